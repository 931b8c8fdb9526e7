"""One source tensor -> what its name and shape say of expert factors, and how to unpack it.

Shapes and formulas: docs/adapter-layouts.md.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from lorashard.verify.reference.patterns import Patterns
from lorashard.verify.reference.values import Bits

Matrix = Literal["lora_A", "lora_B"]
# experts_last: [out, r, E]. A fused tensor of three dimensions has the shape that it has flattened.
Kind = Literal["matrix", "stack", "experts_last", "rows", "rank_major", "grouped_by_expert"]

PEFT_PREFIX = "base_model.model."
PROJECTIONS = {
    "w1": "gate_proj", "w3": "up_proj", "w2": "down_proj", "gate_proj": "gate_proj",
    "up_proj": "up_proj", "down_proj": "down_proj", "gate_up_proj": "gate_up_proj",
    "gate_and_up": "gate_up_proj", "down": "down_proj",
    "input_linear": "gate_up_proj", "output_linear": "down_proj",
}  # fmt: skip
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
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


@dataclass(frozen=True, slots=True)
class Facts:
    """What decides between readings: adapter_config.json and the options that `split` was given."""

    config: Mapping[str, Any]
    lora_ranks: Patterns
    alphas: Patterns
    num_experts: int
    hidden_size: int | None
    intermediate_size: int | None
    orientation: str | None
    grouped_by_expert: bool

    def lora_rank_of(self, name: str) -> int:
        """PEFT's r for the module or parameter `name`."""
        return int(self.lora_ranks.find(name, self.config["r"]))

    def scaling_of(self, name: str, lora_rank: int) -> float:
        """PEFT's scaling for the module or parameter `name`."""
        alpha = float(self.alphas.find(name, self.config["lora_alpha"]))
        return alpha / (math.sqrt(lora_rank) if self.config.get("use_rslora") else lora_rank)


@dataclass(frozen=True, slots=True)
class Piece:
    """One source tensor with expert factors.

    peft_name: what PEFT matches its patterns against. expert: None = the tensor is for all.
    transposed: each expert's matrix is transposed in the tensor.
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

    @property
    def interleaves_experts(self) -> bool:
        """Whether each row of the tensor has columns of every expert."""
        return self.kind in {"experts_last", "rank_major", "grouped_by_expert"}

    def unpacked_shape(self, num_experts: int) -> tuple[int, int, int]:
        """[E or 1, rows, columns] of the experts' matrices."""
        match self.kind:
            case "matrix":
                count, rows, columns = 1, self.shape[0], self.shape[1]
            case "stack":
                count, rows, columns = self.shape
            case "experts_last":
                rows, columns, count = self.shape
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


def unpack_expert(values: Bits, piece: Piece, num_experts: int) -> Bits:
    """One expert's elements of a source tensor, where they lie together: [rows, columns]."""
    _, rows, columns = piece.unpacked_shape(num_experts)
    shape = (columns, rows) if piece.transposed else (rows, columns)
    matrix: Bits = values.reshape(shape)
    return matrix.T if piece.transposed else matrix


def unpack_rows(values: Bits, piece: Piece, num_experts: int) -> Bits:
    """Some rows of a source tensor that interleaves the experts, n of `piece.shape[0]`.

    values: [n, all else]. Returns [E, n, columns], where it is transposed [E, n, rows].
    """
    experts: Bits
    if piece.kind == "grouped_by_expert":
        experts = values.reshape(len(values), num_experts, -1).transpose(1, 0, 2)
    else:  # experts_last is rank_major in three dimensions
        experts = values.reshape(len(values), -1, num_experts).transpose(2, 0, 1)
    return experts


def plain_key(name: str) -> str:
    """Drop what wrappers of the model put into a name, and the adapter's own name."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while parts[0] == "module":
        del parts[0]
    not_a_name = {"weight", "bias", "lora_A", "lora_B"}
    named = len(parts) > 2 and parts[-1] == "weight" and parts[-2] not in not_a_name
    if named and parts[-3] in {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"}:
        del parts[-2]
    elif len(parts) > 1 and parts[-2].startswith("lora_embedding_") and parts[-1] != "weight":
        del parts[-1]
    return ".".join(parts)


def read_name(name: str, shape: tuple[int, ...], facts: Facts) -> Piece | None:
    """Give the piece behind a name, projection "" where only shapes can tell. None: no expert."""
    key = plain_key(name).removeprefix(PEFT_PREFIX)
    native = _NATIVE.fullmatch(key)
    factor = native or _FACTOR.fullmatch(key)
    if factor is None:
        return None
    if native:
        module, leaf = native["module"], native["leaf"]
        place = _Place(module, leaf, f"{module}.{PROJECTIONS[leaf]}", "stack")
    else:
        columns: Kind = "grouped_by_expert" if facts.grouped_by_expert else "rank_major"
        fused: Kind = "rows" if factor["matrix"] == "A" else columns
        found = _read_path(factor["path"], len(shape), fused)
        if found is None:
            return None
        place = found
    place, shape = _flattened(place, shape, facts.num_experts)
    dims = 3 if place.kind in {"stack", "experts_last"} else 2
    if len(shape) != dims and 0 not in shape:
        return None
    return Piece(
        name=name,
        shape=shape,
        module=place.module,
        leaf=place.leaf,
        projection=PROJECTIONS.get(place.leaf, ""),
        matrix="lora_A" if factor["matrix"] == "A" else "lora_B",
        expert=place.expert,
        kind=place.kind,
        transposed=native is not None,
        peft_name=place.peft_name,
    )


def _flattened(
    place: _Place, shape: tuple[int, ...], num_experts: int
) -> tuple[_Place, tuple[int, ...]]:
    """Megatron-Bridge's stacks under fused names: lora_A [E, r, in] and lora_B [out, r, E]."""
    if len(shape) != 3:
        return place, shape
    first, middle, last = shape
    if place.kind == "rows" and first == num_experts:
        return place, (first * middle, last)
    if place.kind in {"rank_major", "grouped_by_expert"} and last == num_experts:
        return replace(place, kind="rank_major"), (first, middle * last)
    return place, shape


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
