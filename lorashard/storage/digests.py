"""Reading front to back in steps, and the BLAKE3 digest of what is read.

In: a `ByteSource` and a range of its bytes. Out: pieces that fit the processor's cache, or a digest
in hex. Memory is one step for each thread, whatever the range.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import cycle
from pathlib import Path
from typing import TypeVar

from blake3 import blake3

from lorashard.progress import Progress
from lorashard.storage.buffers import Buffer
from lorashard.storage.local import ByteSource, LocalFile
from lorashard.storage.parallel import in_order
from lorashard.storage.syscalls import is_in_memory

STEP_BYTES = 2**20  # read, then digested, while it is still in the processor's cache
LARGE_STEP_BYTES = 16 * 2**20  # for several threads, each of which digests some of it

J = TypeVar("J")


def read_in_steps(
    source: ByteSource, begin: int, end: int, buffer: memoryview
) -> Iterator[memoryview]:
    """The bytes [begin, end) in order, in pieces no longer than `buffer`.

    Each piece is a view into `buffer`, valid until the next one is asked for.
    """
    for start in range(begin, end, len(buffer)):
        piece = buffer[: end - start]
        source.read_into(piece, start)
        yield piece


def read_in_threads(
    items: Iterable[J],
    size_of: Callable[[J], int],
    read: Callable[[J, memoryview], object],
    threads: int,
) -> Generator[memoryview, None, None]:
    """What `read` fills a buffer of `size_of(item)` bytes with, in the order of the items.

    Each buffer is valid until the next one is asked for; `threads` of them are being filled by then.
    """
    buffers = cycle([Buffer() for _ in range(threads + 1)])

    def filled(job: tuple[J, Buffer]) -> memoryview:
        item, buffer = job
        data = buffer.get(size_of(item))
        read(item, data)
        return data

    with ThreadPoolExecutor(threads, thread_name_prefix="lorashard-read") as pool:
        yield from in_order(pool, filled, zip(items, buffers), ahead=threads)


def digest_of(
    source: ByteSource,
    begin: int,
    end: int,
    progress: Progress,
    *,
    prefix: bytes = b"",
    threads: int = 1,
) -> str:
    """BLAKE3 in hex of `prefix` and the bytes [begin, end).

    progress: called with the length of each piece that is done. threads: that read and digest; with
    several the source must bear that.
    """
    hasher = blake3(prefix, max_threads=threads)
    if threads == 1:
        for piece in read_in_steps(source, begin, end, memoryview(bytearray(STEP_BYTES))):
            hasher.update(piece)
            progress(len(piece))
        return hasher.hexdigest()
    pieces = read_in_threads(
        range(begin, end, LARGE_STEP_BYTES),
        lambda start: min(LARGE_STEP_BYTES, end - start),
        lambda start, buffer: source.read_into(buffer, start),
        reading_threads(threads),
    )
    with closing(pieces):
        for piece in pieces:
            hasher.update(piece)
            progress(len(piece))
    return hasher.hexdigest()


def digest_file(path: Path, threads: int) -> str:
    """BLAKE3 in hex of a local file. Several threads digest one in memory where it is.

    A disk that fails while a mapping is read ends the process, so other files are read. So they are
    by one thread, which is faster in steps that fit the processor's cache.
    """
    if threads > 1 and is_in_memory(path):
        return blake3(max_threads=threads).update_mmap(path).hexdigest()
    with closing(LocalFile(path)) as file:
        return digest_of(file, 0, file.size_bytes, lambda _: None, threads=threads)


def reading_threads(threads: int) -> int:
    """How many of the threads read while the others digest. Both take about as long."""
    return max(1, threads // 2)
