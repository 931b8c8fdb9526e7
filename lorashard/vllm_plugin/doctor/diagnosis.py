"""What is wrong, and what the plugin would do with these flags and this adapter. Pure.

`survey.py` looks; what it found is decided on here, for `lorashard doctor` to print.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lorashard.adapter.base_model import ModelFacts
from lorashard.shards.placement import (
    Strategy,
    linear_placement,
    round_robin_placement,
    strategy_in_vllm,
)
from lorashard.vllm_plugin import settings
from lorashard.vllm_plugin.doctor.survey import (
    FIRST_KNOWN,
    LAST_KNOWN,
    FoundAdapter,
    Installation,
    PatchState,
    Release,
    release_number,
)
from lorashard.vllm_plugin.engine.guards import EngineFacts, find_refusals
from lorashard.vllm_plugin.engine.live import LiveExperts
from lorashard.vllm_plugin.load.advice import resplit_advice
from lorashard.vllm_plugin.load.assembly import Assembly
from lorashard.vllm_plugin.load.fill import LayerPlan
from lorashard.vllm_plugin.load.rows import find_runs

_RELEASES = (".".join(map(str, FIRST_KNOWN)), ".".join(map(str, LAST_KNOWN)))
_KNOWN = " to ".join(_RELEASES)


@dataclass(frozen=True, slots=True)
class EngineFlags:
    """vLLM's options, by vLLM's names."""

    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    enable_expert_parallel: bool = False
    enable_eplb: bool = False
    fully_sharded_loras: bool = False
    expert_placement_strategy: Strategy = "linear"
    max_lora_rank: int = 16

    @property
    def ep_size(self) -> int:
        """Number of expert-parallel ranks."""
        ranks = self.tensor_parallel_size * self.data_parallel_size
        return ranks if self.enable_expert_parallel else 1


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that would be refused or is broken. about: vllm, plugin, patches, flags, adapter."""

    about: str
    text: str


@dataclass(frozen=True, slots=True)
class RefusalReport:
    """A refusal; `overridden` where its variable is set, so that vLLM starts all the same."""

    variable: str
    reason: str
    way_out: str
    overridden: bool


@dataclass(frozen=True, slots=True)
class Report:
    """All that is printed.

    vllm_known: whether the release is between known_releases; None = no vLLM. placement: the
    strategy that vLLM would really use. outcome: what the plugin would do with the adapter.
    as_placed: whether each rank would read its own shard; None = no shard directory.
    """

    ok: bool
    installation: Installation
    vllm_known: bool | None
    known_releases: tuple[str, str]
    patches: tuple[PatchState, ...]
    flags: EngineFlags
    ep_size: int
    placement: Strategy
    refusals: tuple[RefusalReport, ...]
    known_once_loaded: tuple[str, ...]
    adapter: FoundAdapter | None
    outcome: str | None
    as_placed: bool | None
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]


def diagnose(
    installation: Installation,
    patches: Sequence[PatchState],
    flags: EngineFlags,
    facts: ModelFacts | None,
    found: FoundAdapter | None,
) -> Report:
    """Decide what is wrong and what the plugin would do. facts: the model's, None = not named."""
    release = release_number(installation.vllm)
    num_experts = facts.num_experts if facts else None
    expert_parallel = flags.ep_size > 1
    refusals = tuple(
        RefusalReport(r.variable, r.reason, r.way_out, r.variable in installation.switched_on)
        for r in find_refusals(
            EngineFacts(expert_parallel, flags.data_parallel_size, flags.enable_eplb, num_experts)
        )
    )
    placement, placement_notes = _live_strategy(flags, facts)
    outcome, as_placed = _outcome(found, flags.ep_size, placement) if found else (None, None)
    problems = [
        *_installation_problems(installation, patches),
        *_flag_problems(flags, refusals),
        *(_adapter_problems(found, flags, num_experts) if found else ()),
    ]
    if as_placed is False and settings.STRICT in installation.switched_on:
        problems.append(Problem("adapter", f"{settings.STRICT} makes it an error: {outcome}"))
    notes = [
        *_installation_notes(installation),
        *placement_notes,
        *_flag_notes(flags, refusals, found),
    ]
    return Report(
        ok=not problems,
        installation=installation,
        vllm_known=None if installation.vllm is None else _is_known(release),
        known_releases=_RELEASES,
        patches=tuple(patches),
        flags=flags,
        ep_size=flags.ep_size,
        placement=placement,
        refusals=refusals,
        known_once_loaded=tuple(_known_once_loaded(release)) if expert_parallel else (),
        adapter=found,
        outcome=outcome,
        as_placed=as_placed,
        problems=tuple(problems),
        notes=tuple(notes),
    )


