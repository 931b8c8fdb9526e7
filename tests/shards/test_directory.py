"""What belongs in a shard directory, here and behind a URL, and how its files are opened."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lorashard import SplitRequest, split_adapter
from lorashard.errors import LorashardError, ManifestError, ShardError
from lorashard.shards.directory import (
    LocatedShards,
    check_file,
    claims_to_be_shards,
    find_files,
    holds_only_shards,
    is_repository_file,
    local_shards,
    locate_shards,
    needed_files,
    opened_files,
    shard_directory_names,
    write_manifest,
)
from lorashard.shards.replan import check_shards
from lorashard.storage.remote import RemoteFolder, locate, over_local_files
from tests.tiny import RANK_FILES, contents, save_adapter

FILES = ("replicated.safetensors", *RANK_FILES)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    split_adapter(save_adapter(tmp_path / "adapter"), tmp_path / "out", SplitRequest(ep_size=2))
    return tmp_path / "out"


def test_the_manifest_is_read_once(shards: Path) -> None:
    located = locate_shards(shards)
    (shards / "lorashard.json").unlink()
    assert locate_shards(located) is located


def test_a_directory_claims_to_be_shards_by_its_manifest_alone(
    shards: Path, tmp_path: Path
) -> None:
    assert claims_to_be_shards(shards)
    assert claims_to_be_shards(locate(shards.as_uri()))
    assert not claims_to_be_shards(tmp_path / "adapter")
    (shards / "lorashard.json").write_text("{")
    assert claims_to_be_shards(shards), "it is damaged, and still no adapter"


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo], ids=["directory", "pipe"])
def test_what_is_called_like_a_manifest_and_is_no_file_claims_nothing(
    tmp_path: Path, make: object
) -> None:
    make(tmp_path / "lorashard.json")  # type: ignore[operator]
    assert not claims_to_be_shards(tmp_path)


def test_only_the_files_of_a_split_belong_in_a_directory(shards: Path) -> None:
    names = frozenset(os.listdir(shards))
    assert names == shard_directory_names(locate_shards(shards).manifest)
    assert holds_only_shards(shards, names)
    assert holds_only_shards(shards, names - {RANK_FILES[1]}), "as `pull` of some ranks leaves it"


@pytest.mark.parametrize("name", ["README.md", ".gitattributes", "notes.txt"])
def test_a_directory_with_anything_else_in_it_is_not_replaced(shards: Path, name: str) -> None:
    assert not holds_only_shards(shards, frozenset(os.listdir(shards)) | {name})


def test_shards_may_lack_the_notice_and_anothers_weights_are_not_replaced(shards: Path) -> None:
    weights = shards / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    assert holds_only_shards(shards, frozenset(os.listdir(shards)))
    weights.write_bytes(content + b"\0")
    assert not holds_only_shards(shards, frozenset(os.listdir(shards)))


def test_a_directory_with_a_damaged_manifest_is_not_replaced(shards: Path) -> None:
    (shards / "lorashard.json").write_text("{}")
    assert not holds_only_shards(shards, frozenset(os.listdir(shards)))


def test_what_repositories_add_is_told_from_what_people_add() -> None:
    assert all(map(is_repository_file, ("README.md", ".gitattributes", ".cache")))
    assert not any(map(is_repository_file, ("readme.txt", "ep-00000-of-00004.safetensors")))


def test_some_ranks_need_the_config_the_replicated_file_and_their_own(shards: Path) -> None:
    manifest = locate_shards(shards).manifest
    needed = needed_files(manifest, [1, 1], shards)
    assert list(needed) == ["adapter_config.json", "replicated.safetensors", RANK_FILES[1]]
    for name, digest in needed.items():
        assert digest.size_bytes == (shards / name).stat().st_size


@pytest.mark.parametrize("ep_rank", [-1, 2])
def test_a_rank_that_a_directory_does_not_have_is_refused(shards: Path, ep_rank: int) -> None:
    with pytest.raises(ShardError, match=rf"no ep rank {ep_rank}; it is split for 2 ranks, 0 to 1"):
        needed_files(locate_shards(shards).manifest, [0, ep_rank], shards)


@pytest.mark.parametrize("remote", [False, True])
def test_all_files_are_opened_in_the_order_of_the_manifest(shards: Path, remote: bool) -> None:
    files = find_files(locate_shards(shards.as_uri() if remote else shards))
    with opened_files(files) as sources:
        assert len(sources) == len(FILES)
        for source, name in zip(sources, FILES, strict=True):
            expected = (shards / name).read_bytes()
            buffer = bytearray(len(expected))
            source.read_into(memoryview(buffer), 0)
            assert bytes(buffer) == expected


@pytest.mark.parametrize("remote", [False, True])
def test_a_file_that_is_missing_or_cut_short_is_found_before_any_is_read(
    shards: Path, remote: bool
) -> None:
    located = locate_shards(shards.as_uri() if remote else shards)
    path = shards / RANK_FILES[1]
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(ShardError, match=RANK_FILES[1]):
        find_files(located)
    path.unlink()
    with pytest.raises(ShardError, match=RANK_FILES[1]):
        find_files(located)


def test_a_file_that_ends_while_it_is_read_is_a_fault_of_the_shards(shards: Path) -> None:
    files = find_files(locate_shards(shards))
    os.truncate(shards / RANK_FILES[0], 100)
    with pytest.raises(ShardError, match="it ended at byte 100"), opened_files(files) as sources:
        sources[1].read_into(memoryview(bytearray(200)), 0)


def test_a_local_directory_is_used_in_place_and_a_remote_one_is_copied_for_a_while(
    shards: Path,
) -> None:
    with local_shards(locate_shards(shards)) as directory:
        assert directory == shards
    located = locate_shards(shards.as_uri())
    assert isinstance(located.place, RemoteFolder)
    with local_shards(located) as directory:
        assert directory != shards
        assert contents(directory) == contents(shards)
    assert not directory.exists()


def test_of_some_ranks_no_other_files_are_copied(shards: Path) -> None:
    with local_shards(locate_shards(shards.as_uri()), [0]) as directory:
        assert RANK_FILES[1] not in os.listdir(directory)
        assert {RANK_FILES[0], "lorashard.json"} < set(os.listdir(directory))


def test_swapped_rank_files_are_told_from_damaged_ones(shards: Path) -> None:
    manifest = locate_shards(shards).manifest
    (shards / RANK_FILES[1]).replace(shards / RANK_FILES[0])
    with pytest.raises(ShardError, match=rf"was written as {RANK_FILES[1]}"):
        check_file(shards / RANK_FILES[0], manifest.files[RANK_FILES[0]])


def test_a_manifest_is_written_as_it_is_read_back(shards: Path, tmp_path: Path) -> None:
    manifest = locate_shards(shards).manifest
    (tmp_path / "new").mkdir()
    write_manifest(tmp_path / "new", manifest)
    assert locate_shards(tmp_path / "new") == LocatedShards(tmp_path / "new", manifest)


@pytest.mark.parametrize("remote", [False, True])
def test_a_place_without_a_manifest_is_not_a_finished_directory(
    tmp_path: Path, remote: bool
) -> None:
    adapter = save_adapter(tmp_path / "adapter")
    with pytest.raises(ManifestError, match=r"lorashard\.json"):
        locate_shards(adapter.as_uri() if remote else adapter)


def test_a_shard_file_that_changes_while_it_is_read_is_refused(shards: Path) -> None:
    files = find_files(locate_shards(shards))
    path = shards / RANK_FILES[0]
    os.utime(path, ns=(0, 10**18))
    with pytest.raises(ShardError, match="it changed while being read"), opened_files(files):
        path.write_bytes(path.read_bytes())


@pytest.mark.parametrize(
    "name", ["lorashard.json", "adapter_config.json", "replicated.safetensors"]
)
def test_a_pipe_in_place_of_a_file_is_refused_at_once(tmp_path: Path, name: str) -> None:
    split_adapter(save_adapter(tmp_path / "a"), tmp_path / "piped", SplitRequest(ep_size=2))
    (tmp_path / "piped" / name).unlink()
    os.mkfifo(tmp_path / "piped" / name)
    with pytest.raises(LorashardError, match="a pipe or a device, not a file"):
        check_shards(locate_shards(tmp_path / "piped"))


def test_a_manifest_without_bound_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "lorashard.json").open("wb") as file:
        file.truncate(6 * 2**30)
    for place in (tmp_path, over_local_files(tmp_path)):
        with pytest.raises(ManifestError, match="larger than 134217728 bytes"):
            locate_shards(place)
