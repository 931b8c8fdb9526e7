"""What `convert` writes: header, adapter_config.json, and what each tensor is made of. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lorashard.adapter.base_model import (
    ModelFacts,
    fused_orientation,
    fused_orientation_by_name,
    gate_up_by_name,
    has_fused_experts,
)
from lorashard.adapter.config import LoraConfig, parse_config
from lorashard.adapter.keys import PEFT_PREFIX, LoraKey, parse_key
from lorashard.adapter.layout import AdapterLayout
from lorashard.adapter.modules import FactorStack
from lorashard.adapter.options import LayoutOptions, Orientation
from lorashard.convert.fused import emit_modules
from lorashard.convert.peft_config import Setting, write_config
from lorashard.convert.peft_tensors import (
    Asked,
    OutputTensor,
    PeftLayout,
    TrainedModule,
    fitting_alpha,
)
from lorashard.errors import LayoutError
from lorashard.header import TensorEntry, build_header
from lorashard.shards.placement import Placement
from lorashard.shards.plan import ShardPlan, Target, expert_slots

# Stack name -> expert -> where its slot is; of a shared stack the one place for every expert.
Places = Mapping[str, Mapping[int, Target]]


@dataclass(frozen=True, slots=True)
class Conversion:
    """Everything decided, nothing written.

    header: the new file's start. tensors: in file order, made of parts of stacks, or an entry of
    the replicated file that is copied. notes: worth telling the user.
    """

    config: bytes
    header: bytes
    tensors: tuple[OutputTensor | TensorEntry, ...]
    size_bytes: int
    notes: tuple[str, ...]


def ask(
    source: AdapterLayout,
    plan: ShardPlan,
    config: LoraConfig,
    layout: PeftLayout,
    options: LayoutOptions,
    facts: ModelFacts | None,
    equal_inputs: frozenset[str],
) -> Asked:
    """What the flags, the model, the shards and the adapter's config together ask for.

    options: those of the split; their `orientation` is that of the result, None = not told.
    Raises LayoutError for a fused layout if its orientation is not known.
    """
    told = facts.gate_up if facts else options.gate_up
    orientation: Orientation = "standard"
    if layout == "fused":
        orientation = options.orientation or _orientation(source, config, facts)
    return Asked(
        layout=layout,
        gate_up=told or gate_up_by_name(config.base_model, config.base_model_class),
        gated=told is not None,
        orientation=orientation,
        use_rslora=config.use_rslora,
        equal_inputs=equal_inputs,
        dtypes=dtypes_in_shards(plan),
        model=" ".join(
            name
            for name in (config.base_model, config.base_model_class, facts and facts.model_type)
            if name
        ),
    )


def _orientation(
    source: AdapterLayout, config: LoraConfig, facts: ModelFacts | None
) -> Orientation:
    """Which way round PEFT >= 0.19 has the parameters of the base model."""
    if facts is not None:
        return fused_orientation(facts.model_type)
    named = fused_orientation_by_name(config.base_model, config.base_model_class)
    # Llama 4 is the one model that comes out transposed; it calls its blocks `feed_forward`.
    unsure = [m.name for m in source.modules if m.name.endswith("feed_forward.experts")]
    if named is None and unsure:
        raise LayoutError(
            f"{unsure[0]}: which way round PEFT has the fused parameters is not known: transposed "
            "for Llama 4, standard for others.",
            hint="Give --model MODEL_DIR, or --orientation.",
        )
    return named or "standard"


def dtypes_in_shards(plan: ShardPlan) -> dict[str, str]:
    """The dtype of each tensor of the shard files by its name; a cast may have changed it."""
    return {entry.name: entry.dtype for file in plan.files[:2] for entry in file.tensors}


def find_slots(source: AdapterLayout, placement: Placement, plan: ShardPlan) -> Places:
    """Where in the shard files each expert's slot of each stack is."""
    begins = [file.begins for file in plan.files]
    dtypes = dtypes_in_shards(plan)
    places: dict[str, Mapping[int, Target]] = {}
    for module in source.modules:
        ranks = placement.ranks_of(module.name)
        for stack in module.stacks:
            if stack.shared:
                target = Target(0, begins[0][stack.name])
                places[stack.name] = dict.fromkeys(range(source.num_experts), target)
                continue
            slots = expert_slots(stack, ranks, begins, dtypes[stack.name])
            # Copies of a redundant expert are equal.
            places[stack.name] = {expert: copies[0] for expert, copies in slots.items()}
    return places


def inputs_to_compare(source: AdapterLayout) -> Iterator[tuple[str, FactorStack, FactorStack]]:
    """(module, gate's lora_A, up's lora_A) where these could be equal."""
    for module in source.modules:
        stacks = module.stacks_by_factor
        gate, up = stacks.get(("gate_proj", "lora_A")), stacks.get(("up_proj", "lora_A"))
        if gate and up and (gate.rows, gate.cols, gate.dtype) == (up.rows, up.cols, up.dtype):
            yield module.name, gate, up


def decide(
    source: AdapterLayout, plan: ShardPlan, config: LoraConfig, config_bytes: bytes, asked: Asked
) -> Conversion:
    """Decide every byte. Raises LayoutError for what the layout that is asked for cannot say."""
    modules = tuple(emit_modules(source, asked))
    names = {entry.name for entry in source.replicated}
    replicated = [entry for entry in plan.files[0].tensors if entry.name in names]
    made: dict[str, OutputTensor | TensorEntry] = {entry.name: entry for entry in replicated}
    for tensor in (tensor for module in modules for tensor in module.tensors):
        if tensor.name in made:
            raise LayoutError(
                f"Two tensors would be called {tensor.name}.",
                hint="Rename the one in the adapter that is no expert factor.",
            )
        made[tensor.name] = tensor
    header, entries = build_header(
        [(tensor.name, tensor.dtype, tensor.shape) for tensor in made.values()], {"format": "pt"}
    )
    if not _keeps_the_config(source, config, made, asked):
        config_bytes = _new_config(config, config_bytes, replicated, modules, asked)
    _check_config(config_bytes, modules)
    return Conversion(
        config=config_bytes,
        header=header,
        tensors=tuple(made[entry.name] for entry in entries),
        size_bytes=entries[-1].end,
        notes=tuple(_notes(source, config_bytes, replicated, modules, asked)),
    )


