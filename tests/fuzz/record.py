"""The figures of all runs so far, target by target: docs/fuzzing.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

RECORD = Path(__file__).resolve().parents[2] / "docs" / "fuzzing.json"


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one target. accepted: executions that were no refusal. seconds: of fuzzing, one process.

    corpus: inputs that each reach something that no other does. findings: of the last run.
    """

    executions: int = 0
    accepted: int = 0
    seconds: int = 0
    corpus: int = 0
    findings: int = 0


def read_record(path: Path = RECORD) -> dict[str, Figures]:
    """What was recorded; nothing if there is no file."""
    if not path.exists():
        return {}
    return {name: Figures(**fields) for name, fields in json.loads(path.read_text()).items()}


def add_run(record: Mapping[str, Figures], target: str, run: Figures) -> dict[str, Figures]:
    """The record with one more run in it: executions add up, the corpus is the last one."""
    before = record.get(target, Figures())
    total = replace(
        run,
        executions=before.executions + run.executions,
        accepted=before.accepted + run.accepted,
        seconds=before.seconds + run.seconds,
    )
    return dict(record) | {target: total}


def write_record(record: Mapping[str, Figures], path: Path = RECORD) -> None:
    """Write the record."""
    lines = (f" {json.dumps(name)}: {json.dumps(asdict(f))}" for name, f in record.items())
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
