"""Our own code against libraries that move the same bytes: from the Hub, from S3 and HTTP, from disk.

    python -m tests.bench.transfers --work /data/bench

Each contestant brings the files that one rank needs, in the process of the benchmark, in alternating
rounds; what a line says is the median of its time and of its ratio to ours in the same round. The
server is `file_server`: processes of its own in which the kernel copies (a Hub's small answers come
from the tests' server, in another process). obstore and fastsafetensors are measured if they can be
imported.
"""

import argparse
import asyncio
import gc
import importlib.util
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.bench.file_server import file_server
from tests.bench.generate import write_adapter
from tests.bench.machine import describe_machine
from tests.bench.measure import run_command, warm_page_cache
from tests.bench.models import MODELS, scale_layers
from tests.bench.suite import LORASHARD

_MODEL, _EP_SIZE = "glm-4.5-air", 8
_WINDOW_BYTES = 8 * 2**20
# The second is an object store as a machine in its region sees it.
_NETWORKS: Mapping[str, Mapping[str, float]] = {
    "loopback": {},
    "30 ms, 80 MB/s a connection": {"delay_s": 0.03, "connection_bytes_per_s": 80e6},
}
_REPO = "owner/shards"


@dataclass(frozen=True, slots=True)
class Contestant:
    """run: moves the bytes. prepare: before each round, untimed."""

    name: str
    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None


def measure(title: str, contestants: Sequence[Contestant], num_rounds: int) -> None:
    """Print the medians; the first contestant is ours. A round that nobody counts comes first."""
    times: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    processor: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    for number in range(num_rounds + 1):
        for contestant in contestants if number % 2 else contestants[::-1]:
            contestant.prepare()
            gc.collect()
            started, cpu = time.perf_counter(), time.process_time()
            contestant.run()
            if number:
                times[contestant.name].append(time.perf_counter() - started)
                processor[contestant.name].append(time.process_time() - cpu)
    ours = times[contestants[0].name]
    print(f"\n{title}, {num_rounds} rounds\n\n| | s | of ours | CPU s |\n|---|---|---|---|")
    for name, seconds in times.items():
        ratio = statistics.median(one / other for one, other in zip(seconds, ours, strict=True))
        cpu_s = statistics.median(processor[name])
        print(f"| {name} | {statistics.median(seconds):.3f} | {ratio:.2f} | {cpu_s:.2f} |")
    sys.stdout.flush()


# From the Hub


def _serve_hub(files: Mapping[str, Path], pipe: Any) -> None:
    """A Hub whose large files are elsewhere: where, the pipe says, again and again until None."""
    from tests.hub_server import HubServer

    class Hub(HubServer):
        """Large files are on another server."""

        cdn = ""  # type: ignore[assignment]

    with Hub() as hub:
        hub.add_repo(_REPO, files)
        pipe.send(hub.endpoint)
        while (url := pipe.recv()) is not None:
            Hub.cdn = url  # type: ignore[assignment]
            pipe.send("done")


