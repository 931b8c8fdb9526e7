"""ExpertModule -> tensors of a plain PEFT adapter with a pair for each expert (L1). Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from lorashard.adapter.base_model import uses_w_names
from lorashard.adapter.keys import PEFT_PREFIX, Projection
from lorashard.adapter.modules import ExpertModule
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
from lorashard.errors import LayoutError

_W_NAMES: Mapping[Projection, str] = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def emit_per_expert(
    module: ExpertModule, num_experts: int, asked: Asked
) -> Iterator[TrainedModule]:
    """A pair for each expert and projection, with the r that the source gave it.

    Also for experts that are not trained: PEFT would do without, vLLM would not.
    Raises LayoutError if it is not known which rows of gate_up_proj are gate's.
    """
    stacks = module.stacks_by_factor
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
    if not uses_w_names(asked.model):
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
