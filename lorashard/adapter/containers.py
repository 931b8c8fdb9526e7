"""One experts container's tensors -> where each expert's factor lies in them. Pure.

Legend: E experts, r LoRA rank, H hidden size. Every factor is described in one orientation,
lora_A [r, in] and lora_B [out, r]; `axes` says how the source tensor lies. The layout numbers are
those of docs/adapter-layouts.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeVar

from lorashard.adapter.config import LoraConfig
from lorashard.adapter.fused_pairs import FusedPair, Reading, read_fused
from lorashard.adapter.keys import PEFT_PREFIX, ExpertKey, Matrix, Projection
from lorashard.adapter.options import LayoutOptions, LoraBLayout
from lorashard.errors import LayoutError
from lorashard.header import TensorEntry

# Order of a source tensor's axes, slowest first: e expert, r row, c column of the factor.
# erc is the shard's own order, so its experts are contiguous byte ranges.
Axes = Literal["erc", "ecr", "rce", "rec", "cre", "cer"]
FactorName = tuple[Projection, Matrix]

_Key = TypeVar("_Key")
_Found = tuple[FactorName, "list[SourceFactor]"]


class SourceFactor(NamedTuple):
    """One source tensor: the [rows, cols] factors of `experts`, in this order along axis e.

    A tuple for speed, like TensorEntry.

    experts: None if all experts share the one factor.
    module: the name that PEFT's rank and alpha patterns are matched against.
    """

    entry: TensorEntry
    module: str
    axes: Axes
    experts: tuple[int, ...] | None
    rows: int
    cols: int


@dataclass(frozen=True, slots=True)
class ContainerFactors:
    """All factors of one container, and how its writer spells them."""

    source_layout: str
    fused: bool
    non_gated: bool
    factors: Mapping[FactorName, tuple[SourceFactor, ...]]


@dataclass(slots=True)
class ContainerTensors:
    """The tensors of one container by the kind of their key, while they are collected."""

    per_expert: dict[FactorName, dict[int, TensorEntry]] = field(default_factory=dict)
    stacked: dict[FactorName, TensorEntry] = field(default_factory=dict)
    native: dict[FactorName, TensorEntry] = field(default_factory=dict)
    parameter: dict[FactorName, TensorEntry] = field(default_factory=dict)
    inner: dict[Matrix, TensorEntry] = field(default_factory=dict)
    outer: dict[Matrix, TensorEntry] = field(default_factory=dict)
    empty: set[Projection] = field(default_factory=set)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing but tensors without elements."""
        tables = (self.per_expert, self.stacked, self.native, self.parameter)
        return not any((*tables, self.inner, self.outer))

    def add(self, key: ExpertKey, entry: TensorEntry) -> None:
        """File a tensor under its key. Raises LayoutError if its place is taken."""
        if key.projection is None:
            if 0 in entry.shape:
                raise _bad_shape(entry, "at least one row and column")
            _put(self.inner if key.kind == "inner" else self.outer, key.matrix, entry)
            return
        name = (key.projection, key.matrix)
        if key.expert is not None:
            if 0 in entry.shape:
                raise _bad_shape(entry, "at least one row and column")
            _put(self.per_expert.setdefault(name, {}), key.expert, entry)
        elif 0 in entry.shape:
            self.empty.add(key.projection)  # Tinker writes an empty w3 for experts without a gate
        else:
            tables = {"stacked": self.stacked, "native": self.native, "parameter": self.parameter}
            _put(tables[key.kind], name, entry)


