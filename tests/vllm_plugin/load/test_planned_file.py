"""A file of a split that is read from the adapter, and not written."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorashard import LayoutOptions, SplitRequest
from lorashard.split.pipeline import prepared_split
from lorashard.vllm_plugin.load.planned_file import planned_file
from lorashard.writing.execute import write_files
from tests.adapters import Spec, build


@pytest.mark.parametrize("step", [1, 7, 64, 10**6])
def test_any_piece_of_it_is_that_of_the_file_that_a_split_writes(tmp_path: Path, step: int) -> None:
    adapter = build(Spec("L1", experts=(0, 2, 3), extras=True, num_layers=2)).write(tmp_path / "a")
    request = SplitRequest(2, options=LayoutOptions(num_experts=4))
    with prepared_split(adapter, request) as prepared, prepared.source.opened() as weights:
        write_files(prepared.plan, weights, tmp_path, lambda _: None)
        for number, file in enumerate(prepared.plan.files):
            found = planned_file(prepared.plan, number, weights)
            assert found is not None
            begin = len(file.header)
            expected = (tmp_path / file.name).read_bytes()[begin:]
            for at in range(0, len(expected), step):
                buffer = bytearray(b"\xc3" * min(step, len(expected) - at))
                found.read_into(memoryview(buffer), begin + at)
                assert bytes(buffer) == expected[at : at + step], (file.name, at)


def test_a_file_with_data_to_rearrange_is_none(tmp_path: Path) -> None:
    adapter = build(Spec("L2", extras=True)).write(tmp_path)
    with prepared_split(adapter, SplitRequest(2)) as prepared, prepared.source.opened() as weights:
        files = [planned_file(prepared.plan, number, weights) for number in range(3)]
    assert files[0] is not None
    assert files[1:] == [None, None]
