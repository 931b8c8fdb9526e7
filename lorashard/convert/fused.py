"""ExpertModule -> tensors of a plain PEFT adapter with fused experts (L2, L2b, L3). Pure.

Gate and up become one parameter. Where both have the same lora_A, that is the pair's; otherwise the
pair has the r of both, lora_A one above the other and lora_B block-diagonal, as PEFT converts it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from lorashard.adapter.containers import Axes
from lorashard.adapter.keys import PEFT_PREFIX, Matrix, Projection
from lorashard.adapter.modules import ExpertModule, FactorStack, gate_up_rows
from lorashard.convert.peft_tensors import (
    OutputFactor,
    OutputTensor,
    StackPart,
    TrainedModule,
    whole_stack,
)
from lorashard.convert.scaling import find_rank_with_alpha
from lorashard.convert.target import PeftTarget
from lorashard.errors import LayoutError

_GIVE_MODEL = "Give `model=MODEL_DIR`, whose config.json says it."
_HALVES: tuple[Projection, Projection] = ("gate_proj", "up_proj")


def build_fused_modules(
    module: ExpertModule, num_experts: int, target: PeftTarget
) -> Iterator[TrainedModule]:
    """PEFT's wrapped parameters. Of two, the first (gate_up or up) is the inner one.

    Raises LayoutError for what a fused parameter cannot express.
    """
    parameters = list(_parameters(module, target))
    for number, parameter in enumerate(parameters):
        is_inner = number < len(parameters) - 1
        key = f"{module.name}.base_layer" if is_inner else module.name
        scaling = _common_scaling(module, parameter.projections)
        lora_rank = find_rank_with_alpha(
            scaling, parameter.lora_a.rows, use_rslora=target.use_rslora, module=module.name
        )
        lora_a = replace(parameter.lora_a, rows=lora_rank)
        lora_b = replace(parameter.lora_b, cols=lora_rank)
        tensors = tuple(_tensors(key, lora_a, lora_b, num_experts, target))
        yield TrainedModule(f"{module.name}.{parameter.name}", lora_rank, scaling, tensors)


def _tensors(
    key: str, lora_a: OutputFactor, lora_b: OutputFactor, num_experts: int, target: PeftTarget
) -> Iterator[OutputTensor]:
    """A pair as PEFT stores it: lora_A [E * r, in], lora_B [out, r * E]; or the transposed of it."""
    experts = tuple(range(num_experts))
    shape_a = (num_experts * lora_a.rows, lora_a.cols)
    shape_b = (lora_b.rows, lora_b.cols * num_experts)
    pair: tuple[tuple[Matrix, tuple[int, ...], Axes, OutputFactor], ...] = (
        ("lora_A", shape_a, "erc", lora_a),
        ("lora_B", shape_b, "rce", lora_b),
    )
    if target.orientation == "transposed":  # delta = (B @ A)^T: each takes the other's place
        pair = (
            ("lora_A", shape_b[::-1], "ecr", lora_b),
            ("lora_B", shape_a[::-1], "cre", lora_a),
        )
    for matrix, shape, axes, factor in pair:
        yield OutputTensor(f"{PEFT_PREFIX}{key}.{matrix}.weight", shape, axes, experts, factor)


@dataclass(frozen=True, slots=True)
class _Parameter:
    """A parameter of the experts module; projections: those of the shards that it is made of."""

    name: str
    projections: tuple[Projection, ...]
    lora_a: OutputFactor
    lora_b: OutputFactor


def _parameters(module: ExpertModule, target: PeftTarget) -> Iterator[_Parameter]:
    """In the order in which transformers' modules define them."""
    halves = tuple(half for half in _HALVES if half in module.scaling)
    if halves == ("up_proj",) and not _has_gate(module, target):
        yield _unchanged(module, "up_proj", target)
    elif halves:
        yield _joined(module, halves, target)
    for projection in ("gate_up_proj", "down_proj"):
        if projection in module.scaling:
            yield _unchanged(module, projection, target)


def _unchanged(module: ExpertModule, projection: Projection, target: PeftTarget) -> _Parameter:
    """A projection that is a parameter as it is."""
    stacks = module.stacks_by_factor
    lora_a, lora_b = (
        OutputFactor(stack.rows, stack.cols, target.stack_dtypes[stack.name], (whole_stack(stack),))
        for stack in (stacks[projection, "lora_A"], stacks[projection, "lora_B"])
    )
    return _Parameter(projection, (projection,), lora_a, lora_b)


