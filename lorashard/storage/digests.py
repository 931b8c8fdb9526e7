"""Reading front to back in steps, and the BLAKE3 digest of what is read.

In: a `ByteSource` and a range of its bytes. Out: pieces that fit the processor's cache, or a digest
in hex. Memory is one step, whatever the range.
"""

from __future__ import annotations

from collections.abc import Iterator

from blake3 import blake3

from lorashard.progress import Progress
from lorashard.storage.local import ByteSource

STEP_BYTES = 2**20  # read, then digested, while it is still in the processor's cache


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


def digest_of(
    source: ByteSource, begin: int, end: int, progress: Progress, *, prefix: bytes = b""
) -> str:
    """BLAKE3 in hex of `prefix` and the bytes [begin, end).

    progress: called with the length of each piece that is done.
    """
    hasher = blake3(prefix)
    for piece in read_in_steps(source, begin, end, memoryview(bytearray(STEP_BYTES))):
        hasher.update(piece)
        progress(len(piece))
    return hasher.hexdigest()
