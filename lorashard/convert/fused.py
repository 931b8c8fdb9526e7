"""ExpertModule -> tensors of a plain PEFT adapter with fused experts (L2, L2b, L3). Pure.

Gate and up become one parameter. Where both have the same lora_A, it is the pair's; else the pair
has the r of both, lora_A one above the other and lora_B block-diagonal, as PEFT converts it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from lorashard.adapter.containers import Axes
from lorashard.adapter.keys import PEFT_PREFIX, Matrix, Projection
from lorashard.adapter.layout import AdapterLayout
from lorashard.adapter.modules import ExpertModule, FactorStack
from lorashard.adapter.options import GateUp
from lorashard.convert.peft_tensors import (
    Asked,
    Factor,
    OutputTensor,
    Part,
    Span,
    TrainedModule,
    gate_up_rows,
    representable_rank,
)
from lorashard.convert.per_expert import emit_per_expert
from lorashard.errors import LayoutError

_MODEL = "Give --model MODEL_DIR, whose config.json says it."
_HALVES: tuple[Projection, Projection] = ("gate_proj", "up_proj")


def emit_modules(source: AdapterLayout, asked: Asked) -> Iterator[TrainedModule]:
    """What the new adapter trains, module by module.

    Raises LayoutError for what the layout that is asked for cannot say.
    """
    emit = emit_per_expert if asked.layout == "per_expert" else emit_fused
    for module in source.modules:
        yield from emit(module, source.num_experts, asked)


def emit_fused(module: ExpertModule, num_experts: int, asked: Asked) -> Iterator[TrainedModule]:
    """PEFT's wrappers. Of two parameters the first, gate_up or up, is the inner one."""
    parameters = list(_parameters(module, asked))
    for number, parameter in enumerate(parameters):
        key = f"{module.name}.base_layer" if number < len(parameters) - 1 else module.name
        scaling = _one_scaling(module, parameter.projections)
        lora_rank = representable_rank(module, parameter.lora_a.rows, scaling, asked)
        lora_a = replace(parameter.lora_a, rows=lora_rank)
        lora_b = replace(parameter.lora_b, cols=lora_rank)
        shape_a, shape_b = (
            (num_experts * lora_rank, lora_a.cols),
            (lora_b.rows, num_experts * lora_rank),
        )
        made: tuple[tuple[Matrix, tuple[int, int], Axes, Factor], ...] = (
            ("lora_A", shape_a, "erc", lora_a),
            ("lora_B", shape_b, "rce", lora_b),
        )
        if asked.orientation == "transposed":  # delta = (B @ A)^T: each takes the other's place
            made = (
                ("lora_A", shape_b[::-1], "ecr", lora_b),
                ("lora_B", shape_a[::-1], "cre", lora_a),
            )
        experts = tuple(range(num_experts))
        tensors = tuple(
            OutputTensor(f"{PEFT_PREFIX}{key}.{matrix}.weight", shape, axes, experts, factor)
            for matrix, shape, axes, factor in made
        )
        yield TrainedModule(f"{module.name}.{parameter.name}", lora_rank, scaling, tensors)


@dataclass(frozen=True, slots=True)
class _Parameter:
    """A parameter of the experts module; projections: those of the shards that it takes in."""

    name: str
    projections: tuple[Projection, ...]
    lora_a: Factor
    lora_b: Factor


def _parameters(module: ExpertModule, asked: Asked) -> Iterator[_Parameter]:
    """In the order in which transformers' modules define them."""
    present = tuple(half for half in _HALVES if half in module.scaling)
    if present == ("up_proj",) and not _has_gate(module, asked):
        yield _whole(module, "up_proj", asked)
    elif present:
        yield _joined(module, present, asked)
    for projection in ("gate_up_proj", "down_proj"):
        if projection in module.scaling:
            yield _whole(module, projection, asked)


def _whole(module: ExpertModule, projection: Projection, asked: Asked) -> _Parameter:
    """A projection that is a parameter as it is."""
    stacks = module.stacks_by_factor
    lora_a, lora_b = (
        Factor(stack.rows, stack.cols, asked.dtypes[stack.name], (_all_of(stack),))
        for stack in (stacks[projection, "lora_A"], stacks[projection, "lora_B"])
    )
    return _Parameter(projection, (projection,), lora_a, lora_b)


