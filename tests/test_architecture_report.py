"""`python -m tests.architecture` and the parts of docs/architecture.md, on small packages of known shape."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.architecture import House, mermaid, read_house, report
from tests.architecture_page import architecture_parts, fill_in, first_sentence


def write_package(root: Path, modules: dict[str, str]) -> Path:
    """A package `lorashard` below `root`: dotted name of a module -> its source."""
    package = root / "lorashard"
    for name, source in modules.items():
        path = package.joinpath(*name.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source + "\n")
    for folder in [package, *filter(Path.is_dir, package.rglob("*"))]:
        (folder / "__init__.py").touch()
    return package


HOUSE = {
    "errors": "",
    "storage.local": "from lorashard.errors import LorashardError",
    "storage.remote": "from lorashard.storage.local import LocalFile",
    "adapter.read": "from lorashard.storage import remote",
    "cli": "def run():\n    from lorashard.adapter.read import read; import lorashard.storage.local",
}


@pytest.fixture
def house(tmp_path: Path) -> House:
    return read_house(write_package(tmp_path, HOUSE))


def test_arrows_join_rooms_and_not_the_modules_in_them(house: House) -> None:
    assert dict(house.arrows) == {
        "": frozenset(),
        "adapter": {"storage"},
        "cli": {"adapter", "storage"},
        "errors": frozenset(),
        "storage": {"errors"},
    }


def test_a_room_stands_one_floor_above_the_highest_that_it_imports(house: House) -> None:
    assert dict(house.floors) == {"": 1, "errors": 1, "storage": 2, "adapter": 3, "cli": 4}
    assert house.summary == "5 rooms on 4 floors, 4 arrows, 0 pointing up, 0 circles"


def test_an_import_of_the_package_itself_points_up_and_lifts_nobody(tmp_path: Path) -> None:
    package = write_package(tmp_path, HOUSE | {"merge": "from lorashard import open_shards"})
    house = read_house(package)
    assert (house.upward, house.floors["merge"], house.circles) == (1, 1, ())


def test_rooms_that_import_each_other_by_way_of_a_third_are_a_circle_and_have_no_floors(
    tmp_path: Path,
) -> None:
    around = {"a": "import lorashard.b", "b": "import lorashard.c", "c": "import lorashard.a"}
    house = read_house(write_package(tmp_path, around | {"d": "import lorashard.a"}))
    assert house.circles == (frozenset("abc"),)
    assert dict(house.floors) == {}


def test_within_a_folder_its_modules_are_the_rooms(tmp_path: Path) -> None:
    house = read_house(write_package(tmp_path, HOUSE), "storage")
    assert dict(house.arrows) == {"local": frozenset(), "remote": {"local"}}


def test_the_picture_leaves_out_the_ground_and_arrows_that_repeat_a_longer_way(
    house: House,
) -> None:
    assert mermaid(house).splitlines() == [
        "flowchart LR",
        "    storage([storage])",
        "    adapter([adapter])",
        "    cli([cli])",
        "    storage --> adapter",
        "    adapter --> cli",
    ]


def test_the_report_goes_from_the_top_floor_down(tmp_path: Path) -> None:
    lines = list(report(write_package(tmp_path, HOUSE)))
    assert lines[0] == "lorashard/: 5 rooms on 4 floors, 4 arrows, 0 pointing up, 0 circles"
    assert [line.split() for line in lines[2:]] == [
        ["floor", "room", "imports"],
        ["4", "cli", "adapter,", "storage"],
        ["3", "adapter", "storage"],
        ["2", "storage", "errors"],
        ["1", "__init__", "-"],
        ["1", "errors", "-"],
    ]


def test_only_the_text_between_the_markers_is_replaced() -> None:
    page = "before\n<!-- begin a -->\nold\n<!-- end a -->\nafter <!-- begin b -->\n<!-- end b -->"
    filled = fill_in(page, {"a": "1 \\1\n", "b": "2\n"})
    assert filled == (
        "before\n<!-- begin a -->\n1 \\1\n<!-- end a -->\nafter <!-- begin b -->\n2\n<!-- end b -->"
    )
    assert fill_in(filled, {"a": "1 \\1\n", "b": "2\n"}) == filled


@pytest.mark.parametrize(
    "page", ["", "<!-- begin a -->\n", "<!-- begin a -->\n<!-- end a -->\n" * 2]
)
def test_a_page_without_one_pair_of_markers_is_refused(page: str) -> None:
    with pytest.raises(ValueError, match="begin a"):
        fill_in(page, {"a": ""})


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("One thing.", "One thing."),
        ("lorashard.json: read. Pure.\n\nMore.", "lorashard.json: read."),
        ("It goes\non here. And on.", "It goes on here."),
        ("No stop", "No stop"),
    ],
)
def test_a_module_is_described_by_the_first_sentence_of_its_docstring(
    tmp_path: Path, docstring: str, sentence: str
) -> None:
    module = tmp_path / "module.py"
    module.write_text(f'"""{docstring}"""\n')
    assert first_sentence(module) == sentence


def test_packages_come_in_the_order_of_imports_with_every_module(tmp_path: Path) -> None:
    package = write_package(tmp_path, HOUSE | {"vllm_plugin.load.fill": '"""Fills a | b. Fast."""'})
    text = architecture_parts(package)["packages"]
    titles = [line.split("`")[1] for line in text.splitlines() if line.startswith("**")]
    assert titles == [
        "lorashard/", "vllm_plugin/", "vllm_plugin/load/", "storage/", "adapter/",
    ]  # fmt: skip
    assert "| [`fill`](../lorashard/vllm_plugin/load/fill.py) | Fills a \\| b. |" in text
    assert text.count("[`") == 6
