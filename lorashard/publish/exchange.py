"""What ranks tell each other: small JSON files in the directory that they write together.

In: a directory that all ranks see, and a barrier of the trainer's. Out: what every rank has said in
a round, or the error of the rank that could not. A rank that fails keeps coming to the barriers that
are left, so that no other waits for it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorashard.errors import LorashardError, ShardError

OWN_PREFIX = ".rank-"  # of what ranks tell each other
_SEEN_WITHIN_S = 20.0  # network file systems show a new file late


@dataclass(frozen=True, slots=True)
class Round:
    """One step of the work: its name, and what a rank does in it; the result is told to the others."""

    name: str
    work: Callable[[Sequence[Any]], Any]


class Exchange:
    """The talk of `world_size` ranks about one directory, from rank `rank`'s side."""

    def __init__(
        self, directory: Path, rank: int, world_size: int, barrier: Callable[[], object]
    ) -> None:
        self._directory = directory
        self._rank, self._world_size = rank, world_size
        self._barrier = barrier
        self.seconds: dict[str, float] = {}  # of this rank's work in each round that it has done

    def run(self, rounds: Sequence[Round], failed: Exception | None = None) -> None:
        """Do the rounds one after the other.

        Each round's work gets what all ranks have said in the one before. The barrier is passed after
        each round, whatever happens. After the last one nobody reads what was said any more.
        failed: what has gone wrong on this rank before.
        Raises this rank's error, or ShardError for another rank's.
        """
        said: Sequence[Any] = ()
        error = failed
        for step in rounds:
            if error is None:
                error = self._say(step, said)
            self._barrier()
            if error is None and step is not rounds[-1]:
                try:
                    said = [self._read(step.name, rank) for rank in range(self._world_size)]
                except Exception as err:  # noqa: BLE001 - raised once the others have passed
                    error = err
        if error is not None:
            raise error

    def clear(self) -> None:
        """Remove what was said."""
        for path in self._directory.glob(f"{OWN_PREFIX}*"):
            path.unlink(missing_ok=True)

    def _say(self, step: Round, said: Sequence[Any]) -> Exception | None:
        began = time.perf_counter()
        try:
            self._write(step.name, {"said": step.work(said)})
            self.seconds[step.name] = time.perf_counter() - began
        except Exception as err:  # noqa: BLE001 - raised again at the end
            self.tell_failure(step.name, err)
            return err
        return None

    def tell_failure(self, name: str, err: Exception) -> None:
        """Say in a round why this rank cannot do its work."""
        message = str(err) if isinstance(err, LorashardError) else f"{type(err).__name__}: {err}"
        with suppress(OSError):  # the others find nothing then, and say so
            self._write(name, {"error": message})

    def _write(self, name: str, document: dict[str, Any]) -> None:
        path = self._path(name, self._rank)
        new = path.with_name(f"{path.name}.new")
        new.write_text(json.dumps(document), encoding="utf-8")
        new.replace(path)

    def _read(self, name: str, rank: int) -> Any:
        path, ends = self._path(name, rank), time.monotonic() + _SEEN_WITHIN_S
        while True:
            try:
                document = json.loads(path.read_text(encoding="utf-8"))
                break
            except FileNotFoundError:
                if time.monotonic() > ends:
                    raise ShardError(
                        f"{self._directory}: nothing of rank {rank} is there.",
                        hint="Do all ranks see this directory, and do they all write to it?",
                    ) from None
                time.sleep(0.02)
        if "error" in document:
            raise ShardError(
                f"Rank {rank} could not write its part: {document['error']}",
                hint="Nothing was published. See that rank's own error.",
            )
        return document["said"]

    def _path(self, name: str, rank: int) -> Path:
        return self._directory / f"{OWN_PREFIX}{rank}-{name}.json"
