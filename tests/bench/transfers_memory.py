"""A rank's files from the page cache to host memory: `fill` against loaders of whole files."""

import importlib.util
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from tests.bench.contest import Contestant, measure
from tests.bench.measure import warm_page_cache


def bench_memory(shards: Path, names: Sequence[str], num_rounds: int) -> None:
    """`fill` of a rank's tensors into memory that is there, against loaders of whole files."""
    paths = [shards / name for name in names if name.endswith(".safetensors")]
    sizes = [path.stat().st_size for path in paths]
    warm_page_cache(paths)
    contestants = [
        Contestant(
            f"`fill`, {threads} threads", partial(_fill, _region(sum(sizes)), paths, threads)
        )
        for threads in (2, 16)
    ]
    contestants.append(Contestant("`fill`, 2 threads, new memory", lambda: _fill(None, paths, 2)))
    contestants.append(Contestant("`safetensors.torch.load_file`", partial(_load_files, paths)))
    if importlib.util.find_spec("fastsafetensors"):
        contestants += [
            Contestant(f"fastsafetensors, {threads} threads", partial(_fast_load, paths, threads))
            for threads in (2, 16)
        ]
    measure("Page cache to host memory", contestants, num_rounds)


class _Files:
    """RankSources of whole files."""

    def __init__(self, paths: Sequence[Path]) -> None:
        from lorashard.storage.local import LocalFile

        self._files = [LocalFile(path) for path in paths]

    def source_of(self, number: int) -> Any:
        """The file of this number."""
        return self._files[number]

    def close(self) -> None:
        """Close all of them."""
        for file in self._files:
            file.close()


def _region(size_bytes: int) -> Any:
    import numpy as np

    return np.full(size_bytes, 1, np.uint8)  # every page is there


def _fill(region: Any, paths: Sequence[Path], num_threads: int) -> None:
    from lorashard.vllm_plugin.load.fill import Filler
    from lorashard.vllm_plugin.load.reads import VERBATIM_BYTES, CopyJob

    jobs, at = [], 0
    for number, path in enumerate(paths):
        size = path.stat().st_size
        for begin in range(0, size, VERBATIM_BYTES):
            length = min(VERBATIM_BYTES, size - begin)
            jobs.append(CopyJob(number, begin, at + begin, length))
        at += size
    if region is None:
        region = _region(at)
    with closing(_Files(paths)) as files, ThreadPoolExecutor(num_threads) as threads:
        assert Filler(region, files, "BF16", threads).run((), jobs) == at


def _load_files(paths: Sequence[Path]) -> None:
    from safetensors.torch import load_file

    for path in paths:
        for tensor in load_file(path).values():
            tensor.clone()  # until then the bytes are where the file is


def _fast_load(paths: Sequence[Path], num_threads: int) -> None:
    from fastsafetensors import SafeTensorsFileLoader

    loader = SafeTensorsFileLoader(None, "cpu", nogds=True, max_threads=num_threads)
    loader.add_filenames({0: [str(path) for path in paths]})
    buffers = loader.copy_files_to_device()
    for name in loader.get_keys():
        buffers.get_tensor(name)
    buffers.close()
    loader.close()
