"""Commands, ranks that commit and publishers, run while one of their calls on files fails.

`Runner` is the way to tests/fault_runner.py, which runs them; `Course` follows what a recorded run made
durable, and in which order.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.file_calls import WRITING
from tests.tiny import REPO


class Runner:
    """Runs jobs one after the other, each in a process of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def __call__(self, *argv: object, folder: Path = Path("/"), **how: Any) -> dict[str, Any]:
        """Run a command. folder: the current one; only calls below it count."""
        return self.run({"argv": list(map(str, argv))}, folder, **how)

    def run(
        self,
        work: dict[str, Any],
        folder: Path,
        *,
        action: str = "",
        at: int = 0,
        calls: Sequence[str] = WRITING,
        **more: Any,
    ) -> dict[str, Any]:
        """The answer to a job; work: its "argv", "commit" or "publish"."""
        assert self._process.stdin
        assert self._process.stdout
        job = work | {"folder": str(folder), "action": action, "at": at, "calls": [*calls]} | more
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer


@contextmanager
def runner(*, with_torch: bool = False) -> Iterator[Runner]:
    """with_torch: for jobs that need it, as those of ranks that commit do."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.fault_runner", *["torch"] * with_torch],
        cwd=REPO,
        env={**os.environ, "PYTHONPATH": str(REPO)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        yield Runner(process)
        assert process.stdin
        process.stdin.close()


class Course:
    """What a run has made so far, and what of it a power failure would take away."""

    def __init__(self) -> None:
        self.tree: dict[str, int] = {}  # the inodes of what it made, by path
        self.nameless: set[str] = (
            set()
        )  # paths whose folder has not been synced since they appeared
        self.unsynced: set[int] = set()  # inodes of files whose bytes have not been

    def follow(  # noqa: C901 - one branch for each call
        self, recorded: Iterable[Sequence[Any]], finished: Sequence[str]
    ) -> Iterator[str]:
        """What was wrong with the order of the calls of a run.

        finished: the paths at which something whole appears; each, and what is below it, must be
        durable before it is renamed to that, and its name afterwards, with those of new folders above.
        """
        for call, inode, path, *source in recorded:
            if call in ("create", "mkdir"):
                self.tree[path] = inode
                self.nameless.add(path)
            if call in ("create", "write", "truncate"):
                self.unsynced.add(inode)
            elif call == "fsync":
                self.unsynced.discard(inode)
                self.nameless -= {p for p in self.nameless if str(Path(p).parent) == path}
            elif call in ("unlink", "rmdir"):
                self.tree.pop(path, None)
                self.nameless.discard(path)
            elif call == "rename":
                if _is_within(path, finished):
                    yield from self._not_durable(source[0], path)
                self._move(source[0], path, inode)
        for path in sorted(self.nameless):
            if _is_within(path, finished) or any(one.startswith(path + "/") for one in finished):
                yield f"{path}: its folder is not synced in the end"
        for path, inode in self.tree.items():
            if _is_within(path, finished) and inode in self.unsynced:
                yield f"{path}: its bytes are not synced in the end"

    def _not_durable(self, source: str, target: str) -> Iterator[str]:
        for path, inode in self.tree.items():
            if _is_within(path, [source]) and inode in self.unsynced:
                yield f"{path}: its bytes are not synced before it is renamed to {target}"
            if path.startswith(source + "/") and path in self.nameless:
                yield f"{path}: its folder is not synced before it is renamed to {target}"

    def _move(self, source: str, target: str, inode: int) -> None:
        moved = {path: number for path, number in self.tree.items() if _is_within(path, [source])}
        for path in [*moved, *(path for path in self.tree if _is_within(path, [target]))]:
            self.tree.pop(path, None)
        nameless = {path for path in self.nameless if path.startswith(source + "/")}
        self.nameless = {path for path in self.nameless if not _is_within(path, [source, target])}
        self.tree |= {target + path.removeprefix(source): number for path, number in moved.items()}
        self.tree[target] = inode
        self.nameless |= {target + path.removeprefix(source) for path in nameless} | {target}


def _is_within(path: str, places: Iterable[str]) -> bool:
    return any(path == place or path.startswith(place + "/") for place in places)
