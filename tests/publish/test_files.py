"""Versions that are written to the files of outdated ones: what `split` writes, whatever was there."""

from __future__ import annotations

import os
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from lorashard import LayoutOptions, SplitRequest, split_adapter
from lorashard.errors import LayoutError
from lorashard.publish import rounds
from lorashard.publish.removal import remove_shards
from lorashard.publish.rounds import OwnShare
from lorashard.storage.spares import SPARE_NAME
from tests.adapters import ONE_TENSOR_PER_EXPERT
from tests.publish.test_writer import (
    commit_all,
    dealt,
    files_of,
    gathered,
    leftovers,
    writers_of,
)

RANKS = ([0, 1], [2, 3], [4, 5])
RANK_FILES = [f"ep-{rank:05}-of-00002.safetensors" for rank in range(2)]


@pytest.fixture(params=[2, 32], autouse=True)
def cpus(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """With many processors, the ranks map spare files, and more threads read, write and digest."""
    monkeypatch.setattr(rounds, "available_cpus", lambda: request.param)
    return int(request.param)


def inodes(path: Path) -> dict[str, int]:
    return {child.name: child.stat().st_ino for child in path.glob("*.safetensors")}


def written(path: Path, out: Path) -> Path:
    """A version of three ranks."""
    for made in commit_all(dealt(path, out, *RANKS)):
        assert not isinstance(made, Exception), made
    return out


def scribble(path: Path, draw: random.Random) -> None:
    """Fill the shard files with something else, and make some of them longer or shorter."""
    for child in path.glob("*.safetensors"):
        if child.name != "adapter_model.safetensors":
            size = round(child.stat().st_size * draw.choice([0, 0.5, 1, 1, 2]))
            child.write_bytes(b"\xff" * size)


@pytest.fixture
def outdated(memory_path: Path, tmp_path: Path) -> tuple[Path, Path]:
    """An adapter, and a folder in memory with a version of it that nobody needs any more."""
    path = gathered(tmp_path)
    old = written(path, memory_path / "v1")
    scribble(old, random.Random(1))
    return path, old


def expected(path: Path, ep_size: int = 2) -> dict[str, bytes]:
    split_adapter(path, path.parent / "split", SplitRequest(ep_size))
    return files_of(path.parent / "split")


def test_the_files_of_a_version_that_is_removed_are_those_of_the_next(
    outdated: tuple[Path, Path],
) -> None:
    path, old = outdated
    before = inodes(old)
    assert remove_shards(old, as_spare=True) is None
    assert leftovers(old.parent) == {SPARE_NAME}
    new = written(path, old.parent / "v2")
    assert files_of(new) == expected(path)
    assert leftovers(old.parent) == {"v2"}
    kept = ("replicated.safetensors", *RANK_FILES)
    assert {name: inodes(new)[name] for name in kept} == {name: before[name] for name in kept}


def test_without_wanting_it_a_removed_version_is_gone(outdated: tuple[Path, Path]) -> None:
    _, old = outdated
    assert remove_shards(old, as_spare=False) is None
    assert leftovers(old.parent) == set()


def test_spare_files_are_no_shards(outdated: tuple[Path, Path]) -> None:
    _, old = outdated
    remove_shards(old, as_spare=True)
    assert leftovers(old.parent / SPARE_NAME) == {"replicated.safetensors", *RANK_FILES}


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_whatever_was_in_the_files_they_are_what_split_writes(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    if not Path("/dev/shm").is_dir():
        pytest.skip("no /dev/shm")
    draw = random.Random(data.draw(st.integers()))
    num_experts = data.draw(st.integers(1, 6))
    options = LayoutOptions(num_experts=num_experts, hidden_size=6, intermediate_size=5)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        for version in range(3):
            place = tmp_path_factory.mktemp("version")
            changes: dict[str, Any] = {
                "layout": data.draw(st.sampled_from([*ONE_TENSOR_PER_EXPERT, "L2", "L3", "L8"])),
                "dtype": data.draw(st.sampled_from([torch.bfloat16, torch.float32])),
                "seed": version,
            }
            if changes["layout"] == "L1":  # some slots are filled in part, or not at all
                smaller = st.dictionaries(st.integers(1, num_experts), st.integers(0, 1))
                changes["lora_ranks"] = data.draw(smaller)  # expert 0 is trained
            path = gathered(place, num_experts=num_experts, **changes)
            request = SplitRequest(data.draw(st.integers(1, 3)), options=options)
            out = Path(folder, f"v{version}")
            world = data.draw(st.integers(1, 4))
            writers = writers_of(path, out, world, ep_size=request.ep_size, options=options)
            for name, tensor in load_file(path / "adapter_model.safetensors").items():
                writers[data.draw(st.integers(0, world - 1))].tensor(name, tensor)
            for made in commit_all(writers):
                assert not isinstance(made, Exception), made
            split_adapter(path, place / "split", request)
            assert files_of(out) == files_of(place / "split")
            scribble(out, draw)
            assert remove_shards(out, as_spare=True) is None
            assert os.listdir(folder) == [SPARE_NAME]


def test_who_reads_or_keeps_an_outdated_file_has_what_was_in_it(
    outdated: tuple[Path, Path], tmp_path: Path
) -> None:
    path, old = outdated
    os.link(old / RANK_FILES[0], old.parent / "kept")
    before = inodes(old)
    with (old / RANK_FILES[1]).open("rb") as reader:
        remove_shards(old, as_spare=True)
        new = written(path, old.parent / "v2")
        assert set(reader.read()) <= {0xFF}
    assert set((old.parent / "kept").read_bytes()) <= {0xFF}
    assert files_of(new) == expected(path)
    assert not {inodes(new)[name] for name in RANK_FILES} & set(before.values())
    assert inodes(new)["replicated.safetensors"] == before["replicated.safetensors"]


@pytest.mark.parametrize("where", ["describe", "write", "digest", "describe_all", "finish"])
def test_a_commit_that_fails_leaves_neither_the_version_nor_spare_files(
    outdated: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    path, old = outdated
    remove_shards(old, as_spare=True)

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(OwnShare, where, fail)
        assert all(
            isinstance(error, Exception)
            for error in commit_all(dealt(path, old.parent / "v2", *RANKS))
        )
    assert leftovers(old.parent) == set()
    assert files_of(written(path, old.parent / "v3")) == expected(path)


def test_a_version_that_is_refused_may_be_written_after_all(outdated: tuple[Path, Path]) -> None:
    path, old = outdated
    remove_shards(old, as_spare=True)
    for error in commit_all(dealt(path, old.parent / "v2", [0, 1, 2], [2, 3, 4, 5])):
        assert isinstance(error, LayoutError)
    assert files_of(written(path, old.parent / "v2")) == expected(path)
