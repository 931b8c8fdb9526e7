"""All source tensors -> the trained projections of each module, as PEFT defines them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from lorashard.errors import LayoutError
from lorashard.verify.reference.fused import orient_fused
from lorashard.verify.reference.pieces import Facts, Piece, read_name

_EXPERTS_COMPONENT = re.compile(r"(?:^|\.)experts(?:\.|$)")


@dataclass(frozen=True, slots=True)
class Factor:
    """lora_A or lora_B of one projection: one piece per expert, or one piece for all."""

    per_expert: Mapping[int, Piece]
    whole: Piece | None
    shared: bool

    def piece_of(self, expert: int | None) -> Piece | None:
        """The piece with an expert's matrix, None = all experts' matrix. None if it has none."""
        if self.whole is not None or expert is None:
            return self.whole
        return self.per_expert.get(expert)


@dataclass(frozen=True, slots=True)
class Projection:
    """One trained projection. `lora_ranks` and `scaling` by expert, 0 = not trained."""

    lora_a: Factor
    lora_b: Factor
    in_features: int
    out_features: int
    lora_ranks: tuple[int, ...]
    scaling: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class SourceReading:
    """All tensors of an adapter. `problems`: sentences about what cannot be read for certain."""

    modules: Mapping[str, Mapping[str, Projection]]
    replicated: tuple[str, ...]
    empty: tuple[str, ...]
    problems: tuple[str, ...]


def read_source(shapes: Mapping[str, tuple[int, ...]], facts: Facts) -> SourceReading:
    """Tell experts from replicated tensors, and give every expert tensor its meaning."""
    pieces: dict[str, list[Piece]] = {}
    replicated, empty, problems = [], [], []
    for name, shape in shapes.items():
        if 0 in shape:
            empty.append(name)
        elif (piece := read_name(name, shape, facts)) is not None:
            pieces.setdefault(piece.module, []).append(piece)
        elif _EXPERTS_COMPONENT.search(name):
            problems.append(f"{name} {list(shape)} in the source: expert tensor of unknown kind.")
        else:
            replicated.append(name)
    # As Tinker writes experts without a gate: w3 is empty, and w1 the up projection.
    no_gate = {p.module for n in empty if (p := read_name(n, shapes[n], facts)) and p.leaf == "w3"}
    modules: dict[str, dict[str, Projection]] = {}
    for module, found in pieces.items():
        if module in no_gate and not any(piece.projection == "up_proj" for piece in found):
            found[:] = [_as_up(piece) for piece in found]
        try:
            modules[module] = _read_module(module, found, shapes, facts)
        except LayoutError as err:
            problems.append(f"{module} in the source cannot be read: {err.message}")
    return SourceReading(modules, tuple(replicated), tuple(empty), tuple(problems))


def _read_module(
    module: str,
    pieces: list[Piece],
    shapes: Mapping[str, tuple[int, ...]],
    facts: Facts,
) -> dict[str, Projection]:
    fused = [p for p in pieces if p.kind in {"rows", "rank_major", "grouped_by_expert"}]
    plain = [p for p in pieces if p not in fused] if fused else pieces
    if fused:
        plain = plain + orient_fused(module, fused, shapes, facts)
    by_projection: dict[str, list[Piece]] = {}
    for piece in plain:
        by_projection.setdefault(piece.projection, []).append(piece)
    return {
        name: _build_projection(name, _with_experts_last(found, facts.num_experts), facts)
        for name, found in by_projection.items()
    }


def _as_up(piece: Piece) -> Piece:
    return replace(piece, projection="up_proj") if piece.projection == "gate_proj" else piece


def _with_experts_last(pieces: list[Piece], num_experts: int) -> list[Piece]:
    """Find a stacked lora_B [out, r, E], which beside its lora_A [E or 1, r, in] is no [E, out, r]."""
    stacks = {p.matrix: p for p in pieces if p.kind == "stack" and not p.transposed}
    if len(stacks) < 2:
        return pieces
    lora_b, lora_rank = stacks["lora_B"], stacks["lora_A"].shape[1]
    first, middle, last = lora_b.shape
    is_plain = first in {1, num_experts} and last == lora_rank
    if is_plain or (middle, last) != (lora_rank, num_experts):
        return pieces
    return [replace(p, kind="experts_last") if p is lora_b else p for p in pieces]


def _build_projection(projection: str, pieces: list[Piece], facts: Facts) -> Projection:
    lora_a = _build_factor([p for p in pieces if p.matrix == "lora_A"], facts.num_experts)
    lora_b = _build_factor([p for p in pieces if p.matrix == "lora_B"], facts.num_experts)
    if lora_a is None or lora_b is None:
        raise LayoutError(f"{projection} has only one of lora_A and lora_B.")
    ranks, scaling = [], []
    features = set()
    for expert in range(facts.num_experts):
        a = lora_a.whole or lora_a.per_expert.get(expert)
        b = lora_b.whole or lora_b.per_expert.get(expert)
        if (a is None or lora_a.shared) and (b is None or lora_b.shared) and not (a and b):
            ranks.append(0)
            scaling.append(0.0)
            continue
        if a is None or b is None:
            raise LayoutError(f"{projection} of expert {expert} has only one of lora_A and lora_B.")
        _, lora_rank, in_features = a.unpacked_shape(facts.num_experts)
        _, out_features, columns = b.unpacked_shape(facts.num_experts)
        if lora_rank != columns:
            raise LayoutError(f"{a.name} and {b.name} have different r ({lora_rank}, {columns}).")
        features.add((in_features, out_features))
        peft_name = (a if a.expert is not None else b).peft_name
        _check_lora_rank(a, peft_name, lora_rank, facts)
        ranks.append(lora_rank)
        scaling.append(facts.scaling_of(peft_name, lora_rank))
    if len(features) != 1:
        raise LayoutError(f"{projection}: the experts differ in size: {sorted(features)}.")
    in_features, out_features = features.pop()
    return Projection(lora_a, lora_b, in_features, out_features, tuple(ranks), tuple(scaling))


def _check_lora_rank(piece: Piece, peft_name: str, lora_rank: int, facts: Facts) -> None:
    # PEFT writes what its config says. Other writers may not (NeMo's moe_rank_scaling), but one
    # matrix for all experts must not be taken for a fused one. NeMo's own orientation is no PEFT's.
    by_peft = "peft_version" in facts.config or "loftq_config" in facts.config
    one_matrix = piece.kind == "matrix" and piece.expert is None
    if piece.kind == "stack" and piece.transposed:
        return
    if (by_peft or one_matrix) and lora_rank != facts.lora_rank_of(peft_name):
        expected = facts.lora_rank_of(peft_name)
        raise LayoutError(
            f"{piece.name} {list(piece.shape)} has r {lora_rank} if there are {facts.num_experts} "
            f"experts, but adapter_config.json says {expected}."
        )


def _build_factor(pieces: list[Piece], num_experts: int) -> Factor | None:
    if not pieces:
        return None
    per_expert: dict[int, Piece] = {}
    wholes = [piece for piece in pieces if piece.expert is None]
    for piece in pieces:
        if piece.expert is None:
            continue
        if piece.expert in per_expert or piece.expert >= num_experts:
            raise LayoutError(f"{piece.name} is not one of {num_experts} experts, or there twice.")
        per_expert[piece.expert] = piece
    if len(wholes) + bool(per_expert) != 1:
        raise LayoutError(f"{pieces[0].name} and {pieces[-1].name} are for the same experts.")
    if not wholes:
        return Factor(per_expert, None, shared=False)
    count = wholes[0].unpacked_shape(num_experts)[0]
    one_for_all = count == 1 and wholes[0].kind in {"matrix", "stack"} and not wholes[0].transposed
    if count != num_experts and not one_for_all:
        raise LayoutError(f"{wholes[0].name} holds {count} experts, not {num_experts}.")
    return Factor({}, wholes[0], shared=one_for_all)
