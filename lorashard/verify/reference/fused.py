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

_ATTENTION_INPUT = re.compile(r"(?P<path>.+\.layers)\.\d+\..*[qkv]_proj\.lora_A(?:\.weight)?")


@dataclass(frozen=True, slots=True)
class FusedReading:
    """What a module's fused 2-D pairs are. `roles`: leaf -> projection."""

    roles: Mapping[str, str]
    swapped: bool
    hidden_size: int
    intermediate_size: float


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
    the shapes leave open.
    """
    readings = []
    for roles in _possible_roles(module, pairs, facts):
        for swapped in (False, True):
            hidden, intermediate = set(), set()
            for leaf, role in roles.items():
                width = (pairs[leaf]["lora_A"].shape[1], pairs[leaf]["lora_B"].shape[0])
                in_features, out_features = reversed(width) if swapped else width
                is_down = role == "down_proj"
                hidden.add(out_features if is_down else in_features)
                inner = in_features if is_down else out_features
                intermediate.add(inner / 2 if role == "gate_up_proj" else inner)
            if len(hidden) == len(intermediate) == 1:
                readings.append(FusedReading(roles, swapped, hidden.pop(), intermediate.pop()))
    transposed = None if facts.orientation is None else facts.orientation == "transposed"
    for field, known in (
        ("hidden_size", facts.hidden_size),
        ("intermediate_size", facts.intermediate_size),
        ("hidden_size", _attention_input(module, shapes)),
        ("swapped", transposed),
    ):
        if len(readings) > 1 and known is not None:
            readings = [reading for reading in readings if getattr(reading, field) == known]
    if len(readings) == 1 and float(readings[0].intermediate_size).is_integer():
        return readings[0]
    sizes = ", ".join(f"{p.name} {list(p.shape)}" for pair in pairs.values() for p in pair.values())
    what = "several readings fit" if len(readings) > 1 else "no reading fits"
    raise LayoutError(f"{what} the fused tensors {sizes}.")


def _possible_roles(
    module: str, pairs: Mapping[str, Mapping[str, Piece]], facts: Facts
) -> Iterable[dict[str, str]]:
    """Yield each role assignment that names and target_parameters allow.

    PEFT wraps parameters in definition order, gate_up_proj or up_proj first, so base_layer is
    never down_proj where both are there.
    """
    fixed = {leaf: PROJECTIONS[leaf] for leaf in pairs if leaf in PROJECTIONS}
    if fixed:
        if len(fixed) == len(pairs):
            yield fixed
        return
    targets = facts.config.get("target_parameters") or ()

    def trained(role: str) -> bool:
        name = f"{module}.{role}"
        return any(name == target or name.endswith(f".{target}") for target in targets)

    named = {role for role in ("gate_up_proj", "up_proj", "down_proj") if trained(role)}
    allowed = named or {"gate_up_proj", "up_proj", "down_proj"}
    for first in ("gate_up_proj", "up_proj"):
        if set(pairs) == {"base_layer", ""} and {first, "down_proj"} <= allowed:
            yield {"base_layer": first, "": "down_proj"}
        if set(pairs) == {""} and first in allowed:
            yield {"": first}
    if set(pairs) == {""} and "down_proj" in allowed:
        yield {"": "down_proj"}


def _attention_input(module: str, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Find the input size of q, k and v next to the module, if they agree."""
    sizes = set()
    for name, shape in shapes.items():
        match = _ATTENTION_INPUT.fullmatch(plain_key(name).removeprefix(PEFT_PREFIX))
        if match and module.startswith(match["path"] + ".") and len(shape) == 2 and 0 not in shape:
            sizes.add(shape[1])
    return sizes.pop() if len(sizes) == 1 else None
