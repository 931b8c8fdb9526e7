"""A plan carried out on a real disk: every file, its digest, and every error."""

from __future__ import annotations

import os
import resource
import threading
from contextlib import closing
from pathlib import Path

import pytest
import torch
from blake3 import blake3

from lorashard.errors import HeaderError, LayoutError
from lorashard.shards.placement import linear_placement
from lorashard.shards.plan import CopyRange, ShardPlan, build_plan
from lorashard.storage.local import LocalFile
from lorashard.writing.execute import _ProcessedPrefix, execute_plan, write_files
from tests.adapters import Spec, build
from tests.strategies import layout_of

WEIGHTS = "adapter_model.safetensors"


class Split:
    """A small adapter on disk, and the plan of its two shards."""

    def __init__(self, folder: Path, layout: str = "L1", dtype: str | None = None) -> None:
        adapter = build(Spec(layout, num_experts=4, hidden=64, extras=True))
        self.weights = adapter.write(folder / "adapter") / WEIGHTS
        self.out = folder / "out"
        self.out.mkdir()
        read = layout_of(adapter)
        self.plan: ShardPlan = build_plan(read, linear_placement(4, 2), dtype)
        self.data_begin = self.plan.reads[0].begin

    def execute(self, progress=lambda _: None):
        raw = self.weights.read_bytes()[: self.data_begin]
        with closing(LocalFile(self.weights)) as source:
            return execute_plan(self.plan, source, raw, self.out, progress)


@pytest.mark.parametrize("layout", ["L1", "L2", "L3"])
def test_the_digests_are_those_of_the_source_and_of_each_file(tmp_path: Path, layout: str) -> None:
    split = Split(tmp_path, layout)
    digests = split.execute()
    assert digests.source == blake3(split.weights.read_bytes()).hexdigest()
    written = [(split.out / file.name).read_bytes() for file in split.plan.files]
    assert digests.files == tuple(blake3(content).hexdigest() for content in written)
    assert [len(content) for content in written] == [file.size_bytes for file in split.plan.files]


def test_each_source_byte_is_where_the_plan_says(tmp_path: Path) -> None:
    split = Split(tmp_path)
    split.execute()
    source = split.weights.read_bytes()
    written = [(split.out / file.name).read_bytes() for file in split.plan.files]
    for file, content in zip(split.plan.files, written, strict=True):
        assert content.startswith(file.header)
    for op in split.plan.reads:
        assert isinstance(op, CopyRange)
        for target in op.targets:
            end = target.offset + op.end - op.begin
            assert written[target.file][target.offset : end] == source[op.begin : op.end]


def test_progress_adds_up_to_the_data(tmp_path: Path) -> None:
    split, done = Split(tmp_path), []
    split.execute(done.append)
    assert sum(done) == split.weights.stat().st_size - split.data_begin


def test_the_source_is_seen_once_and_in_order(tmp_path: Path) -> None:
    split, seen = Split(tmp_path), bytearray()
    with closing(LocalFile(split.weights)) as source:
        write_files(split.plan, source, split.out, lambda _: None, seen.extend)
    assert seen == split.weights.read_bytes()[split.data_begin :]


def test_a_source_that_ends_early_is_an_error_and_ends_the_threads(tmp_path: Path) -> None:
    split, before = Split(tmp_path), threading.active_count()
    os.truncate(split.weights, split.weights.stat().st_size - 1)
    with pytest.raises(HeaderError, match="while being read"):
        split.execute()
    assert threading.active_count() == before


def test_an_error_of_a_writer_thread_is_raised_here(tmp_path: Path) -> None:
    split = Split(tmp_path, "L2", "F16")
    values = split.weights.read_bytes()
    largest = torch.full(((len(values) - split.data_begin) // 4,), 1e9).numpy().tobytes()
    split.weights.write_bytes(values[: split.data_begin] + largest)
    with pytest.raises(LayoutError, match="too large for F16"):
        split.execute()


def test_a_disk_that_cannot_hold_the_files_is_an_error(tmp_path: Path) -> None:
    split = Split(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            split.execute()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_that_is_there_is_never_written_over(tmp_path: Path) -> None:
    split = Split(tmp_path)
    taken = split.out / split.plan.files[1].name
    taken.write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        split.execute()
    assert taken.read_bytes() == b"mine"


def test_the_processed_prefix_ends_before_the_first_block_that_is_missing() -> None:
    ends: list[int] = []
    processed = _ProcessedPrefix(ends.append)
    for number in (1, 2, 0, 4, 3):
        processed.add(number, 10 * (number + 1))
    assert ends == [30, 50]
