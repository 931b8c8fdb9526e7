"""Names in an adapter -> names in vLLM's model, by vLLM's own rules.

In: a LoRA manager's model and how vLLM renames weights for a load. Out: which live MoE layer takes
an experts container, and a LayoutError for a tensor that nothing takes, or that does not fit.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorashard.adapter.keys import PEFT_PREFIX, LoraKey, parse_key
from lorashard.errors import LayoutError
from lorashard.header import TensorEntry
from lorashard.rules import RENAMED_EXPERTS
from lorashard.vllm_plugin.engine.linears import LinearSizes, read_linears

_LAYER = re.compile(r"(?:.*\.)?layers\.[0-9]+\.")
_NUMBERED = re.compile(r"(?:^|\.)(layers\.[0-9]+)\.")


@dataclass(frozen=True, slots=True)
class ModelNames:
    """Names of one engine's modules.

    dense: every name under which vLLM looks up the LoRA of a module other than experts.
    linears: those of them whose sizes are known. absent: prefixes of modules on other pipeline
    stages.
    aliases: names in a text-only adapter -> names in a multimodal model.
    has_mtp: whether it has a block for multi-token prediction. mtp_layers: the numbers of layers
    that it leaves to such a block, as "layers.61".
    """

    dense: frozenset[str]
    linears: Mapping[str, LinearSizes]
    absent: tuple[str, ...]
    aliases: Mapping[str, str]
    has_mtp: bool
    mtp_layers: frozenset[str]


def read_model_names(manager: Any) -> ModelNames:
    """The names of a LoRAModelManager's model."""
    # Since 0.31; before that vLLM accepts the model's own names only.
    text_names = getattr(manager, "_get_text_lora_names", lambda _: ())
    dense = set(manager.modules)
    for packed, parts in manager.packed_modules.items():
        if not packed.endswith(".experts"):
            dense.update(parts)
    linears = read_linears(manager)
    shorter = [(short, name) for name in dense for short in text_names(name)]
    _add_names(shorter, dense, linears)
    if getattr(manager, "is_pooling_model", False):
        shorter = [(name.removeprefix("model."), name) for name in dense]
        _add_names(shorter, dense, linears)
    named = list(manager.model.named_modules())
    module_names = [name for name, _ in named]
    return ModelNames(
        frozenset(dense),
        linears,
        tuple(f"{name}." for name, module in named if type(module).__name__ == "PPMissingLayer"),
        {short: name for name in manager.modules for short in text_names(name)},
        any(map(_is_in_mtp_block, module_names)),
        _mtp_layers(getattr(manager.model, "config", None), module_names),
    )


def _add_names(
    shorter: Iterable[tuple[str, str]], dense: set[str], linears: dict[str, LinearSizes]
) -> None:
    """Let modules be known by other names as well: (the other name, the model's)."""
    for short, name in shorter:
        dense.add(short)
        if name in linears:
            linears.setdefault(short, linears[name])


def _is_in_mtp_block(module: str) -> bool:
    """By the names that models give these blocks: `mtp`, `mtp_layers`, `mtp_block`."""
    return any(part == "mtp" or part.startswith("mtp_") for part in module.split("."))


def _mtp_layers(config: Any, module_names: Iterable[str]) -> frozenset[str]:
    """The layers after the last one that checkpoints of DeepSeek-V3 and GLM number on for it."""
    config = getattr(config, "text_config", None) or config
    last = getattr(config, "num_hidden_layers", None)
    count = getattr(config, "num_nextn_predict_layers", None)
    if type(last) is not int or type(count) is not int:
        return frozenset()
    present = {layer for name in module_names for layer in _NUMBERED.findall(f"{name}.")}
    return frozenset(f"layers.{last + number}" for number in range(count)) - present


