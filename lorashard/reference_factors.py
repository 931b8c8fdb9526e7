"""Source tensors -> expert factors as PEFT defines them: the second reading that `verify` needs.

Shares no code with the modules that write shards; a mistake there cannot repeat itself here.
Shapes and formulas: docs/adapter-formats.md.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from lorashard.errors import LayoutError

if TYPE_CHECKING:
    from torch import Tensor

Matrix = Literal["lora_A", "lora_B"]
Kind = Literal["matrix", "stack", "rows", "rank_major", "grouped_by_expert"]

_PEFT_PREFIX = "base_model.model."
_PROJECTIONS = {
    "w1": "gate_proj", "w3": "up_proj", "w2": "down_proj", "gate_proj": "gate_proj",
    "up_proj": "up_proj", "down_proj": "down_proj", "gate_up_proj": "gate_up_proj",
    "gate_and_up": "gate_up_proj", "down": "down_proj",
    "input_linear": "gate_up_proj", "output_linear": "down_proj",
}  # fmt: skip
_MODULE = r"(?P<module>(?:.+\.)?experts)"
_LEAF = r"(?P<leaf>gate_proj|up_proj|down_proj|gate_up_proj|w1|w2|w3)"
_FACTOR = re.compile(r"(?P<path>.+)\.lora_(?P<matrix>[AB])(?:\.weight)?")
_NATIVE = re.compile(_MODULE + r"\.lora_(?P<leaf>gate_and_up|down)_(?P<matrix>[AB])(?:\.weight)?")
_PER_EXPERT = re.compile(_MODULE + r"\.(?P<expert>\d+)\." + _LEAF)
_PER_EXPERT_LIST = re.compile(_MODULE + r"\.(?P<leaf>gate_up_proj|down_proj)s\.(?P<expert>\d+)")
_ONE_FOR_ALL = re.compile(_MODULE + r"\." + _LEAF)
_FUSED = re.compile(_MODULE + r"(?P<inner>\.base_layer)?")
_GRANITE = re.compile(r"(?P<block>(?:.+\.)?block_sparse_moe)\.(?P<leaf>input_linear|output_linear)")
_DENSE_LOOKING = re.compile(r"(?P<block>.+)\.(?P<leaf>gate_up_proj|gate_proj|up_proj|down_proj)")
_EXPERTS_COMPONENT = re.compile(r"(?:^|\.)experts(?:\.|$)")
_ATTENTION_INPUT = re.compile(r"(?P<path>.+\.layers)\.\d+\..*[qkv]_proj\.lora_A(?:\.weight)?")


@dataclass(frozen=True, slots=True)
class Facts:
    """What decides between readings: adapter_config.json and what the user told `split`."""

    config: Mapping[str, Any]
    num_experts: int
    hidden_size: int | None
    intermediate_size: int | None
    orientation: str | None
    grouped_by_expert: bool

    def lora_rank_of(self, name: str) -> int:
        """PEFT's r for the module or parameter `name`."""
        return int(self._by_pattern("rank_pattern", name, self.config["r"]))

    def scaling_of(self, name: str, lora_rank: int) -> float:
        """PEFT's scaling for the module or parameter `name`."""
        alpha = float(self._by_pattern("alpha_pattern", name, self.config["lora_alpha"]))
        return alpha / (math.sqrt(lora_rank) if self.config.get("use_rslora") else lora_rank)

    def _by_pattern(self, field: str, name: str, default: Any) -> Any:
        patterns: Mapping[str, Any] = self.config.get(field) or {}
        for key, value in patterns.items():
            if re.match(rf"(.*\.)?({key})$", name):
                return value
        return patterns.get(name, default)