def read_container(
    module: str,
    tensors: ContainerTensors,
    config: LoraConfig,
    options: LayoutOptions,
    hidden_size_hint: int | None,
) -> ContainerFactors:
    """Say where each factor of one container lies.

    hidden_size_hint: H as far as other tensors of the adapter show it.
    Raises LayoutError for shapes that fit no layout, or more than one.
    """
    factors: dict[FactorName, list[SourceFactor]] = {}
    spellings: list[str] = []

    def add(spelling: str, items: Iterable[_Found]) -> None:
        for name, found in items:
            if name in factors:
                raise LayoutError(
                    f"{module}.{name[0]} {name[1]} is stored twice: {factors[name][0].entry.name} "
                    f"and {found[0].entry.name}.",
                    hint="Keep one of them; lorashard does not guess which is meant.",
                )
            factors[name] = found
        spellings.append(spelling)

    if tensors.per_expert:
        add("per_expert", _per_expert(tensors))
    if tensors.stacked:
        add("stacked", _stacked(tensors))
    if tensors.native:
        add("native", _native(tensors))
    if tensors.inner or tensors.outer or tensors.parameter:
        spelling, items = _fused(module, tensors, config, options, hidden_size_hint)
        add(spelling, items)
    non_gated = bool(tensors.empty) and not any(name[0] == "up_proj" for name in factors)
    if non_gated:  # the writer's w1 is then the up projection
        factors = {("up_proj" if p == "gate_proj" else p, m): f for (p, m), f in factors.items()}
    return ContainerFactors(
        source_layout="+".join(spellings),
        fused=any(name[0] == "gate_up_proj" for name in factors)
        or spellings[-1].startswith("fused"),
        non_gated=non_gated or spellings[-1].endswith("non_gated"),
        factors={name: tuple(items) for name, items in factors.items()},
    )


def _put(table: dict[_Key, TensorEntry], key: _Key, entry: TensorEntry) -> None:
    if key in table:
        raise LayoutError(
            f"{table[key].name} and {entry.name} name the same factor.",
            hint="Keep one of them; lorashard does not guess which is meant.",
        )
    table[key] = entry


def _peft_module(entry: TensorEntry) -> str:
    name = entry.name
    begin = len(PEFT_PREFIX) if name.startswith(PEFT_PREFIX) else 0
    return name[begin : name.rindex(".lora_")]


def _per_expert(tensors: ContainerTensors) -> Iterable[_Found]:
    """L1, the per-expert side of L9, L15: [r, in] and [out, r] for each expert."""
    for name, entries in tensors.per_expert.items():
        found = []
        for expert in sorted(entries):
            entry = entries[expert]
            if len(entry.shape) != 2:
                raise _bad_shape(entry, "two dimensions")
            rows, cols = entry.shape
            found.append(SourceFactor(entry, _peft_module(entry), "erc", (expert,), rows, cols))
        yield name, found


def _stacked(tensors: ContainerTensors) -> Iterable[_Found]:
    """L8 to L12, L14: [E, r, in] and [E, out, r]; E = 1 or no E axis at all means shared."""
    for name, entry in tensors.stacked.items():
        if len(entry.shape) not in (2, 3):
            raise _bad_shape(entry, "two or three dimensions")
        *expert_axis, rows, cols = entry.shape
        shared = expert_axis in ([], [1])
        experts = None if shared else tuple(range(expert_axis[0]))
        yield name, [SourceFactor(entry, _peft_module(entry), "erc", experts, rows, cols)]


def _native(tensors: ContainerTensors) -> Iterable[_Found]:
    """L13: lora_A [E, in, r] and lora_B [E, r, out], both the other way round."""
    for name, entry in tensors.native.items():
        if len(entry.shape) != 3:
            raise _bad_shape(entry, "three dimensions")
        num_experts, cols, rows = entry.shape
        experts = tuple(range(num_experts))
        module = entry.name.removeprefix(PEFT_PREFIX).rpartition(".lora_")[0]
        yield name, [SourceFactor(entry, module, "ecr", experts, rows, cols)]


def _fused(
    module: str,
    tensors: ContainerTensors,
    config: LoraConfig,
    options: LayoutOptions,
    hidden_size_hint: int | None,
) -> tuple[str, list[_Found]]:
    """L2 to L7: lora_A [E*r, x] and lora_B [y, r*E] (or [y, E*r], grouped by expert)."""
    pairs = _fused_pairs(module, tensors)
    reading = read_fused(module, pairs, config.target_parameters, options, hidden_size_hint)
    b_layout = _lora_b_layout(module, config, options)
    items: list[_Found] = []
    for pair, role in zip(pairs, reading.roles):
        # PEFT matches its patterns against "<module>.<parameter>".
        name = _peft_module(pair.lora_a) + ".weight" if pair.projection else f"{module}.{role}"
        items += _fused_factors(pair, role, name, reading, b_layout, config.rank_of(name))
    spelling = "fused" + ("_transposed" if reading.orientation == "transposed" else "")
    spelling += "_grouped_by_expert" if b_layout == "grouped_by_expert" else ""
    return spelling + ("_non_gated" if "up_proj" in reading.roles else ""), items


