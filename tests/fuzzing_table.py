"""docs/fuzzing.json -> the table of docs/security.md."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.fuzz.corpus import kept_inputs
from tests.fuzz.record import read_record
from tests.fuzz.targets import MODULES
from tests.tiny import REPO

_FUZZ = REPO / "tests" / "fuzz"


def fuzzing_table(record: Path | None = None) -> str:
    """A row for each target that was run."""
    figures = read_record(record) if record else read_record()
    rows = [
        f"| `{name}` | {_what(name)} | {run.executions:,} | {run.accepted:,} | {run.corpus:,} | {len(kept_inputs(name))} |\n"
        for name, run in figures.items()
    ]
    executions = sum(run.executions for run in figures.values())
    hours = sum(run.seconds for run in figures.values()) / 3600
    return (
        "| target | what is read | executions | accepted | corpus | kept |\n|---|---|--:|--:|--:|--:|\n"
        + "".join(rows)
        + f"\n{executions:,} executions in all, in {hours:.1f} hours of one process.\n"
    )


def _what(name: str) -> str:
    """A target's own words, from its source: importing `load` takes vLLM."""
    for call in ast.walk(ast.parse((_FUZZ / f"{MODULES[name]}.py").read_text())):
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "Target":
            texts = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
            if texts[0] == name:
                return str(texts[1])
    raise ValueError(f"{name} is no target")
