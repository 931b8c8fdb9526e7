"""Tensor names and shapes -> what they mean: AdapterIndex -> AdapterLayout. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lorashard.adapter.base_model import gate_up_by_name
from lorashard.adapter.config import AdapterIndex, LoraConfig
from lorashard.adapter.containers import (
    MAX_EXPERTS,
    ContainerFactors,
    ContainerTensors,
    SourceFactor,
    is_untrained,
    read_container,
)
from lorashard.adapter.keys import (
    ExpertKey,
    LoraKey,
    UnknownKey,
    clean_name,
    is_unsloth_alias,
    parse_key,
)
from lorashard.adapter.modules import ExpertModule, build_module
from lorashard.adapter.options import LayoutOptions
from lorashard.adapter.rank_evidence import check_count_from_r, check_shared_pairs
from lorashard.dtypes import FLOAT_DTYPES
from lorashard.errors import (
    LayoutError,
    NoExpertsError,
    UnclearLayoutError,
    UnsupportedAdapterError,
)
from lorashard.header import TensorEntry

# No module has such a name, and "." and "$" of PEFT's patterns mean something else beside them.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


@dataclass(frozen=True, slots=True)
class AdapterLayout:
    """The meaning of every tensor: expert modules in the order of the file, and the rest.

    gate_up_known: False where neither the model nor the adapter says in which order gate and up
    rows are stored, so that "concatenated" is assumed.
    counted_from_r: whether only the config's r says how many experts the tensors hold.
    """

    num_experts: int
    modules: tuple[ExpertModule, ...]
    replicated: tuple[TensorEntry, ...]
    gate_up_known: bool
    counted_from_r: bool

    @property
    def replicated_names(self) -> frozenset[str]:
        """What the replicated tensors are called in the shards, without names of wrappers."""
        return frozenset(clean_name(entry.name) for entry in self.replicated)

    @property
    def numbers_experts_only(self) -> bool:
        """Whether no tensor holds all experts, so that more may exist than are numbered."""
        sources = (s for m in self.modules for stack in m.stacks for s in stack.sources)
        return all(len(source.experts or ()) <= 1 for source in sources)


def detect_layout(index: AdapterIndex, options: LayoutOptions, where: str) -> AdapterLayout:
    """Give every tensor its meaning. `where` names the adapter in messages.

    Raises NoExpertsError, LayoutError or UnsupportedAdapterError; guesses neither an orientation
    nor an expert count.
    """
    collected, replicated, lora_keys = _collect(index, where)
    _refuse_same_names(replicated)
    _check_replicated(lora_keys, index.config)
    containers = {
        name: read_container(name, tensors, index.config, options, _hidden_size(name, lora_keys))
        for name, tensors in collected.items()
        if tensors.storages
    }
    if not containers:
        raise NoExpertsError(where)
    router_rows = _router_rows(containers, lora_keys)
    num_experts = _count_experts(containers, options, router_rows)
    counted_from_r = options.num_experts is None and check_count_from_r(
        containers, num_experts, router_rows, lora_keys, index.config
    )
    gate_up = options.gate_up or gate_up_by_name(
        index.config.base_model, index.config.base_model_class
    )
    modules = tuple(
        module
        for name, container in containers.items()
        if (module := build_module(name, container, num_experts, gate_up, index.config)) is not None
    )
    if not modules:
        raise NoExpertsError(where)
    check_shared_pairs(modules, num_experts, lora_keys, index.config)
    known = gate_up is not None or all(m.gate_up in ("split", "none") for m in modules)
    return AdapterLayout(num_experts, modules, tuple(replicated), known, counted_from_r)


def _collect(
    index: AdapterIndex, where: str
) -> tuple[dict[str, ContainerTensors], list[TensorEntry], list[tuple[LoraKey, TensorEntry]]]:
    containers: dict[str, ContainerTensors] = {}
    replicated: list[TensorEntry] = []
    lora_keys: list[tuple[LoraKey, TensorEntry]] = []
    for entry in index.tensors:
        if entry.shape == (0,):
            raise LayoutError(
                f"{where}: tensor {entry.name} is empty, shape [0].",
                hint="DeepSpeed ZeRO-3 leaves such tensors where the parameters were not gathered "
                "before saving. Save again with all parameters gathered, for example with "
                "stage3_gather_16bit_weights_on_model_save.",
            )
        # Control characters are not printable, and to ask for that first takes half the time.
        if not entry.name.isprintable() and _CONTROL.search(entry.name):
            raise LayoutError(
                f"{where}: the name of tensor {entry.name!a} has control characters.",
                hint="The file is damaged; save the adapter again.",
            )
        key = parse_key(entry.name, len(entry.shape))
        if isinstance(key, ExpertKey):
            if entry.dtype not in FLOAT_DTYPES:
                raise LayoutError(f"{entry.name}: a LoRA factor cannot have dtype {entry.dtype}.")
            container = containers.get(key.module)
            if container is None:
                container = containers[key.module] = ContainerTensors()
            container.add(key, entry)
        elif isinstance(key, UnknownKey):
            raise UnsupportedAdapterError(
                key.reason,
                f"{where}: tensor {entry.name} {list(entry.shape)}",
                hint=key.hint,
                rule=key.rule,
            )
        else:
            if not (isinstance(key, LoraKey) and is_untrained(key.matrix, entry)):
                replicated.append(entry)
            if isinstance(key, LoraKey):
                lora_keys.append((key, entry))
    return containers, replicated, lora_keys


def _refuse_same_names(replicated: Sequence[TensorEntry]) -> None:
    """Raise LayoutError for two names that differ only in what wrappers add."""
    entries: dict[str, TensorEntry] = {}
    for entry in replicated:
        first = entries.setdefault(clean_name(entry.name), entry)
        if first is not entry:
            raise _same_tensor(first, entry, "tensor")


def _same_tensor(first: TensorEntry, second: TensorEntry, what: str) -> LayoutError:
    return LayoutError(
        f"{first.name} and {second.name} name the same {what}.",
        hint="Keep one of them; lorashard does not guess which is meant.",
    )


def _check_replicated(lora_keys: Sequence[tuple[LoraKey, TensorEntry]], config: LoraConfig) -> None:
    """Raise LayoutError for a factor alone, or one whose r is not the config's."""
    matrices: dict[str, dict[str, TensorEntry]] = {}
    for key, entry in lora_keys:
        first = matrices.setdefault(key.module, {}).setdefault(key.matrix, entry)
        if first is not entry:
            raise _same_tensor(first, entry, "factor")
        _check_replicated_rank(key, entry, config)
    for key, entry in lora_keys:
        if len(matrices[key.module]) == 1:
            raise LayoutError(
                f"{entry.name} has no partner (lora_A and lora_B come in pairs).",
                hint="The file is incomplete; save the adapter again.",
            )


