"""EPLB, vLLM's rearranging of experts: their LoRA moves with them. `expert_rows` says what else it takes.

The LoRA of a layer's experts leaves right after their base weights, by the same communicator, and goes
into its stacks where vLLM puts the base weights in place: in each way that EPLB has.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from lorashard.vllm_plugin.engine.expert_maps import ExpertMaps
from lorashard.vllm_plugin.patches.expert_rows import layer_of, layer_rows

EPLB = "--enable-eplb"  # the option that these patches are for


def wrap_add_model(original: Callable[..., Any]) -> Callable[..., Any]:
    """EplbState.add_model: which layer has which number, and where experts are."""

    def add_model(self: Any, model: Any, model_config: Any, *args: Any, **kwargs: Any) -> Any:
        added = original(self, model, model_config, *args, **kwargs)
        layers = [layer_rows(layer) for layer in model.moe_layers]
        known = [layer for layer in layers if layer is not None]
        if known:
            if _leaves_redundant_experts_out(model):
                raise ValueError(
                    f"lorashard: {type(model).__name__} of this vLLM loads no weights for redundant "
                    "experts, so that answers would be wrong with any adapter and without one. "
                    "Start with num_redundant_experts 0 in --eplb-config, or with another release."
                )
            weights = model.expert_weights
            if len(known) < len(layers) or not all(map(_are_weights_of, weights, model.moe_layers)):
                raise ValueError(
                    f"lorashard: {type(model).__name__} gives EPLB the weights of its experts in a "
                    "way that leaves out their LoRA. Start without --enable-eplb."
                )
            for layer, of_layer in zip(known, weights, strict=True):
                layer.tag(of_layer)
            state = self.model_states[model_config.compute_hash()]
            maps = state.physical_to_logical_map.tolist()
            names = [layer.name for layer in known]
            slots = {name: tuple(slots) for name, slots in zip(names, maps, strict=True)}
            known[0].rows.bind(names, ExpertMaps(slots))
        return added

    return add_model


def wrap_rearrange(original: Callable[..., Any]) -> Callable[..., Any]:
    """rearrange_expert_weights_inplace, EPLB's synchronous way: all layers at once."""
    parameters = inspect.signature(original)

    def rearrange_expert_weights_inplace(*args: Any, **kwargs: Any) -> Any:
        call = parameters.bind(*args, **kwargs)
        given = call.arguments
        first = layer_of(given["expert_weights"][0])
        if first is None or given.get("is_profile"):
            return original(*call.args, **call.kwargs)
        from vllm.distributed.parallel_state import get_ep_group

        # Read before vLLM's part, behind which this would wait for the GPU. Then all of ours is on its way
        # to the GPU while that is busy with the base weights. Their buffer is free by then, and holds
        # the rows of many layers: to send each layer on its own would keep the CPU busy for longer.
        before, after = (given[f"{age}_global_expert_indices"].tolist() for age in ("old", "new"))
        group = get_ep_group().cpu_group
        said = first.rows.announce(group)  # heard by the time that vLLM is done
        done = original(*call.args, **call.kwargs)
        first.rows.begin_transfer(said)
        first.rows.move_all(before, after, group, given["communicator"], given["expert_buffer"])
        return done

    return rearrange_expert_weights_inplace


def wrap_transfer_layer(original: Callable[..., Any]) -> Callable[..., Any]:
    """transfer_layer, in EPLB's thread: one layer."""
    parameters = inspect.signature(original)

    def transfer_layer(*args: Any, **kwargs: Any) -> Any:
        call = parameters.bind(*args, **kwargs)
        given = call.arguments
        done = original(*call.args, **call.kwargs)
        layer = layer_of(given["expert_weights"])
        if layer is not None and not given.get("is_profile"):
            from vllm.distributed.parallel_state import get_eplb_group

            group = get_eplb_group().cpu_group
            layer.rows.begin_transfer(layer.rows.announce(group))
            before, after = (given[f"{age}_layer_indices"].tolist() for age in ("old", "new"))
            # cuda_stream until 0.30
            stream = given.get("stream", given.get("cuda_stream"))
            communicator = given["communicator"]
            layer.rows.send(layer.name, before, after, group, communicator, stream)
        return done

    return transfer_layer


def wrap_move_from_buffer(original: Callable[..., Any]) -> Callable[..., Any]:
    """move_from_buffer: after the base weights of a layer, its LoRA goes where it belongs."""

    def move_from_buffer(expert_weights: Any, *args: Any, **kwargs: Any) -> Any:
        done = original(expert_weights, *args, **kwargs)
        layer = layer_of(expert_weights)
        if layer is not None:
            layer.rows.put(layer.name)
        return done

    return move_from_buffer


def wrap_commit_maps(original: Callable[..., Any]) -> Callable[..., Any]:
    """_commit_eplb_maps: the end of a synchronous rearrangement."""

    def _commit_eplb_maps(model_state: Any, new_physical_to_logical_map: Any) -> Any:
        done = original(model_state, new_physical_to_logical_map)
        layer = layer_of(model_state.model.expert_weights[0])
        if layer is not None:
            layer.rows.arrived(dict(enumerate(new_physical_to_logical_map.tolist())))
            layer.rows.end_of_cycle()
        return done

    return _commit_eplb_maps


def wrap_commit_maps_for_layer(original: Callable[..., Any]) -> Callable[..., Any]:
    """_commit_eplb_maps_for_layer: a layer has arrived that EPLB's thread has sent."""

    def _commit_eplb_maps_for_layer(
        model_state: Any, new_physical_to_logical_map: Any, layer: int
    ) -> Any:
        done = original(model_state, new_physical_to_logical_map, layer)
        found = layer_of(model_state.model.expert_weights[0])
        if found is not None:
            rows = found.rows
            rows.arrived({layer: new_physical_to_logical_map.tolist()})
            if layer == len(rows.names) - 1:
                rows.end_of_cycle()
        return done

    return _commit_eplb_maps_for_layer


def _are_weights_of(weights: Any, layer: Any) -> bool:
    """Whether what EPLB moves is this layer's: the same memory, perhaps as other values, uint8 for FP8."""
    own = next(iter(layer.get_expert_weights()))
    return bool(weights[0].data_ptr() == own.data_ptr())


def _leaves_redundant_experts_out(model: Any) -> bool:
    """Whether the model's weights are loaded by a list of experts that ends with the logical ones.

    Glm4MoeForCausalLM in vLLM 0.24 (glm4_moe.py:472; measured: the base model's error is 0.09, not 0.02).
    """
    list_experts = getattr(model, "get_expert_mapping", None)
    if list_experts is None or model.num_redundant_experts == 0:
        return False
    loaded = {entry[2] for entry in list_experts()}
    return bool(loaded) and max(loaded) < model.num_logical_experts
