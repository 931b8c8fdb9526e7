"""What the processes of `make test` share out among themselves."""

from __future__ import annotations

import pytest

from tests.conftest import group_of
from tests.vllm_release import PLUGIN_RELEASES

ANY, OTHER = PLUGIN_RELEASES[0], PLUGIN_RELEASES[-1]
PATCHES = "tests/vllm_plugin/patches"


@pytest.mark.parametrize(
    ("nodeid", "group"),
    [
        ("tests/test_header.py::test_a", "tests/test_header.py"),
        ("tests/test_header.py::test_a[x-1]", "tests/test_header.py"),
        (f"{PATCHES}/test_unloading.py::test_a[{ANY}]", f"{ANY} {PATCHES}/test_unloading.py"),
        (f"{PATCHES}/test_unloading.py::test_a[{OTHER}]", f"{OTHER} {PATCHES}/test_unloading.py"),
        (f"{PATCHES}/test_punica.py::test_a[{ANY}-2d]", f"{ANY} patched.py"),
        (f"{PATCHES}/test_warm_up.py::test_a[2d-{ANY}]", f"{ANY} patched.py"),
        (f"{PATCHES}/test_punica.py::test_a", f"{PATCHES}/test_punica.py"),
    ],
    ids=lambda text: text.replace(ANY, "first").replace(OTHER, "last"),
)
def test_a_file_is_one_group_and_each_release_that_it_runs_another(nodeid: str, group: str) -> None:
    assert group_of(nodeid) == group
