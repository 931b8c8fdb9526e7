"""What one input led to: success, one of our errors, or a finding.

Bounded means: at most two seconds of processor time, in code that atheris has instrumented and that
takes three times as long by that, and at most 200 MB more than at any time before.
"""

from __future__ import annotations

import resource
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from lorashard.errors import LorashardError
from tests.fuzz.target import Target

MAX_SECONDS = 2.0
MAX_BYTES = 200 * 2**20
_REPO = str(Path(__file__).resolve().parents[2])


@dataclass(frozen=True, slots=True)
class Finding:
    """key: the same for inputs that fail in the same place. text: what to read."""

    key: str
    text: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """accepted: False for a refusal with one of our errors."""

    accepted: bool
    finding: Finding | None = None


def outcome_of(target: Target, data: bytes) -> Outcome:
    """Run one input."""
    most_memory = _peak_bytes()
    began = time.process_time()
    accepted, finding = False, None
    try:
        accepted = target.run(data)
    except LorashardError:
        pass
    except Exception as err:  # noqa: BLE001 - that is what is looked for
        finding = Finding(f"{type(err).__name__} {_place(err)}", "".join(_lines(err)))
    seconds = time.process_time() - began
    taken = _peak_bytes() - most_memory
    if finding is None and seconds > MAX_SECONDS:
        finding = Finding("too slow", f"{seconds:.1f} s of processor time")
    if finding is None and taken > MAX_BYTES:
        finding = Finding("too much memory", f"{taken / 2**20:.0f} MB")
    return Outcome(accepted, finding)


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _place(err: BaseException) -> str:
    """The innermost line of ours."""
    frames = traceback.extract_tb(err.__traceback__)
    own = [f for f in frames if f.filename.startswith(_REPO) and "/.venv/" not in f.filename]
    last = own[-1] if own else frames[-1]
    return f"{last.filename.removeprefix(_REPO + '/')}:{last.lineno}"


def _lines(err: BaseException) -> list[str]:
    return traceback.format_exception(type(err), err, err.__traceback__)
