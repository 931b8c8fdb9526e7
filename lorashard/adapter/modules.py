"""One experts container -> its stacks: what becomes one tensor per rank. Pure.

Legend: E experts, r LoRA rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lorashard.adapter.config import LoraConfig
from lorashard.adapter.containers import ContainerFactors, FactorName, SourceFactor
from lorashard.adapter.keys import Matrix, Projection
from lorashard.adapter.options import GateUp
from lorashard.adapter.source_layout import SourceLayout
from lorashard.errors import LayoutError
from lorashard.rules import PATTERNS_IGNORED

PROJECTIONS: tuple[Projection, ...] = ("gate_proj", "up_proj", "gate_up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class FactorStack:
    """All experts' lora_A or lora_B of one projection: one tensor [E_local, rows, cols] per rank.

    rows and cols are the largest; a smaller r is padded. A shared stack holds one factor for all
    experts and becomes [1, rows, cols] in the replicated file.
    """

    module: str
    projection: Projection
    matrix: Matrix
    dtype: str
    rows: int
    cols: int
    sources: tuple[SourceFactor, ...]

    @property
    def name(self) -> str:
        """The tensor's name in the shard files."""
        return f"{self.module}.{self.projection}.{self.matrix}"

    @property
    def shared(self) -> bool:
        """Whether all experts have the one factor."""
        return self.sources[0].experts is None

    @property
    def experts(self) -> tuple[int, ...]:
        """The experts that the adapter trains, in the order of the sources; not those with r=0."""
        return tuple(
            expert
            for source in self.sources
            if source.rows and source.cols
            for expert in source.experts or ()
        )


@dataclass(frozen=True, slots=True)
class ExpertModule:
    """One experts container.

    scaling: per projection one number, or [E] numbers where the experts differ.
    expert_lora_ranks: per projection {expert: r} for the experts whose r is not the stack's
    (0: not trained).
    absent_experts: experts for which no projection is trained.
    """

    name: str
    layout: Literal["per_expert", "fused"]
    source_layout: SourceLayout
    gate_up: GateUp
    lora_rank: int
    scaling: Mapping[Projection, float | tuple[float, ...]]
    expert_lora_ranks: Mapping[Projection, Mapping[int, int]]
    absent_experts: tuple[int, ...]
    stacks: tuple[FactorStack, ...]

    @property
    def stacks_by_factor(self) -> dict[FactorName, FactorStack]:
        """The stacks by what they are: ("down_proj", "lora_A") -> its stack."""
        return {(stack.projection, stack.matrix): stack for stack in self.stacks}


