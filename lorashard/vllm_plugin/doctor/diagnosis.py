"""Everything that `lorashard doctor` says, decided from what the surveys found. Pure.

In: the installation, vLLM's flags, the model's facts and an adapter. Out: a `Report` to print.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lorashard.adapter.base_model import ModelFacts
from lorashard.vllm_options import Strategy
from lorashard.vllm_plugin import settings
from lorashard.vllm_plugin.doctor.adapter_outcome import AdapterOutcome, judge_adapter
from lorashard.vllm_plugin.doctor.findings import (
    AdapterSummary,
    Installation,
    PatchState,
    SurveyedAdapter,
)
from lorashard.vllm_plugin.doctor.flags import EngineFlags, effective_placement
from lorashard.vllm_plugin.doctor.notes import (
    adapter_notes,
    flag_notes,
    installation_notes,
    unknown_until_loaded,
)
from lorashard.vllm_plugin.doctor.problems import Problem, flag_problems, installation_problems
from lorashard.vllm_plugin.doctor.releases import (
    FIRST_WITH_DATA_PARALLEL,
    FIRST_WITH_EPLB,
    KNOWN_RELEASES,
    Release,
    is_known,
    release_number,
)
from lorashard.vllm_plugin.engine.guards import (
    EPLB_TOO,
    OLD_DATA_PARALLEL,
    OLD_EPLB,
    TENSOR_PARALLEL,
    TOO_FEW_SLOTS,
    EngineFacts,
    find_refusals,
    unknown_data_parallel,
    unknown_eplb,
)


@dataclass(frozen=True, slots=True)
class RefusalReport:
    """A refusal; `overridden` where its variable is set, so that vLLM starts anyway.

    rule: its id in docs/rules.md.
    """

    rule: str
    variable: str
    reason: str
    way_out: str
    overridden: bool


@dataclass(frozen=True, slots=True)
class Report:
    """All that is printed; `--json` shows it field by field.

    vllm_known: whether the release is between known_releases; None = no vLLM. placement: the
    strategy that vLLM would really use. outcome: what the plugin would do with the adapter; None
    where a problem or a note says why not. as_placed: whether each rank would read its own shard;
    None = not a shard directory, or it is refused. ignored: words of the command that mean nothing here.
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
    adapter: AdapterSummary | None
    outcome: str | None
    as_placed: bool | None
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    ignored: tuple[str, ...] = ()


def diagnose(
    installation: Installation,
    patches: Sequence[PatchState],
    flags: EngineFlags,
    model: ModelFacts | None,
    adapter: SurveyedAdapter | None,
) -> Report:
    """Say what is wrong, and what the plugin would do. model: its config.json, None = not named."""
    release = release_number(installation.vllm)
    expert_parallel = flags.ep_size > 1
    refusals = find_refusals(
        EngineFacts(
            expert_parallel=expert_parallel,
            data_parallel_size=flags.data_parallel_size,
            eplb=flags.enable_eplb,
            eplb_obstacle=_eplb_obstacle(release, patches),
            data_parallel_obstacle=_data_parallel_obstacle(release, patches, flags),
            num_experts=model.num_experts if model else None,
        )
    )
    overridden = [r for r in refusals if r.variable in installation.switched_on]
    placement, placement_note = effective_placement(flags, model)
    outcome = AdapterOutcome()
    if adapter is not None:
        strict = settings.STRICT in installation.switched_on
        outcome = judge_adapter(adapter, flags, placement, model, strict=strict)
    problems = (
        *installation_problems(installation, patches),
        *flag_problems(flags, [r for r in refusals if r not in overridden]),
        *((Problem("adapter", outcome.refusal),) if outcome.refusal is not None else ()),
    )
    notes = (
        *installation_notes(installation),
        *((placement_note,) if placement_note is not None else ()),
        *flag_notes(flags, overridden),
        *(adapter_notes(adapter, flags) if adapter is not None else ()),
    )
    return Report(
        ok=not problems,
        installation=installation,
        vllm_known=None if installation.vllm is None else is_known(release),
        known_releases=KNOWN_RELEASES,
        patches=tuple(patches),
        flags=flags,
        ep_size=flags.ep_size,
        placement=placement,
        refusals=tuple(
            RefusalReport(r.rule, r.variable, r.reason, r.way_out, r in overridden)
            for r in refusals
        ),
        known_once_loaded=tuple(unknown_until_loaded(release)) if expert_parallel else (),
        adapter=adapter.summary if adapter is not None else None,
        outcome=outcome.text,
        as_placed=outcome.as_placed,
        problems=problems,
        notes=notes,
    )


def _eplb_obstacle(release: Release | None, patches: Sequence[PatchState]) -> str | None:
    """Why LoRA could not follow experts that EPLB moves; None if it can, as far as is known."""
    if release is not None and release < FIRST_WITH_EPLB:
        return OLD_EPLB
    missing = _missing(patches, "--enable-eplb")
    return unknown_eplb(missing) if missing else None


def _data_parallel_obstacle(
    release: Release | None, patches: Sequence[PatchState], flags: EngineFlags
) -> str | None:
    """Why engines could not agree on LoRA slots; None if they can, as far as is known."""
    if flags.tensor_parallel_size > 1:
        return TENSOR_PARALLEL
    if release is not None and release < FIRST_WITH_DATA_PARALLEL:
        return OLD_DATA_PARALLEL
    if flags.enable_eplb:
        return EPLB_TOO
    if flags.max_loras < flags.data_parallel_size:
        return TOO_FEW_SLOTS
    missing = _missing(patches, "--data-parallel-size")
    return unknown_data_parallel(missing) if missing else None


def _missing(patches: Sequence[PatchState], option: str) -> list[str]:
    return [
        f"{patch.target}: {patch.reason}"
        for patch in patches
        if patch.state == "unsupported" and patch.only_for == option
    ]