@dataclass(frozen=True, slots=True)
class Piece:
    """One source tensor with expert factors.

    peft_name: what PEFT matches its patterns against. expert: None = the tensor is for all.
    transposed: each expert's matrix stands transposed in the tensor.
    """

    name: str
    shape: tuple[int, ...]
    module: str
    leaf: str
    projection: str
    matrix: Matrix
    expert: int | None
    kind: Kind
    transposed: bool
    peft_name: str

    def unpacked_shape(self, num_experts: int) -> tuple[int, int, int]:
        """Shape of `unpack`'s result."""
        match self.kind:
            case "matrix":
                count, rows, columns = 1, self.shape[0], self.shape[1]
            case "stack":
                count, rows, columns = self.shape
            case "rows":
                count, rows, columns = num_experts, self.shape[0] // num_experts, self.shape[1]
            case _:
                count, rows, columns = num_experts, self.shape[0], self.shape[1] // num_experts
        return (count, columns, rows) if self.transposed else (count, rows, columns)


@dataclass(frozen=True, slots=True)
class _Place:
    """What a name alone says."""

    module: str
    leaf: str
    peft_name: str
    kind: Kind
    expert: int | None = None


@dataclass(frozen=True, slots=True)
class Factor:
    """lora_A or lora_B of one projection: one piece per expert, or one piece for all."""

    per_expert: Mapping[int, Piece]
    whole: Piece | None
    shared: bool


@dataclass(frozen=True, slots=True)
class FusedReading:
    """What a module's fused 2-D pairs are. `roles`: leaf -> projection."""

    roles: Mapping[str, str]
    swapped: bool
    hidden_size: int
    intermediate_size: float


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


def unpack(tensor: Tensor, piece: Piece, num_experts: int) -> Tensor:
    """Unpack the experts' matrices of a source tensor: [E or 1, rows, columns], contiguous."""
    match piece.kind:
        case "matrix":
            experts = tensor[None]
        case "stack":
            experts = tensor
        case "rows":
            experts = tensor.reshape(num_experts, -1, tensor.shape[1])
        case "rank_major":
            experts = tensor.reshape(tensor.shape[0], -1, num_experts).permute(2, 0, 1)
        case "grouped_by_expert":
            experts = tensor.reshape(tensor.shape[0], num_experts, -1).permute(1, 0, 2)
    return (experts.transpose(1, 2) if piece.transposed else experts).contiguous()


def read_source(shapes: Mapping[str, tuple[int, ...]], facts: Facts) -> SourceReading:
    """Tell experts from replicated tensors, and give every expert tensor its meaning."""
    pieces: dict[str, list[Piece]] = {}
    replicated, empty, problems = [], [], []
    for name, shape in shapes.items():
        if 0 in shape:
            empty.append(name)
        elif (piece := _read_name(name, shape, facts)) is not None:
            pieces.setdefault(piece.module, []).append(piece)
        elif _EXPERTS_COMPONENT.search(name):
            problems.append(f"{name} {list(shape)} in the source: expert tensor of unknown kind.")
        else:
            replicated.append(name)
    no_gate = {p.module for n in empty if (p := _read_name(n, shapes[n], facts)) and p.leaf == "w3"}
    modules: dict[str, dict[str, Projection]] = {}
    for module, found in pieces.items():
        if module in no_gate and not any(piece.leaf == "w3" for piece in found):
            found[:] = [replace(p, projection="up_proj") if p.leaf == "w1" else p for p in found]
        try:
            modules[module] = _read_module(module, found, shapes, facts)
        except LayoutError as err:
            problems.append(f"{module} in the source cannot be read: {err.message}")
    return SourceReading(modules, tuple(replicated), tuple(empty), tuple(problems))


