"""Names of versions, and which of them are kept."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorashard.publish.versions import is_adapter_name, outdated, version_name, version_of


@given(st.integers(0, 10**7))
def test_a_name_says_its_version(version: int) -> None:
    assert version_of("a.b-v00001", version_name("a.b-v00001", version)) == version


@pytest.mark.parametrize(
    "found",
    ["policy-v1", "policy-v000001", "policy-v0000१", "policy-v-0001", "policy-v", "policy", "v00001",
     "policy-v00001-v00001", "olicy-v00001", "policy-v00001 ", "00001"],
)  # fmt: skip
def test_another_name_has_no_version(found: str) -> None:
    assert version_of("policy", found) is None


@pytest.mark.parametrize("name", ["", ".", "..", ".a", "a/b", "a b", "a\n", "-a", "ä"])
def test_a_name_is_one_part_of_a_path(name: str) -> None:
    assert not is_adapter_name(name)


@pytest.mark.parametrize(
    ("newest", "served", "present", "keep", "expected"),
    [
        (5, [3, 4, 5], [3, 4, 5], 2, (3,)),
        (5, [3, 4, 5], [3, 4, 5], 9, ()),
        (5, [5], [1, 2, 4, 5], 2, (1, 2)),  # the servers have started again
        (5, [2, 5], [1, 2, 4, 5], 2, (1,)),  # 4 was never served
        (5, [2, 3, 5], [1, 2, 3, 4, 5], 1, (1, 2, 3, 4)),
        (5, [1, 7, 8], [7, 9], 1, (1,)),  # back to an earlier one
        (0, [], [], 1, ()),
    ],
)
def test_what_is_older_than_the_last_k_is_outdated(
    newest: int, served: list[int], present: list[int], keep: int, expected: tuple[int, ...]
) -> None:
    assert outdated(newest, served, present, keep) == expected