class ModuleNames:
    """The names of one load: the model's, and how vLLM renames the adapter's.

    options: the keyword arguments of `from_local_checkpoint` (weights_mapper, skip_prefixes).
    """

    def __init__(self, manager: Any, model: ModelNames, options: Mapping[str, Any]) -> None:
        self._targets = getattr(manager.lora_config, "target_modules", None)
        self._model = model
        self._mapper = options.get("weights_mapper")
        self._skip = tuple(options.get("skip_prefixes") or ())

    def renamed(self, module: str) -> str:
        """A module's name as vLLM looks it up."""
        from vllm.lora.utils import parse_fine_tuned_lora_name

        name, _ = parse_fine_tuned_lora_name(f"{PEFT_PREFIX}{module}.lora_A.weight", self._mapper)
        return str(name)

    def is_left_to_mtp(self, module: str) -> bool:
        """Whether a module, or a tensor, is in a block for multi-token prediction that is not here.

        vLLM runs such a block as a draft model of its own, without LoRA (vLLM 53361).
        """
        if not self._model.has_mtp and _is_in_mtp_block(module):
            return True
        numbered = self._model.mtp_layers
        return bool(numbered) and not numbered.isdisjoint(_NUMBERED.findall(module))

    def is_elsewhere(self, module: str) -> bool:
        """Whether a module is on another pipeline stage, or the model leaves it out."""
        return self.is_left_to_mtp(module) or any(
            name.startswith(self._model.absent)
            or any(name.startswith(skip) or f".{skip}" in name for skip in self._skip)
            for name in (module, self.renamed(module))
        )

    def moe_module(self, module: str, live: Collection[str]) -> str | None:
        """The live MoE layer that takes an experts container of the adapter, or None."""
        return find_moe_module(module, self.renamed(module), live, self._model.aliases)

    def takes(self, module: str) -> bool:
        """Whether a module other than experts gets its LoRA: in the model, and not excluded."""
        renamed = self.renamed(module)
        return renamed in self._model.dense and not self._is_filtered(renamed)

    def check_dense(self, entries: Iterable[TensorEntry]) -> None:
        """Raise LayoutError for a tensor that no module of the model takes, or that does not fit."""
        for entry in entries:
            key = parse_key(entry.name, len(entry.shape))
            if not isinstance(key, LoraKey):
                continue
            renamed = self.renamed(key.module)
            if self._is_filtered(renamed):
                continue
            if renamed in self._model.dense:
                _check_size(key, entry, self._model.linears.get(renamed))
                continue
            if not self.is_elsewhere(key.module):
                raise LayoutError(
                    f"{entry.name}: no module of the model takes this tensor of the adapter.",
                    hint="vLLM would ignore it silently. Is the adapter for this model, and "
                    f"does vLLM support LoRA on {renamed.rpartition('.')[2]}?",
                    rule=RENAMED_EXPERTS,
                )

    def _is_filtered(self, module: str) -> bool:
        """Whether the user has excluded the module (--lora-target-modules)."""
        return self._targets is not None and module.rpartition(".")[2] not in self._targets


def _check_size(key: LoraKey, entry: TensorEntry, linear: LinearSizes | None) -> None:
    features = entry.shape[1 if key.matrix == "lora_A" else 0]
    expected = linear.refuses(key.matrix, features) if linear and not key.embedding else None
    if linear and expected is not None:
        raise LayoutError(
            f"{entry.name} has {features} features, but {linear.name} has {expected}.",
            hint="Is the adapter for this model?",
        )


def find_moe_module(
    module: str, renamed: str, live: Collection[str], aliases: Mapping[str, str]
) -> str | None:
    """The live MoE layer that takes an adapter's experts container, or None.

    Tried in this order: the name itself, the name as vLLM renames weights, what the name of a
    text-only adapter is in a multimodal model (`aliases`), and the only MoE layer of the same
    decoder layer, because names of the block differ (Mixtral: `block_sparse_moe` in vLLM and
    transformers 4, `mlp` in transformers 5).
    """
    for candidate in (module, renamed, aliases.get(module), aliases.get(renamed)):
        if candidate in live:
            return candidate
    for candidate in (renamed, module, *_with_alias_prefix(renamed, aliases)):
        layer = _LAYER.match(candidate)
        if layer:
            same = [name for name in live if name.startswith(layer[0])]
            if len(same) == 1:
                return same[0]
    return None


def _with_alias_prefix(name: str, aliases: Mapping[str, str]) -> Sequence[str]:
    """`name` with each prefix replaced that differs between text-only names and the model's."""
    prefixes = set()
    for short, long in aliases.items():
        head, separator, tail = short.partition("layers.")
        if separator and long.endswith(separator + tail):
            prefixes.add((head, long.removesuffix(separator + tail)))
    return [long + name[len(short) :] for short, long in sorted(prefixes) if name.startswith(short)]