def _read_name(name: str, shape: tuple[int, ...], facts: Facts) -> Piece | None:
    """Give the piece behind a name, projection "" where only shapes can tell. None: no expert."""
    key = name.removeprefix(_PEFT_PREFIX)
    native = _NATIVE.fullmatch(key)
    factor = native or _FACTOR.fullmatch(key)
    if factor is None:
        return None
    if native:
        module, leaf = native["module"], native["leaf"]
        place = _Place(module, leaf, f"{module}.{_PROJECTIONS[leaf]}", "stack")
    else:
        columns: Kind = "grouped_by_expert" if facts.grouped_by_expert else "rank_major"
        fused: Kind = "rows" if factor["matrix"] == "A" else columns
        found = _read_path(factor["path"], len(shape), fused)
        if found is None:
            return None
        place = found
    if len(shape) != (3 if place.kind == "stack" else 2) and 0 not in shape:
        return None
    return Piece(
        name=name,
        shape=shape,
        module=place.module,
        leaf=place.leaf,
        projection=_PROJECTIONS.get(place.leaf, ""),
        matrix="lora_A" if factor["matrix"] == "A" else "lora_B",
        expert=place.expert,
        kind=place.kind,
        transposed=native is not None,
        peft_name=place.peft_name,
    )


def _read_path(path: str, num_dims: int, fused: Kind) -> _Place | None:
    if match := _PER_EXPERT.fullmatch(path) or _PER_EXPERT_LIST.fullmatch(path):
        return _Place(match["module"], match["leaf"], path, "matrix", int(match["expert"]))
    if match := _ONE_FOR_ALL.fullmatch(path):
        kind: Kind = "stack" if num_dims == 3 else "matrix"
        return _Place(match["module"], match["leaf"], path, kind)
    if match := _FUSED.fullmatch(path):
        return _Place(match["module"], "base_layer" if match["inner"] else "", "", fused)
    if match := _GRANITE.fullmatch(path):
        # The targeted parameter is the `weight` of that module, and PEFT matches its full name.
        return _Place(f"{match['block']}.experts", match["leaf"], f"{path}.weight", fused)
    if num_dims == 3 and (match := _DENSE_LOOKING.fullmatch(path)):
        return _Place(f"{match['block']}.experts", match["leaf"], path, "stack")
    return None


def _read_module(
    module: str,
    pieces: list[Piece],
    shapes: Mapping[str, tuple[int, ...]],
    facts: Facts,
) -> dict[str, Projection]:
    fused = [p for p in pieces if p.kind in {"rows", "rank_major", "grouped_by_expert"}]
    plain = [p for p in pieces if p not in fused] if fused else pieces
    if fused:
        plain = plain + _orient_fused(module, fused, shapes, facts)
    by_projection: dict[str, list[Piece]] = {}
    for piece in plain:
        by_projection.setdefault(piece.projection, []).append(piece)
    return {name: _build_projection(name, found, facts) for name, found in by_projection.items()}


def _orient_fused(
    module: str, pieces: list[Piece], shapes: Mapping[str, tuple[int, ...]], facts: Facts
) -> list[Piece]:
    """Give fused 2-D pieces their projection and orientation, or raise LayoutError."""
    pairs: dict[str, dict[str, Piece]] = {}
    for piece in pieces:
        if piece.matrix in pairs.setdefault(piece.leaf, {}):
            raise LayoutError(f"{piece.name} stands there twice.")
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
    fixed = {leaf: _PROJECTIONS[leaf] for leaf in pairs if leaf in _PROJECTIONS}
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
        match = _ATTENTION_INPUT.fullmatch(name.removeprefix(_PEFT_PREFIX))
        if match and module.startswith(match["path"] + ".") and len(shape) == 2 and 0 not in shape:
            sizes.add(shape[1])
    return sizes.pop() if len(sizes) == 1 else None


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
    # matrix for all experts must not be taken for a fused one.
    by_peft = "peft_version" in facts.config or "loftq_config" in facts.config
    one_matrix = piece.kind == "matrix" and piece.expert is None
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
    if count not in {1, num_experts}:
        raise LayoutError(f"{wholes[0].name} holds {count} experts, not {num_experts}.")
    return Factor({}, wholes[0], shared=count == 1)
