"""What a load made and did, to be logged, counted and compared between ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lorashard.vllm_plugin.engine.expert_maps import ExpertMaps
from lorashard.vllm_plugin.load.slot_ahead import SlotAhead


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What one load did. advice: what to run instead, on the rank that gives it for all.

    path: the directory, or what to call tensors. kind: "shards", "plain adapter" or "tensors".
    num_left_to_mtp: modules of a block for multi-token prediction, which vLLM serves without LoRA.
    version: of what was read, to be compared between ranks. maps: where the experts were as it was
    loaded; None if they never move. stages: seconds of each, in their order.
    """

    path: str
    kind: str
    num_local_experts: int
    num_experts: int
    num_layers: int
    num_bytes: int
    seconds: float
    ep_rank: int
    ep_size: int
    advice: str | None
    num_left_to_mtp: int = 0
    version: str = ""
    maps: ExpertMaps | None = None
    stages: Mapping[str, float] = field(default_factory=dict)

    @property
    def compared(self) -> str:
        """What must be the same on all ranks; "" where nothing has to be."""
        return self.version if self.maps is None else f"{self.version}, maps {self.maps.number}"


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """VLLM's LoRAModel. report: None where vLLM's own loader made it.

    on_device: what the model has of experts, by layer, in the device's memory; empty if it is not
    there. is_packed: vLLM has packed the model. slot: that it is in already.
    """

    model: Any
    report: LoadReport | None = None
    on_device: Mapping[str, Any] = field(default_factory=dict)
    is_packed: bool = False
    slot: SlotAhead | None = None