def _fused_pairs(module: str, tensors: ContainerTensors) -> list[FusedPair]:
    tables: list[tuple[Projection | None, dict[Matrix, TensorEntry]]] = [
        (None, tensors.inner),
        (None, tensors.outer),
    ]
    for projection in ("gate_up_proj", "down_proj"):
        table = {m: e for (p, m), e in tensors.parameter.items() if p == projection}
        tables.append((projection, table))
    pairs = []
    for named, table in tables:
        if len(table) == 1:
            (entry,) = table.values()
            raise LayoutError(
                f"{module}: {entry.name} has no partner (lora_A and lora_B belong together).",
                hint="The file is incomplete; save the adapter again.",
            )
        if table:
            pairs.append(FusedPair(table["lora_A"], table["lora_B"], named))
    for pair in pairs:
        for entry in (pair.lora_a, pair.lora_b):
            if len(entry.shape) != 2:
                raise _bad_shape(entry, "two dimensions, [experts * r, in] and [out, r * experts]")
        if pair.lora_a.shape[0] != pair.lora_b.shape[1]:
            raise LayoutError(
                f"{pair.lora_a.name} {list(pair.lora_a.shape)} and {pair.lora_b.name} "
                f"{list(pair.lora_b.shape)}: experts * r differs.",
                hint="The file is damaged; save the adapter again.",
            )
    return pairs


def _lora_b_layout(module: str, config: LoraConfig, options: LayoutOptions) -> LoraBLayout:
    marker, chosen = config.lora_b_layout, options.lora_b_layout
    if marker and chosen and marker != chosen:
        raise LayoutError(
            f"{module}: adapter_config.json says lora_B_layout={marker}, --lora-b-layout says "
            f"{chosen}.",
            hint="Leave the option out to follow the adapter.",
        )
    if marker or chosen:
        return chosen or marker  # type: ignore[return-value]
    if not config.saved_by_peft:
        raise LayoutError(
            f"{module}: the columns of the fused lora_B can be in two orders, and "
            "adapter_config.json was not written by PEFT and names none.",
            hint="Give --lora-b-layout: rank_major is PEFT's order, grouped_by_expert is "
            "Megatron-Bridge's and older Unsloth's.",
        )
    return "rank_major"


def _fused_factors(
    pair: FusedPair,
    role: Projection,
    name: str,
    reading: Reading,
    b_layout: LoraBLayout,
    lora_rank: int,
) -> list[_Found]:
    total, out = pair.lora_a.shape[0], pair.lora_b.shape[0]
    if total % lora_rank:
        raise LayoutError(
            f"{pair.lora_a.name}: {total} rows are no multiple of r={lora_rank}.",
            hint="Is adapter_config.json the one of this file (r, rank_pattern)?",
        )
    experts = tuple(range(total // lora_rank))
    inside = pair.lora_a.shape[1]
    grouped = b_layout == "grouped_by_expert"
    if reading.orientation == "standard":
        lora_a = SourceFactor(pair.lora_a, name, "erc", experts, lora_rank, inside)
        lora_b = SourceFactor(
            pair.lora_b, name, "rec" if grouped else "rce", experts, out, lora_rank
        )
    else:  # delta = (B @ A)^T, so each takes the other's place, transposed
        lora_a = SourceFactor(
            pair.lora_b, name, "cer" if grouped else "cre", experts, lora_rank, out
        )
        lora_b = SourceFactor(pair.lora_a, name, "ecr", experts, inside, lora_rank)
    return [((role, "lora_A"), [lora_a]), ((role, "lora_B"), [lora_b])]


def _bad_shape(entry: TensorEntry, wanted: str) -> LayoutError:
    return LayoutError(
        f"{entry.name} has shape {list(entry.shape)}, not {wanted}.",
        hint="docs/adapter-layouts.md lists the layouts that lorashard reads.",
    )
