"""ExpertModule -> tensors of a plain PEFT adapter with a pair for each expert (L1). Pure.

And what fuse.py, which makes the fused layout, has in common with it. An output tensor is one
factor of one expert or of all, laid out along `axes` as in factors.py; its parts say which rows
and columns come from which stack of the shards. What no part fills is zero: an expert that is not
trained, the other half of a block-diagonal lora_B, padding.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from lorashard.errors import LayoutError
from lorashard.experts import ExpertModule, FactorStack
from lorashard.factors import Axes
from lorashard.keys import PEFT_PREFIX, Matrix, Projection
from lorashard.options import GateUp, Orientation, spelled_w

PeftLayout = Literal["per_expert", "fused"]
PEFT_LAYOUTS: tuple[PeftLayout, ...] = ("per_expert", "fused")

_W_NAMES: Mapping[Projection, str] = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


class Span(NamedTuple):
    """Indices begin, begin + step, …: `size` of them."""

    begin: int
    step: int
    size: int


@dataclass(frozen=True, slots=True)
class Part:
    """Rows and columns of an output factor that a stack of the shards holds, for each expert.

    The columns are [first_col, first_col + num_cols) there and the first ones in the stack.
    """

    stack: FactorStack
    rows: Span
    from_rows: Span
    first_col: int
    num_cols: int


@dataclass(frozen=True, slots=True)
class Factor:
    """lora_A [r, in] or lora_B [out, r] of an expert, and what it is made of."""

    rows: int
    cols: int
    dtype: str
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One tensor of the new file: the factors of `experts`, its axes in the order of `axes`."""

    name: str
    shape: tuple[int, ...]
    axes: Axes
    experts: tuple[int, ...]
    factor: Factor

    @property
    def dtype(self) -> str:
        """As safetensors names it."""
        return self.factor.dtype


@dataclass(frozen=True, slots=True)
class TrainedModule:
    """What PEFT gives one r and one alpha: an expert's projection, or a fused parameter.

    name: what its patterns are matched against. scaling: None where all is zero.
    """

    name: str
    lora_rank: int
    scaling: float | None
    tensors: tuple[OutputTensor, ...]


@dataclass(frozen=True, slots=True)
class Asked:
    """What is to be written.

    gate_up: how the base model stores gate and up rows; None = not known.
    gated: whether `gate_up` was told, not only concluded from the model's name.
    equal_inputs: the modules whose gate and up have one lora_A, expert by expert.
    dtypes: of each stack in the shards, by its name.
    model: what is known of the base model's name, class and type; may be empty.
    """

    layout: PeftLayout
    gate_up: GateUp | None
    gated: bool
    orientation: Orientation
    use_rslora: bool
    equal_inputs: frozenset[str]
    dtypes: Mapping[str, str]
    model: str