def _joined(module: ExpertModule, halves: tuple[Projection, ...], target: PeftTarget) -> _Parameter:
    """Gate and up as one parameter; the rows of the one that is not trained are zero."""
    stacks = module.stacks_by_factor
    inputs = [stacks[projection, "lora_A"] for projection in halves]
    outputs = [stacks[projection, "lora_B"] for projection in halves]
    _check_halves(module, inputs, outputs, target)
    _check_gate_up(module, target)
    if len(halves) == 1 or module.name in target.modules_with_equal_inputs:
        lora_rank = inputs[0].rows
        first_ranks = [0, 0]  # both halves use the one lora_A
        parts_a = [whole_stack(inputs[0])]
    else:
        lora_rank = sum(stack.rows for stack in inputs)
        first_ranks = [0, inputs[0].rows]
        parts_a = [whole_stack(s, first_row=first) for s, first in zip(inputs, first_ranks)]
    num_rows = 2 * outputs[0].rows
    gate, up = gate_up_rows(num_rows, interleaved=target.gate_up == "interleaved")
    rows = {"gate_proj": gate, "up_proj": up}
    parts_b = [
        StackPart(stack, rows[half], range(stack.rows), range(first, first + stack.cols))
        for half, stack, first in zip(halves, outputs, first_ranks)
    ]
    dtype_a, dtype_b = target.stack_dtypes[inputs[0].name], target.stack_dtypes[outputs[0].name]
    return _Parameter(
        "gate_up_proj",
        halves,
        OutputFactor(lora_rank, inputs[0].cols, dtype_a, tuple(parts_a)),
        OutputFactor(num_rows, lora_rank, dtype_b, tuple(parts_b)),
    )


def _check_halves(
    module: ExpertModule,
    inputs: Sequence[FactorStack],
    outputs: Sequence[FactorStack],
    target: PeftTarget,
) -> None:
    """Raise LayoutError if gate and up differ in what one tensor has once: sizes and dtype."""
    if len({stack.cols for stack in inputs}) > 1 or len({stack.rows for stack in outputs}) > 1:
        raise LayoutError(
            f"{module.name}: gate_proj and up_proj differ in size.",
            hint="They are not two halves of one parameter; convert to per_expert.",
        )
    for stacks in (inputs, outputs):
        dtypes = sorted({target.stack_dtypes[stack.name] for stack in stacks})
        if len(dtypes) > 1:
            raise LayoutError(
                f"{module.name}: gate_proj and up_proj are {' and '.join(dtypes)}, and one tensor "
                "cannot hold both.",
                hint="Convert to per_expert, or split again with `dtype`.",
            )


def _check_gate_up(module: ExpertModule, target: PeftTarget) -> None:
    """Raise LayoutError unless it is known how the base model orders the rows of gate_up_proj."""
    if target.gate_up == "none":
        raise LayoutError(
            f"{module.name}: has gate_proj, but the base model's experts have no gate.",
            hint="Is `model` the base model of this adapter?",
        )
    if target.gate_up not in ("concatenated", "interleaved"):
        raise LayoutError(
            f"{module.name}: it is not known in which order the base model stores gate and up rows.",
            hint="Its config names no base model on the Hub whose order is known (a local path does not "
            f"tell). {_GIVE_MODEL}",
        )


def _has_gate(module: ExpertModule, target: PeftTarget) -> bool:
    """Whether the experts have a gate, which the shards do not show if only up is trained."""
    if module.gate_up == "none" or target.gate_up == "none":
        return False
    if not target.gate_up_stated:
        raise LayoutError(
            f"{module.name}: up_proj is trained without gate_proj, and it is not known whether the "
            "experts have a gate.",
            hint=_GIVE_MODEL,
        )
    return True


def _common_scaling(module: ExpertModule, projections: Sequence[Projection]) -> float:
    """The scaling of all that is trained. Raises LayoutError if there is more than one."""
    values: set[float] = set()
    for projection in projections:
        scaling = module.scaling[projection]
        if not isinstance(scaling, tuple):
            values.add(scaling)
            continue
        lora_ranks: Mapping[int, int] = module.expert_lora_ranks.get(projection, {})
        values |= {s for expert, s in enumerate(scaling) if lora_ranks.get(expert) != 0}
    if len(values) > 1:
        listed = ", ".join(f"{value:g}" for value in sorted(values)[:4])
        raise LayoutError(
            f"{module.name}: {' and '.join(projections)} have the scalings {listed}; a fused "
            "tensor has one for all experts.",
            hint="Convert to per_expert, where each expert keeps its own.",
        )
    return values.pop()