def _is_known(release: Release | None) -> bool:
    return release is not None and FIRST_KNOWN <= release <= LAST_KNOWN


def _installation_notes(installation: Installation) -> Iterator[str]:
    release = release_number(installation.vllm)
    if installation.vllm and not _is_known(release):
        yield f"vLLM {installation.vllm} is not known to lorashard, {_KNOWN} are."
    for name in installation.unknown:
        yield f"{name} is set, and nothing reads it."


def _installation_problems(
    installation: Installation, patches: Sequence[PatchState]
) -> Iterator[Problem]:
    if installation.vllm is None:
        yield Problem(
            "vllm",
            f"vLLM is not installed in this Python ({installation.executable}). Install lorashard "
            "where vLLM is.",
        )
    release = release_number(installation.vllm)
    if release is not None and release < FIRST_KNOWN:
        yield Problem("vllm", f"vLLM {installation.vllm} is too old for lorashard ({_KNOWN}).")
    if not installation.entry_point:
        yield Problem(
            "plugin", "vLLM would not find the plugin. Install lorashard with pip, beside vLLM."
        )
    if not installation.allowed:
        yield Problem("plugin", "VLLM_PLUGINS leaves the plugin out. Add lorashard to its list.")
    if settings.DISABLE in installation.switched_on:
        yield Problem("plugin", f"{settings.DISABLE} is set: the plugin does nothing.")
    for fault in installation.faults:
        yield Problem("plugin", fault)
    for patch in patches:
        if patch.state == "broken":
            yield Problem("patches", f"{patch.target} cannot be patched: {patch.reason}.")


def _live_strategy(flags: EngineFlags, facts: ModelFacts | None) -> tuple[Strategy, list[str]]:
    """What vLLM makes of the strategy (0.33.0 expert_map_manager.py:116), and what to say of it."""
    if flags.expert_placement_strategy == "linear" or flags.ep_size == 1:
        return "linear", []
    if flags.enable_eplb:
        return "linear", ["With --enable-eplb, vLLM places experts linearly."]
    strategy, note = strategy_in_vllm(flags.expert_placement_strategy, facts)
    return strategy, [note] if note else []


def _flag_problems(flags: EngineFlags, refusals: Sequence[RefusalReport]) -> Iterator[Problem]:
    if flags.enable_eplb and flags.ep_size == 1:
        yield Problem(
            "flags",
            "vLLM itself takes --enable-eplb only with --enable-expert-parallel on several ranks.",
        )
    for refusal in refusals:
        if not refusal.overridden:
            yield Problem(
                "flags",
                f"{refusal.reason} {refusal.way_out} To start all the same, at the risk that its "
                f"name states: {refusal.variable}=1.",
            )