def _check_replicated_rank(key: LoraKey, entry: TensorEntry, config: LoraConfig) -> None:
    """A factor whose r is not the config's may be a stack of experts under an unknown name.

    Replicating such a tensor would silently serve wrong experts.
    """
    lora_rank = entry.shape[0] if key.matrix == "lora_A" else entry.shape[1]
    expected = config.rank_of(key.module)
    if is_unsloth_alias(key.module) and lora_rank not in (expected, 0):
        raise LayoutError(
            f"{entry.name} {list(entry.shape)}: `moe` is Unsloth's name for `experts`, under which PEFT "
            "has the factors of all experts.",
            hint="Rename the tensors, `.moe.` to `.moe.experts.`, or save the adapter again with PEFT.",
        )
    # A router that is a bare parameter is matched with the parameter's name at the end.
    if lora_rank not in (expected, config.rank_of(f"{key.module}.weight")):
        raise LayoutError(
            f"{entry.name} {list(entry.shape)} has r={lora_rank}, adapter_config.json says "
            f"{expected}.",
            hint="Either it holds several experts in a layout that lorashard does not know, or "
            "the config does not belong to this file.",
        )


def _hidden_size(module: str, lora_keys: Sequence[tuple[LoraKey, TensorEntry]]) -> int | None:
    """The model's hidden size as the attention of the same layers shows it, if it agrees."""
    stem = module.partition(".layers.")[0]
    sizes = {
        entry.shape[1]
        for key, entry in lora_keys
        if key.matrix == "lora_A"
        and key.module.startswith(f"{stem}.layers.")
        and key.module.rpartition(".")[2] in ("q_proj", "k_proj", "v_proj")
    }
    return sizes.pop() if len(sizes) == 1 else None


