"""Layouts, placements and manifests -> the values that a page of `plan` or `inspect` is drawn from. Pure.

Legend: E experts, r LoRA rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lorashard.adapter.keys import Projection
from lorashard.adapter.layout import AdapterLayout
from lorashard.dtypes import ELEMENT_SIZE, FLOAT_DTYPES
from lorashard.shards.manifest import Manifest
from lorashard.shards.placement import Placement, Ranks

LEVELS = 5  # shades of a map
NOT_HERE, UNTRAINED = -1, 0  # the levels below the shades 1 to LEVELS


@dataclass(frozen=True, slots=True)
class ModuleExperts:
    """The experts of one module: where they are, and how much of each was trained.

    ranks: empty for an adapter that is not split.
    trained_bytes: [E] bytes of the factors that are an expert's own, without the zeros that pad a
    smaller r. untrained: the experts for which no projection is trained.
    """

    name: str
    ranks: Ranks
    trained_bytes: tuple[int, ...]
    untrained: frozenset[int]

    def differs_from(self, other: ModuleExperts) -> bool:
        """Whether more than the name differs."""
        return (self.ranks, self.trained_bytes, self.untrained) != (
            other.ranks, other.trained_bytes, other.untrained,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class MapRow:
    """One row of a map: a rank, or modules that are alike.

    experts: those that are here; of a rank whose modules differ, those that any of them puts here.
    levels: [E] NOT_HERE, UNTRAINED, or 1 to LEVELS by bytes; the largest of the map has LEVELS.
    partly: the experts that are here, or are trained, in some of the modules only.
    """

    name: str
    experts: tuple[int, ...]
    levels: tuple[int, ...]
    partly: frozenset[int]
    trained_bytes: int


@dataclass(frozen=True, slots=True)
class ExpertMap:
    """Experts (columns) by ranks or modules (rows).

    modules: those that it is about. num_rows: how many there are; `rows` may be the first of them.
    """

    modules: tuple[str, ...]
    num_experts: int
    num_rows: int
    rows: tuple[MapRow, ...]


@dataclass(frozen=True, slots=True)
class _Stack:
    """One factor of all experts: its projection, r, features, and bytes of an element."""

    projection: Projection
    lora_rank: int
    features: int
    element_size: int


def experts_of_layout(
    layout: AdapterLayout, placement: Placement | None = None, dtype: str | None = None
) -> tuple[ModuleExperts, ...]:
    """The experts of an adapter. dtype: what a split casts to, as safetensors names it."""
    return tuple(
        ModuleExperts(
            module.name,
            () if placement is None else placement.ranks_of(module.name),
            _trained_bytes(
                (
                    _Stack(
                        stack.projection,
                        stack.rows if stack.matrix == "lora_A" else stack.cols,
                        stack.cols if stack.matrix == "lora_A" else stack.rows,
                        ELEMENT_SIZE[dtype if dtype and stack.dtype in FLOAT_DTYPES else stack.dtype],
                    )
                    for stack in module.stacks
                    if not stack.shared
                ),
                module.expert_lora_ranks,
                layout.num_experts,
            ),
            frozenset(module.absent_experts),
        )
        for module in layout.modules
    )  # fmt: skip


def experts_of_shards(manifest: Manifest) -> tuple[ModuleExperts, ...]:
    """The experts of a shard directory, by its manifest alone; whether that is right, `verify` says."""
    placement = manifest.placement
    _, first_rank, *_ = manifest.files.values()  # every rank has these tensors, of its own experts
    tensors = {entry.name: entry for entry in first_rank.tensors}
    modules = []
    for name, info in manifest.modules.items():
        stacks = []
        for projection in info.scaling:
            for matrix in ("lora_A", "lora_B"):
                entry = tensors.get(f"{name}.{projection}.{matrix}")
                if entry is None or len(entry.shape) != 3:
                    continue  # shared by all experts, so in the replicated file
                _, rows, cols = entry.shape
                lora_rank, features = (rows, cols) if matrix == "lora_A" else (cols, rows)
                element_size = ELEMENT_SIZE.get(entry.dtype, 0)
                stacks.append(_Stack(projection, lora_rank, features, element_size))
        modules.append(
            ModuleExperts(
                name,
                placement.ranks_of(name),
                _trained_bytes(stacks, info.expert_lora_ranks, placement.num_experts),
                frozenset(info.absent_experts),
            )
        )
    return tuple(modules)


def map_of_ranks(modules: Sequence[ModuleExperts], most_rows: int) -> ExpertMap:
    """Experts by the first `most_rows` ranks, with the bytes of all the modules together."""
    num_experts, ep_size = len(modules[0].trained_bytes), len(modules[0].ranks)
    shown = range(min(ep_size, most_rows))
    totals = [[0] * num_experts for _ in shown]
    times_here = [[0] * num_experts for _ in shown]
    times_trained = [[0] * num_experts for _ in shown]
    for module, count in _alike(modules):
        for ep_rank in shown:
            for expert in module.ranks[ep_rank]:
                totals[ep_rank][expert] += module.trained_bytes[expert] * count
                times_here[ep_rank][expert] += count
                times_trained[ep_rank][expert] += 0 if expert in module.untrained else count
    most = max(map(max, totals), default=0)
    one_order = all(module.ranks == modules[0].ranks for module in modules)
    rows = []
    for ep_rank in shown:
        here, trained = times_here[ep_rank], times_trained[ep_rank]
        experts = tuple(expert for expert in range(num_experts) if here[expert])
        rows.append(
            MapRow(
                f"rank {ep_rank}",
                modules[0].ranks[ep_rank] if one_order else experts,
                tuple(
                    _level(totals[ep_rank][e], most, is_trained=trained[e] > 0)
                    if here[e]
                    else NOT_HERE
                    for e in range(num_experts)
                ),
                frozenset(e for e in experts if (trained[e] or here[e]) < len(modules)),
                sum(totals[ep_rank]),
            )
        )
    return ExpertMap(tuple(m.name for m in modules), num_experts, ep_size, tuple(rows))


def groups_of_modules(modules: Sequence[ModuleExperts]) -> tuple[tuple[ModuleExperts, ...], ...]:
    """The modules in groups that differ in nothing but their name."""
    groups: dict[object, list[ModuleExperts]] = {}
    for module in modules:
        key = (module.ranks, module.trained_bytes, module.untrained)
        groups.setdefault(key, []).append(module)
    return tuple(map(tuple, groups.values()))


def map_of_modules(modules: Sequence[ModuleExperts], most_rows: int) -> ExpertMap:
    """Experts by modules, a row for each of the first `most_rows` runs of modules that are alike."""
    num_experts = len(modules[0].trained_bytes)
    most = max(max(module.trained_bytes) for module in modules)
    runs = _alike(modules)
    rows = tuple(
        MapRow(
            module.name + (f" (+{count - 1})" if count > 1 else ""),
            tuple(e for e in range(num_experts) if e not in module.untrained),
            tuple(
                _level(size, most, is_trained=e not in module.untrained)
                for e, size in enumerate(module.trained_bytes)
            ),
            frozenset(),
            sum(module.trained_bytes) * count,
        )
        for module, count in runs[:most_rows]
    )
    return ExpertMap(tuple(m.name for m in modules), num_experts, len(runs), rows)


def _alike(modules: Iterable[ModuleExperts]) -> list[tuple[ModuleExperts, int]]:
    """The first of each run of modules that differ in nothing but their name, and how many."""
    runs: list[tuple[ModuleExperts, int]] = []
    for module in modules:
        if runs and not module.differs_from(runs[-1][0]):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((module, 1))
    return runs


def _level(size_bytes: int, most: int, *, is_trained: bool) -> int:
    """1 to LEVELS in equal steps up to the largest; UNTRAINED for nothing."""
    return max(1, -(-size_bytes * LEVELS // max(most, 1))) if is_trained else UNTRAINED


def _trained_bytes(
    stacks: Iterable[_Stack],
    expert_lora_ranks: Mapping[Projection, Mapping[int, int]],
    num_experts: int,
) -> tuple[int, ...]:
    whole, less = 0, [0] * num_experts
    for stack in stacks:
        bytes_of_one = stack.features * stack.element_size  # for each 1 of r
        whole += stack.lora_rank * bytes_of_one
        for expert, lora_rank in expert_lora_ranks.get(stack.projection, {}).items():
            if expert < num_experts:  # a damaged manifest may name others
                less[expert] += (stack.lora_rank - lora_rank) * bytes_of_one
    return tuple(whole - missing for missing in less)
