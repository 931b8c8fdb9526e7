"""What a target of the fuzzer is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random

# data, largest size, source of chance -> a variant, or None to leave it to the fuzzer's own mutator
Mutate = Callable[[bytes, int, Random], bytes | None]


class WrongAnswer(AssertionError):
    """Something was accepted that must not be, or was read in two ways."""


@dataclass(frozen=True, slots=True)
class Target:
    """One kind of file or text from a stranger, and the code that reads it.

    run: reads an input; raises a LorashardError where it refuses it, WrongAnswer where it takes it
    wrongly, and returns whether it was accepted. seeds: valid inputs to begin with.
    max_bytes: of an input. what: for the record.
    """

    name: str
    what: str
    run: Callable[[bytes], bool]
    seeds: Callable[[], Iterable[bytes]]
    mutate: Mutate
    max_bytes: int = 16_384


def check(holds: object, says: str) -> None:
    """Raise WrongAnswer unless it holds."""
    if not holds:
        raise WrongAnswer(says)