def emit_per_expert(
    module: ExpertModule, num_experts: int, asked: Asked
) -> Iterator[TrainedModule]:
    """A pair for each expert and projection, with the r that the source gave it.

    Also for experts that are not trained: PEFT would do without, vLLM would not.
    Raises LayoutError if it is not known which rows of gate_up_proj are gate's.
    """
    stacks = stacks_of(module)
    container, spelling = _spelling(module, asked)
    for projection in module.scaling:
        lora_a, lora_b = stacks[projection, "lora_A"], stacks[projection, "lora_B"]
        rows: dict[Projection, Span] = {projection: Span(0, 1, lora_b.rows)}
        if projection == "gate_up_proj":
            gate, up = gate_up_rows(lora_b.rows // 2, _stored_order(module, asked))
            rows = {"gate_proj": gate, "up_proj": up}
        for expert in range(num_experts):
            lora_rank = module.expert_lora_ranks.get(projection, {}).get(expert, lora_a.rows)
            scaling = _scaling_of(module, projection, expert) if lora_rank else None
            padded = representable_rank(module, lora_rank or lora_a.rows, scaling, asked)
            for leaf, span in rows.items():
                parts_a: tuple[Part, ...] = ()
                parts_b: tuple[Part, ...] = ()
                if lora_rank:
                    own_rows = Span(0, 1, lora_rank)
                    parts_a = (Part(lora_a, own_rows, own_rows, 0, lora_a.cols),)
                    parts_b = (Part(lora_b, Span(0, 1, span.size), span, 0, lora_rank),)
                name = f"{container}.{expert}.{spelling.get(leaf, leaf)}"
                factors = {
                    "lora_A": Factor(padded, lora_a.cols, asked.dtypes[lora_a.name], parts_a),
                    "lora_B": Factor(span.size, padded, asked.dtypes[lora_b.name], parts_b),
                }
                tensors = tuple(
                    OutputTensor(
                        f"{PEFT_PREFIX}{name}.{matrix}.weight",
                        (factor.rows, factor.cols), "rec", (expert,), factor,
                    )
                    for matrix, factor in factors.items()
                )  # fmt: skip
                yield TrainedModule(name, padded, scaling, tensors)


def stacks_of(module: ExpertModule) -> dict[tuple[Projection, Matrix], FactorStack]:
    """The module's stacks by what they are."""
    return {(stack.projection, stack.matrix): stack for stack in module.stacks}


def gate_up_rows(half: int, order: GateUp) -> tuple[Span, Span]:
    """The gate's and the up projection's rows among 2 * half."""
    if order == "interleaved":
        return Span(0, 2, half), Span(1, 2, half)
    return Span(0, 1, half), Span(half, 1, half)


def fitting_alpha(scaling: float, lora_rank: int, *, use_rslora: bool) -> float | None:
    """The alpha of which PEFT makes exactly `scaling`, an integer if there is one; None if not."""
    divisor = math.sqrt(lora_rank) if use_rslora else lora_rank
    near = scaling * divisor
    candidates: list[float] = [round(near), near]
    for direction in (0.0, math.inf):
        alpha = near
        for _ in range(4):  # rounding there and back is off by less
            alpha = math.nextafter(alpha, direction)
            candidates.append(alpha)
    return next((alpha for alpha in candidates if alpha > 0 and alpha / divisor == scaling), None)


def representable_rank(
    module: ExpertModule, lora_rank: int, scaling: float | None, asked: Asked
) -> int:
    """The smallest r from `lora_rank` on with an alpha that gives exactly `scaling`.

    What is beyond `lora_rank` is zero. Nearly always `lora_rank` itself will do.
    """
    if scaling is None:
        return lora_rank
    for padded in range(lora_rank, 4 * lora_rank + 1):  # a power of 4 is among them
        if fitting_alpha(scaling, padded, use_rslora=asked.use_rslora) is not None:
            return padded
    raise LayoutError(
        f"{module.name}: no lora_alpha gives a scaling of {scaling!r} with r={lora_rank}.",
        hint="Serve the shards; adapter_config.json cannot say this scaling.",
    )


def _spelling(module: ExpertModule, asked: Asked) -> tuple[str, Mapping[Projection, str]]:
    """The container's name and those of the projections, as transformers 4 has them."""
    names = [
        source.module.removeprefix(f"{module.name}.").split(".")
        for stack in module.stacks
        for source in stack.sources
    ]
    leaves = {name[1] for name in names if len(name) == 2 and name[0].isdecimal()}
    if leaves:  # one tensor per expert already
        return module.name, _W_NAMES if leaves <= set(_W_NAMES.values()) else {}
    if not spelled_w(asked.model):
        return module.name, {}
    # transformers 5 has renamed it
    return re.sub(r"\.mlp\.experts$", ".block_sparse_moe.experts", module.name), _W_NAMES


def _scaling_of(module: ExpertModule, projection: Projection, expert: int) -> float:
    scaling = module.scaling[projection]
    return scaling[expert] if isinstance(scaling, tuple) else scaling


def _stored_order(module: ExpertModule, asked: Asked) -> GateUp:
    """How the rows of the module's gate_up_proj lie."""
    if asked.gate_up == "none":
        raise LayoutError(
            f"{module.name}: has gate_up_proj, and the model is said to have no gate.",
            hint="Is --model the base model of this adapter?",
        )
    if asked.gate_up not in ("concatenated", "interleaved"):
        raise LayoutError(
            f"{module.name}: which rows of gate_up_proj are gate's and which up's is not known.",
            hint="The adapter does not name its base model. Give --model MODEL_DIR.",
        )
    return asked.gate_up
