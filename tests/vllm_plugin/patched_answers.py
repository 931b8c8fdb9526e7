"""The answers of patched.py in a vLLM release, asked for once by all the tests that read them."""

from __future__ import annotations

from functools import cache
from typing import Any

from tests.tiny import REPO
from tests.vllm_release import run_in_release

SCRIPT = f"""
import sys; sys.path.insert(0, {str(REPO)!r})
from tests.vllm_plugin import patched
answer(patched.run_all())
"""


@cache
def answers(release: str) -> dict[str, Any]:
    """What each check of patched.py answers. One process, because importing vLLM takes seconds."""
    found: dict[str, Any] = run_in_release(release, SCRIPT, timeout_s=600)
    return found


def number(release: str) -> tuple[int, ...]:
    """A release as numbers that can be compared."""
    return tuple(map(int, release.split(".")))
