"""The place that a user named for output."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from lorashard.errors import ShardError
from lorashard.storage.targets import (
    explained_write_errors,
    made_parents,
    resolve_target,
    work_path,
)
from tests.tiny import mounted_tmpfs


def test_a_relative_target_becomes_absolute_without_following_links_above_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    assert resolve_target(Path("link/out/../new")) == tmp_path / "link" / "new"


def test_a_link_stands_for_what_it_points_to_even_if_that_does_not_exist(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("elsewhere/out")
    assert resolve_target(tmp_path / "link") == tmp_path / "elsewhere" / "out"


def test_a_link_to_itself_is_no_reason_to_fail(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert resolve_target(tmp_path / "loop") == tmp_path / "loop"


def test_work_is_done_beside_a_target_and_inside_a_mount_point(tmp_path: Path) -> None:
    assert work_path(tmp_path / "out", ".work") == tmp_path / ".out.work"
    with mounted_tmpfs(tmp_path / "mount", "size=64k") as mounted:
        if not mounted:
            pytest.skip("mounting needs root")
        assert work_path(tmp_path / "mount", ".work") == tmp_path / "mount" / ".work"


def test_parents_that_were_made_go_away_if_the_block_fails(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(KeyError), made_parents(tmp_path / "there" / "a" / "b" / "out"):  # noqa: PT012
        assert (tmp_path / "there" / "a" / "b").is_dir()
        raise KeyError
    assert os.listdir(tmp_path) == ["there"]
    assert os.listdir(tmp_path / "there") == []


def test_a_parent_that_something_was_put_into_stays(tmp_path: Path) -> None:
    with pytest.raises(KeyError), made_parents(tmp_path / "a" / "b" / "out"):  # noqa: PT012
        (tmp_path / "a" / "mine").write_bytes(b"x")
        raise KeyError
    assert os.listdir(tmp_path / "a") == ["mine"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_called_that_with_what_to_do(code: int) -> None:
    with (
        pytest.raises(ShardError) as raised,
        explained_write_errors(Path("/data/out"), full_disk="Free some."),
    ):
        raise OSError(code, os.strerror(code))
    assert raised.value.message == "/data: no space left while writing out."
    assert raised.value.hint == "Free some."


def test_another_error_is_named_and_kept_as_the_cause() -> None:
    with (
        pytest.raises(ShardError) as raised,
        explained_write_errors(Path("/data/out"), full_disk=""),
    ):
        raise PermissionError(errno.EACCES, "whatever")
    assert raised.value.message == "/data/out: cannot be written (Permission denied)."
    assert isinstance(raised.value.__cause__, PermissionError)


@pytest.mark.parametrize("url", ["s3://bucket/x", "hf://owner/name", "file:///tmp/x", "gs://b/x"])
def test_a_url_is_no_target(url: str) -> None:
    with pytest.raises(ShardError, match="this is a URL") as raised:
        resolve_target(Path(url))
    assert "lorashard push" in str(raised.value)


@pytest.mark.parametrize("name", ["run:3", "a/s3:/b", "./s3:/b/x/../y", "x:"])
def test_a_colon_alone_makes_no_url(name: str, tmp_path: Path) -> None:
    assert resolve_target(tmp_path / name).is_relative_to(tmp_path)
    assert resolve_target(Path("run:3")) == Path.cwd() / "run:3"


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError(errno.ECONNRESET, "reset"),
        TimeoutError(errno.ETIMEDOUT, "timed out"),
        FileNotFoundError(errno.ENOENT, "gone", "/source/adapter_model.safetensors"),
        OSError(errno.EIO, "broken", "/source/adapter_model.safetensors"),
    ],
)
def test_an_error_of_the_source_is_not_one_of_the_target(error: OSError) -> None:
    with (
        pytest.raises(OSError, match=str(error.strerror)) as raised,
        explained_write_errors(Path("/data/out"), full_disk=""),
    ):
        raise error
    assert raised.value is error


@pytest.mark.parametrize(
    "name", ["/data/.out.lorashard-partial/x", "/data/out", "/data", "/", None]
)
def test_an_error_of_the_target_is_explained(name: str | None) -> None:
    with (
        pytest.raises(ShardError, match="/data/out: cannot be written"),
        explained_write_errors(Path("/data/out"), full_disk=""),
    ):
        raise OSError(errno.EIO, "broken", name)