def _keeps_the_config(
    source: AdapterLayout,
    config: LoraConfig,
    made: Mapping[str, OutputTensor | TensorEntry],
    asked: Asked,
) -> bool:
    """Whether PEFT wrote the source in this very layout, so that its config says it right."""
    same_layout = all(
        m.source_layout.is_peft_layout(asked.layout, asked.orientation) for m in source.modules
    )
    sources = (s.entry for m in source.modules for stack in m.stacks for s in stack.sources)
    before = {entry.name: entry.shape for entry in (*source.replicated, *sources)}
    after = {name: tensor.shape for name, tensor in made.items()}
    return config.saved_by_peft and same_layout and before == after


def _new_config(
    config: LoraConfig,
    config_bytes: bytes,
    replicated: Sequence[TensorEntry],
    modules: Sequence[TrainedModule],
    asked: Asked,
) -> bytes:
    alphas = [_alpha(module, config) for module in modules]
    # What is zero has the alpha of its like, so that one pattern does for all.
    likely = {_leaf(m): alpha for m, alpha in zip(modules, alphas) if alpha is not None}
    experts = [
        Setting(m.name, m.lora_rank, likely[_leaf(m)] if alpha is None else alpha)
        for m, alpha in zip(modules, alphas)
    ]
    keys = (parse_key(entry.name, len(entry.shape)) for entry in replicated)
    others = dict.fromkeys(key.module for key in keys if isinstance(key, LoraKey))
    document = write_config(json.loads(config_bytes), config, asked.layout, experts, tuple(others))
    ordered = dict(sorted(document.items()))  # the fields; the order of patterns has a meaning
    return (json.dumps(ordered, indent=2, ensure_ascii=False) + "\n").encode()


def _leaf(module: TrainedModule) -> str:
    return module.name.rpartition(".")[2]


def _alpha(module: TrainedModule, config: LoraConfig) -> float | None:
    if module.scaling is None:
        return None
    alpha = fitting_alpha(module.scaling, module.lora_rank, use_rslora=config.use_rslora)
    assert alpha is not None, module
    return alpha


def _check_config(config_bytes: bytes, modules: Sequence[TrainedModule]) -> None:
    """PEFT's rules must lead from the new config to each module's r and scaling."""
    config = parse_config(config_bytes, "the new adapter_config.json")
    for module in modules:
        assert config.rank_of(module.name) == module.lora_rank, module.name
        scaling = config.scaling_of(module.name, module.lora_rank)
        assert module.scaling in (None, scaling), module.name


def _notes(
    source: AdapterLayout,
    config_bytes: bytes,
    replicated: Sequence[TensorEntry],
    modules: Sequence[TrainedModule],
    asked: Asked,
) -> Iterator[str]:
    odd = [
        entry.name
        for entry in replicated
        if ".lora_" in entry.name
        and not (entry.name.startswith(PEFT_PREFIX) and entry.name.endswith(".weight"))
    ]
    if odd:
        yield f"{len(odd)} tensors keep names that PEFT does not know, {odd[0]} for example."
    whole = ({"gate_proj", "up_proj", "down_proj"}, {"gate_up_proj", "down_proj"})
    for module in source.modules:
        trained = set(module.scaling)
        if trained not in whole and not (module.gate_up == "none" and "down_proj" in trained):
            yield (
                f"{module.name} trains {', '.join(sorted(trained))} only, which vLLM loads with "
                "lorashard's plugin alone."
            )
            break
    if asked.layout == "per_expert":
        yield from _per_expert_notes(source, config_bytes, asked)
        yield from _renamed_notes(source, replicated, modules)


def _per_expert_notes(source: AdapterLayout, config_bytes: bytes, asked: Asked) -> Iterator[str]:
    if has_fused_experts(asked.model):
        yield (
            "transformers has no module for each expert of this model, so PEFT would leave them "
            "out without a word. Convert to fused for it."
        )
    filled = any(0 in odd.values() for m in source.modules for odd in m.expert_lora_ranks.values())
    if filled:
        yield "Experts that are not trained are written as zeros: vLLM alone wants every expert."
    config = json.loads(config_bytes)
    lost = "rsLoRA's scaling of gate and up" if config.get("use_rslora") else None
    if any(
        "experts" in key for f in ("rank_pattern", "alpha_pattern") for key in config.get(f) or ()
    ):
        lost = "r and alpha of experts that have their own"
    if lost:
        yield (
            f"PEFT >= 0.19 with transformers 5 fuses experts as it loads them and gets {lost} "
            "wrong. Convert to fused for it."
        )


def _renamed_notes(
    source: AdapterLayout, replicated: Sequence[TensorEntry], modules: Sequence[TrainedModule]
) -> Iterator[str]:
    """Of a block that has another name now, what is no expert keeps the old one."""
    now = {module.name.rsplit(".", 2)[0] for module in modules}
    blocks = [m.name.removesuffix("experts") for m in source.modules if m.name not in now]
    left = [e.name for e in replicated if any(f"{PEFT_PREFIX}{b}" in e.name for b in blocks)]
    if left:
        yield (
            f"{left[0]} keeps its name, which vLLM, and PEFT with transformers 4, do not have for "
            "this model."
        )
