"""What to write: from the flags, the base model, the shards and the adapter's config. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lorashard.adapter.base_model import (
    ModelFacts,
    fused_orientation,
    fused_orientation_by_name,
    gate_up_by_name,
    telling_name,
)
from lorashard.adapter.config import LoraConfig
from lorashard.adapter.layout import AdapterLayout
from lorashard.adapter.options import ExpertLayout, GateUp, LayoutOptions, Orientation
from lorashard.errors import LayoutError


@dataclass(frozen=True, slots=True)
class PeftTarget:
    """The PEFT adapter to write, and what that needs to know about the base model and the shards.

    gate_up: how the base model stores gate and up rows; None = not known.
    gate_up_stated: whether `gate_up` was stated, not only inferred from the model's name.
    orientation: which way round the fused parameters are; "standard" for per_expert.
    modules_with_equal_inputs: those whose gate and up have one lora_A, expert by expert.
    stack_dtypes: of each stack in the shards, by its name.
    model_names: the base model's type, its class or its name, as far as known; may be empty.
    """

    layout: ExpertLayout
    gate_up: GateUp | None
    gate_up_stated: bool
    orientation: Orientation
    use_rslora: bool
    modules_with_equal_inputs: frozenset[str]
    stack_dtypes: Mapping[str, str]
    model_names: str


def describe_target(
    source: AdapterLayout,
    config: LoraConfig,
    layout: ExpertLayout,
    *,
    options: LayoutOptions,
    facts: ModelFacts | None,
    modules_with_equal_inputs: frozenset[str],
    stack_dtypes: Mapping[str, str],
) -> PeftTarget:
    """Put together what the flags, the model, the shards and the adapter's config say.

    options: those of the split; their `orientation` is that of the result, None = not stated.
    Raises LayoutError for a fused layout if its orientation is not known.
    """
    stated_gate_up = facts.gate_up if facts else options.gate_up
    orientation: Orientation = "standard"
    if layout == "fused":
        orientation = options.orientation or _find_orientation(source, config, facts)
    model_type = facts.model_type if facts else None
    return PeftTarget(
        layout=layout,
        gate_up=stated_gate_up or gate_up_by_name(config.base_model, config.base_model_class),
        gate_up_stated=stated_gate_up is not None,
        orientation=orientation,
        use_rslora=config.use_rslora,
        modules_with_equal_inputs=modules_with_equal_inputs,
        stack_dtypes=stack_dtypes,
        model_names=telling_name(config.base_model, config.base_model_class, model_type),
    )


def _find_orientation(
    source: AdapterLayout, config: LoraConfig, facts: ModelFacts | None
) -> Orientation:
    """Which way round PEFT >= 0.19 has the parameters of the base model."""
    if facts is not None:
        return fused_orientation(facts.model_type)
    by_name = fused_orientation_by_name(config.base_model, config.base_model_class)
    # Llama 4 is the one model that comes out transposed; it calls its blocks `feed_forward`.
    may_be_llama = [m.name for m in source.modules if m.name.endswith("feed_forward.experts")]
    if by_name is None and may_be_llama:
        raise LayoutError(
            f"{may_be_llama[0]}: it is not known which way round PEFT has the fused parameters: "
            "transposed for Llama 4, standard for others.",
            hint="Give `model=MODEL_DIR`, or `orientation`.",
        )
    return by_name or "standard"
