"""How far a command is, on stderr: a bar on a terminal, and a line now and then in a log.

In: bytes, as they are done. rich is imported where a bar is shown.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from lorashard.cli import render

SHOW_PROGRESS_AFTER_S = 1.0
SAY_PROGRESS_EVERY_S = 10.0  # where there is no terminal, as in the log of a job


class ByteBar:
    """Counts the bytes done; this one does not show them."""

    def advance(self, size_bytes: int) -> None:
        """Count some more bytes."""

    def restart(self, total_bytes: int, label: str | None = None) -> None:
        """Begin to count from zero, up to `total_bytes`. label: a new one, for other work."""

    def hide(self) -> None:
        """Show no more: what follows shows itself."""


class _Clock:
    """Says when it is time for another line."""

    def __init__(self) -> None:
        self._started = self._last = time.monotonic()

    def seconds(self) -> float:
        return time.monotonic() - self._started

    def is_due(self) -> bool:
        now = time.monotonic()
        if now - self._last < SAY_PROGRESS_EVERY_S:
            return False
        self._last = now
        return True


class _ByteLines(ByteBar):
    """Says from time to time how far the work is."""

    def __init__(self, label: str, total_bytes: int) -> None:
        self._label, self._clock, self._lock = label, _Clock(), threading.Lock()
        self.restart(total_bytes)

    def restart(self, total_bytes: int, label: str | None = None) -> None:
        self._total, self._done, self._since = total_bytes, 0, self._clock.seconds()
        self._label = label or self._label

    def advance(self, size_bytes: int) -> None:
        with self._lock:  # threads report
            self._done += size_bytes
            if not self._clock.is_due():
                return
            speed = self._done / max(self._clock.seconds() - self._since, 1e-9)
            of = f" of {render.size(self._total)}" if self._total else ""
            render.say(f"{self._label}: {render.size(self._done)}{of}, {render.size(int(speed))}/s")


@contextmanager
def progress_bar(label: str, total_bytes: int = 0, *, quiet: bool) -> Iterator[ByteBar]:
    """Yield a bar to report bytes to; it appears on stderr once the work has taken a second.

    Without a terminal, a line every ten seconds.
    """
    if quiet:
        yield ByteBar()
        return
    if not sys.stderr.isatty():
        yield _ByteLines(label, total_bytes)
        return
    shown = _bytes_shown()
    task = shown.add_task(label, total=total_bytes)
    started = time.monotonic()
    hidden = False

    class ShownBar(ByteBar):
        def advance(self, size_bytes: int) -> None:
            late = time.monotonic() - started > SHOW_PROGRESS_AFTER_S
            if late and not shown.live.is_started and not hidden:
                shown.start()
            shown.advance(task, size_bytes)

        def restart(self, total_bytes: int, label: str | None = None) -> None:
            shown.reset(task, total=total_bytes, description=label)

        def hide(self) -> None:
            nonlocal hidden
            hidden = True
            shown.stop()

    try:
        yield ShownBar()
    finally:
        shown.stop()


class BatchCount:
    """How far several adapters are.

    Their sizes are known as each begins; until then one is taken for as large as the average.
    """

    def __init__(self, num_adapters: int) -> None:
        self.num_adapters = num_adapters
        self.num_finished = 0
        self._sizes: dict[str, int] = {}
        self._done: dict[str, int] = {}

    def start(self, adapter: str, size_bytes: int, done_bytes: int = 0) -> None:
        """Count the adapter's bytes, `size_bytes` in all, from `done_bytes` on."""
        self._sizes[adapter], self._done[adapter] = size_bytes, done_bytes

    def advance(self, adapter: str, size_bytes: int) -> None:
        """Count some more bytes of it."""
        self._done[adapter] += size_bytes

    def finish(self, adapter: str) -> None:
        """Nothing more comes of this adapter, whether it is split or not."""
        self.num_finished += 1
        self._done[adapter] = self._sizes.setdefault(adapter, 0)

    @property
    def done_bytes(self) -> int:
        """Of all adapters together."""
        return sum(self._done.values())

    @property
    def total_bytes(self) -> int:
        """The same, once all are done; 0 = nothing is known yet."""
        known = [size for size in self._sizes.values() if size]
        if not known:
            return 0
        return sum(known) + (self.num_adapters - len(self._sizes)) * sum(known) // len(known)

    @property
    def is_estimate(self) -> bool:
        """Whether an adapter's size is not known yet."""
        return len(self._sizes) < self.num_adapters


class BatchBar:
    """Counts what several adapters report, from any thread; this one does not show it."""

    def __init__(self, num_adapters: int) -> None:
        self.count = BatchCount(num_adapters)
        self._lock = threading.Lock()

    def start(self, adapter: str, size_bytes: int, done_bytes: int = 0) -> None:
        """An adapter begins, or begins another pass, with a size in bytes of which some are done."""
        with self._lock:
            self.count.start(adapter, size_bytes, done_bytes)
            self.show()

    def advance(self, adapter: str, size_bytes: int) -> None:
        """Some more bytes of an adapter are done."""
        with self._lock:
            self.count.advance(adapter, size_bytes)
            self.show()

    def finish(self, adapter: str) -> None:
        """An adapter is done, or has failed."""
        with self._lock:
            self.count.finish(adapter)
            self.show()

    def show(self) -> None:
        """Show how far it is."""


class _BatchLines(BatchBar):
    """Says from time to time how far the work is."""

    def __init__(self, label: str, num_adapters: int) -> None:
        super().__init__(num_adapters)
        self._label, self._clock = label, _Clock()

    def show(self) -> None:
        if not self._clock.is_due():
            return
        count = self.count
        done, total = count.done_bytes, count.total_bytes
        speed = done / max(self._clock.seconds(), 1e-9)
        text = f"{self._label}: {count.num_finished} of {count.num_adapters}, {render.size(done)}"
        if total:
            about = "about " if count.is_estimate else ""
            text += f" of {about}{render.size(total)}"
        text += f", {render.size(int(speed))}/s"
        if done and total:
            text += f", {timedelta(seconds=round((total - done) / speed))} left"
        render.say(text)


@contextmanager
def batch_bar(label: str, num_adapters: int, *, quiet: bool) -> Iterator[BatchBar]:
    """Yield a bar to which adapters report; shows one on stderr from the start.

    Without a terminal, a line every ten seconds.
    """
    if quiet:
        yield BatchBar(num_adapters)
        return
    if not sys.stderr.isatty():
        yield _BatchLines(label, num_adapters)
        return
    shown = _bytes_shown()
    task = shown.add_task(f"{label} 0/{num_adapters}", total=None)

    class ShownBar(BatchBar):
        def show(self) -> None:
            count = self.count
            shown.update(
                task,
                description=f"{label} {count.num_finished}/{count.num_adapters}",
                completed=count.done_bytes,
                total=count.total_bytes or None,
            )

    with shown:
        yield ShownBar(num_adapters)


def _bytes_shown() -> Any:
    """Rich's bar, with bytes, speed and the time that is left."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    return Progress(
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(),
        TransferSpeedColumn(), TimeRemainingColumn(),
        console=Console(stderr=True), transient=True,
    )  # fmt: skip
