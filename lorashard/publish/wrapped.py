"""A model as a trainer holds it -> the PeftModel in it.

In: the model, perhaps inside DistributedDataParallel or torch.compile. Out: the PeftModel whose
tensors the ranks can write, or an error that says what is in the way.
"""

from __future__ import annotations

from typing import Any

from lorashard.errors import AdapterError, UnsupportedAdapterError

_INNER = ("_orig_mod", "module")  # of torch.compile; of DDP, DataParallel and DeepSpeed's engine


def unwrap_peft_model(model: Any, adapter_name: str) -> Any:
    """Raises AdapterError if there is no PeftModel, or none with this adapter.

    Raises UnsupportedAdapterError for parameters that are not whole tensors or DTensors.
    """
    from peft import PeftModel  # noqa: PLC0415 - of the trainer's environment
    from torch.distributed.fsdp import FullyShardedDataParallel

    if model is None:
        raise AdapterError("The trainer has given its callbacks no model.")
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise UnsupportedAdapterError(
            "FSDP's first version", type(model).__name__, hint="Train with FSDP2: fsdp_version: 2."
        )
    # ZeRO-3 leaves an empty tensor where a parameter was.
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise UnsupportedAdapterError(
            "DeepSpeed ZeRO-3", type(model).__name__, hint="Train with FSDP2, or with ZeRO 1 or 2."
        )
    unwrapped = model
    while not isinstance(unwrapped, PeftModel):
        children = dict(unwrapped.named_children())
        inner = [children[name] for name in _INNER if name in children]
        if not inner:
            raise AdapterError(
                f"{type(model).__name__} is not a PeftModel: there is no adapter to publish.",
                hint="Give the trainer a model from get_peft_model, or a peft_config.",
            )
        unwrapped = inner[0]
    if adapter_name not in unwrapped.peft_config:
        raise AdapterError(
            f"The model has no adapter {adapter_name!r}.",
            hint=f"It has {', '.join(map(repr, unwrapped.peft_config))}: see adapter_name.",
        )
    return unwrapped