def _joined(module: ExpertModule, present: tuple[Projection, ...], asked: Asked) -> _Parameter:
    """Gate and up as one parameter; the rows of the one that is not trained are zero."""
    stacks = module.stacks_by_factor
    inputs = [stacks[projection, "lora_A"] for projection in present]
    outputs = [stacks[projection, "lora_B"] for projection in present]
    _check_halves(module, inputs, outputs, asked)
    half = outputs[0].rows
    rows = dict(zip(_HALVES, gate_up_rows(half, _wanted_order(module, asked))))
    if len(present) == 1 or module.name in asked.equal_inputs:
        lora_rank = inputs[0].rows
        begins, parts_a = [0, 0], [_all_of(inputs[0])]
    else:
        lora_rank = sum(stack.rows for stack in inputs)
        begins = [0, inputs[0].rows]
        parts_a = [
            Part(stack, Span(begin, 1, stack.rows), Span(0, 1, stack.rows), 0, stack.cols)
            for begin, stack in zip(begins, inputs)
        ]
    parts_b = [
        Part(stack, rows[projection], Span(0, 1, half), begin, stack.cols)
        for projection, stack, begin in zip(present, outputs, begins)
    ]
    dtype_a, dtype_b = asked.dtypes[inputs[0].name], asked.dtypes[outputs[0].name]
    return _Parameter(
        "gate_up_proj",
        present,
        Factor(lora_rank, inputs[0].cols, dtype_a, tuple(parts_a)),
        Factor(2 * half, lora_rank, dtype_b, tuple(parts_b)),
    )


def _all_of(stack: FactorStack) -> Part:
    rows = Span(0, 1, stack.rows)
    return Part(stack, rows, rows, 0, stack.cols)


def _check_halves(
    module: ExpertModule,
    inputs: Sequence[FactorStack],
    outputs: Sequence[FactorStack],
    asked: Asked,
) -> None:
    if len({stack.cols for stack in inputs}) > 1 or len({stack.rows for stack in outputs}) > 1:
        raise LayoutError(
            f"{module.name}: gate_proj and up_proj differ in size.",
            hint="They are no halves of one parameter; convert to per_expert.",
        )
    for halves in (inputs, outputs):
        dtypes = sorted({asked.dtypes[stack.name] for stack in halves})
        if len(dtypes) > 1:
            raise LayoutError(
                f"{module.name}: gate_proj and up_proj are {' and '.join(dtypes)}, one tensor "
                "cannot hold both.",
                hint="Convert to per_expert, or split again with --dtype.",
            )


def _wanted_order(module: ExpertModule, asked: Asked) -> GateUp:
    """How the base model wants the rows of gate_up_proj."""
    if asked.gate_up == "none":
        raise LayoutError(
            f"{module.name}: has gate_proj, and the model is said to have no gate.",
            hint="Is --model the base model of this adapter?",
        )
    if asked.gate_up not in ("concatenated", "interleaved"):
        raise LayoutError(
            f"{module.name}: in which order the base model stores gate and up rows is not known.",
            hint=f"The adapter does not name its base model. {_MODEL}",
        )
    return asked.gate_up


def _has_gate(module: ExpertModule, asked: Asked) -> bool:
    if module.gate_up == "none" or asked.gate_up == "none":
        return False
    if not asked.gated:
        raise LayoutError(
            f"{module.name}: up_proj is trained without gate_proj, and whether the experts have a "
            "gate is not known.",
            hint=_MODEL,
        )
    return True


def _one_scaling(module: ExpertModule, projections: Sequence[Projection]) -> float:
    """The one scaling of all that is trained; a fused tensor has no other."""
    values: set[float] = set()
    for projection in projections:
        scaling = module.scaling[projection]
        lora_ranks: Mapping[int, int] = module.expert_lora_ranks.get(projection, {})
        by_expert = scaling if isinstance(scaling, tuple) else (scaling,)
        untrained = {expert for expert, lora_rank in lora_ranks.items() if lora_rank == 0}
        values |= {
            value
            for expert, value in enumerate(by_expert)
            if len(by_expert) == 1 or expert not in untrained
        }
    if len(values) > 1:
        listed = ", ".join(f"{value:g}" for value in sorted(values)[:4])
        raise LayoutError(
            f"{module.name}: {' and '.join(projections)} have the scalings {listed}; a fused "
            "tensor has one for all experts.",
            hint="Convert to per_expert, where each expert keeps its own.",
        )
    return values.pop()
