"""What would be silently wrong is refused at start, with the reason and the way out. Pure.

`EngineFacts` are taken from vLLM's objects by `facts.py`; here it is decided. Each refusal can be
overridden by a variable whose name says what is risked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What decides whether LoRA on experts is right in this engine. None = not known yet.

    experts_class: the class that computes the experts. reads_lora: whether its code looks at the
    LoRA context. leaves_rows: rows of experts elsewhere are summed unwritten. rearranged_for: the
    kernel whose weight layout the experts have, where LoRA computes them with another.
    """

    expert_parallel: bool
    data_parallel_size: int = 1
    eplb: bool = False
    num_experts: int | None = None
    experts_class: str | None = None
    reads_lora: bool = True
    leaves_rows: bool = False
    rearranged_for: str | None = None
    contract_breaks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Refusal:
    """One reason not to start; `variable` set to 1 starts all the same."""

    variable: str
    reason: str
    way_out: str

    def __str__(self) -> str:
        return (
            f"lorashard: {self.reason} {self.way_out} "
            f"To start all the same, at the risk that its name states: {self.variable}=1."
        )


_RULES: tuple[tuple[Callable[[EngineFacts], bool], Callable[[EngineFacts], Refusal]], ...] = (
    (
        lambda facts: facts.eplb,
        lambda _: Refusal(
            "LORASHARD_RISK_WRONG_EXPERTS_AFTER_EPLB_REBALANCE",
            "LoRA with --enable-eplb: a rebalance moves the experts' weights and leaves their "
            "LoRA where it was, so that adapters are silently wrong from then on.",
            "Start without --enable-eplb.",
        ),
    ),
    (
        lambda facts: facts.data_parallel_size > 1,
        lambda facts: Refusal(
            "LORASHARD_RISK_WRONG_ADAPTERS_WITH_DATA_PARALLEL",
            f"LoRA with expert parallelism and --data-parallel-size {facts.data_parallel_size}: "
            "ranks exchange tokens with LoRA slot numbers that each engine gives out for itself, "
            "so that a token can meet another request's adapter.",
            "Use tensor parallelism alone (-tp N --enable-expert-parallel), or one server for "
            "each data-parallel rank.",
        ),
    ),
    (
        lambda facts: bool(facts.contract_breaks),
        lambda facts: Refusal(
            "LORASHARD_RISK_UNKNOWN_VLLM",
            "This vLLM differs from what lorashard relies on: "
            + "; ".join(facts.contract_breaks) + ".",
            "Update lorashard, or use a vLLM release that `lorashard doctor` lists.",
        ),
    ),
    (
        lambda facts: not facts.reads_lora,
        lambda facts: Refusal(
            "LORASHARD_RISK_IGNORED_EXPERT_LORA",
            f"The experts run in {facts.experts_class}, which takes LoRA weights and never "
            "applies them.",
            "Choose another MoE backend or quantization for the model (--moe-backend triton).",
        ),
    ),
    (
        lambda facts: facts.rearranged_for is not None,
        lambda facts: Refusal(
            "LORASHARD_RISK_WEIGHTS_OF_ANOTHER_KERNEL",
            f"The experts' weights are laid out for {facts.rearranged_for}, and this vLLM computes "
            "experts with LoRA by its Triton kernel, which reads them otherwise.",
            "Start without VLLM_USE_FLASHINFER_MOE_FP16 and with --moe-backend auto.",
        ),
    ),
    (
        lambda facts: facts.leaves_rows,
        lambda facts: Refusal(
            "LORASHARD_RISK_STALE_ROWS_OF_REMOTE_EXPERTS",
            f"{facts.experts_class} of this vLLM sums rows of experts on other ranks that nothing "
            "has written.",
            "Use vLLM 0.25.1 or later.",
        ),
    ),
)  # fmt: skip

# Every variable that overrides a refusal.
VARIABLES = tuple(
    make(EngineFacts(expert_parallel=True, data_parallel_size=1, eplb=False)).variable
    for _, make in _RULES
)


def find_refusals(facts: EngineFacts) -> tuple[Refusal, ...]:
    """Everything that speaks against serving LoRA here; nothing without expert parallelism."""
    if not facts.expert_parallel or facts.num_experts == 0:
        return ()
    return tuple(make(facts) for applies, make in _RULES if applies(facts))
