"""An adapter as the loader needs it, wherever its bytes are: a shard directory, or a plain adapter.

Both become `AdapterContents`: expert modules with their stacks, the tensors that every rank needs,
and sources to read them from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, Union

from lorashard.adapter.config import LoraConfig
from lorashard.adapter.keys import Projection
from lorashard.header import TensorEntry
from lorashard.shards.placement import Ranks
from lorashard.vllm_plugin.load.assembly import Stack

REPLICATED = -1  # the source that holds what every rank needs
Scaling = Union[float, tuple[float, ...]]


class TensorSource(Protocol):
    """Where the tensors of one shard file are read from."""

    def offset_of(self, name: str) -> int:
        """First byte of a tensor."""

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` from byte `offset`. Raises ShardError if the source ends before."""


@dataclass(frozen=True, slots=True)
class ModuleContents:
    """One experts container. ranks: global ids in slot order, per source 0, 1, 2, ..."""

    name: str
    gate_up: str
    scaling: Mapping[Projection, Scaling]
    stacks: tuple[Stack, ...]
    ranks: Ranks


@dataclass(frozen=True, slots=True)
class AdapterContents:
    """`dense` are entries of the replicated source; `sources` opens files when first asked.

    gate_up_known: False where "concatenated" is an assumption and the model decides.
    """

    config: LoraConfig
    num_experts: int
    gate_up_known: bool
    modules: tuple[ModuleContents, ...]
    dense: tuple[TensorEntry, ...]
    sources: Mapping[int, TensorSource]
