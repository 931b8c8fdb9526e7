"""Which tensors `set_lora` of one MoE layer takes, and which rows of a shard they are made of. Pure.

vLLM's 2-D class takes the lists [gate, down, up] (w1, w2, w3), its 3-D class [gate_up, down]
(w13, w2); 0.33.0 lora/layers/fused_moe.py:381 and :578. A shard has gate and up either as two
tensors or as one `gate_up_proj`, whichever class the engine uses. Pieces bridge the two: rows of a
shard's tensor -> rows and columns of a tensor for set_lora, the same for every expert.

Legend: n slots on the device (E_local, or 1 where a factor is shared), r LoRA rank, H hidden size,
I expert intermediate size, A = lora_A [n, r, in], B = lora_B [n, out, r].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lorashard.adapter.keys import Matrix, Projection
from lorashard.adapter.modules import gate_up_rows
from lorashard.errors import LayoutError
from lorashard.vllm_options import smallest_max_lora_rank
from lorashard.vllm_plugin.engine.live import LiveExperts


@dataclass(frozen=True, slots=True)
class ShardStack:
    """One tensor of a shard: a factor of all its experts, [slots, rows, cols].

    shared: dimension 0 is 1, all experts have this factor.
    """

    name: str
    projection: Projection
    matrix: Matrix
    dtype: str
    rows: int
    cols: int
    shared: bool


@dataclass(frozen=True, slots=True)
class Piece:
    """`source_rows` of each expert's factor in `stack` become `target_rows`, from `first_col` on."""

    stack: ShardStack
    source_rows: range
    target_rows: range
    first_col: int = 0

    @property
    def source(self) -> slice:
        """The rows to read of [slots, rows, cols]."""
        return _slice_of(self.source_rows)

    @property
    def target(self) -> tuple[slice, slice]:
        """The rows and columns to write of [num_slots, rows, cols]."""
        return _slice_of(self.target_rows), slice(self.first_col, self.first_col + self.stack.cols)


@dataclass(frozen=True, slots=True)
class DeviceFactor:
    """One tensor that set_lora takes: [num_slots, rows, cols]. What no piece covers is zero."""

    num_slots: int
    rows: int
    cols: int
    pieces: tuple[Piece, ...]

    @property
    def is_verbatim(self) -> bool:
        """Whether the bytes of one stack, slot by slot, are this tensor's."""
        if len(self.pieces) != 1:
            return False
        (piece,) = self.pieces
        whole = piece.source_rows == piece.target_rows == range(self.rows)
        same_size = (piece.stack.rows, piece.stack.cols) == (self.rows, self.cols)
        return whole and same_size and not (piece.stack.shared and self.num_slots != 1)

    @property
    def is_covered(self) -> bool:
        """Whether the pieces leave nothing zero; they never overlap."""
        covered = sum(len(piece.target_rows) * piece.stack.cols for piece in self.pieces)
        return covered == self.rows * self.cols


@dataclass(frozen=True, slots=True)
class Assembly:
    """The distinct tensors for one layer, and their indices as lora_a and lora_b of each part."""

    factors: tuple[DeviceFactor, ...]
    lora_a: tuple[int, ...]
    lora_b: tuple[int, ...]
    lora_rank: int


def plan_assembly(
    live: LiveExperts, stacks: Sequence[ShardStack], gate_up: str, where: str
) -> Assembly:
    """Decide which tensors the layer gets and where each row of the stacks goes.

    gate_up: the order of the `gate_up_proj` rows in the shard (docs/format.md). where: the
    adapter's module, for messages. Raises LayoutError if the layer cannot take the adapter.
    """
    by_key = {(stack.projection, stack.matrix): stack for stack in stacks}
    _check_sizes(live, stacks, where)
    parts = _parts_2d if live.wrapper == "2d" else _parts_3d
    pairs = parts(live, by_key, gate_up, where)
    factors: list[DeviceFactor] = []
    for factor in (factor for pair in pairs for factor in pair):
        if factor not in factors:
            factors.append(factor)
    lora_rank = max(pair[0].rows for pair in pairs)
    if lora_rank > live.max_lora_rank:
        raise LayoutError(
            f"{where}: r={lora_rank} for {live.name}, but the engine has room for "
            f"{live.max_lora_rank}.",
            hint=f"Start vLLM with --max-lora-rank {smallest_max_lora_rank(lora_rank)}"
            + (
                ", or with --enable-mixed-moe-lora-format: the adapter has gate and up as separate "
                "factors; this model's LoRA class combines them, which adds up their ranks."
                if live.wrapper == "3d" and ("gate_proj", "lora_A") in by_key
                else "."
            ),
        )
    return Assembly(
        tuple(factors),
        tuple(factors.index(a) for a, _ in pairs),
        tuple(factors.index(b) for _, b in pairs),
        lora_rank,
    )


_Pair = tuple[DeviceFactor, DeviceFactor]
_Stacks = Mapping[tuple[Projection, Matrix], ShardStack]


def _parts_2d(live: LiveExperts, stacks: _Stacks, gate_up: str, where: str) -> list[_Pair]:
    down = _straight(live, stacks, "down_proj", where)
    if not live.gated:
        if ("gate_proj", "lora_A") in stacks or ("gate_up_proj", "lora_A") in stacks:
            raise LayoutError(
                f"{where}: trains a gate, but the experts of {live.name} have none.",
                hint="Is the adapter for this model?",
            )
        up = _straight(live, stacks, "up_proj", where)
        return [up, down, up]  # vLLM's w3 is w1 where there is no gate (lora_weights.py:204)
    if ("gate_up_proj", "lora_A") not in stacks:
        gate, up = (_straight(live, stacks, p, where) for p in ("gate_proj", "up_proj"))
        return [gate, down, up]
    stack_a, stack_b = stacks["gate_up_proj", "lora_A"], stacks["gate_up_proj", "lora_B"]
    lora_a = _whole(live, stack_a, where)
    gate_rows, up_rows = gate_up_rows(stack_b.rows, interleaved=gate_up == "interleaved")
    gate, up = ((lora_a, _rows(live, stack_b, rows, where)) for rows in (gate_rows, up_rows))
    return [gate, down, up]


