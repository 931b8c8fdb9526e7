"""Small files are read whole, wherever they are, and nothing large is."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorashard.errors import AdapterError
from lorashard.storage.remote import Location, over_local_files
from lorashard.storage.small_files import (
    load_writable_json,
    parse_json,
    read_json,
    read_small_file,
    read_small_path,
)

LIMIT = 16 * 2**20


@pytest.fixture(params=["here", "elsewhere"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    return tmp_path if request.param == "here" else over_local_files(tmp_path)


def sparse(path: Path, size_bytes: int) -> Path:
    with path.open("wb") as file:
        file.truncate(size_bytes)
    return path


@pytest.mark.parametrize("content", [b"", b'{"r": 8}'])
def test_a_file_is_read_whole(folder: Location, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    assert read_small_file(folder, "config.json") == content


def test_a_missing_file_is_named(folder: Location, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"config\.json") as raised:
        read_small_file(folder, "config.json")
    assert str(tmp_path) in raised.value.message


def test_a_file_over_the_limit_is_refused_before_it_is_read(
    folder: Location, tmp_path: Path
) -> None:
    sparse(tmp_path / "config.json", LIMIT + 1)
    with pytest.raises(AdapterError, match=f"larger than {LIMIT} bytes"):
        read_small_file(folder, "config.json")


def test_a_file_of_exactly_the_limit_is_read(tmp_path: Path) -> None:
    assert len(read_small_path(sparse(tmp_path / "large", LIMIT))) == LIMIT


def test_a_directory_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="Is a directory"):
        read_small_path(tmp_path)


@pytest.mark.parametrize("raw", [b"{", b"\xff", b"[" * 100_000, b""])
def test_what_is_not_json_is_refused_with_its_place(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "map.json").write_bytes(raw)
    with pytest.raises(AdapterError, match=r"map\.json: not JSON"):
        read_json(tmp_path / "map.json")


def test_json_is_parsed() -> None:
    assert parse_json(b'{"ranks": [[0], [1]]}', Path("map.json")) == {"ranks": [[0], [1]]}


@pytest.mark.parametrize("pair", [("[", "]"), ('{"text_config":', "}")])
def test_what_is_nested_deeply_is_refused_at_every_depth(tmp_path: Path, pair: tuple[str, str]):
    opening, closing = pair
    for depth in (102, 500, 900, *range(950, 1010), 1_500, 9_000, 100_000):
        raw = (opening * depth + "0" + closing * depth).encode()
        with pytest.raises(AdapterError, match="not JSON"):
            parse_json(raw, tmp_path / "config.json")
        with pytest.raises((ValueError, RecursionError)):
            load_writable_json(raw)
    usual = (opening * 50 + "0" + closing * 50).encode()
    assert parse_json(usual, tmp_path) == load_writable_json(usual)
