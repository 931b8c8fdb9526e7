"""What to tell the user of a conversion: who will not read the result, or not read it right. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from lorashard.adapter.base_model import has_fused_experts
from lorashard.adapter.keys import PEFT_PREFIX
from lorashard.adapter.layout import AdapterLayout
from lorashard.convert.peft_tensors import TrainedModule
from lorashard.convert.target import PeftTarget
from lorashard.header import TensorEntry

# The sets of projections that vLLM loads by itself.
_COMPLETE = ({"gate_proj", "up_proj", "down_proj"}, {"gate_up_proj", "down_proj"})


def conversion_notes(
    source: AdapterLayout,
    config_bytes: bytes,
    replicated: Sequence[TensorEntry],
    modules: Sequence[TrainedModule],
    target: PeftTarget,
) -> Iterator[str]:
    """Sentences for the user. config_bytes: the new adapter_config.json."""
    unknown_to_peft = [
        entry.name
        for entry in replicated
        if ".lora_" in entry.name
        and not (entry.name.startswith(PEFT_PREFIX) and entry.name.endswith(".weight"))
    ]
    if unknown_to_peft:
        yield (
            f"{len(unknown_to_peft)} tensors keep names that PEFT does not know, for example "
            f"{unknown_to_peft[0]}."
        )
    for module in source.modules:
        trained = set(module.scaling)
        has_all = trained in _COMPLETE or (module.gate_up == "none" and "down_proj" in trained)
        if not has_all:
            yield (
                f"{module.name} trains {', '.join(sorted(trained))} only, which vLLM loads only "
                "with lorashard's plugin."
            )
            break
    if target.layout == "per_expert":
        yield from _per_expert_notes(source, config_bytes, target)
        yield from _renamed_block_notes(source, replicated, modules)


def _per_expert_notes(
    source: AdapterLayout, config_bytes: bytes, target: PeftTarget
) -> Iterator[str]:
    if has_fused_experts(target.model_names):
        yield (
            "transformers has no module for each expert of this model, so PEFT would silently "
            "leave them out. Convert to fused for PEFT."
        )
    if any(0 in odd.values() for m in source.modules for odd in m.expert_lora_ranks.values()):
        yield (
            "Experts that are not trained are written as zeros, because vLLM without the plugin "
            "needs every expert."
        )
    config = json.loads(config_bytes)
    patterns = (*(config.get("rank_pattern") or ()), *(config.get("alpha_pattern") or ()))
    misread = None
    if config.get("use_rslora"):
        misread = "rsLoRA's scaling of gate and up"
    if any("experts" in key for key in patterns):
        misread = "r and alpha of experts that have their own"
    if misread:
        yield (
            f"PEFT >= 0.19 with transformers 5 fuses experts as it loads them and gets {misread} "
            "wrong. Convert to fused for it."
        )


def _renamed_block_notes(
    source: AdapterLayout, replicated: Sequence[TensorEntry], modules: Sequence[TrainedModule]
) -> Iterator[str]:
    """Where a block's experts get another block name, its other modules keep the old one."""
    containers = {module.name.rsplit(".", 2)[0] for module in modules}
    old_blocks = [
        m.name.removesuffix("experts") for m in source.modules if m.name not in containers
    ]
    with_old_name = [
        entry.name
        for entry in replicated
        if any(f"{PEFT_PREFIX}{block}" in entry.name for block in old_blocks)
    ]
    if with_old_name:
        yield (
            f"{with_old_name[0]} keeps its name, which for this model neither vLLM nor PEFT with "
            "transformers 4 knows."
        )
