"""Everything known to go wrong with MoE adapters that nobody notices: one table, with an id for each.

What detects or mends one names its id: errors (`errors.py`), the refusals of the plugin
(`engine/guards.py`), its patches (`patches/table.py`), what `inspect` finds. docs/rules.md is made
from it. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# Where lorashard sees it: in a command, as vLLM starts, or as an adapter is loaded.
Seen = Literal["split", "verify", "inspect", "doctor", "start", "load"]

_VLLM = "https://github.com/vllm-project/vllm"
_PEFT = "https://github.com/huggingface/peft/blob/v0.21.2/src/peft"
_UNSLOTH = "https://github.com/unslothai/unsloth-zoo"


@dataclass(frozen=True, slots=True)
class Rule:
    """One of them. An id is never given to anything else.

    hazard: what is wrong without lorashard, as a sentence. answer: what lorashard does about it.
    upstream: where it is reported or, if it is not, its source.
    """

    id: str
    hazard: str
    answer: str
    seen: tuple[Seen, ...]
    upstream: str


def with_rule(text: str, rule_id: str) -> str:
    """A line that says why something is refused, which ends in the rule's id."""
    stop = "." if text.endswith(".") else ""
    return f"{text.removesuffix('.')} (rule {rule_id}){stop}"


UNEVEN_EXPERTS = Rule(
    "uneven-experts",
    "Experts that are not in equal blocks in the order of the ranks get the LoRA of other experts: uneven counts, round-robin placement.",
    "Each rank loads by the live expert map; `inspect --html` and `doctor` say so.",
    ("inspect", "doctor", "load"),
    f"{_VLLM}/blob/v0.33.0/vllm/lora/model_manager.py#L1144",
)
OTHER_PLACEMENT = Rule(
    "other-placement",
    "Shards for another number of ranks, or another placement, put experts where others are.",
    "Each rank takes its experts from the files that have them, and says so; `LORASHARD_STRICT=1` refuses.",
    ("doctor", "load"),
    f"{_VLLM}/blob/v0.33.0/vllm/lora/model_manager.py#L1144",
)
EPLB = Rule(
    "eplb-rebalance",
    "A rebalance (--enable-eplb) moves the experts' weights but not their LoRA.",
    "The rows move with the experts from vLLM 0.24.0 on; what cannot follow is refused.",
    ("doctor", "start"),
    f"{_VLLM}/blob/v0.33.0/vllm/distributed/eplb/rebalance_execute.py#L642",
)
DATA_PARALLEL = Rule(
    "data-parallel-slots",
    "Engines that share experts send the numbers of their own LoRA slots along, so a token is computed with another request's adapter.",
    "From vLLM 0.24.0 on the engines agree on the slots in each step; where they cannot, it is refused.",
    ("doctor", "start"),
    "https://github.com/PrimeIntellect-ai/prime-rl/issues/2073",
)
UNKNOWN_VLLM = Rule(
    "unknown-vllm",
    "A vLLM that works otherwise than the plugin relies on could load without an error, and wrong.",
    "Its functions and what they do are looked at before an adapter is served; what differs is refused.",
    ("doctor", "start"),
    f"{_VLLM}/releases",
)
PATCHED_BY_OTHERS = Rule(
    "patched-by-others",
    "verl, ms-swift and others replace the function that loads adapters, and with it the plugin's.",
    "What they load is packed by the live expert map as well; a patch that takes the place of one that is needed is refused.",
    ("doctor", "start"),
    "https://github.com/volcengine/verl/blob/v0.9.1/verl/utils/vllm/utils.py",
)
IGNORED_LORA = Rule(
    "ignored-expert-lora",
    "Some classes of experts accept LoRA weights and never apply them (WNA16, some of ROCm).",
    "Refused as vLLM starts, with the name of the class.",
    ("start",),
    f"{_VLLM}/blob/v0.33.0/vllm/model_executor/layers/fused_moe/experts/triton_moe.py#L656",
)
WEIGHTED_INPUTS = Rule(
    "router-weight-on-input",
    "Models that weigh an expert's input and not its output (Llama 4) get LoRA of the input without the weight, and the weight on the LoRA of the output.",
    "Refused as vLLM starts.",
    ("start",),
    f"{_VLLM}/blob/v0.33.0/vllm/model_executor/layers/fused_moe/modular_kernel.py#L1561",
)
OTHER_KERNEL = Rule(
    "weights-of-another-kernel",
    "Experts' weights are laid out for FlashInfer, and LoRA computes them in a kernel that expects another layout (up to 0.19.1).",
    "Refused as vLLM starts.",
    ("start",),
    f"{_VLLM}/blob/v0.19.1/vllm/lora/layers/fused_moe.py#L155",
)
STALE_ROWS = Rule(
    "stale-remote-rows",
    "gpt-oss in the unfused Triton experts sums rows of experts on other ranks that nothing has written (before 0.25.1).",
    "Refused as vLLM starts.",
    ("start",),
    f"{_VLLM}/blob/v0.24.0/vllm/model_executor/layers/fused_moe/experts/gpt_oss_triton_kernels_moe.py",
)
FP8_ACTIVATIONS = Rule(
    "fp8-activations",
    "LoRA on FP8 experts is computed from quantised activations without their scale (0.20.0 to 0.23.0).",
    "The layer's input is handed to LoRA.",
    ("doctor", "load"),
    f"{_VLLM}/issues/42008",
)
SORTED_BY_LOCAL_EXPERT = Rule(
    "local-expert-ids",
    "The op that sorts tokens counts the local experts and gets global ids: memory that is not its own (up to 0.20.2).",
    "It gets the number of all experts, and the map.",
    ("doctor", "load"),
    f"{_VLLM}/pull/40867",
)
EARLIER_DELTAS = Rule(
    "earlier-adapters-deltas",
    "Requests for the base model can get the deltas of an earlier adapter (until 0.23.0).",
    "Nothing is computed for a batch without LoRA.",
    ("doctor", "load"),
    f"{_VLLM}/issues/42008",
)
UNLOADED_ONLY_BY_NAME = Rule(
    "unloaded-by-name-only",
    "Unloading makes the server forget the name; the adapter keeps its slot and memory on every rank.",
    "It leaves every rank once no request uses it.",
    ("doctor", "load"),
    f"{_VLLM}/issues/54839",
)
STALE_PREFIX_CACHE = Rule(
    "stale-prefix-cache",
    "A new version under the name of an old one is served what the prefix cache has of the old one.",
    "A name that was unloaded or loaded again has other keys.",
    ("doctor", "load"),
    f"{_VLLM}/issues/42207",
)
RANKS_DIFFER = Rule(
    "ranks-differ",
    "A load that fails on one rank alone leaves the others with it, and the next request waits for ever.",
    "The ranks agree on each load: all have it, or none, and each says why.",
    ("load",),
    f"{_VLLM}/blob/v0.33.0/vllm/lora/worker_manager.py#L288",
)
ANSWERS_LEFT_BEHIND = Rule(
    "answers-left-behind",
    "After an adapter that several ranks refuse, their answers are taken for those to later calls: loads that succeed are reported as failed.",
    "All ranks answer before the error is raised.",
    ("load",),
    f"{_VLLM}/issues/49972",
)
VERSIONS_OF_A_NAME = Rule(
    "versions-of-a-name",
    "A step with requests for two versions of an adapter of one name, as after a swap, activates one of them; without a slot for the other the engine ends.",
    "Requests are told apart by the adapter's number, too.",
    ("doctor", "load"),
    f"{_VLLM}/issues/30931",
)
REPLACED_WHILE_READ = Rule(
    "replaced-while-read",
    "A directory that a trainer replaces while it is read gives a mixture of two versions.",
    "`split` and loads notice and refuse; ranks compare what they have read.",
    ("split", "load"),
    "",
)
RENAMED_EXPERTS = Rule(
    "unknown-module-names",
    "Modules that the model calls otherwise (Mixtral's and MiniMax's experts of transformers 5) are ignored without a word.",
    "Names are mapped by the model's own rules, and by what transformers renames; what finds no place is refused.",
    ("load",),
    f"{_VLLM}/issues/41754",
)
PATTERNS_IGNORED = Rule(
    "rank-and-alpha-patterns",
    "rank_pattern, alpha_pattern (up to 0.31) and rsLoRA (up to 0.29) are scaled by the config's r and alpha alone.",
    "Each module has its own scaling, by PEFT's rule, from what the tensors have for r.",
    ("split", "load"),
    f"{_PEFT}/utils/other.py",
)
PARTIAL_EXPERTS = Rule(
    "untrained-experts",
    "An adapter of some experts or projections stops at an assertion, or ends the worker.",
    "What is not trained is zero; `inspect` counts it.",
    ("inspect", "load"),
    f"{_VLLM}/blob/v0.33.0/vllm/lora/lora_weights.py#L206",
)
RANKS_OF_EXPERTS = Rule(
    "experts-of-another-r",
    "Experts with another r than the rest get numbers of their neighbours (0.22.1 to 0.31).",
    "They are padded with zeros; `inspect` says so.",
    ("inspect", "split", "load"),
    f"{_VLLM}/blob/v0.33.0/vllm/lora/lora_weights.py#L206",
)
FUSED_ORDER = Rule(
    "order-of-fused-columns",
    "Unsloth until September 2026, and Megatron, write the columns of a fused lora_B expert by expert, PEFT rank by rank.",
    "What the file or its config tells decides, or it is refused; an older Unsloth adapter looks like PEFT's and needs `lora_b_layout`.",
    ("split", "load"),
    f"{_UNSLOTH}/pull/1269",
)
FUSED_ORIENTATION = Rule(
    "orientation-of-fused-factors",
    "PEFT 0.17 and 0.18 with transformers 5 write the factors of fused experts in each other's place.",
    "Told by their sizes; where those fit both ways, `model` or `orientation` is asked for.",
    ("split", "load"),
    f"{_VLLM}/issues/52198",
)
BASE_CHANGED = Rule(
    "base-weights-changed",
    "PiSSA and other initialisations move part of the base weights into the adapter; served on the plain base it is wrong.",
    "Refused, with how to save a plain LoRA.",
    ("split", "inspect", "load"),
    f"{_PEFT}/tuners/lora/layer.py",
)
UNSUPPORTED_VARIANTS = Rule(
    "unsupported-variants",
    "DoRA, trained biases, trainable tokens and the like would be dropped, and the rest served.",
    "Refused by name.",
    ("split", "inspect", "load"),
    f"{_VLLM}/blob/v0.33.0/vllm/lora/peft_helper.py#L188",
)
LOST_IN_A_CAST = Rule(
    "lost-in-a-cast",
    "Values too small for another dtype become zero, and too large ones infinite.",
    "A cast by `split` refuses what overflows, and says how much has become zero.",
    ("split",),
    "",
)
DAMAGED_BYTES = Rule(
    "damaged-bytes",
    "A truncated, swapped or damaged file of some ranks is an adapter that is wrong on these.",
    "Sizes, headers and the manifest's own digest are checked at each load, all digests with `verify` or `LORASHARD_VERIFY=full`.",
    ("split", "verify", "inspect", "doctor", "load"),
    "",
)

RULES: tuple[Rule, ...] = (
    UNEVEN_EXPERTS, OTHER_PLACEMENT, EPLB, DATA_PARALLEL, UNKNOWN_VLLM, PATCHED_BY_OTHERS, IGNORED_LORA,
    WEIGHTED_INPUTS, OTHER_KERNEL, STALE_ROWS, FP8_ACTIVATIONS, SORTED_BY_LOCAL_EXPERT, EARLIER_DELTAS,
    UNLOADED_ONLY_BY_NAME, STALE_PREFIX_CACHE, RANKS_DIFFER, ANSWERS_LEFT_BEHIND,
    VERSIONS_OF_A_NAME, REPLACED_WHILE_READ, RENAMED_EXPERTS,
    PATTERNS_IGNORED, PARTIAL_EXPERTS, RANKS_OF_EXPERTS, FUSED_ORDER, FUSED_ORIENTATION, BASE_CHANGED,
    UNSUPPORTED_VARIANTS, LOST_IN_A_CAST, DAMAGED_BYTES,
)  # fmt: skip
