"""What each rank has of a Megatron model's adapters, by Megatron-Bridge's own conversion.

In: the bridge, and this rank's parts of the model. Out: calls of an AdapterWriter. No tensor passes
between ranks; those of one pipeline tell each other the names of their adapters, as the bridge does.

Names, and which rows of a fused layer are a projection's, come from the bridge: its functions are
called with this rank's tensors. What a rank has (Megatron-Bridge 0.6.2 peft/utils.py:1006, :1836):

    linear_in   of a ColumnParallel or replicated base    [r / TP, in]     cut along axis 0
    linear_in   of a RowParallel base                     [r, in / TP]     axis 1
    linear_out  of any base                               [out / TP, r]    axis 0
    experts, an adapter for each                          [E_local, r, in], [E_local, out, r]
    experts, one adapter for all of a layer               [r, in], [out, r], alike on all EP ranks

Of a fused layer's linear_out, a TP rank has its part of each projection: q, k and v of its query
groups, one group after the other; or its rows of gate_proj, then those of up_proj.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from types import SimpleNamespace
from typing import Any

from lorashard.adapter.keys import PEFT_PREFIX
from lorashard.errors import UnsupportedAdapterError
from lorashard.publish.writer import AdapterWriter

_LOCAL_EXPERT = re.compile(r"\.local_experts\.(\d+)\.")
# Mappings of base layers of which a TP rank has a part of each projection. Others deal rows in other
# ways, which the bridge's export of adapters does not follow either.
_CUT_EVENLY = frozenset({
    "AutoMapping", "ColumnParallelMapping", "RowParallelMapping", "ReplicatedMapping", "QKVMapping",
    "GatedMLPMapping",
})  # fmt: skip
_GATHER = "Save it with the bridge's save_hf_adapter, and split that."


@dataclass(frozen=True, slots=True)
class _Names:
    """What PEFT calls an adapter. weights: of the projections of the base layer, in the bridge's order.

    expert: its global number, for an adapter of experts.
    """

    weights: tuple[str, ...]
    lora_a: tuple[str, ...]
    lora_b: tuple[str, ...]
    expert: int | None = None


class BridgedAdapters:
    """The adapters of a model, as Megatron-Bridge sees them: its tasks, one for each base layer.

    Every rank has the tasks of all pipeline stages; those of its own have tensors.
    """

    def __init__(self, bridge: Any, model: Sequence[Any]) -> None:
        self._bridge = bridge._model_bridge
        if not hasattr(self._bridge, "build_adapter_conversion_tasks"):
            raise UnsupportedAdapterError(
                "an adapter's way to Hugging Face names",
                "This Megatron-Bridge",
                hint="Install 0.6.2 or later.",
            )
        from megatron.core.utils import unwrap_model

        self._models = list(model)
        self._registry = self._bridge.mapping_registry()
        self._config = unwrap_model(self._models)[0].config
        found = self._bridge.build_adapter_conversion_tasks(self._models)
        self._tasks = [task for tasks in found.values() for task in tasks]

    def refuse_unknown(self) -> None:
        """Raise UnsupportedAdapterError, alike on all ranks, for what cannot be given part by part."""
        for task in self._tasks:
            where, tp_size = task.global_base_prefix, task.linear_out_task.mapping.tp_size
            if hasattr(task.linear_out_task.param_weight, "placements"):
                raise UnsupportedAdapterError("Megatron-FSDP", where, hint=_GATHER)
            if _is_of_experts(task) and tp_size > 1:
                # The bridge halves what it has gathered, but each rank's rows are its part of
                # gate_proj, then its part of up_proj (0.6.2 peft_bridge.py:498).
                raise UnsupportedAdapterError(
                    f"expert tensor parallelism {tp_size}", where, hint="Train with ETP 1."
                )
            names = next(self._names(task))
            if names.expert is not None and f".experts.{names.expert}." not in names.weights[0]:
                raise UnsupportedAdapterError(
                    f"an adapter for {names.weights[0]}, one tensor for all experts,",
                    where,
                    hint=_GATHER,
                )
            if tp_size > 1:
                self._refuse_uneven(names, tp_size, where)

    def _refuse_uneven(self, names: _Names, tp_size: int, where: str) -> None:
        """Raise for a base layer whose rows on one TP rank are not a part of each projection."""
        from megatron.bridge.models.conversion.peft_bridge import MegatronPeftBridge

        kind = type(self._registry.megatron_to_hf_lookup(f"{where}.weight")).__name__
        if kind not in _CUT_EVENLY:
            raise UnsupportedAdapterError(
                f"a layer with a {kind} on {tp_size} TP ranks", where, hint=_GATHER
            )
        if self._bridge._is_fused_qkv(names.weights):
            own = type(self._bridge)._split_qkv_linear_out_weight
            is_changed = own is not MegatronPeftBridge._split_qkv_linear_out_weight
            groups = self._config.num_query_groups
            if is_changed or groups % tp_size:
                raise UnsupportedAdapterError(
                    f"q, k and v of {groups} query groups, for this model, on {tp_size} TP ranks",
                    where,
                    hint=_GATHER,
                )

    def peft_config(self, lora: Any, base_model: str) -> Mapping[str, Any]:
        """adapter_config.json, as `save_hf_adapter` writes it."""
        import torch
        from megatron.bridge.models.conversion import peft_bridge
        from megatron.bridge.models.conversion.model_bridge import HFWeightTuple

        weights = [
            HFWeightTuple(name, torch.empty(task.dim, 1, device="meta"))
            for task in self._tasks
            # Of a usual r, what is said of one expert is said of all.
            for names in islice(
                self._names(task, of_all_ranks=True), 1 if task.dim == lora.dim else None
            )
            for name in names.lora_a
        ]
        config: Mapping[str, Any] = peft_bridge.build_adapter_config_dict(
            lora,
            target_modules=peft_bridge.infer_target_modules_from_adapter_weights(
                weight.param_name for weight in weights
            ),
            target_parameters=[],
            base_model_name_or_path=base_model,
            rank_pattern=peft_bridge.infer_rank_pattern_from_adapter_weights(
                weights, default_rank=lora.dim
            ),
        )
        return config

    def give_own(self, writer: AdapterWriter) -> None:
        """Give a writer what this rank is to write: of the data-parallel ranks, the first has it."""
        from megatron.core import parallel_state

        pp_rank = parallel_state.get_pipeline_model_parallel_rank()
        gives_dense = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
        gives_experts = parallel_state.get_expert_data_parallel_rank() == 0
        for task in self._tasks:
            if task.linear_in_task.pp_rank != pp_rank:
                continue
            if _is_of_experts(task):
                if gives_experts:
                    self._give_experts(writer, task)
            elif gives_dense:
                self._give_dense(writer, task)

    def _give_dense(self, writer: AdapterWriter, task: Any) -> None:
        (names,) = self._names(task)
        lora_a, mapping = task.linear_in_task.param_weight, task.linear_in_task.mapping
        lora_b = task.linear_out_task.param_weight
        kind, tp_size, tp_rank = type(mapping).__name__, mapping.tp_size, mapping.tp_rank
        is_replicated = kind == "ReplicatedMapping"
        if is_replicated and tp_rank != 0:
            return
        size = 1 if is_replicated else tp_size
        at = 0 if is_replicated else tp_rank
        for name_a, name_b, rows in self._projections(names, lora_b, size):
            for name, values, axis in (
                (name_a, lora_a, 1 if kind == "RowParallelMapping" else 0),
                (name_b, rows, 0),
            ):
                own = values.shape[axis]
                writer.tensor(
                    PEFT_PREFIX + name, values, axis=axis, begin=at * own, size=size * own
                )

    def _give_experts(self, writer: AdapterWriter, task: Any) -> None:
        named = list(self._names(task))
        ids = [names.expert for names in named if names.expert is not None]
        lora_a, lora_b = (
            own if own.dim() == 3 else own.expand(len(ids), *own.shape)
            for own in (task.linear_in_task.param_weight, task.linear_out_task.param_weight)
        )
        first, out_features = named[0], lora_b.shape[1]
        # The bridge takes rows of a matrix, whatever its columns are.
        columns = lora_b.permute(1, 0, 2).reshape(out_features, -1)
        for name_a, _, rows in self._projections(first, columns, 1):
            module, _, rest = name_a.rpartition(f".{first.expert}.")
            projection = rest.removesuffix(".lora_A.weight")
            own = rows.reshape(-1, len(ids), lora_b.shape[2]).permute(1, 0, 2)
            writer.experts(module, ids, {projection: (lora_a, own)})

    def _projections(
        self, names: _Names, lora_b: Any, tp_size: int
    ) -> Iterator[tuple[str, str, Any]]:
        """Name of lora_A, name of lora_B and its rows, for each projection of a base layer."""
        weights, models = list(names.weights), self._models
        if tp_size > 1:
            config = copy.copy(self._config)
            config.num_attention_heads //= tp_size
            config.num_query_groups //= tp_size
            models = [SimpleNamespace(config=config)]
        # `is_expert` says that the rows are of one TP rank, which this rank's always are.
        found = self._bridge._get_fused_adapter_linear_out_slices(
            models, weights, lora_b, is_expert=True
        )
        if found is None:
            found, weights = {weights[0]: lora_b}, weights[:1]
        for weight, name_a, name_b in zip(weights, names.lora_a, names.lora_b):
            if hasattr(found[weight], "shape"):  # not so for a projection that this layer lacks
                yield name_a, name_b, found[weight]

    def _names(self, task: Any, *, of_all_ranks: bool = False) -> Iterator[_Names]:
        """The names of an adapter: one set, or one for each of this EP rank's experts, or all."""
        from megatron.core import parallel_state

        prefix = task.global_base_prefix
        if not _is_of_experts(task):
            yield self._name(task, prefix, ".weight", None)
            return
        ep_size = parallel_state.get_expert_model_parallel_world_size()
        num_local = self._config.num_moe_experts // ep_size
        ep_rank = parallel_state.get_expert_model_parallel_rank()
        local = _LOCAL_EXPERT.search(prefix)
        for rank in range(ep_size) if of_all_ranks else [ep_rank]:
            # Megatron deals experts in order (0.6.2 model_bridge.py:322).
            if local is None:
                for expert in range(rank * num_local, (rank + 1) * num_local):
                    yield self._name(task, prefix, f".weight{expert}", expert)
            else:
                # The bridge numbers the experts of adapters as if each EP rank had the first ones
                # (0.6.2 model_bridge.py:307).
                expert = rank * num_local + int(local[1]) % num_local
                whole = f"{prefix[: local.start(1)]}{expert}{prefix[local.end(1) :]}"
                yield self._name(task, whole, ".weight", expert)

    def _name(self, task: Any, prefix: str, suffix: str, expert: int | None) -> _Names:
        weights = self._bridge._get_base_hf_param_names_for_adapter(
            self._registry, prefix, task.adapter_key, suffix
        )
        lora_a, lora_b = self._bridge._build_lora_hf_names(weights)
        return _Names(tuple(weights), tuple(lora_a), tuple(lora_b), expert)


def _is_of_experts(task: Any) -> bool:
    from megatron.bridge.peft.utils import is_expert_linear

    return bool(is_expert_linear(task.global_base_prefix))
