"""The answers of patched.py in a vLLM release, asked for once by all the tests that read them."""

from __future__ import annotations

from typing import Any

from tests.vllm_release import answers_of


def answers(release: str) -> dict[str, Any]:
    """What each check of patched.py answers."""
    found: dict[str, Any] = answers_of(release, "tests.vllm_plugin.patched", timeout_s=600)
    return found


def number(release: str) -> tuple[int, ...]:
    """A release as numbers that can be compared."""
    return tuple(map(int, release.split(".")))
