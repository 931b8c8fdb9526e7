"""File and directory names."""

from __future__ import annotations

from fnmatch import fnmatch

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


@pytest.mark.parametrize("adapter", ["checkpoint-130", "checkpoint-130-merged"])
def test_shards_of_a_checkpoint_do_not_match_the_rotation_of_checkpoints(adapter: str) -> None:
    name = directory_name(adapter, 8)
    assert name == f"ep8-of-{adapter}"
    assert not fnmatch(name, "checkpoint-*"), "what transformers' sorted_checkpoints looks for"
    assert adapter_name(name) == adapter


@pytest.mark.parametrize("old", ["checkpoint-130-ep8", "ep8-of-checkpoint-130"])
def test_both_forms_are_resharded_to_the_new_one(old: str) -> None:
    assert directory_name(adapter_name(old), 16) == "ep16-of-checkpoint-130"


@pytest.mark.parametrize("name", ["checkpoint-last", "my-checkpoint-3", "ep8-of-mine"])
def test_other_names_keep_their_form(name: str) -> None:
    assert directory_name(name, 8) == f"{name}-ep8"
    assert adapter_name(name) == name
