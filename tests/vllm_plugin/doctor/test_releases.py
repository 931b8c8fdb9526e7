"""Which releases of vLLM count as tested."""

from __future__ import annotations

import pytest

from lorashard.vllm_plugin.doctor.releases import (
    FIRST_KNOWN,
    KNOWN_RANGE,
    LAST_KNOWN,
    is_known,
    release_number,
)
from tests.vllm_release import PLUGIN_RELEASES


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0.33.0", (0, 33, 0)),
        ("0.33.0+cu129", (0, 33, 0)),
        ("0.9", (0, 9, 0)),
        ("0.34.1rc1.dev7+g1234", (0, 34, 1)),
        ("dev", None),
        ("?", None),
        ("", None),
        (None, None),
    ],
)
def test_a_version_is_read_as_far_as_it_is_a_release(text: str | None, number: object) -> None:
    assert release_number(text) == number


def test_the_known_range_includes_its_ends_and_nothing_beyond() -> None:
    assert is_known(FIRST_KNOWN)
    assert is_known((0, 20, 2))
    assert is_known(LAST_KNOWN)
    assert not is_known((0, 15, 9))
    assert not is_known((LAST_KNOWN[0], LAST_KNOWN[1], LAST_KNOWN[2] + 1))
    assert not is_known(None)


def test_the_releases_of_the_tests_are_known() -> None:
    assert all(is_known(release_number(release)) for release in PLUGIN_RELEASES)
    assert KNOWN_RANGE == "0.16.0 to 0.33.0"
