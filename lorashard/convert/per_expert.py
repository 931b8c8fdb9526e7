"""ExpertModule -> tensors of a plain PEFT adapter with a pair for each expert (L1). Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from lorashard.adapter.base_model import uses_w_names
from lorashard.adapter.keys import PEFT_PREFIX, Projection
from lorashard.adapter.modules import ExpertModule, FactorStack, gate_up_rows
from lorashard.convert.peft_tensors import OutputFactor, OutputTensor, StackPart, TrainedModule
from lorashard.convert.scaling import find_rank_with_alpha
from lorashard.convert.target import PeftTarget
from lorashard.errors import LayoutError

_W_NAMES: Mapping[Projection, str] = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def build_per_expert_modules(
    module: ExpertModule, num_experts: int, target: PeftTarget
) -> Iterator[TrainedModule]:
    """A pair for each expert and projection, with the r that the source gave it.

    Also for experts that are not trained: PEFT can do without, vLLM cannot.
    Raises LayoutError if it is not known which rows of gate_up_proj are gate's.
    """
    stacks = module.stacks_by_factor
    container, leaf_names = _names(module, target)
    for projection in module.scaling:
        lora_a, lora_b = stacks[projection, "lora_A"], stacks[projection, "lora_B"]
        rows_by_leaf = _rows_by_leaf(module, projection, lora_b, target)
        for expert in range(num_experts):
            lora_rank = module.expert_lora_ranks.get(projection, {}).get(expert, lora_a.rows)
            scaling = _scaling_of(module, projection, expert) if lora_rank else None
            padded = find_rank_with_alpha(
                scaling,
                lora_rank or lora_a.rows,
                use_rslora=target.use_rslora,
                module=module.name,
            )
            for leaf, rows in rows_by_leaf.items():
                name = f"{container}.{expert}.{leaf_names.get(leaf, leaf)}"
                factors = {
                    "lora_A": _input_factor(lora_a, lora_rank, padded, target),
                    "lora_B": _output_factor(lora_b, rows, lora_rank, padded, target),
                }
                tensors = tuple(
                    OutputTensor(
                        f"{PEFT_PREFIX}{name}.{matrix}.weight",
                        (factor.rows, factor.cols), "rec", (expert,), factor,
                    )
                    for matrix, factor in factors.items()
                )  # fmt: skip
                yield TrainedModule(name, padded, scaling, tensors)


def _input_factor(
    stack: FactorStack, lora_rank: int, padded: int, target: PeftTarget
) -> OutputFactor:
    """One expert's lora_A [padded, in]; zero if its `lora_rank` is 0, that is, not trained."""
    rows = range(lora_rank)
    parts = (StackPart(stack, rows, rows, range(stack.cols)),) if lora_rank else ()
    return OutputFactor(padded, stack.cols, target.stack_dtypes[stack.name], parts)


def _output_factor(
    stack: FactorStack, stack_rows: range, lora_rank: int, padded: int, target: PeftTarget
) -> OutputFactor:
    """One expert's lora_B [out, padded], made of `stack_rows`; zero if it is not trained."""
    rows = range(len(stack_rows))
    parts = (StackPart(stack, rows, stack_rows, range(lora_rank)),) if lora_rank else ()
    return OutputFactor(len(rows), padded, target.stack_dtypes[stack.name], parts)


def _rows_by_leaf(
    module: ExpertModule, projection: Projection, lora_b: FactorStack, target: PeftTarget
) -> dict[Projection, range]:
    """The projections that a stack becomes, each with its rows of the stack's lora_B."""
    if projection != "gate_up_proj":
        return {projection: range(lora_b.rows)}
    _check_gate_up(module, target)
    gate, up = gate_up_rows(lora_b.rows, interleaved=target.gate_up == "interleaved")
    return {"gate_proj": gate, "up_proj": up}


def _check_gate_up(module: ExpertModule, target: PeftTarget) -> None:
    """Raise LayoutError unless it is known which rows of gate_up_proj are whose."""
    if target.gate_up == "none":
        raise LayoutError(
            f"{module.name}: has gate_up_proj, but the base model's experts have no gate.",
            hint="Is `model` the base model of this adapter?",
        )
    if target.gate_up not in ("concatenated", "interleaved"):
        raise LayoutError(
            f"{module.name}: it is not known which rows of gate_up_proj are gate's and which are "
            "up's.",
            hint="Its config names no base model on the Hub whose order is known (a local path does not "
            "tell). Give `model=MODEL_DIR`.",
        )


def _names(module: ExpertModule, target: PeftTarget) -> tuple[str, Mapping[Projection, str]]:
    """The container's name in transformers 4, and its projections' where they are not ours."""
    names_below = [
        source.module.removeprefix(f"{module.name}.").split(".")
        for stack in module.stacks
        for source in stack.sources
    ]
    leaves = {name[1] for name in names_below if len(name) == 2 and name[0].isdecimal()}
    if leaves:  # one tensor per expert already, so the names are known
        return module.name, _W_NAMES if leaves <= set(_W_NAMES.values()) else {}
    if not uses_w_names(target.model_names):
        return module.name, {}
    # transformers 5 has renamed the block
    return re.sub(r"\.mlp\.experts$", ".block_sparse_moe.experts", module.name), _W_NAMES


def _scaling_of(module: ExpertModule, projection: Projection, expert: int) -> float:
    scaling = module.scaling[projection]
    return scaling[expert] if isinstance(scaling, tuple) else scaling
