"""A ByteSource over something slow: bytes that will be needed next are fetched while others work."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

WINDOW_BYTES = 8 * 2**20
# Windows under way at once; one more is being read. A window of the Hub takes two requests, one for
# the link: with 0.1 s for each, 8 of them are 1.3 times as fast as 4, and 12 no faster.
_AHEAD = 8


class FetchAhead:
    """Windows of bytes [begin, end), fetched in order by a few threads; ahead + 2 in memory."""

    def __init__(
        self,
        fetch: Callable[[int, int], bytes],
        begin: int,
        end: int,
        window_bytes: int = WINDOW_BYTES,
        ahead: int = _AHEAD,
    ) -> None:
        """fetch(begin, end): those bytes, called by `ahead` threads."""
        self._fetch = fetch
        self._begin = begin
        self._end = end
        self._window_bytes = window_bytes
        self._ahead = ahead
        self._windows: dict[int, Future[bytes]] = {}
        self._pool = ThreadPoolExecutor(ahead, thread_name_prefix="lorashard-fetch")

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` from byte `offset`, within [begin, end). Raises what `fetch` raises."""
        done = 0
        while done < len(buffer):
            number, skip = divmod(offset + done - self._begin, self._window_bytes)
            self._want(number)
            window = self._windows[number].result()
            piece = memoryview(window)[skip : skip + len(buffer) - done]
            buffer[done : done + len(piece)] = piece
            done += len(piece)

    def _want(self, number: int) -> None:
        for old in [n for n in self._windows if n < number]:
            self._windows.pop(old).cancel()
        last = min(number + self._ahead, (self._end - self._begin - 1) // self._window_bytes)
        for wanted in range(number, last + 1):
            if wanted not in self._windows:
                begin = self._begin + wanted * self._window_bytes
                end = min(begin + self._window_bytes, self._end)
                self._windows[wanted] = self._pool.submit(self._fetch, begin, end)

    def close(self) -> None:
        """End what is under way."""
        self._pool.shutdown(wait=True, cancel_futures=True)
