"""PEFT's fused 2-D pairs -> role and orientation, decided by shapes, config and options."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from lorashard.errors import LayoutError
from lorashard.verify.reference.pieces import (
    PEFT_PREFIX,
    PROJECTIONS,
    Facts,
    Matrix,
    Piece,
    plain_key,
)

_ATTENTION_INPUT = re.compile(r"(?P<path>.+?\.layers)\.(?:.*\.)?[qkv]_proj\.lora_A(?:\.weight)?")
# The last words of target_parameters that mean a projection.
_TARGETS = {
    name: PROJECTIONS[name]
    for name in ("gate_up_proj", "up_proj", "down_proj", "input_linear", "output_linear")
}
# What one pair or two are for, base_layer first.
_ORDERS = (
    ("gate_up_proj",), ("up_proj",), ("down_proj",),
    ("gate_up_proj", "down_proj"), ("up_proj", "down_proj"), ("down_proj", "gate_up_proj"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class FusedReading:
    """What a module's fused 2-D pairs are. `roles`: leaf -> projection."""

    roles: Mapping[str, str]
    swapped: bool
    hidden_size: int
    intermediate_size: int


def orient_fused(
    module: str, pieces: list[Piece], shapes: Mapping[str, tuple[int, ...]], facts: Facts
) -> list[Piece]:
    """Give fused 2-D pieces their projection and orientation, or raise LayoutError."""
    pairs: dict[str, dict[str, Piece]] = {}
    for piece in pieces:
        if piece.matrix in pairs.setdefault(piece.leaf, {}):
            raise LayoutError(f"{piece.name} is there twice.")
        pairs[piece.leaf][piece.matrix] = piece
    for pair in pairs.values():
        if len(pair) != 2 or pair["lora_A"].shape[0] != pair["lora_B"].shape[1]:
            raise LayoutError(f"{next(iter(pair.values())).name} has no counterpart that fits.")
        if pair["lora_A"].shape[0] % facts.num_experts:
            raise LayoutError(f"{pair['lora_A'].name} is not for {facts.num_experts} experts.")
    reading = _decide_fused(module, pairs, shapes, facts)
    return [_oriented(piece, reading) for piece in pieces]


def _oriented(piece: Piece, reading: FusedReading) -> Piece:
    """Apply a reading. Swapped: the true lora_A is the tensor lora_B transposed, and vice versa."""
    role = reading.roles[piece.leaf]
    piece = replace(piece, projection=role, peft_name=piece.peft_name or f"{piece.module}.{role}")
    if not reading.swapped:
        return piece
    matrix: Matrix = "lora_B" if piece.matrix == "lora_A" else "lora_A"
    return replace(piece, matrix=matrix, transposed=True)


def _decide_fused(
    module: str,
    pairs: Mapping[str, Mapping[str, Piece]],
    shapes: Mapping[str, tuple[int, ...]],
    facts: Facts,
) -> FusedReading:
    """Find the one reading that shapes, config and options allow, or raise LayoutError.

    Hidden and intermediate size must agree over the pairs; hints count only between readings that
    the shapes leave open, and the attention's input size only if it is that of one of them.
    """
    readings = []
    for roles in _possible_roles(module, pairs, facts):
        for swapped in (False, True):
            hidden, inner = set(), set()  # inner: twice the intermediate size
            for leaf, role in roles.items():
                width = (pairs[leaf]["lora_A"].shape[1], pairs[leaf]["lora_B"].shape[0])
                in_features, out_features = reversed(width) if swapped else width
                is_down = role == "down_proj"
                hidden.add(out_features if is_down else in_features)
                features = in_features if is_down else out_features
                inner.add(features if role == "gate_up_proj" else 2 * features)
            if len(hidden) == len(inner) == 1 and min(inner) % 2 == 0:
                readings.append(FusedReading(roles, swapped, hidden.pop(), inner.pop() // 2))
    transposed = None if facts.orientation is None else facts.orientation == "transposed"
    for field, known in (
        ("hidden_size", facts.hidden_size),
        ("intermediate_size", facts.intermediate_size),
        ("swapped", transposed),
    ):
        if len(readings) > 1 and known is not None:
            readings = [reading for reading in readings if getattr(reading, field) == known]
    if len(readings) > 1:
        attention = _attention_input(module, shapes)
        readings = [r for r in readings if r.hidden_size == attention] or readings
    if len(readings) == 1:
        return readings[0]
    sizes = ", ".join(f"{p.name} {list(p.shape)}" for pair in pairs.values() for p in pair.values())
    what = "several readings fit" if len(readings) > 1 else "no reading fits"
    raise LayoutError(f"{what} the fused tensors {sizes}.")


def _possible_roles(
    module: str, pairs: Mapping[str, Mapping[str, Piece]], facts: Facts
) -> Iterable[dict[str, str]]:
    """Yield each role assignment that names and target_parameters allow.

    PEFT wraps parameters in the order of their definition, which is gate_up_proj or up_proj first in
    all known models; the shapes tell gate_up_proj and down_proj apart in any case. target_parameters
    are matched as by PEFT, or by their last words if too few of them are this module's.
    """
    targets = facts.config.get("target_parameters") or ()
    targets = [targets] if isinstance(targets, str) else targets
    named, like_named = set(), set()
    for target in targets:
        name = target.removesuffix(".weight")
        last = name.rpartition(".")[2]
        if last in _TARGETS:
            like_named.add(_TARGETS[last])
            if f".{module}.{last}".endswith(f".{name}"):
                named.add(_TARGETS[last])
    allowed = named if len(named) >= len(pairs) else like_named
    for order in _ORDERS:
        roles = dict(zip(sorted(pairs, reverse=True), order))
        by_name = {leaf: PROJECTIONS.get(leaf, role) for leaf, role in roles.items()}
        if len(order) == len(pairs) and roles == by_name and (not allowed or allowed >= set(order)):
            yield roles


def _attention_input(module: str, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Find the input size of q, k and v next to the module, if they agree."""
    sizes = set()
    for name, shape in shapes.items():
        match = _ATTENTION_INPUT.fullmatch(plain_key(name).removeprefix(PEFT_PREFIX))
        if match and module.startswith(match["path"] + ".") and len(shape) == 2:
            sizes.add(shape[1])
    return sizes.pop() if len(sizes) == 1 else None
