"""What is worth a word about an adapter, a plan or a shard directory. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from lorashard import rules
from lorashard.inspect.picture import ModuleExperts
from lorashard.shards.names import MANIFEST_NAME
from lorashard.shards.placement import Ranks
from lorashard.shards.seal import CHANGED

_MOST_UNEQUAL = 1.1
MANIFEST_CHANGED = (
    f"{MANIFEST_NAME}: {CHANGED}. Nothing in it can be relied on, and servers refuse the directory. Copy "
    "the whole directory again."
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One sentence or two for the reader. warning: what goes wrong if it is overlooked.

    rule: the id of what it is about, in docs/rules.md; "" if it only is good to know.
    """

    kind: Literal["warning", "note"]
    text: str
    rule: str = ""


def findings_of(modules: Sequence[ModuleExperts]) -> Iterator[Finding]:
    """What the placement and the training of experts make worth knowing."""
    placements = {module.ranks for module in modules}
    if any(len(ranks) > 1 and not _are_equal_blocks(ranks) for ranks in placements):
        yield Finding(
            "warning",
            "The experts are not in equal, contiguous blocks in the order of the ranks. vLLM alone would "
            "give some ranks the LoRA of other experts, without an error. With lorashard's plugin each "
            "rank loads its own.",
            rules.UNEVEN_EXPERTS.id,
        )
    if len(placements) > 1:
        yield Finding("note", f"The layers have {len(placements)} different placements.")
    copies = sum(map(_num_copies, (module.ranks for module in modules)))
    if copies:
        yield Finding(
            "note",
            f"{copies} expert slots, counted over {layers(len(modules))}, are copies of experts that "
            "another rank has too.",
        )
    if modules and (note := _unequal(modules)):
        yield Finding("note", note)
    untrained = [module for module in modules if module.untrained]
    if untrained:
        most = max(len(module.untrained) for module in untrained)
        yield Finding(
            "note",
            f"In {len(untrained)} of {layers(len(modules))}, "
            f"{'1 expert is' if most == 1 else f'up to {most} experts are'} not trained. In shards, "
            "their slots hold zeros.",
            rules.PARTIAL_EXPERTS.id,
        )
    if any(_differ_in_r(module) for module in modules):
        yield Finding(
            "note",
            "Some experts have a smaller r than others. Shards pad them with zeros.",
            rules.RANKS_OF_EXPERTS.id,
        )


def _are_equal_blocks(ranks: Ranks) -> bool:
    size = len(ranks[0])
    return all(
        experts == tuple(range(ep_rank * size, (ep_rank + 1) * size))
        for ep_rank, experts in enumerate(ranks)
    )


def _num_copies(ranks: Ranks) -> int:
    times = Counter(expert for experts in ranks for expert in experts)
    return sum(count - 1 for count in times.values())


def _unequal(modules: Sequence[ModuleExperts]) -> str | None:
    """Which ranks hold the most and the fewest experts, if that makes a difference."""
    ep_size = len(modules[0].ranks)
    held = [sum(len(module.ranks[ep_rank]) for module in modules) for ep_rank in range(ep_size)]
    if not held or max(held) < _MOST_UNEQUAL * min(held):
        return None
    most, fewest = held.index(max(held)), held.index(min(held))
    return (
        f"Rank {most} holds {max(held)} experts and rank {fewest} holds {min(held)}, counted over "
        f"{layers(len(modules))}. The fullest rank decides how long a load takes."
    )


def _differ_in_r(module: ModuleExperts) -> bool:
    sizes = {
        size for e, size in enumerate(module.trained_bytes) if e not in module.untrained
    }  # what they share is in none of these
    return len(sizes) > 1


def layers(count: int) -> str:
    """A number of layers, in words."""
    return "1 layer" if count == 1 else f"{count} layers"
