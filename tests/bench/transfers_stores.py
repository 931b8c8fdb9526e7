"""A rank's files from S3 and HTTP: our reading against fsspec's and obstore's."""

import asyncio
import importlib.util
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from tests.bench.contest import NETWORKS, Contestant, empty, measure, prove
from tests.bench.file_server import file_server

_WINDOW_BYTES = 8 * 2**20


def bench_stores(shards: Path, outputs: Path, names: Sequence[str], num_rounds: int) -> None:
    """What reads remote files for us against fsspec's and obstore's concurrent reads."""
    for network, limits in NETWORKS.items():
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
        Contestant("`fs.get` of all, BLAKE3 and fsync", lambda: (get_all(), prove(outputs, sizes))),
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
    emptied = [Contestant(c.name, c.run, partial(empty, outputs)) for c in to_files]
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
