"""Whether the r of adapter_config.json is that of the experts, where their tensors do not show it.

Two layouts are read by that r alone: fused tensors, whose rows / r are the experts, and a 2-D pair
under a parameter's own name, which all experts share if r is all of its rows. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lorashard.adapter.config import LoraConfig
from lorashard.adapter.containers import ContainerFactors
from lorashard.adapter.keys import LoraKey
from lorashard.adapter.modules import ExpertModule
from lorashard.errors import LayoutError, UnclearLayoutError
from lorashard.header import TensorEntry

_CHECK_R = (
    "Give `model=MODEL_DIR`, which has the number of experts. If that is another one, the config "
    "does not belong to this file (some tools write it from the tensors' shapes): take r and "
    "lora_alpha from the training run."
)


def check_count_from_r(
    containers: Mapping[str, ContainerFactors],
    num_experts: int,
    router_rows: int | None,
    lora_keys: Sequence[tuple[LoraKey, TensorEntry]],
    config: LoraConfig,
) -> bool:
    """Whether only the config's r tells the number of experts, which no option states.

    router_rows: how many experts the trained routers choose from, None if none is trained.
    Raises UnclearLayoutError if the file contradicts that r, or shows nothing of the kind where it
    is an unlikely one.
    """
    fused = {n: c for n, c in containers.items() if c.source_layout.has_fused_tensors}
    if not fused:
        return False
    if _is_shown_by_others(containers, num_experts) or router_rows == num_experts:
        return False
    if router_rows is not None:
        raise UnclearLayoutError(
            f"By the r of adapter_config.json the adapter has {num_experts} experts, but its router "
            f"chooses from {router_rows}.",
            hint=_CHECK_R,
        )
    for name, container in fused.items():
        ranks, width = _ranks_and_width(container)
        if any(_is_shown(lora_rank, lora_keys, config) for lora_rank in ranks):
            continue
        if max(ranks) >= width or num_experts == 1:
            raise UnclearLayoutError(
                f"{name}: by the r={max(ranks)} of adapter_config.json, its factors of {width} or more "
                f"features hold {num_experts} expert{'s' * (num_experts > 1)}. That r and the file do "
                "not seem to fit.",
                hint=_CHECK_R,
            )
    return True


def check_shared_pairs(
    modules: Sequence[ExpertModule],
    num_experts: int,
    lora_keys: Sequence[tuple[LoraKey, TensorEntry]],
    config: LoraConfig,
) -> None:
    """Refuse a pair "for all experts" whose r is a multiple of their number, unless r is shown.

    It may as well hold the factors of each expert, one after the other. Raises LayoutError.
    """
    for module in modules:
        for stack in module.stacks:
            pair = [s for s in module.stacks if s.projection == stack.projection]
            entry = stack.sources[0].entry
            lora_rank = stack.rows if stack.matrix == "lora_A" else stack.cols
            if not all(s.shared and len(s.sources[0].entry.shape) == 2 for s in pair):
                continue
            if num_experts == 1 or lora_rank % num_experts:
                continue
            if not _is_shown(lora_rank, lora_keys, config):
                raise LayoutError(
                    f"{entry.name} {list(entry.shape)} may be one factor of r={lora_rank} that all "
                    f"experts share, or hold {num_experts} experts of r={lora_rank // num_experts}.",
                    hint="No other tensor has the r that adapter_config.json gives it. Save the "
                    "adapter with PEFT, or with one pair for each expert.",
                )


def _is_shown_by_others(containers: Mapping[str, ContainerFactors], num_experts: int) -> bool:
    """Whether tensors that are not read by the config's r hold just as many experts."""
    others = {
        expert
        for container in containers.values()
        if not container.source_layout.has_fused_tensors
        for factors in container.factors.values()
        for factor in factors
        for expert in factor.experts or ()
    }
    return others == set(range(num_experts))


def _ranks_and_width(container: ContainerFactors) -> tuple[set[int], int]:
    """Every r of a container, and its smallest number of in or out features."""
    factors = [
        (factor.rows, factor.cols) if matrix == "lora_A" else (factor.cols, factor.rows)
        for (_, matrix), sources in container.factors.items()
        for factor in sources
    ]
    return {lora_rank for lora_rank, _ in factors}, min(width for _, width in factors)


def _is_shown(
    lora_rank: int, lora_keys: Sequence[tuple[LoraKey, TensorEntry]], config: LoraConfig
) -> bool:
    """Whether this is the r that the config gives every module, and other modules do have it."""
    if lora_rank != config.lora_rank or config.moe_rank_scaling:
        return False
    return any(key.matrix == "lora_A" and entry.shape[0] == lora_rank for key, entry in lora_keys)
