"""An adapter as the loader needs it, whether it is a shard directory or a plain adapter.

Both become `AdapterContents`: the expert modules with their stacks, the tensors that every rank
needs, and the sources to read them from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, Union

from lorashard.adapter.config import LoraConfig
from lorashard.adapter.keys import Projection
from lorashard.header import TensorEntry
from lorashard.shards.placement import Ranks
from lorashard.shards.plan import Rearrange
from lorashard.storage.local import ByteSource
from lorashard.vllm_plugin.load.assembly import ShardStack

# In place of an ep rank:
REPLICATED = -1  # the source of what every rank needs
WEIGHTS = -2  # a plain adapter's own file, for what is rearranged
Scaling = Union[float, tuple[float, ...]]


class RankSources(Protocol):
    """The bytes of an adapter's tensors, by ep rank, REPLICATED or WEIGHTS."""

    def offset_of(self, ep_rank: int, name: str) -> int:
        """First byte of a tensor in its rank's source. Opens nothing."""

    def source_of(self, ep_rank: int) -> ByteSource:
        """The source itself, opened at its first use; not from several threads at once.

        Its `read_into` may be called from several threads. Raises ShardError.
        """


class NoSources:
    """The RankSources of contents that are only judged and never read, as by `lorashard doctor`."""

    def offset_of(self, ep_rank: int, name: str) -> int:
        """No tensor is anywhere."""
        raise LookupError(f"{name} of rank {ep_rank}: these contents have no sources")

    def source_of(self, ep_rank: int) -> ByteSource:
        """There is no source."""
        raise LookupError(f"rank {ep_rank}: these contents have no sources")


@dataclass(frozen=True, slots=True)
class ModuleContents:
    """One experts container. ranks: global ids in slot order, of the sources 0, 1, 2, ..."""

    name: str
    gate_up: str
    scaling: Mapping[Projection, Scaling]
    stacks: tuple[ShardStack, ...]
    ranks: Ranks


@dataclass(frozen=True, slots=True)
class Rearrangement:
    """A tensor with several experts' factors of a stack of source 0, in another order of axes.

    op: its bytes in the adapter's weights, and how they lie; its targets mean nothing here. slots:
    for each expert along axis e the slot of the stack that it fills, None if the rank lacks it.
    """

    stack: str
    op: Rearrange
    slots: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class AdapterContents:
    """What one adapter has for this engine.

    dense: the tensors beside the experts, entries of the replicated source. gate_up_known: False
    if "concatenated" is only assumed, so that the model decides. version: the same on all
    ranks that read the same version: the manifest's BLAKE3 in hex, or that of a plain adapter's
    config and header. rearrangements: what has to be put in order. rearranged: the stacks that this
    fills; the others are read from the sources before, where what is to come is zero.
    """

    config: LoraConfig
    num_experts: int
    gate_up_known: bool
    modules: tuple[ModuleContents, ...]
    dense: tuple[TensorEntry, ...]
    sources: RankSources
    version: str = ""
    rearrangements: tuple[Rearrangement, ...] = ()
    rearranged: frozenset[str] = frozenset()

    @property
    def dense_range(self) -> tuple[int, int]:
        """The bytes [begin, end) of the dense tensors in the replicated source."""
        return (self.dense[0].begin, self.dense[-1].end) if self.dense else (0, 0)

    @property
    def lora_names(self) -> Iterator[str]:
        """One name for each module with LoRA: of the experts containers, and of other lora_A."""
        yield from (module.name for module in self.modules)
        for entry in self.dense:
            if ".lora_A" in entry.name or ".lora_embedding_A" in entry.name:
                yield entry.name