def _router_rows(
    containers: Mapping[str, ContainerFactors], lora_keys: Sequence[tuple[LoraKey, TensorEntry]]
) -> int | None:
    """How many experts the trained routers choose from, None if none is trained."""
    blocks = {name.rpartition(".")[0] for name in containers}
    rows = {
        entry.shape[0]
        for key, entry in lora_keys
        if key.matrix == "lora_B"
        and key.module.rpartition(".")[0] in blocks
        and key.module.rpartition(".")[2] in ("gate", "router")
    }
    return max(rows, default=None)


def _count_experts(
    containers: Mapping[str, ContainerFactors], options: LayoutOptions, router_rows: int | None
) -> int:
    """E: from tensors that hold all experts, from the model, or from gapless expert numbers."""
    factors = [
        factor
        for container in containers.values()
        for same in container.factors.values()
        for factor in same
        if factor.experts is not None
    ]
    stated = _stated_count(factors, options.num_experts)
    num_experts = options.num_experts or stated or _count_trained(factors, router_rows)
    for factor in factors:
        if factor.experts and factor.experts[-1] >= num_experts:
            raise LayoutError(
                f"{factor.entry.name} has expert {factor.experts[-1]}, but the model has "
                f"{num_experts} experts.",
                hint="Is `model` the base model of this adapter? If the model has two banks of experts "
                "in one list (ERNIE-4.5-VL: text, then vision), lorashard does not read them.",
            )
    if num_experts > MAX_EXPERTS or (router_rows is not None and num_experts > router_rows):
        limit = "more than any model has"
        if num_experts <= MAX_EXPERTS:
            limit = f"but its router chooses from {router_rows}"
        raise LayoutError(
            f"The adapter would have {num_experts} experts, {limit}.",
            hint="Does adapter_config.json belong to this file (r, rank_pattern)?",
        )
    return num_experts


def _count_trained(factors: Sequence[SourceFactor], router_rows: int | None) -> int:
    """The number of experts trained. Raises LayoutError if there may be more than those."""
    trained = {expert for factor in factors for expert in factor.experts or ()}
    complete = bool(trained) and trained == set(range(len(trained)))
    if not complete or (router_rows is not None and router_rows != len(trained)):
        listed = ", ".join(map(str, sorted(trained)[:8]))
        trains = f"experts {listed}" if listed else "no expert by number"
        raise UnclearLayoutError(
            f"The adapter trains {trains} and does not say how many there are"
            + (f" (its router chooses from {router_rows})." if router_rows else "."),
            hint="Give `model=MODEL_DIR` or `num_experts=N`.",
        )
    return len(trained)


def _stated_count(factors: Sequence[SourceFactor], known: int | None) -> int | None:
    """The one count that all tensors with an expert axis state; None if there are none."""
    stated = {
        len(factor.experts): factor.entry.name
        for factor in factors
        if factor.experts is not None and (len(factor.experts) > 1 or factor.axes != "erc")
    }
    if known is not None:
        stated.setdefault(known, "the model")
    if len(stated) > 1:
        (count_a, name_a), (count_b, name_b) = list(stated.items())[:2]
        raise LayoutError(
            f"{name_a} holds {count_a} experts, {name_b} {count_b}.",
            hint="Is `model` the base model, and do r and rank_pattern match the file?",
        )
    return next(iter(stated), None)
