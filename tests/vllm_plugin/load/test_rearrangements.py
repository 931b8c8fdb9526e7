"""Factors that lie otherwise than in the shards: what lands in the region is what a split writes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given

from lorashard.adapter.options import LayoutOptions
from lorashard.shards.placement import Placement, linear_placement
from lorashard.shards.plan import Rearrange, Target, build_plan
from lorashard.storage.local import LocalFile
from lorashard.storage.safetensors_file import read_header
from lorashard.vllm_plugin.load.assembly import Assembly, DeviceFactor, Piece, ShardStack
from lorashard.vllm_plugin.load.contents import WEIGHTS, Rearrangement
from lorashard.vllm_plugin.load.fill import Filler
from lorashard.vllm_plugin.load.kept_plans import KeptPlans
from lorashard.vllm_plugin.load.plain_source import open_plain_adapter
from lorashard.vllm_plugin.load.reads import LayerPlan, place_factors
from lorashard.vllm_plugin.load.rearrangements import plan_rearrangements
from lorashard.vllm_plugin.load.rows import Run
from lorashard.writing import blocks
from lorashard.writing.execute import write_files
from tests.adapters import LAYOUTS, Adapter, Spec, build
from tests.plans import plans, run
from tests.strategies import layout_of
from tests.vllm_plugin.load.plain_loads import read_stacks


@pytest.fixture(scope="module")
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(3) as made:
        yield made


def check_ranks(built: Adapter, placement: Placement, threads: ThreadPoolExecutor) -> set[int]:
    """How many tensors had to be rearranged for each rank; all bytes are those of its file."""
    numbers = set()
    with tempfile.TemporaryDirectory() as folder:
        path = built.write(Path(folder) / "adapter")
        plan = build_plan(layout_of(built), placement, None)
        write_files(
            plan, LocalFile(path / "adapter_model.safetensors"), Path(folder), lambda _: None
        )
        for ep_rank, file in enumerate(plan.files[1:]):
            with ExitStack() as stack:
                contents = open_plain_adapter(
                    path, LayoutOptions(**built.options),
                    lambda module, k=ep_rank: placement.ranks_of(module)[k],  # type: ignore[misc]
                    stack, KeptPlans(),
                )  # fmt: skip
                assert contents is not None
                found = read_stacks(contents, threads)
            written = (Path(folder) / file.name).read_bytes()
            _, header = read_header(Path(folder) / file.name)
            for entry in header.tensors:
                assert found[entry.name] == written[entry.begin : entry.end], (ep_rank, entry.name)
            numbers.add(len(contents.rearrangements))
    return numbers


@run
@given(plan=plans())
def test_any_adapter_comes_to_what_its_files_of_a_split_hold(
    threads: ThreadPoolExecutor, plan: tuple[Spec, Placement, str | None]
) -> None:
    spec, placement, _ = plan
    check_ranks(build(spec), placement, threads)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block_bytes", [1, 100])
def test_every_layout_in_blocks_of_any_size(
    threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch, layout: str, block_bytes: int
) -> None:
    for name in ("BLOCK_BYTES", "COLUMN_BLOCK_BYTES"):
        monkeypatch.setattr(blocks, name, block_bytes)
    defaults = (block_bytes, block_bytes)
    monkeypatch.setattr(blocks.split_into_blocks, "__defaults__", defaults)
    numbers = check_ranks(build(Spec(layout, num_layers=2)), linear_placement(4, 3), threads)
    is_fused = layout in ("L2", "L2b", "L3", "L4-gate_up", "L4-down", "L5", "L6", "L7", "L16")
    assert min(numbers) > 0 if is_fused else True


STACK = ShardStack("experts.gate_up_proj.lora_B", "gate_up_proj", "lora_B", "F32", 4, 3, False)
AXES = ("rce", "rec", "ecr", "cre", "cer")


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("cut", ["halves", "interleaved", "three and one"])
@pytest.mark.parametrize("block_bytes", [1, 120, 180, 10**6])
def test_rows_columns_and_scalings_are_where_the_pieces_and_slots_say(
    threads: ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
    axes: str,
    dtype: str,
    cut: str,
    block_bytes: int,
) -> None:
    """Of 5 experts, the rank has 3 in slots out of order; gate and up become two tensors."""
    defaults = (block_bytes, block_bytes)
    monkeypatch.setattr(blocks.split_into_blocks, "__defaults__", defaults)
    values = torch.arange(1.0, 61.0).view(5, 4, 3)
    source = values.permute(["erc".index(axis) for axis in axes]).contiguous()
    slots = (2, None, 0, None, 1)
    op = Rearrange(
        0, 240, axes, 4, 3, 4, 3, "F32", "F32", tuple((Target(1, 0),) for _ in range(5))  # type: ignore[arg-type]
    )  # fmt: skip
    rows = {
        "halves": (range(2), range(2, 4)),
        "interleaved": (range(0, 4, 2), range(1, 4, 2)),
        "three and one": (range(3), range(3, 4)),
    }[cut]
    factors = tuple(
        DeviceFactor(3, len(part), 5, (Piece(STACK, part, range(len(part)), first_col=1),))
        for part in rows
    )
    size = {"F32": 4, "BF16": 2}[dtype]
    (placed,), end = place_factors([Assembly(factors, (), (), 0)], size, 0)
    layer = LayerPlan(
        "layer",
        placed,
        (Run(0, 0, 0, 3),),
        (7, 8, 9),
        {"gate_up_proj": (0.0,) * 7 + (1.0, 2.0, 4.0)},
    )
    region = np.zeros(end, np.uint8)
    filler = Filler(region, _Weights(source), dtype, threads)
    jobs = list(plan_rearrangements([layer], [Rearrangement(STACK.name, op, slots)]))
    assert filler.run((), jobs) == 3 * 4 * 3 * 4
    for factor, part in zip(placed, rows, strict=True):
        found = filler.tensor(factor).float()
        assert not found[..., 0].any()
        assert not found[..., 4].any()
        for expert, slot in ((2, 0), (4, 1), (0, 2)):
            expected = values[expert, list(part)] * 2**slot
            assert torch.equal(found[slot, :, 1:4], expected), (expert, slot)


def test_what_is_of_no_layer_and_of_no_slot_is_not_read() -> None:
    op = Rearrange(0, 240, "ecr", 4, 3, 4, 3, "F32", "F32", ((),) * 5)
    layer = LayerPlan("layer", (), (), (), {})
    assert list(plan_rearrangements([layer], [Rearrangement(STACK.name, op, (0,) * 5)])) == []
    factor = DeviceFactor(1, 4, 3, (Piece(STACK, range(4), range(4)),))
    (placed,), _ = place_factors([Assembly((factor,), (), (), 0)], 4, 0)
    layer = LayerPlan("layer", placed, (Run(0, 0, 0, 1),), (3,), {"gate_up_proj": 1.0})
    of_another_stage = Rearrangement("elsewhere", op, (0, 1, 2, 3, 4))
    (job,) = plan_rearrangements(
        [layer], [of_another_stage, Rearrangement(STACK.name, op, (None, None, None, 0, None))]
    )
    assert job.size_bytes == 48
    assert job.ep_rank == WEIGHTS


@pytest.mark.parametrize(
    ("slots", "num_parts"),
    [
        ((None, 0, 1, 2, None), 1),  # one after the other
        ((0, None, 1, None, 2), 1),  # every other one
        ((None, None, 1, 2, None), 1),
        ((2, None, None, None, None), 1),
        ((1, None, None, 2, None), 1),
        ((0, 1, None, 2, None), 3),
        ((2, 1, 0, None, None), 3),
        ((0, None, 2, None, 1), 3),
    ],
)
def test_slots_in_even_steps_are_one_part(slots: tuple[int | None, ...], num_parts: int) -> None:
    op = Rearrange(0, 240, "rce", 4, 3, 4, 3, "F32", "F32", ((),) * 5)
    factor = DeviceFactor(3, 4, 3, (Piece(STACK, range(4), range(4)),))
    (placed,), _ = place_factors([Assembly((factor,), (), (), 0)], 4, 0)
    layer = LayerPlan("layer", placed, (Run(0, 0, 0, 3),), (3, 4, 5), {"gate_up_proj": 1.0})
    (job,) = plan_rearrangements([layer], [Rearrangement(STACK.name, op, slots)])
    assert len(job.parts) == num_parts
    copied = {
        expert: slot
        for part in job.parts
        for expert, slot in zip(range(5)[part.source[0]], range(3)[part.target[0]], strict=True)
    }
    assert copied == {expert: slot for expert, slot in enumerate(slots) if slot is not None}


class _Weights:
    """The RankSources of one tensor's bytes."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._bytes = tensor.numpy().tobytes()

    def offset_of(self, ep_rank: int, name: str) -> int:
        raise LookupError

    def source_of(self, ep_rank: int) -> _Weights:
        assert ep_rank == WEIGHTS
        return self

    def read_into(self, buffer: memoryview, offset: int) -> None:
        buffer[:] = self._bytes[offset : offset + len(buffer)]
