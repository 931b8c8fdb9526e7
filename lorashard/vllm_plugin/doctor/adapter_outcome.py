"""What the plugin would do with an adapter. Pure.

The judgement is the loader's own (`load.outcome`), on the layers that the engine would have.
"""

from __future__ import annotations

from dataclasses import dataclass

from lorashard.adapter.base_model import ModelFacts
from lorashard.errors import LorashardError
from lorashard.vllm_options import Strategy, smallest_max_lora_rank
from lorashard.vllm_plugin.doctor.findings import AdapterSummary, SurveyedAdapter
from lorashard.vllm_plugin.doctor.flags import EngineFlags
from lorashard.vllm_plugin.doctor.live_layers import NamesOfAdapter, expected_layers
from lorashard.vllm_plugin.load.contents import AdapterContents
from lorashard.vllm_plugin.load.outcome import explain_load, strict_error


@dataclass(frozen=True, slots=True)
class AdapterOutcome:
    """What would be done with the adapter: `text`, or why not: `refusal`.

    Neither, if it depends on a model that is not named. as_placed: whether each rank would read
    its own shard; None = not a shard directory, or refused before placements matter.
    """

    text: str | None = None
    as_placed: bool | None = None
    refusal: str | None = None


def judge_adapter(
    adapter: SurveyedAdapter,
    flags: EngineFlags,
    placement: Strategy,
    model: ModelFacts | None,
    *,
    strict: bool,
) -> AdapterOutcome:
    """What an engine with these flags would do with an adapter.

    placement: the strategy that vLLM really uses. model: None = not named. strict: whether
    LORASHARD_STRICT is set.
    """
    refusal = _refusal_before_loading(adapter, flags)
    if refusal is not None or adapter.needs_model:
        return AdapterOutcome(refusal=refusal)
    if adapter.contents is None:
        reason = "there is no expert parallelism" if flags.ep_size == 1 else "no expert is trained"
        return AdapterOutcome(f"vLLM's own loader, since {reason}")
    try:
        advice = _advice(adapter, adapter.contents, flags, placement, model)
    except LorashardError as err:
        return AdapterOutcome(refusal=f"{adapter.summary.path}: {err}")
    if adapter.is_shard_directory:
        return _outcome_of_shards(adapter.summary, advice, strict=strict)
    return AdapterOutcome(
        "sliced in memory by each rank; a shard directory for "
        f"{flags.ep_size} ranks would load faster"
    )


def _refusal_before_loading(adapter: SurveyedAdapter, flags: EngineFlags) -> str | None:
    """Why no loader would get to see the adapter; None if nothing speaks against it so far."""
    summary = adapter.summary
    if summary.error is not None:
        return None if adapter.needs_model else summary.error
    # vLLM's own check, before it calls a loader (0.33.0 lora/peft_helper.py:193).
    if summary.lora_rank is not None and summary.lora_rank > flags.max_lora_rank:
        return (
            f"{summary.path}: r={summary.lora_rank}, the engine has room for "
            f"{flags.max_lora_rank}. Start vLLM with --max-lora-rank "
            f"{smallest_max_lora_rank(summary.lora_rank)}."
        )
    return adapter.vllm_refusal


def _outcome_of_shards(
    summary: AdapterSummary, advice: str | None, *, strict: bool
) -> AdapterOutcome:
    if advice is None:
        return AdapterOutcome(
            f"each rank reads its own file, at most {max(summary.rank_bytes):,} bytes, plus "
            f"{summary.replicated_bytes:,} replicated bytes",
            as_placed=True,
        )
    if strict:
        return AdapterOutcome(as_placed=False, refusal=str(strict_error(summary.path, advice)))
    return AdapterOutcome(f"loads, and warns: {advice}", as_placed=False)


def _advice(
    adapter: SurveyedAdapter,
    contents: AdapterContents,
    flags: EngineFlags,
    placement: Strategy,
    model: ModelFacts | None,
) -> str | None:
    """The warning that one of the ranks would log; None if there is none. Raises LorashardError."""
    shard_directory = adapter.summary.path if adapter.is_shard_directory else None
    for layers in expected_layers(contents, flags, placement, model):
        outcome = explain_load(contents, layers, NamesOfAdapter(), shard_directory)
        if outcome.gives_advice:
            return outcome.advice
    return None