def _flag_notes(
    flags: EngineFlags, refusals: Sequence[RefusalReport], found: FoundAdapter | None
) -> Iterator[str]:
    for refusal in refusals:
        if refusal.overridden:
            yield f"{refusal.variable} is set, so this goes on: {refusal.reason}"
    if flags.enable_expert_parallel and flags.ep_size == 1:
        yield "--enable-expert-parallel does nothing on one rank; -tp N gives their number."
    if flags.fully_sharded_loras and flags.ep_size > 1:
        yield "--fully-sharded-loras: LoRA of experts stays whole, that of dense layers is sharded."
    if found and found.ranks and flags.ep_size == 1:
        yield "Without -tp N --enable-expert-parallel, every rank needs all experts."
    if found and found.separate_gate and 2 * (found.lora_rank or 0) > flags.max_lora_rank:
        yield (
            "Gate and up are separate in the adapter. A model whose LoRA class keeps them together "
            f"(gpt-oss is one) needs --max-lora-rank {2 * (found.lora_rank or 0)} or more for it."
        )


def _known_once_loaded(release: Release | None) -> Iterator[str]:
    yield (
        "Which class computes the experts (quantization and --moe-backend decide), and whether it "
        "applies LoRA. If not, the start is refused."
    )
    if release is None or release < (0, 20, 0):
        yield (
            "Up to vLLM 0.19.1, whether unquantised experts were laid out for FlashInfer. "
            "That is refused."
        )
    if release is None or release < (0, 25, 1):
        yield "Whether gpt-oss runs in the unfused Triton experts. Before 0.25.1 that is refused."
    yield "Whether vLLM's LoRA manager does what the plugin relies on; that is tried out at start."


def _adapter_problems(
    found: FoundAdapter, flags: EngineFlags, num_experts: int | None
) -> Iterator[Problem]:
    if found.error is not None:
        yield Problem("adapter", found.error)
    if found.lora_rank is not None and found.lora_rank > flags.max_lora_rank:
        yield Problem(
            "adapter",
            f"{found.path}: r={found.lora_rank}, the engine has room for {flags.max_lora_rank}. "
            f"Start vLLM with --max-lora-rank {found.lora_rank} or more.",
        )
    if None not in (found.num_experts, num_experts) and found.num_experts != num_experts:
        yield Problem(
            "adapter",
            f"{found.path}: the adapter has {found.num_experts} experts, the model {num_experts}.",
        )


def _outcome(
    found: FoundAdapter, ep_size: int, strategy: Strategy
) -> tuple[str | None, bool | None]:
    """What the plugin would do, and whether shards are as the engine places experts."""
    if found.error is not None:
        return None, None
    if found.ranks:
        advice = _advice(found, ep_size, strategy)
        if advice is not None:
            return f"loads, and warns: {advice}", False
        return (
            f"each rank reads its own file, {max(found.rank_bytes):,} bytes at most, and "
            f"{found.replicated_bytes:,} replicated"
        ), True
    if ep_size == 1:
        return "vLLM's own loader, as there is no expert parallelism", None
    if found.num_experts is None:
        return "vLLM's own loader, as no expert is trained", None
    return f"sliced in memory by each rank; a shard directory for {ep_size} loads faster", None


def _advice(found: FoundAdapter, ep_size: int, strategy: Strategy) -> str | None:
    """The warning that the first rank concerned would log; None if there is none."""
    place = linear_placement if strategy == "linear" else round_robin_placement
    assert found.num_experts is not None
    for ep_rank, local in enumerate(place(found.num_experts, ep_size).ranks):
        live = LiveExperts(
            "", "2d", found.num_experts, ep_rank, ep_size, local, gated=True, hidden_size=0,
            intermediate_size=0, buffer_intermediate=0, max_lora_rank=0, interleaved=False,
            shared_outer=False,
        )  # fmt: skip
        cut_for = (found.ranks, *found.other_ranks)
        empty = LayerPlan("", Assembly((), (), (), 0), (), local, {}, ())
        layers = [
            replace(empty, runs=find_runs(ranks, local, ep_rank if len(ranks) == ep_size else None))
            for ranks in cut_for
        ]
        advice = resplit_advice(found.directory, live, cut_for, layers)
        if advice is not None:
            return advice
    return None
