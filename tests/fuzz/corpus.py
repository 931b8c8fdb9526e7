"""Inputs kept as text: one JSON string a line, a character for each byte.

`corpus/TARGET.jsonl` holds the smallest set that reaches all that the fuzzer has reached, and every
input that was once a finding. While it runs, the fuzzer keeps a folder with a file for each input.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

KEPT = Path(__file__).parent / "corpus"


def kept_inputs(target: str, folder: Path = KEPT) -> tuple[bytes, ...]:
    """The inputs of a target; none if there is no file."""
    path = folder / f"{target}.jsonl"
    if not path.exists():
        return ()
    return tuple(json.loads(line).encode("latin-1") for line in path.read_text().splitlines())


def write_inputs(path: Path, inputs: Iterable[bytes]) -> None:
    """Write a file of inputs, each once, the shortest first."""
    distinct = sorted(set(inputs), key=lambda data: (len(data), data))
    path.write_text("".join(json.dumps(data.decode("latin-1")) + "\n" for data in distinct))


def unpack(inputs: Iterable[bytes], folder: Path) -> None:
    """Put inputs into a folder as the fuzzer names them."""
    folder.mkdir(parents=True, exist_ok=True)
    for data in inputs:
        name = hashlib.sha1(data).hexdigest()
        (folder / name).write_bytes(data)
