"""A file of a split that is read from the adapter, and not written."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorashard import LayoutOptions, SplitRequest
from lorashard.split.pipeline import prepared_split
from lorashard.vllm_plugin.load.planned_file import PlannedFile, map_files
from lorashard.writing.execute import write_files
from tests.adapters import Spec, build


@pytest.mark.parametrize("step", [1, 7, 64, 10**6])
def test_any_piece_of_it_is_that_of_the_file_that_a_split_writes(tmp_path: Path, step: int) -> None:
    adapter = build(Spec("L1", experts=(0, 2, 3), extras=True, num_layers=2)).write(tmp_path / "a")
    request = SplitRequest(2, options=LayoutOptions(num_experts=4))
    with prepared_split(adapter, request) as prepared, prepared.source.opened() as weights:
        write_files(prepared.plan, weights, tmp_path, lambda _: None)
        maps = map_files(prepared.plan, 3)
        for number, file in enumerate(prepared.plan.files):
            found = PlannedFile(maps[number], weights)
            begin = len(file.header)
            expected = (tmp_path / file.name).read_bytes()[begin:]
            for at in range(0, len(expected), step):
                buffer = bytearray(b"\xc3" * min(step, len(expected) - at))
                found.read_into(memoryview(buffer), begin + at)
                assert bytes(buffer) == expected[at : at + step], (file.name, at)


def test_what_is_to_be_rearranged_is_zero(tmp_path: Path) -> None:
    adapter = build(Spec("L2", extras=True)).write(tmp_path / "a")
    with prepared_split(adapter, SplitRequest(2)) as prepared, prepared.source.opened() as weights:
        write_files(prepared.plan, weights, tmp_path, lambda _: None)
        _, file, _ = prepared.plan.files
        found = PlannedFile(map_files(prepared.plan, 2)[1], weights)
        data = bytearray(b"\xc3" * file.size_bytes)
        found.read_into(memoryview(data), 0)
    written = (tmp_path / file.name).read_bytes()
    for entry in file.tensors:
        expected = written[entry.begin : entry.end]
        if entry.name.endswith("lora_B"):
            expected = bytes(len(expected))
        assert data[entry.begin : entry.end] == expected, entry.name
