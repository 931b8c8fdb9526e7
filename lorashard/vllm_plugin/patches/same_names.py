"""Adapters of the same name: a step may use several, where requests still run that came before a swap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def wrap_eq(original: Callable[..., Any]) -> Callable[..., Any]:
    """LoRARequest.__eq__: vLLM compares names alone."""

    def __eq__(self: Any, value: Any) -> Any:  # noqa: N807 - the method's own name
        return original(self, value) and self.lora_int_id == value.lora_int_id

    return __eq__


def wrap_hash(original: Callable[..., Any]) -> Callable[..., Any]:
    """LoRARequest.__hash__: of equal requests it is equal, too."""

    def __hash__(self: Any) -> int:  # noqa: N807 - the method's own name
        return hash((original(self), self.lora_int_id))

    return __hash__
