"""File and directory names."""

from __future__ import annotations

import pytest

from lorashard.shards.names import adapter_name, directory_name, rank_file_name, shard_file_names


def test_rank_files_sort_by_rank_up_to_five_digits() -> None:
    assert rank_file_name(3, 8) == "ep-00003-of-00008.safetensors"
    names = [rank_file_name(rank, 300) for rank in range(300)]
    assert names == sorted(names)


def test_the_replicated_file_comes_first() -> None:
    assert shard_file_names(2) == (
        "replicated.safetensors",
        "ep-00000-of-00002.safetensors",
        "ep-00001-of-00002.safetensors",
    )


@pytest.mark.parametrize(
    ("directory", "adapter"),
    [("mine-ep8", "mine"), ("mine-ep8-ep16", "mine-ep8"), ("-ep8", "-ep8"), ("step-8", "step-8")],
)
def test_the_suffix_is_taken_off_once_and_only_if_a_name_is_left(
    directory: str, adapter: str
) -> None:
    assert adapter_name(directory) == adapter


def test_a_directory_of_another_size_has_the_same_adapter_name() -> None:
    assert directory_name(adapter_name(directory_name("mine", 8)), 16) == "mine-ep16"
