"""A rank's files from a Hub: `pull` against huggingface_hub's own download."""

import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tests.bench.contest import NETWORKS, Contestant, empty, measure, prove
from tests.bench.file_server import file_server

_REPO = "owner/shards"


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


def bench_hub(shards: Path, outputs: Path, names: Sequence[str], num_rounds: int) -> None:
    """`pull` against `snapshot_download` of the same files, with and without the proof."""
    from lorashard import pull_shards

    contestants = [
        Contestant("`pull`", lambda: pull_shards(f"hf://{_REPO}", outputs / "pulled", [0])),
        Contestant("`snapshot_download`", partial(_download, outputs, names)),
        Contestant(
            "`snapshot_download`, BLAKE3 and fsync",
            lambda: prove(_download(outputs, names), names),
        ),
    ]
    contestants = [Contestant(c.name, c.run, partial(empty, outputs)) for c in contestants]
    with _hub(shards) as pipe:
        for network, limits in NETWORKS.items():
            with file_server(shards, **limits) as cdn:
                pipe.send(cdn)
                pipe.recv()
                measure(f"Hub, {network}", contestants, num_rounds)
