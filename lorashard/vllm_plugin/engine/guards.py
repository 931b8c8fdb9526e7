"""Rules for what would be silently wrong: it is refused at start, with the reason and the way out.

In: `EngineFacts`, which `facts.py` takes from vLLM's objects. Out: a `Refusal` for each rule that
applies. Setting a refusal's variable, whose name says what is risked, overrides it. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lorashard import rules


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What decides whether LoRA on experts is right in this engine. None = not known yet.

    eplb_obstacle: why the LoRA of experts cannot follow when EPLB moves them; None if it can.
    data_parallel_obstacle: why engines that share experts cannot agree on LoRA slots; None if they can.
    experts_class: the class that computes the experts. reads_lora: whether its code looks at the
    LoRA context. leaves_rows: it sums rows of remote experts that nothing has written.
    weighs_inputs: the router's weight is on an expert's input, not on its output.
    rearranged_for: the kernel whose weight layout the experts have, where LoRA computes them with
    another. contract_breaks: sentences on how this vLLM differs from what the plugin relies on.
    displaced: sentences on what other packages have put in the place of the plugin's patches.
    """

    expert_parallel: bool
    data_parallel_size: int = 1
    eplb: bool = False
    eplb_obstacle: str | None = None
    data_parallel_obstacle: str | None = None
    num_experts: int | None = None
    experts_class: str | None = None
    reads_lora: bool = True
    leaves_rows: bool = False
    weighs_inputs: bool = False
    rearranged_for: str | None = None
    contract_breaks: tuple[str, ...] = ()
    displaced: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Refusal:
    """One reason not to start; setting `variable` to 1 overrides it. rule: its id in lorashard.rules."""

    rule: str
    variable: str
    reason: str
    way_out: str

    @property
    def explanation(self) -> str:
        """Why, what to do instead, how to start anyway, and the rule's id in docs/rules.md."""
        return rules.with_rule(
            f"{self.reason} {self.way_out} "
            f"To start anyway, accepting the risk in its name, set {self.variable}=1.",
            self.rule,
        )

    def __str__(self) -> str:
        return f"lorashard: {self.explanation}"


@dataclass(frozen=True, slots=True)
class Rule:
    """When an engine is refused, and what it is told.

    hazard: what the refusal is against.
    reason: a format string over the fields of EngineFacts, and `breaks` and `displaced`, joined.
    """

    hazard: rules.Rule
    variable: str
    applies: Callable[[EngineFacts], bool]
    reason: str
    way_out: str

    def refusal(self, facts: EngineFacts) -> Refusal:
        """The refusal of the engine that the rule applies to."""
        reason = self.reason.format(
            facts=facts,
            breaks="; ".join(facts.contract_breaks),
            displaced="; ".join(facts.displaced),
        )
        return Refusal(self.hazard.id, self.variable, reason, self.way_out)


_BROKEN_CONTRACTS = Rule(
    hazard=rules.UNKNOWN_VLLM,
    variable="LORASHARD_RISK_UNKNOWN_VLLM",
    applies=lambda facts: bool(facts.contract_breaks),
    reason="This vLLM differs from what lorashard relies on: {breaks}.",
    way_out="Update lorashard, or use a vLLM release that `lorashard doctor` lists.",
)

_DISPLACED = Rule(
    hazard=rules.PATCHED_BY_OTHERS,
    variable="LORASHARD_RISK_PATCHED_BY_OTHERS",
    applies=lambda facts: bool(facts.displaced),
    reason="Another package has taken the place of a patch that LoRA on experts needs here: {displaced}.",
    way_out="Start without that patch, or have it call the function that it found there.",
)

