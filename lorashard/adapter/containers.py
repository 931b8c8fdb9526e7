"""One experts container's tensors -> where each expert's factor is in them. Pure.

Legend: E experts, r LoRA rank, H hidden size. Every factor is described in one orientation,
lora_A [r, in] and lora_B [out, r]; `axes` is the order of the source tensor's axes. The layout
numbers are those of docs/adapter-layouts.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Literal, NamedTuple, TypeVar

from lorashard.adapter.config import LoraConfig
from lorashard.adapter.fused_pairs import FusedPair, Reading, read_fused
from lorashard.adapter.keys import PEFT_PREFIX, ExpertKey, Matrix, Projection, clean_name
from lorashard.adapter.options import LayoutOptions, LoraBLayout, Orientation
from lorashard.adapter.source_layout import SourceLayout, Storage
from lorashard.errors import LayoutError
from lorashard.header import TensorEntry
from lorashard.rules import FUSED_ORDER

MAX_EXPERTS = 2**16

# Order of a source tensor's axes, slowest first: e expert, r row, c column of the factor.
# erc is the shard's own order, so its experts are contiguous byte ranges.
Axes = Literal["erc", "ecr", "rce", "rec", "cre", "cer"]
FactorName = tuple[Projection, Matrix]

_Key = TypeVar("_Key")
_NamedSources = tuple[FactorName, "list[SourceFactor]"]


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
    """All factors of one container, and how its writer stored them.

    non_gated: whether the container's own tensors show that its experts have no gate.
    """

    source_layout: SourceLayout
    non_gated: bool
    factors: Mapping[FactorName, tuple[SourceFactor, ...]]

    @property
    def fused(self) -> bool:
        """Whether gate and up share a factor pair, as far as the tensors show."""
        return self.source_layout.has_fused_tensors or any(
            projection == "gate_up_proj" for projection, _ in self.factors
        )


@dataclass(slots=True)
class ContainerTensors:
    """The tensors of one container by the kind of their key, while they are collected."""

    per_expert: dict[FactorName, dict[int, TensorEntry]] = field(default_factory=dict)
    stacked: dict[FactorName, TensorEntry] = field(default_factory=dict)
    native: dict[FactorName, TensorEntry] = field(default_factory=dict)
    parameter: dict[FactorName, TensorEntry] = field(default_factory=dict)
    inner: dict[Matrix, TensorEntry] = field(default_factory=dict)
    outer: dict[Matrix, TensorEntry] = field(default_factory=dict)
    has_empty_w3: bool = False

    @property
    def storages(self) -> tuple[Storage, ...]:
        """The kinds of tensors in it; () if there are only tensors without elements."""
        present: dict[Storage, bool] = {
            "per_expert": bool(self.per_expert),
            "stacked": bool(self.stacked),
            "native": bool(self.native),
            "fused": bool(self.inner or self.outer or self.parameter),
        }
        return tuple(storage for storage, is_present in present.items() if is_present)

    def add(self, key: ExpertKey, entry: TensorEntry) -> None:
        """File a tensor under its key. Raises LayoutError if another has the same key."""
        if key.projection is None:
            if 0 in entry.shape:
                raise _bad_shape(entry, "at least one row and column")
            _add_new(self.inner if key.kind == "inner" else self.outer, key.matrix, entry)
            return
        name = (key.projection, key.matrix)
        if key.expert is not None:
            if 0 in entry.shape and not is_untrained(key.matrix, entry):
                raise _bad_shape(entry, "at least one row and column")
            _add_new(self.per_expert.setdefault(name, {}), key.expert, entry)
        elif 0 in entry.shape:
            # Tinker writes an empty w3 for experts without a gate.
            self.has_empty_w3 |= _peft_module(entry).endswith(".w3")
        else:
            tables = {"stacked": self.stacked, "native": self.native, "parameter": self.parameter}
            _add_new(tables[key.kind], name, entry)


def is_untrained(matrix: Matrix, entry: TensorEntry) -> bool:
    """Whether a factor has r=0: [0, in] or [out, 0], as mergekit writes what did not change."""
    if len(entry.shape) != 2:
        return False
    lora_rank, features = entry.shape if matrix == "lora_A" else reversed(entry.shape)
    return lora_rank == 0 and features > 0


def read_container(
    module: str,
    tensors: ContainerTensors,
    config: LoraConfig,
    options: LayoutOptions,
    hidden_size_hint: int | None,
) -> ContainerFactors:
    """Find where each factor of one container is.

    hidden_size_hint: H as far as other tensors of the adapter show it.
    Raises LayoutError for shapes that fit no layout, or more than one.
    """
    factors: dict[FactorName, list[SourceFactor]] = {}
    source_layout = SourceLayout(tensors.storages)
    _add_sources(factors, module, _per_expert(tensors))
    _add_sources(factors, module, _stacked(tensors))
    _add_sources(factors, module, _native(tensors))
    if source_layout.has_fused_tensors:
        pairs = _fused_pairs(module, tensors)
        reading = read_fused(module, pairs, config.target_parameters, options, hidden_size_hint)
        lora_b_layout: LoraBLayout = "rank_major"
        if not all(pair.is_stacked for pair in pairs):
            lora_b_layout = _lora_b_layout(module, config, options)
        _add_sources(factors, module, _fused(module, pairs, reading, lora_b_layout, config))
        source_layout = SourceLayout(
            tensors.storages, reading.orientation, lora_b_layout, "up_proj" in reading.roles
        )
    has_empty_half = tensors.has_empty_w3 and not any(name[0] == "up_proj" for name in factors)
    if has_empty_half:  # the writer's w1 is then the up projection
        factors = {("up_proj" if p == "gate_proj" else p, m): f for (p, m), f in factors.items()}
    return ContainerFactors(
        source_layout=source_layout,
        non_gated=has_empty_half or source_layout.up_without_gate,
        factors={name: tuple(sources) for name, sources in factors.items()},
    )


def _add_new(table: dict[_Key, TensorEntry], key: _Key, entry: TensorEntry) -> None:
    if key in table:
        raise LayoutError(
            f"{table[key].name} and {entry.name} name the same factor.",
            hint="Keep one of them; lorashard does not guess which is meant.",
        )
    table[key] = entry


def _add_sources(
    factors: dict[FactorName, list[SourceFactor]], module: str, new: Iterable[_NamedSources]
) -> None:
    for name, sources in new:
        if name in factors:
            raise LayoutError(
                f"{module}.{name[0]} {name[1]} is stored twice: {factors[name][0].entry.name} "
                f"and {sources[0].entry.name}.",
                hint="Keep one of them; lorashard does not guess which is meant.",
            )
        factors[name] = sources


def _peft_module(entry: TensorEntry) -> str:
    return clean_name(entry.name).removeprefix(PEFT_PREFIX).rpartition(".lora_")[0]


def _per_expert(tensors: ContainerTensors) -> Iterable[_NamedSources]:
    """L1, the per-expert side of L9, L15: [r, in] and [out, r] for each expert."""
    for name, entries in tensors.per_expert.items():
        sources = []
        for expert in sorted(entries):
            entry = entries[expert]
            if len(entry.shape) != 2:
                raise _bad_shape(entry, "two dimensions")
            rows, cols = entry.shape
            sources.append(SourceFactor(entry, _peft_module(entry), "erc", (expert,), rows, cols))
        yield name, sources


def _stacked(tensors: ContainerTensors) -> Iterable[_NamedSources]:
    """L8 to L12, L14: [E, r, in] and [E, out, r]; E = 1 or no E axis at all means shared.

    A lora_B may also be [out, r, E], as in L16.
    """
    for name, entry in tensors.stacked.items():
        if len(entry.shape) not in (2, 3):
            raise _bad_shape(entry, "two or three dimensions")
        partner = tensors.stacked.get((name[0], "lora_A"))
        if name[1] == "lora_B" and partner and _has_experts_last(partner, entry):
            rows, cols, num_experts = entry.shape
            everyone = _first_experts(entry, num_experts)
            yield name, [SourceFactor(entry, _peft_module(entry), "rce", everyone, rows, cols)]
            continue
        *expert_axis, rows, cols = entry.shape
        shared = expert_axis in ([], [1])
        experts = None if shared else _first_experts(entry, expert_axis[0])
        yield name, [SourceFactor(entry, _peft_module(entry), "erc", experts, rows, cols)]


def _has_experts_last(lora_a: TensorEntry, lora_b: TensorEntry) -> bool:
    """Whether lora_B is [out, r, E] beside lora_A [E, r, in], and cannot be [E, out, r]."""
    if len(lora_a.shape) != 3 or len(lora_b.shape) != 3:
        return False
    num_experts, lora_rank, _ = lora_a.shape
    if lora_b.shape[2] == lora_rank and (num_experts == 1 or lora_b.shape[0] in (1, num_experts)):
        return False
    return lora_b.shape[1] == lora_rank and num_experts in (1, lora_b.shape[2])


def _native(tensors: ContainerTensors) -> Iterable[_NamedSources]:
    """L13: lora_A [E, in, r] and lora_B [E, r, out], both the other way round."""
    for name, entry in tensors.native.items():
        if len(entry.shape) != 3:
            raise _bad_shape(entry, "three dimensions")
        num_experts, cols, rows = entry.shape
        experts = _first_experts(entry, num_experts)
        module = clean_name(entry.name).removeprefix(PEFT_PREFIX).rpartition(".lora_")[0]
        yield name, [SourceFactor(entry, module, "ecr", experts, rows, cols)]


def _fused(
    module: str,
    pairs: Sequence[FusedPair],
    reading: Reading,
    lora_b_layout: LoraBLayout,
    config: LoraConfig,
) -> Iterable[_NamedSources]:
    """L2 to L7: lora_A [E*r, x] and lora_B [y, r*E] (or [y, E*r], grouped by expert); L16."""
    for pair, role in zip(pairs, reading.roles):
        # PEFT matches its patterns against "<module>.<parameter>".
        name = _peft_module(pair.lora_a) + ".weight" if pair.projection else f"{module}.{role}"
        if config.moe_rank_scaling and not config.states_rank_of(name):
            raise LayoutError(
                f"{pair.lora_a.name}: adapter_config.json says moe_rank_scaling, so r={config.lora_rank} "
                "is not the r of experts, which is r // num_experts_per_tok of the model.",
                hint="State it in rank_pattern, with the key "
                f'"{".".join(name.removesuffix(".weight").split(".")[-2:])}", and give `model`.',
            )
        lora_a, lora_b = _fused_factors(
            pair, name, reading.orientation, lora_b_layout, config.rank_of(name)
        )
        yield (role, "lora_A"), [lora_a]
        yield (role, "lora_B"), [lora_b]


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
                f"{module}: {entry.name} has no partner (lora_A and lora_B come in pairs).",
                hint="The file is incomplete; save the adapter again.",
            )
        if table:
            pairs.append(FusedPair(table["lora_A"], table["lora_B"], named))
    for pair in pairs:
        if pair.is_stacked:
            _check_stacked_pair(pair)
            continue
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


def _check_stacked_pair(pair: FusedPair) -> None:
    num_experts, lora_rank, _ = pair.lora_a.shape
    if pair.lora_b.shape[1:] != (lora_rank, num_experts):
        expected = f"[out, {lora_rank}, {num_experts}], [out, r, experts]"
        raise _bad_shape(pair.lora_b, f"{expected}, beside {pair.lora_a.name} [experts, r, in]")


def _lora_b_layout(module: str, config: LoraConfig, options: LayoutOptions) -> LoraBLayout:
    marker, chosen = config.lora_b_layout, options.lora_b_layout
    if marker and chosen and marker != chosen:
        raise LayoutError(
            f"{module}: adapter_config.json says lora_B_layout={marker}, `lora_b_layout` says "
            f"{chosen}.",
            hint="Leave the option out to follow the adapter.",
            rule=FUSED_ORDER,
        )
    if marker or chosen:
        return chosen or marker  # type: ignore[return-value]
    if not config.saved_by_peft:
        raise LayoutError(
            f"{module}: the columns of the fused lora_B can be in two orders, and "
            "adapter_config.json, which PEFT did not write, does not say which.",
            hint="Give `lora_b_layout`: rank_major is PEFT's order, grouped_by_expert is "
            "Megatron-Bridge's and older Unsloth's.",
            rule=FUSED_ORDER,
        )
    return "rank_major"


def _fused_factors(
    pair: FusedPair,
    module: str,
    orientation: Orientation,
    lora_b_layout: LoraBLayout,
    lora_rank: int,
) -> tuple[SourceFactor, SourceFactor]:
    """The lora_A and the lora_B of all experts that a pair holds."""
    *_, in_features = pair.lora_a.shape
    out_features = pair.lora_b.shape[0]
    if pair.is_stacked:
        _, lora_rank, _ = pair.lora_a.shape
        lora_b_layout = "rank_major"
    total_rows = prod(pair.lora_a.shape[:-1])
    if lora_rank == 0 or total_rows % lora_rank:
        raise LayoutError(
            f"{pair.lora_a.name}: {total_rows} rows are not a multiple of r={lora_rank}.",
            hint="Does adapter_config.json belong to this file (r, rank_pattern)?",
        )
    experts = _first_experts(pair.lora_a, total_rows // lora_rank)
    grouped = lora_b_layout == "grouped_by_expert"
    if orientation == "standard":
        axes: Axes = "rec" if grouped else "rce"
        return (
            SourceFactor(pair.lora_a, module, "erc", experts, lora_rank, in_features),
            SourceFactor(pair.lora_b, module, axes, experts, out_features, lora_rank),
        )
    # delta = (B @ A)^T, so each takes the other's place, transposed
    axes = "cer" if grouped else "cre"
    return (
        SourceFactor(pair.lora_b, module, axes, experts, lora_rank, out_features),
        SourceFactor(pair.lora_a, module, "ecr", experts, in_features, lora_rank),
    )


def _first_experts(entry: TensorEntry, num_experts: int) -> tuple[int, ...]:
    if num_experts > MAX_EXPERTS:
        raise LayoutError(
            f"The adapter would have {num_experts} experts, more than any model has "
            f"({entry.name} {list(entry.shape)}).",
            hint="Does adapter_config.json belong to this file (r, rank_pattern)?",
        )
    return tuple(range(num_experts))


def _bad_shape(entry: TensorEntry, wanted: str) -> LayoutError:
    return LayoutError(
        f"{entry.name} has shape {list(entry.shape)}; expected {wanted}.",
        hint="docs/adapter-layouts.md lists the layouts that lorashard reads.",
    )