def gate_up_rows(rows: int, *, interleaved: bool) -> tuple[range, range]:
    """The gate's and the up projection's rows among the `rows` of a gate_up_proj."""
    if interleaved:
        return range(0, rows, 2), range(1, rows, 2)
    return range(rows // 2), range(rows // 2, rows)


def build_module(
    name: str,
    container: ContainerFactors,
    num_experts: int,
    gate_up: GateUp | None,
    config: LoraConfig,
) -> ExpertModule | None:
    """Join a container's factors into stacks and check that they fit together; None if all r are 0.

    gate_up: how the base model stores gate and up rows, None = not known.
    Raises LayoutError for a factor without its partner, or ranks and shapes that disagree.
    """
    trained_projections = {projection for projection, _ in container.factors}
    projections = [p for p in PROJECTIONS if p in trained_projections]
    if "gate_up_proj" in projections and {"gate_proj", "up_proj"} & trained_projections:
        raise LayoutError(
            f"{name}: gate_up_proj as well as gate_proj or up_proj.",
            hint="They name the same weights; keep only one of them.",
        )
    stacks: list[FactorStack] = []
    scaling: dict[Projection, float | tuple[float, ...]] = {}  # of what is trained, as `stacks`
    odd_ranks: dict[Projection, dict[int, int]] = {}
    for projection in projections:
        sources_a = container.factors.get((projection, "lora_A"), ())
        sources_b = container.factors.get((projection, "lora_B"), ())
        trained = _pair_up(f"{name}.{projection}", sources_a, sources_b)
        if not container.source_layout.rank_is_from_tensors:
            _check_config_ranks(trained, config)
        lora_rank = max(factor.lora_rank for factor in trained.values())
        if lora_rank == 0:
            continue
        stacks.append(_build_stack(name, projection, "lora_A", sources_a, lora_rank))
        stacks.append(_build_stack(name, projection, "lora_B", sources_b, lora_rank))
        scaling[projection] = _scaling(trained, num_experts, config)
        if None not in trained:
            ranks = {e: trained[e].lora_rank if e in trained else 0 for e in range(num_experts)}
            odd_ranks[projection] = {e: r for e, r in ranks.items() if r != lora_rank}
    absent = [
        expert
        for expert in range(num_experts)
        if all(odd_ranks.get(p, {}).get(expert) == 0 for p in scaling)
    ]
    if not stacks:
        return None
    order = _gate_up(container, tuple(scaling), gate_up)
    _check_features(stacks, has_gate=order != "none")
    return ExpertModule(
        name=name,
        layout="fused" if container.fused else "per_expert",
        source_layout=container.source_layout,
        gate_up=order,
        lora_rank=max(stack.rows for stack in stacks if stack.matrix == "lora_A"),
        scaling=scaling,
        expert_lora_ranks={p: odd for p, odd in odd_ranks.items() if odd},
        absent_experts=tuple(absent),
        stacks=tuple(stacks),
    )


@dataclass(frozen=True, slots=True)
class _TrainedPair:
    """What one expert trains of a projection: its r and the name PEFT's patterns see.

    features: the larger of its in and out features, as the axes are read.
    """

    lora_rank: int
    features: int
    module: str
    tensor: str


def _pair_up(
    where: str, sources_a: Sequence[SourceFactor], sources_b: Sequence[SourceFactor]
) -> dict[int | None, _TrainedPair]:
    """Expert -> what it trains; the one key None if both factors are shared by all experts."""
    by_expert_a = _by_expert(where, "lora_A", sources_a)
    by_expert_b = _by_expert(where, "lora_B", sources_b)
    numbered = {e for e in (*by_expert_a, *by_expert_b) if e is not None}
    trained: dict[int | None, _TrainedPair] = {}
    for expert in sorted(numbered) or (None,):
        lora_a = by_expert_a.get(expert) or by_expert_a.get(None)
        lora_b = by_expert_b.get(expert) or by_expert_b.get(None)
        if lora_a is None or lora_b is None:
            missing, present = ("lora_A", lora_b) if lora_a is None else ("lora_B", lora_a)
            tensor = present.entry.name if present else "nothing"
            who = "" if expert is None else f" of expert {expert}"
            raise LayoutError(
                f"{where}: {missing}{who} is missing ({tensor} is present).",
                hint="The file is incomplete; save the adapter again.",
            )
        if lora_a.rows != lora_b.cols:
            raise LayoutError(
                f"{lora_a.entry.name} has r={lora_a.rows}, {lora_b.entry.name} r={lora_b.cols}.",
                hint="The two do not belong together; save the adapter again.",
            )
        named = lora_a if lora_a.experts is not None else lora_b
        features = max(lora_a.cols, lora_b.rows)
        trained[expert] = _TrainedPair(lora_a.rows, features, named.module, named.entry.name)
    return trained


def _by_expert(
    where: str, matrix: Matrix, sources: Sequence[SourceFactor]
) -> dict[int | None, SourceFactor]:
    by_expert: dict[int | None, SourceFactor] = {}
    for source in sources:
        for expert in (None,) if source.experts is None else source.experts:
            by_expert[expert] = source
    if None in by_expert and len(by_expert) > 1:
        raise LayoutError(
            f"{where} {matrix}: both a factor shared by all experts and factors for single experts.",
            hint="Keep one of them; lorashard does not guess which is meant.",
        )
    return by_expert


def _check_config_ranks(trained: Mapping[int | None, _TrainedPair], config: LoraConfig) -> None:
    for expert, factor in trained.items():
        expected = config.rank_of(factor.module)
        if factor.lora_rank != expected and expert is None:
            raise LayoutError(
                f"{factor.tensor} has r={factor.lora_rank}, adapter_config.json says {expected}.",
                hint="It may hold the factors of all experts, in a layout that lorashard does not "
                "know, rather than one factor that they share. Save the adapter with PEFT.",
            )
        if factor.lora_rank != expected and factor.lora_rank > factor.features:
            raise LayoutError(
                f"{factor.tensor} has r={factor.lora_rank} and no more than {factor.features} features, "
                f"adapter_config.json says r={expected}.",
                hint="Its axes may be the other way round, in a layout that lorashard does not know. "
                "Save the adapter with PEFT.",
            )
        if factor.lora_rank != expected:
            raise LayoutError(
                f"{factor.tensor} has r={factor.lora_rank}, adapter_config.json says {expected}.",
                hint="The scaling alpha / r would be a guess. State the real r in "
                'adapter_config.json, e.g. "rank_pattern": '
                f'{{"{factor.module.rpartition(".")[2]}": {factor.lora_rank}}}.',
                rule=PATTERNS_IGNORED,
            )


def _build_stack(
    module: str,
    projection: Projection,
    matrix: Matrix,
    sources: Sequence[SourceFactor],
    lora_rank: int,
) -> FactorStack:
    first = sources[0]
    features = first.cols if matrix == "lora_A" else first.rows
    for source in sources:
        own = source.cols if matrix == "lora_A" else source.rows
        if own != features or source.entry.dtype != first.entry.dtype:
            raise LayoutError(
                f"{source.entry.name} is {source.entry.dtype} with {own} features, "
                f"{first.entry.name} is {first.entry.dtype} with {features}.",
                hint="All experts of one projection must have one shape and dtype. Two banks of experts "
                "in one list (ERNIE-4.5-VL: text, then vision) are not read; vLLM keeps them apart.",
            )
    rows, cols = (lora_rank, features) if matrix == "lora_A" else (features, lora_rank)
    dtype = first.entry.dtype
    return FactorStack(module, projection, matrix, dtype, rows, cols, tuple(sources))


def _check_features(stacks: Sequence[FactorStack], *, has_gate: bool) -> None:
    """Raise LayoutError where the sizes are those of two different models.

    Gate and up take as many features as down gives: the hidden size, or a latent one. Down takes as
    many as each of them gives.
    """
    first: dict[bool, tuple[int, str]] = {}
    for stack in stacks:
        side, count = ("input", stack.cols) if stack.matrix == "lora_A" else ("output", stack.rows)
        is_both = has_gate and (stack.projection, stack.matrix) == ("gate_up_proj", "lora_B")
        said = f"{stack.sources[0].entry.name} has {count} {side} features"
        size, said = (count, f"{said} of gate and up together") if is_both else (2 * count, said)
        is_inner = (stack.projection == "down_proj") == (stack.matrix == "lora_A")
        other_size, other_said = first.setdefault(is_inner, (size, said))
        if size != other_size:
            raise LayoutError(
                f"{other_said}, {said}.",
                hint="Gate and up take as many as down gives, and down as many as each of them gives. "
                "These tensors are of two models, or of a layout that lorashard does not know.",
            )


def _scaling(
    trained: Mapping[int | None, _TrainedPair], num_experts: int, config: LoraConfig
) -> float | tuple[float, ...]:
    """One number, or one per expert (0 where it trains nothing) if the trained ones differ."""
    by_expert = {
        expert: config.scaling_of(pair.module, pair.lora_rank)
        for expert, pair in trained.items()
        if pair.lora_rank
    }
    values = set(by_expert.values())
    if len(values) == 1:
        return values.pop()
    return tuple(by_expert.get(expert, 0.0) for expert in range(num_experts))


def _gate_up(
    container: ContainerFactors, projections: tuple[Projection, ...], gate_up: GateUp | None
) -> GateUp:
    if container.non_gated or (gate_up == "none" and "gate_proj" not in projections):
        return "none"
    if "gate_up_proj" in projections:
        return gate_up if gate_up in ("concatenated", "interleaved") else "concatenated"
    if projections == ("down_proj",) and container.fused:
        return gate_up or "concatenated"
    return "split"
