"""Fetching ahead: the right bytes, each once, and never much more than is needed soon."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from lorashard.errors import AdapterError
from lorashard.storage.ahead import FetchAhead

CONTENT = random.Random(0).randbytes(1000)


class Server:
    """Serves CONTENT and remembers what was asked for."""

    def __init__(self) -> None:
        self.ranges: list[tuple[int, int]] = []
        self.fails_from = len(CONTENT)
        self._lock = threading.Lock()

    def fetch(self, begin: int, end: int) -> bytes:
        with self._lock:
            self.ranges.append((begin, end))
        if begin >= self.fails_from:
            raise AdapterError(f"nothing from byte {begin} on.")
        return CONTENT[begin:end]


@contextmanager
def fetching(server: Server, begin: int = 0, ahead: int = 3) -> Iterator[FetchAhead]:
    with closing(FetchAhead(server.fetch, begin, len(CONTENT), 64, ahead)) as source:
        yield source


def read(source: FetchAhead, begin: int, end: int) -> bytes:
    buffer = bytearray(end - begin)
    source.read_into(memoryview(buffer), begin)
    return bytes(buffer)


@pytest.mark.parametrize("step", [1, 63, 64, 65, 300, 1000])
@pytest.mark.parametrize("begin", [0, 10])
def test_reads_of_any_length_give_the_bytes_in_order(begin: int, step: int) -> None:
    with fetching(Server(), begin) as source:
        for at in range(begin, 1000, step):
            end = min(at + step, 1000)
            assert read(source, at, end) == CONTENT[at:end]


def test_each_byte_is_fetched_once_and_none_outside_of_the_range() -> None:
    server = Server()
    with fetching(server, begin=100) as source:
        for at in range(100, 1000, 50):
            read(source, at, at + 50)
    ranges = sorted(server.ranges)
    assert [begin for begin, _ in ranges] == [100, *(end for _, end in ranges[:-1])]
    assert ranges[-1][1] == 1000


def test_what_will_be_read_next_is_fetched_meanwhile_and_no_more() -> None:
    server = Server()
    with fetching(server, ahead=3) as source:
        read(source, 0, 1)
        deadline = time.monotonic() + 5
        while len(server.ranges) < 4 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)
        assert sorted(server.ranges) == [(0, 64), (64, 128), (128, 192), (192, 256)]


def test_an_error_is_raised_where_the_reader_gets_there_and_not_before() -> None:
    server = Server()
    server.fails_from = 128
    with fetching(server) as source:
        assert read(source, 0, 128) == CONTENT[:128]
        with pytest.raises(AdapterError, match="nothing from byte 128 on"):
            read(source, 100, 200)


def test_after_close_nothing_is_fetched_and_no_thread_is_left() -> None:
    server = Server()
    with fetching(server, ahead=2) as source:
        read(source, 0, 1)
    asked = len(server.ranges)
    time.sleep(0.02)
    assert len(server.ranges) == asked <= 3
    assert not [t for t in threading.enumerate() if t.name.startswith("lorashard-fetch")]