RULES: tuple[Rule, ...] = (
    Rule(
        hazard=rules.EPLB,
        variable="LORASHARD_RISK_WRONG_EXPERTS_AFTER_EPLB_REBALANCE",
        applies=lambda facts: facts.eplb and facts.eplb_obstacle is not None,
        reason="LoRA with --enable-eplb: adapters are silently wrong from the first rebalance on, "
        "unless their rows move with the experts. {facts.eplb_obstacle}",
        way_out="Start without --enable-eplb.",
    ),
    Rule(
        hazard=rules.DATA_PARALLEL,
        variable="LORASHARD_RISK_WRONG_ADAPTERS_WITH_DATA_PARALLEL",
        applies=lambda facts: (
            facts.data_parallel_size > 1 and facts.data_parallel_obstacle is not None
        ),
        reason="LoRA with expert parallelism and --data-parallel-size {facts.data_parallel_size}: "
        "engines exchange tokens with the numbers of their LoRA slots, so a token can be computed with "
        "another request's adapter, unless all engines agree on the slots in each step. "
        "{facts.data_parallel_obstacle}",
        way_out="Use tensor parallelism alone (-tp N --enable-expert-parallel), or one server for "
        "each data-parallel rank.",
    ),
    _BROKEN_CONTRACTS,
    _DISPLACED,
    Rule(
        hazard=rules.IGNORED_LORA,
        variable="LORASHARD_RISK_IGNORED_EXPERT_LORA",
        applies=lambda facts: not facts.reads_lora,
        reason="The experts run in {facts.experts_class}, which accepts LoRA weights but never "
        "applies them.",
        way_out="Choose another MoE backend or quantization for the model (--moe-backend auto; marlin for four bits).",
    ),
    Rule(
        hazard=rules.WEIGHTED_INPUTS,
        variable="LORASHARD_RISK_WRONGLY_WEIGHTED_EXPERT_LORA",
        applies=lambda facts: facts.weighs_inputs,
        reason="This model multiplies an expert's input by the router's weight, not its output (Llama 4 "
        "does). vLLM's LoRA takes the input without the weight, and multiplies the output's LoRA by it.",
        way_out="Use a checkpoint into which the adapter is merged, or start without --enable-lora.",
    ),
    Rule(
        hazard=rules.OTHER_KERNEL,
        variable="LORASHARD_RISK_WEIGHTS_OF_ANOTHER_KERNEL",
        applies=lambda facts: facts.rearranged_for is not None,
        reason="The experts' weights are laid out for {facts.rearranged_for}, but this vLLM "
        "computes experts with LoRA in its Triton kernel, which expects another layout.",
        way_out="Start without VLLM_USE_FLASHINFER_MOE_FP16 and with --moe-backend auto.",
    ),
    Rule(
        hazard=rules.STALE_ROWS,
        variable="LORASHARD_RISK_STALE_ROWS_OF_REMOTE_EXPERTS",
        applies=lambda facts: facts.leaves_rows,
        reason="In this vLLM, {facts.experts_class} sums rows of experts on other ranks that "
        "nothing has written.",
        way_out="Use vLLM 0.25.1 or later.",
    ),
)

# Why the rows of LoRA do not move with the experts, or may not.
ELASTIC_EPLB = "With elastic scaling (--enable-elastic-ep) they do not: ranks come and go."
NIXL_EPLB = (
    "Through the communicator nixl that was never measured; through torch_gloo it was "
    "(--eplb-config.communicator torch_gloo)."
)
OLD_EPLB = "That takes vLLM 0.24.0 or later."


# Why engines that share experts cannot agree on LoRA slots, or are not known to.
OLD_DATA_PARALLEL = "That takes vLLM 0.24.0 or later."
ALL2ALL = "vLLM sends LoRA numbers along with --all2all-backend allgather_reducescatter alone."
TENSOR_PARALLEL = "vLLM itself refuses LoRA on experts with -tp above 1 beside -dp above 1."
PIPELINES = "With pipeline or prefill context parallelism as well that was never measured."
MICROBATCHES = (
    "With microbatches (--enable-dbo) they cannot: vLLM sends the numbers of the first one."
)
EPLB_TOO = "With --enable-eplb as well they do not."
ELASTIC_ENGINES = "With elastic scaling (--enable-elastic-ep) they do not: engines come and go."
TOO_FEW_SLOTS = "That takes a slot for each engine: --max-loras of at least the number of engines."


def unknown_data_parallel(breaks: Sequence[str]) -> str:
    """The same of a vLLM that nobody has looked at. breaks: sentences without full stop."""
    return f"This vLLM differs from what that relies on: {'; '.join(breaks)}."


def unknown_eplb(breaks: Sequence[str]) -> str:
    """The same of a vLLM that nobody has looked at. breaks: sentences without full stop."""
    return f"This vLLM differs from what that relies on: {'; '.join(breaks)}."


# Every variable that overrides a refusal.
VARIABLES = tuple(rule.variable for rule in RULES)


def find_refusals(facts: EngineFacts) -> tuple[Refusal, ...]:
    """Every reason not to serve LoRA here; none without expert parallelism or without experts."""
    if not facts.expert_parallel or facts.num_experts == 0:
        return ()
    return tuple(rule.refusal(facts) for rule in RULES if rule.applies(facts))


def displaced_refusal(displaced: Sequence[str]) -> Refusal:
    """The refusal of an engine where another package has replaced what lorashard put there.

    displaced: a sentence for each method, without full stop.
    """
    return _DISPLACED.refusal(EngineFacts(expert_parallel=True, displaced=tuple(displaced)))


def contract_refusal(contract_breaks: Sequence[str]) -> Refusal | None:
    """The refusal of a vLLM that breaks contracts; None if it breaks none.

    For an engine without expert parallelism: the plugin loads shard directories there too, and no
    other rule concerns it.
    """
    facts = EngineFacts(expert_parallel=False, contract_breaks=tuple(contract_breaks))
    return _BROKEN_CONTRACTS.refusal(facts) if _BROKEN_CONTRACTS.applies(facts) else None
