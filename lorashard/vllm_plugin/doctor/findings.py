"""What the surveys find, as plain values. `--json` shows them field by field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lorashard.shards.placement import Ranks
from lorashard.vllm_plugin.load.contents import AdapterContents


@dataclass(frozen=True, slots=True)
class Installation:
    """What this Python has. None = not installed.

    entry_point: vLLM can find the plugin. allowed: VLLM_PLUGINS does not exclude it.
    variables: every LORASHARD_* that is set. switched_on: those that are not empty, 0 or off.
    unknown: those that nothing reads. faults: values that would make the plugin fail.
    foreign_patches: what other packages have put in the place of patches, without harm.
    displaced_patches: the same, where adapters would be wrong.
    """

    lorashard: str
    python: str
    executable: str
    torch: str | None
    vllm: str | None
    entry_point: bool
    allowed: bool
    variables: Mapping[str, str]
    switched_on: tuple[str, ...]
    unknown: tuple[str, ...]
    faults: tuple[str, ...]
    foreign_patches: tuple[str, ...] = ()
    displaced_patches: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PatchState:
    """A patch and what became of it: applied, not needed, unsupported, broken or not checked.

    unsupported: the option of vLLM that it is for is refused. only_for: that option, or "".
    """

    target: str
    state: str
    reason: str
    why: str
    how: str
    upstream: str
    since: str
    until: str | None
    only_for: str = ""


@dataclass(frozen=True, slots=True)
class AdapterSummary:
    """What a path holds: shards or a plain adapter.

    lora_rank: the largest. num_experts: None = no experts, or not read. separate_gate: gate and up
    have a lora_A each. ranks: the experts that each rank file of a shard directory holds;
    other_ranks: the same for modules with a placement of their own. rank_bytes, replicated_bytes:
    file sizes. error: why it cannot be read.
    """

    path: str
    kind: str
    lora_rank: int | None = None
    num_experts: int | None = None
    separate_gate: bool = False
    strategy: str | None = None
    ranks: Ranks = ()
    other_ranks: tuple[Ranks, ...] = ()
    rank_bytes: tuple[int, ...] = ()
    replicated_bytes: int | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class SurveyedAdapter:
    """An adapter as the plugin would see it.

    contents: what the plugin would load; None where vLLM's own loader takes the adapter, and where
    it cannot be read. A plain adapter's are those of one file with all experts.
    needs_model: it cannot be read only because facts are missing that a running engine has.
    vllm_refusal: what vLLM says against its configuration, before it calls a loader.
    """

    summary: AdapterSummary
    contents: AdapterContents | None = None
    needs_model: bool = False
    vllm_refusal: str | None = None

    @property
    def is_shard_directory(self) -> bool:
        """Whether `split` has written it."""
        return self.summary.kind == SHARDS


# Kinds of adapters.
SHARDS = "shards"
PLAIN_ADAPTER = "plain adapter"
