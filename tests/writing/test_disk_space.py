"""Room on a disk, looked at before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorashard.errors import ShardError
from lorashard.writing.disk_space import check_disk_space


def test_what_fits_passes_though_its_folders_do_not_exist(tmp_path: Path) -> None:
    check_disk_space(tmp_path / "a" / "b", 1, hint="")


def test_what_does_not_fit_is_refused_with_both_figures(tmp_path: Path) -> None:
    with pytest.raises(
        ShardError, match=r"1000000000\.00 GB are to be written, and .* GB free"
    ) as raised:
        check_disk_space(tmp_path / "a" / "b", 10**18, hint="Free some.")
    assert raised.value.hint == "Free some."


def test_a_file_system_without_a_size_is_believed() -> None:
    check_disk_space(Path("/proc/nowhere"), 10**18, hint="")
