"""Tensors that interleave the experts are compared in blocks of rows, and no place is missed."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lorashard.verify.reference import rows
from lorashard.verify.reference.files import SafetensorsFile
from lorashard.verify.reference.pieces import Piece
from lorashard.verify.reference.projections import Factor
from lorashard.verify.reference.sides import Source, Stack
from lorashard.verify.reference.stacks import compare_stacks

E, R, OUT = 3, 2, 7
KINDS = ("experts_last", "rank_major", "grouped_by_expert")


def interleave(experts: torch.Tensor, kind: str) -> torch.Tensor:
    """[E, out, r] -> the tensor of that kind, element by element."""
    num_experts, num_rows, lora_rank = experts.shape
    columns = torch.empty(num_rows, num_experts * lora_rank)
    for e in range(num_experts):
        for k in range(lora_rank):
            at = e * lora_rank + k if kind == "grouped_by_expert" else k * num_experts + e
            columns[:, at] = experts[e, :, k]
    return columns.reshape(num_rows, lora_rank, num_experts) if kind == "experts_last" else columns


class Written:
    """A source tensor, and a shard with the same experts in reverse order."""

    def __init__(
        self, directory: Path, kind: str, *, transposed: bool, shape: tuple[int, int, int]
    ) -> None:
        experts = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        tensor = interleave(experts, kind)
        save_file({"source": tensor}, directory / "source.safetensors")
        self.path = directory / "shard.safetensors"
        self.stack = (experts.transpose(1, 2) if transposed else experts).flip(0).contiguous()
        save_file({"stack": self.stack}, self.path)
        piece = Piece(
            name="source", shape=tuple(tensor.shape), module="", leaf="", projection="",
            matrix="lora_A" if transposed else "lora_B", expert=None, kind=kind,  # type: ignore[arg-type]
            transposed=transposed, peft_name="",
        )  # fmt: skip
        self.factor = Factor({}, piece, shared=False)
        self.counted: list[int] = []
        self.source = Source(
            SafetensorsFile(directory / "source.safetensors"), shape[0], None, self.counted.append
        )

    def findings(self) -> list[str]:
        file = SafetensorsFile(self.path)
        experts = tuple(reversed(range(len(self.stack))))
        _, num_rows, num_columns = self.stack.shape
        stack = Stack(file, "stack", experts, (num_rows, num_columns))
        return list(compare_stacks(self.source, self.factor, [stack]))


@pytest.fixture(params=[1, 2, 3, 100])
def rows_at_a_time(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    row_bytes = 4 * E * R
    monkeypatch.setattr(rows, "_BLOCK_BYTES", row_bytes * request.param)
    monkeypatch.setattr(rows, "_STEP_BYTES", row_bytes)


@pytest.mark.usefixtures("rows_at_a_time")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_one_wrong_value_is_found_wherever_it_is(
    tmp_path: Path, kind: str, transposed: bool
) -> None:
    written = Written(tmp_path, kind, transposed=transposed, shape=(E, OUT, R))
    assert written.findings() == []
    assert sum(written.counted) == written.stack.nbytes
    for slot, row, column in torch.cartesian_prod(*map(torch.arange, written.stack.shape)).tolist():
        damaged = written.stack.clone()
        damaged.view(torch.int32)[slot, row, column] ^= 1
        save_file({"stack": damaged}, written.path)
        (finding,) = written.findings()
        place = f"expert {E - 1 - slot} (slot {slot}): [{row}, {column}] is "
        assert finding.startswith(f"shard.safetensors: stack: {place}")


@pytest.mark.usefixtures("rows_at_a_time")
@pytest.mark.parametrize("transposed", [False, True])
def test_the_first_of_several_wrong_values_is_told(tmp_path: Path, transposed: bool) -> None:
    written = Written(tmp_path, "rank_major", transposed=transposed, shape=(E, OUT, R))
    damaged = written.stack.clone()
    damaged[1, 1:, 1] += 1
    damaged[1, 0, -1] += 1
    save_file({"stack": damaged}, written.path)
    (finding,) = written.findings()
    last = damaged.shape[2] - 1
    assert f": expert 1 (slot 1): [0, {last}] is " in finding


@pytest.mark.parametrize(
    "change", [torch.Tensor.double, lambda t: t[:2].clone(), lambda t: t.mT.contiguous()]
)
def test_a_stack_of_another_dtype_or_shape_is_not_read(
    tmp_path: Path, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    written = Written(tmp_path, "rank_major", transposed=False, shape=(E, OUT, R))
    save_file({"stack": change(written.stack)}, written.path)
    findings = written.findings()
    assert findings
    assert all("dtype is torch.float64" in f or "has shape" in f for f in findings)


@pytest.mark.parametrize("transposed", [False, True])
def test_memory_is_that_of_a_block_and_not_of_a_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transposed: bool
) -> None:
    monkeypatch.setattr(rows, "_BLOCK_BYTES", 2**17)
    monkeypatch.setattr(rows, "_STEP_BYTES", 2**16)
    written = Written(tmp_path, "rank_major", transposed=transposed, shape=(32, 2048, 16))
    assert written.stack.nbytes == 2**22
    tracemalloc.start()
    assert written.findings() == []
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
