"""Names, patterns and lists -> adapters, and a target for each."""

from __future__ import annotations

import os
from io import StringIO
from pathlib import Path

import pytest

from lorashard import SplitRequest, split_adapter
from lorashard.errors import AdapterError, ShardError
from lorashard.split.selection import SplitJob, find_adapters, is_batch, plan_jobs, read_list
from tests.tiny import save_adapter


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two adapters, the shards of one of them, an adapter in a sub-folder, and a folder without."""
    for name in ("b", "a", "named/policy"):
        save_adapter(tmp_path / name)
    split_adapter(tmp_path / "a", tmp_path / "a-ep2", SplitRequest(ep_size=2))
    (tmp_path / "logs").mkdir()
    return tmp_path


def test_a_pattern_means_adapters_and_not_their_shards(runs: Path) -> None:
    expected = tuple(f"{runs}/{name}" for name in ("a", "b", "named"))
    assert find_adapters([f"{runs}/*"]) == expected


def test_a_url_pattern_means_folders_whatever_they_hold(runs: Path) -> None:
    found = find_adapters([f"file://{runs}/a*", f"file://{runs}/logs"])
    assert found == (f"file://{runs}/a", f"file://{runs}/a-ep2", f"file://{runs}/logs")


def test_an_adapter_that_is_named_twice_is_found_once_in_its_first_place(runs: Path) -> None:
    assert find_adapters([f"{runs}/b", f"{runs}/[ab]", f"{runs}/b"]) == (f"{runs}/b", f"{runs}/a")


def test_a_pattern_without_any_adapter_is_refused(runs: Path) -> None:
    with pytest.raises(AdapterError, match="no adapter matches"):
        find_adapters([f"{runs}/x*"])


def test_a_pattern_too_long_for_a_name_is_refused_like_any_without_an_adapter() -> None:
    with pytest.raises(AdapterError, match="no adapter matches"):
        find_adapters(["[a]" + "x" * 300])


def test_a_directory_whose_name_looks_like_a_pattern_is_taken_by_name(tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "run[1]")
    assert find_adapters([str(adapter)]) == (str(adapter),)
    assert not is_batch([str(adapter)])


def test_a_pattern_a_collection_and_two_names_are_batches(runs: Path) -> None:
    assert is_batch([f"{runs}/a*"])
    assert is_batch(["hf://collections/owner/some-0123"])
    assert is_batch(["a", "b"])
    assert not is_batch(["hf://owner/name"])


def test_empty_lines_and_comments_of_a_list_are_skipped() -> None:
    assert read_list(StringIO("# two\n\n  a \nb#c")) == ("a", "b#c")


def test_a_list_without_an_end_is_refused_and_not_read_for_ever() -> None:
    with Path("/dev/zero").open() as endless, pytest.raises(AdapterError, match="are no list"):
        read_list(endless)


def test_a_config_that_is_a_pipe_is_told_when_a_pattern_matches_its_folder(runs: Path) -> None:
    (runs / "b" / "adapter_config.json").unlink()
    os.mkfifo(runs / "b" / "adapter_config.json")
    assert f"{runs}/b" in find_adapters([f"{runs}/*"])


def test_one_adapter_goes_to_the_target_itself_and_a_batch_into_it() -> None:
    assert plan_jobs(["x/a"], Path("o"), 4, batch=False) == (SplitJob("x/a", Path("o")),)
    assert [job.target for job in plan_jobs(["x/a", "y/b"], Path("o"), 4, batch=True)] == [
        Path("o/a-ep4"),
        Path("o/b-ep4"),
    ]


def test_without_a_target_shards_go_beside_a_local_adapter_and_here_for_a_remote_one(
    tmp_path: Path,
) -> None:
    adapters = [str(tmp_path / "a"), "hf://owner/name@v1", "s3://bucket/x/y"]
    targets = [job.target for job in plan_jobs(adapters, None, 2, batch=True)]
    assert targets == [tmp_path / "a-ep2", Path("name-ep2"), Path("y-ep2")]


def test_two_adapters_with_one_target_are_refused() -> None:
    with pytest.raises(ShardError, match=r"1/same and 2/same would both be written to o/same-ep2"):
        plan_jobs(["1/same", "2/same"], Path("o"), 2, batch=True)
