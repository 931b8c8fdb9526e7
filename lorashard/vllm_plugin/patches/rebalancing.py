"""EPLB, vLLM's rearranging of experts: their LoRA moves with them. `expert_rows` says what else it takes.

The LoRA stacks are there before EPLB collects what it moves, so it gets their rows with the base
weights, for every way and every communicator that it has. At each transfer, slots that no adapter uses
are left out.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from lorashard.vllm_plugin.engine.expert_maps import ExpertMaps
from lorashard.vllm_plugin.patches.expert_rows import (
    layer_rows,
    row_tag,
    rows_among,
)

EPLB = "--enable-eplb"  # the option that these patches are for

# It knows tensors by their place in the list, so none is left out.
_KNOWS_PLACES = "NixlEplbCommunicator"


def wrap_get_expert_weights(original: Callable[..., Any]) -> Callable[..., Any]:
    """MoERunner.get_expert_weights: with the rows of the LoRA slots behind the base weights."""

    def get_expert_weights(self: Any) -> Any:
        rows = layer_rows(self)
        weights = original(self)
        return weights if rows is None else [*weights, *rows.tensors()]

    return get_expert_weights


def wrap_add_model(original: Callable[..., Any]) -> Callable[..., Any]:
    """EplbState.add_model: which layer has which number, and where experts are."""

    def add_model(self: Any, model: Any, model_config: Any, *args: Any, **kwargs: Any) -> Any:
        added = original(self, model, model_config, *args, **kwargs)
        layers = [layer_rows(layer) for layer in model.moe_layers]
        known = [layer for layer in layers if layer is not None]
        if known:
            if len(known) < len(layers) or not all(map(rows_among, model.expert_weights)):
                raise ValueError(
                    f"lorashard: {type(model).__name__} gives EPLB the weights of its experts in a "
                    "way that leaves out their LoRA. Start without --enable-eplb."
                )
            state = self.model_states[model_config.compute_hash()]
            maps = state.physical_to_logical_map.tolist()
            names = [layer.name for layer in known]
            slots = {name: tuple(slots) for name, slots in zip(names, maps, strict=True)}
            known[0].rows.bind(names, ExpertMaps(slots))
        return added

    return add_model


def wrap_rearrange(original: Callable[..., Any]) -> Callable[..., Any]:
    """rearrange_expert_weights_inplace, EPLB's synchronous way: without slots that are not used."""
    parameters = inspect.signature(original)

    def rearrange_expert_weights_inplace(*args: Any, **kwargs: Any) -> Any:
        call = parameters.bind(*args, **kwargs)
        given = call.arguments
        rows = rows_among(given["expert_weights"][0])
        if rows is not None and not given.get("is_profile"):
            from vllm.distributed.parallel_state import get_ep_group

            slots = rows.begin_transfer(get_ep_group().cpu_group)
            if not _knows_places(given["communicator"]):
                layers = given["expert_weights"]
                given["expert_buffer"] = _buffers_of(slots, layers[0], given["expert_buffer"])
                given["expert_weights"] = [_weights_of(slots, weights) for weights in layers]
        return original(*call.args, **call.kwargs)

    return rearrange_expert_weights_inplace


def wrap_transfer_layer(original: Callable[..., Any]) -> Callable[..., Any]:
    """transfer_layer, in EPLB's thread: the same for one layer."""
    parameters = inspect.signature(original)

    def transfer_layer(*args: Any, **kwargs: Any) -> Any:
        call = parameters.bind(*args, **kwargs)
        given = call.arguments
        weights = given["expert_weights"]
        rows = rows_among(weights)
        if rows is not None and not given.get("is_profile"):
            from vllm.distributed.parallel_state import get_eplb_group

            slots = rows.begin_transfer(get_eplb_group().cpu_group)
            if not _knows_places(given["communicator"]):
                buffers = given["expert_weights_buffer"]
                given["expert_weights_buffer"] = _buffers_of(slots, weights, buffers)
                given["expert_weights"] = _weights_of(slots, weights)
        return original(*call.args, **call.kwargs)

    return transfer_layer


def wrap_move_from_buffer(original: Callable[..., Any]) -> Callable[..., Any]:
    """move_from_buffer: what has travelled comes from the buffers, and nothing else does."""

    def move_from_buffer(
        expert_weights: Any, expert_weights_buffers: Any, *args: Any, **kwargs: Any
    ) -> Any:
        rows = rows_among(expert_weights)
        if rows is not None:
            slots = rows.traveling
            expert_weights_buffers = _buffers_of(slots, expert_weights, expert_weights_buffers)
            expert_weights = _weights_of(slots, expert_weights)
        return original(expert_weights, expert_weights_buffers, *args, **kwargs)

    return move_from_buffer


def wrap_commit_maps(original: Callable[..., Any]) -> Callable[..., Any]:
    """_commit_eplb_maps: the end of a synchronous rearrangement."""

    def _commit_eplb_maps(model_state: Any, new_physical_to_logical_map: Any) -> Any:
        done = original(model_state, new_physical_to_logical_map)
        rows = rows_among(model_state.model.expert_weights[0])
        if rows is not None:
            rows.arrived(dict(enumerate(new_physical_to_logical_map.tolist())))
            rows.end_of_cycle()
        return done

    return _commit_eplb_maps


def wrap_commit_maps_for_layer(original: Callable[..., Any]) -> Callable[..., Any]:
    """_commit_eplb_maps_for_layer: a layer has arrived that EPLB's thread has sent."""

    def _commit_eplb_maps_for_layer(
        model_state: Any, new_physical_to_logical_map: Any, layer: int
    ) -> Any:
        done = original(model_state, new_physical_to_logical_map, layer)
        rows = rows_among(model_state.model.expert_weights[0])
        if rows is not None:
            rows.arrived({layer: new_physical_to_logical_map.tolist()})
            if layer == len(rows.names) - 1:
                rows.end_of_cycle()
        return done

    return _commit_eplb_maps_for_layer


def _knows_places(communicator: Any) -> bool:
    return type(communicator).__name__ == _KNOWS_PLACES


def _weights_of(slots: frozenset[int], weights: Sequence[Any]) -> list[Any]:
    return [tensor for tensor in weights if _travels(slots, tensor)]


def _buffers_of(slots: frozenset[int], weights: Sequence[Any], buffers: Sequence[Any]) -> list[Any]:
    """The buffers of the tensors that travel. weights: of any layer; all have the same order."""
    return [buffer for tensor, buffer in zip(weights, buffers) if _travels(slots, tensor)]


def _travels(slots: frozenset[int], tensor: Any) -> bool:
    tag = row_tag(tensor)
    return tag is None or tag.slot in slots
