"""What is worth knowing although nothing is wrong. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lorashard.vllm_options import smallest_max_lora_rank
from lorashard.vllm_plugin.doctor.findings import Installation, SurveyedAdapter
from lorashard.vllm_plugin.doctor.flags import EngineFlags
from lorashard.vllm_plugin.doctor.releases import KNOWN_RANGE, Release, is_known, release_number
from lorashard.vllm_plugin.engine.guards import Refusal


def installation_notes(installation: Installation) -> Iterator[str]:
    """On a vLLM that nobody has tested, other packages' patches, and misspelt variables."""
    if installation.vllm and not is_known(release_number(installation.vllm)):
        yield f"lorashard is not tested with vLLM {installation.vllm}, only with {KNOWN_RANGE}."
    for found in installation.foreign_patches:
        yield f"{found}. Its adapters get the right experts, too."
    for name in installation.unknown:
        yield f"{name} is set, but nothing reads it."


def flag_notes(flags: EngineFlags, overridden: Sequence[Refusal]) -> Iterator[str]:
    """On flags that do less than one might think. overridden: refusals whose variable is set."""
    for refusal in overridden:
        yield f"{refusal.variable} is set, so vLLM starts anyway: {refusal.reason}"
    if flags.enable_expert_parallel and flags.ep_size == 1:
        yield "--enable-expert-parallel does nothing on one rank; -tp N sets how many there are."
    if flags.enable_eplb and flags.ep_size > 1:
        yield (
            "--enable-eplb: vLLM prefers the communicator nixl where it is installed, and that one is "
            "refused with LoRA. --eplb-config.communicator torch_gloo avoids it."
        )
    if flags.fully_sharded_loras and flags.ep_size > 1:
        yield "--fully-sharded-loras: the LoRA of dense layers is sharded, that of experts is not."


def adapter_notes(adapter: SurveyedAdapter, flags: EngineFlags) -> Iterator[str]:
    """On what an adapter needs that only the engine can tell."""
    summary = adapter.summary
    if adapter.needs_model and summary.error is not None:
        reason = summary.error.partition("\n")[0]
        yield f"{summary.path} cannot be judged without its model (--model): {reason}"
    if summary.ranks and flags.ep_size == 1:
        yield "Without -tp N --enable-expert-parallel, every rank needs all experts."
    both_ranks = 2 * (summary.lora_rank or 0)
    if summary.separate_gate and both_ranks > flags.max_lora_rank:
        yield (
            "Gate and up have separate factors in the adapter. A model whose LoRA class keeps them "
            "together (gpt-oss, for example) needs "
            f"--max-lora-rank {smallest_max_lora_rank(both_ranks)} for it."
        )


def unknown_until_loaded(release: Release | None) -> Iterator[str]:
    """What can stop the start and shows only in a loaded model. release: None = not known."""
    yield (
        "Which class computes the experts (it depends on quantization and --moe-backend) and "
        "whether it applies LoRA. If it does not, vLLM will not start."
    )
    if release is None or release < (0, 20, 0):
        yield (
            "Up to vLLM 0.19.1: whether unquantised experts are laid out for FlashInfer. If they "
            "are, vLLM will not start."
        )
    if release is None or release < (0, 25, 1):
        yield (
            "Before vLLM 0.25.1: whether gpt-oss runs in the unfused Triton experts. If it does, "
            "vLLM will not start."
        )
    yield "Whether vLLM's LoRA manager does what the plugin relies on; this is tested at start."