@contextmanager
def _hub(shards: Path) -> Iterator[Any]:
    """A Hub in another process, which this one uses. huggingface_hub reads its address once."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    files = {path.name: path for path in shards.iterdir()}
    process = spawn.Process(target=_serve_hub, args=(files, theirs))
    process.start()
    os.environ |= {
        "HF_ENDPOINT": ours.recv(),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    try:
        yield ours
    finally:
        ours.send(None)
        process.join()


def _download(outputs: Path, names: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(_REPO, allow_patterns=list(names), cache_dir=outputs / "cache"))


def _prove(directory: Path, names: Iterable[str]) -> None:
    """What `pull` does beside fetching: a digest of each file, which then is on the disk."""
    from blake3 import blake3

    for name in names:
        blake3(max_threads=blake3.AUTO).update_mmap(directory / name).hexdigest()
        fd = os.open(directory / name, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def bench_hub(shards: Path, outputs: Path, names: Sequence[str], num_rounds: int) -> None:
    """`pull` against `snapshot_download` of the same files, with and without the proof."""
    from lorashard import pull_shards

    contestants = [
        Contestant("`pull`", lambda: pull_shards(f"hf://{_REPO}", outputs / "pulled", [0])),
        Contestant("`snapshot_download`", partial(_download, outputs, names)),
        Contestant(
            "`snapshot_download`, BLAKE3 and fsync",
            lambda: _prove(_download(outputs, names), names),
        ),
    ]
    contestants = [Contestant(c.name, c.run, partial(_empty, outputs)) for c in contestants]
    with _hub(shards) as pipe:
        for network, limits in _NETWORKS.items():
            with file_server(shards, **limits) as cdn:
                pipe.send(cdn)
                pipe.recv()
                measure(f"Hub, {network}", contestants, num_rounds)


# From S3 and HTTP


def bench_stores(shards: Path, outputs: Path, names: Sequence[str], num_rounds: int) -> None:
    """What reads remote files for us against fsspec's and obstore's concurrent reads."""
    for network, limits in _NETWORKS.items():
        for protocol in ("s3", "http"):
            with file_server(shards, **limits) as url:
                _bench_store(protocol, url, network, outputs, names, num_rounds)


def _bench_store(
    protocol: str, url: str, network: str, outputs: Path, names: Sequence[str], num_rounds: int
) -> None:
    from lorashard import pull_shards
    from lorashard.storage.remote import RemoteFolder, open_url

    os.environ |= {
        "AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_REGION": "us-east-1",
    }  # fmt: skip
    place = "s3://bucket/shards" if protocol == "s3" else f"{url}/bucket/shards"
    if protocol == "s3":
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()
    folder = open_url(place)
    assert isinstance(folder, RemoteFolder)
    fs = folder.fs
    sizes = {name: file.size_bytes for name in names if (file := folder.file(name)) is not None}
    paths = [f"{folder.path}/{name}" for name in sizes]
    ranges = [
        (f"{folder.path}/{name}", begin, min(begin + _WINDOW_BYTES, size))
        for name, size in sizes.items()
        for begin in range(0, size, _WINDOW_BYTES)
    ]
    contestants = [
        Contestant("`RemoteFile.opened`, as `pull` reads", partial(_read_all, folder, sizes)),
        Contestant(
            "`fs.cat_ranges`, windows of 8 MiB", lambda: fs.cat_ranges(*map(list, zip(*ranges)))
        ),
    ]

    def get_all() -> None:
        fs.get(paths, [str(outputs / name) for name in sizes])

    to_files = [
        Contestant("`pull`", lambda: pull_shards(place, outputs / "pulled", [0])),
        Contestant("`fs.get` of all", get_all),
        Contestant(
            "`fs.get` of all, BLAKE3 and fsync", lambda: (get_all(), _prove(outputs, sizes))
        ),
    ]
    if importlib.util.find_spec("obstore"):
        store = _obstore(protocol, url)
        contestants += [
            Contestant(
                "obstore, ranges of 8 MiB", lambda: asyncio.run(_obstore_ranges(store, sizes))
            ),
            Contestant("obstore, whole files", lambda: asyncio.run(_obstore_streams(store, sizes))),
        ]
        to_files.append(
            Contestant(
                "obstore, whole files", lambda: asyncio.run(_obstore_streams(store, sizes, outputs))
            )
        )
    measure(f"{protocol}, {network}, to memory", contestants, num_rounds)
    emptied = [Contestant(c.name, c.run, partial(_empty, outputs)) for c in to_files]
    measure(f"{protocol}, {network}, to files", emptied, num_rounds)


def _read_all(folder: Any, sizes: Mapping[str, int]) -> None:
    """As `pull` reads: each file front to back, three at once."""

    def read(name: str) -> None:
        file, buffer = folder.file(name), memoryview(bytearray(1 << 20))
        with file.opened() as source:
            for begin in range(0, file.size_bytes, len(buffer)):
                source.read_into(buffer[: file.size_bytes - begin], begin)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(read, sizes))


def _obstore(protocol: str, url: str) -> Any:
    from obstore.store import HTTPStore, S3Store

    options: dict[str, Any] = {"client_options": {"allow_http": True}}
    if protocol == "http":
        return HTTPStore.from_url(f"{url}/bucket/shards", **options)
    return S3Store("bucket", prefix="shards", endpoint=url, region="us-east-1", **options)


async def _obstore_ranges(store: Any, sizes: Mapping[str, int]) -> None:
    import obstore

    async def fetch(name: str, begin: int, end: int) -> None:
        async with limit:
            await obstore.get_range_async(store, name, start=begin, end=end)

    limit = asyncio.Semaphore(9)
    await asyncio.gather(
        *(
            fetch(name, begin, min(begin + _WINDOW_BYTES, size))
            for name, size in sizes.items()
            for begin in range(0, size, _WINDOW_BYTES)
        )
    )


async def _obstore_streams(
    store: Any, sizes: Mapping[str, int], outputs: Path | None = None
) -> None:
    import obstore

    async def fetch(name: str) -> None:
        answer = await obstore.get_async(store, name)
        target = outputs / name if outputs else Path(os.devnull)
        with target.open("wb", buffering=0) as out:
            async for piece in answer.stream(min_chunk_size=1 << 20):
                if outputs:
                    out.write(piece)

    await asyncio.gather(*map(fetch, sizes))


# From the page cache


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


def _empty(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=float, default=0.3, help="fraction of the model's layers")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--work", type=Path, help="the adapter is kept there for the next run")
    parser.add_argument("--only", choices=("hub", "stores", "memory"))
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp(prefix="lorashard-bench-"))
    try:
        model = scale_layers(MODELS[_MODEL], args.scale)
        adapter = work / f"{_MODEL}-{model.num_layers}-layers-per_expert"
        write_adapter(adapter, model, "per_expert")
        shards, outputs = work / "transfer-shards", work / "outputs"
        split = (*LORASHARD, "split", str(adapter), "--ep-size", str(_EP_SIZE), "--force", "-q")
        run_command((*split, "-o", str(shards)))
        names = (
            "adapter_config.json", "lorashard.json", "replicated.safetensors",
            f"ep-00000-of-{_EP_SIZE:05d}.safetensors",
        )  # fmt: skip
        size_bytes = sum((shards / name).stat().st_size for name in names)
        print(f"{size_bytes / 1e6:.0f} MB of one rank of {_EP_SIZE}")
        print(", ".join(f"{key} {value}" for key, value in describe_machine().items()))
        warm_page_cache(shards.iterdir())
        if args.only in (None, "memory"):
            bench_memory(shards, names, args.rounds)
        if args.only in (None, "hub"):
            bench_hub(shards, outputs, names, args.rounds)
        if args.only in (None, "stores"):
            bench_stores(shards, outputs, names, args.rounds)
        shutil.rmtree(outputs, ignore_errors=True)
    finally:
        if args.work is None:
            shutil.rmtree(work)


if __name__ == "__main__":
    main()
