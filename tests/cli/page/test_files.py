"""A page replaces an older page, and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lorashard.cli.page.document import BEGINNING
from lorashard.cli.page.files import check_page_target, write_page
from lorashard.errors import OutputExistsError, ShardError


def test_a_page_is_written_and_replaced(tmp_path: Path) -> None:
    for text in (f"{BEGINNING}one", f"{BEGINNING}two"):
        check_page_target(tmp_path / "page.html")
        write_page(tmp_path / "page.html", text)
        assert (tmp_path / "page.html").read_text() == text
    assert os.listdir(tmp_path) == ["page.html"]


@pytest.mark.parametrize("content", ["{}", "<!doctype html>\n<p>mine"])
def test_another_file_is_left_alone(tmp_path: Path, content: str) -> None:
    (tmp_path / "mine").write_text(content)
    with pytest.raises(OutputExistsError, match="not a page that lorashard wrote"):
        check_page_target(tmp_path / "mine")


@pytest.mark.parametrize("url", ["s3://bucket/page.html", "hf://owner/name", "file:///tmp/page"])
def test_a_url_is_refused_before_it_becomes_a_folder(url: str) -> None:
    with pytest.raises(ShardError, match="this is a URL") as caught:
        check_page_target(Path(url))
    assert "--html" in str(caught.value.hint)


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ShardError, match="cannot be written"):
            check_page_target(path)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="No such file or directory"):
        write_page(tmp_path / "nowhere" / "page.html", BEGINNING)