def _parts_3d(live: LiveExperts, stacks: _Stacks, gate_up: str, where: str) -> list[_Pair]:
    down = _straight(live, stacks, "down_proj", where)
    size = live.intermediate_size
    to_gate, to_up = (
        (range(0, 2 * size, 2), range(1, 2 * size, 2))
        if live.interleaved
        # The up rows begin at the buffer's second half, as they do in the base weight.
        else (range(size), range(live.buffer_intermediate, live.buffer_intermediate + size))
    )
    rows_b = to_up[-1] + 1 if size else 0
    if ("gate_up_proj", "lora_A") in stacks:
        stack_a, stack_b = stacks["gate_up_proj", "lora_A"], stacks["gate_up_proj", "lora_B"]
        from_gate, from_up = gate_up_rows(2 * size, interleaved=gate_up == "interleaved")
        lora_b = _whole(live, stack_b, where)
        if (from_gate, from_up) != (to_gate, to_up):
            pieces = (Piece(stack_b, from_gate, to_gate), Piece(stack_b, from_up, to_up))
            lora_b = DeviceFactor(lora_b.num_slots, rows_b, stack_b.cols, pieces)
        return [(_whole(live, stack_a, where), lora_b), down]
    # Separate factors for gate and up: stack the A's, and put the B's on a block diagonal.
    pieces_a: list[Piece] = []
    pieces_b: list[Piece] = []
    rank = 0
    for projection, rows in (("gate_proj", to_gate), ("up_proj", to_up)):
        if (projection, "lora_A") in stacks:
            stack_a, stack_b = stacks[projection, "lora_A"], stacks[projection, "lora_B"]  # type: ignore[index]
            pieces_a.append(Piece(stack_a, range(stack_a.rows), range(rank, rank + stack_a.rows)))
            pieces_b.append(Piece(stack_b, range(stack_b.rows), rows, first_col=rank))
            rank += stack_a.rows
    slots = len(live.local_experts)
    return [
        (
            DeviceFactor(slots, rank, live.hidden_size, tuple(pieces_a)),
            DeviceFactor(slots, rows_b, rank, tuple(pieces_b)),
        ),
        down,
    ]


def _straight(live: LiveExperts, stacks: _Stacks, projection: Projection, where: str) -> _Pair:
    """The pair of one projection, unchanged; of rank 0 if the adapter does not train it."""
    if (projection, "lora_A") not in stacks:
        hidden, inner = live.hidden_size, live.intermediate_size
        inputs, outputs = (inner, hidden) if projection == "down_proj" else (hidden, inner)
        slots_a, slots_b = (
            1 if _is_shared_on_device(live, projection, matrix) else len(live.local_experts)
            for matrix in ("lora_A", "lora_B")
        )
        return DeviceFactor(slots_a, 0, inputs, ()), DeviceFactor(slots_b, outputs, 0, ())
    lora_a, lora_b = stacks[projection, "lora_A"], stacks[projection, "lora_B"]
    return _whole(live, lora_a, where), _whole(live, lora_b, where)


def _whole(live: LiveExperts, stack: ShardStack, where: str) -> DeviceFactor:
    return _rows(live, stack, range(stack.rows), where)


def _rows(live: LiveExperts, stack: ShardStack, rows: range, where: str) -> DeviceFactor:
    slots = _slots(live, stack, where)
    return DeviceFactor(slots, len(rows), stack.cols, (Piece(stack, rows, range(len(rows))),))


def _slice_of(rows: range) -> slice:
    return slice(rows.start, rows.stop, rows.step)


def _slots(live: LiveExperts, stack: ShardStack, where: str) -> int:
    """Dimension 0 on the device: E_local, or 1 for the factors that the engine shares."""
    if not _is_shared_on_device(live, stack.projection, stack.matrix):
        return len(live.local_experts)
    if not stack.shared:
        raise LayoutError(
            f"{where}: {stack.projection} {stack.matrix} differs from expert to expert, but the "
            "engine keeps one for all of them (--enable-moe-shared-loras).",
            hint="Start vLLM without --enable-moe-shared-loras.",
        )
    return 1


def _is_shared_on_device(live: LiveExperts, projection: Projection, matrix: str) -> bool:
    """Whether the engine keeps one such factor for all experts: gate/up's A and down's B."""
    return live.shared_outer and (projection == "down_proj") == (matrix == "lora_B")


def _check_sizes(live: LiveExperts, stacks: Sequence[ShardStack], where: str) -> None:
    hidden, inner = live.hidden_size, live.intermediate_size
    for stack in stacks:
        is_down = stack.projection == "down_proj"
        if stack.matrix == "lora_A":
            features, expected = stack.cols, inner if is_down else hidden
        else:
            features = stack.rows
            expected = hidden if is_down else inner
            expected *= 2 if stack.projection == "gate_up_proj" else 1
        if features != expected:
            raise LayoutError(
                f"{where}: {stack.projection} {stack.matrix} has {features} features, but "
                f"{live.name} has {expected}.",
                hint="Is the adapter for this model?",
            )
