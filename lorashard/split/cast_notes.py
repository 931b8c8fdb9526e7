"""What a cast did to values that it could not keep -> notes for the user."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from lorashard.dtypes import ELEMENT_SIZE
from lorashard.header import TensorEntry
from lorashard.shards.plan import Rearrange, ShardPlan
from lorashard.writing.rearrange import CastLoss


def describe_losses(
    losses: Sequence[CastLoss], plan: ShardPlan, tensors: Sequence[TensorEntry]
) -> Iterator[str]:
    """A sentence for values that became 0, and one for those that are no numbers."""
    if not losses:
        return
    casts = [op for op in plan.reads if isinstance(op, Rearrange) and op.dtype != op.source_dtype]
    total = sum((op.end - op.begin) // ELEMENT_SIZE[op.source_dtype] for op in casts)
    zeroed: Counter[int] = Counter()
    not_finite: Counter[int] = Counter()
    for loss in losses:
        zeroed[loss.begin] += loss.num_zeroed
        not_finite[loss.begin] += loss.num_not_finite
    for counts, what in (
        (zeroed, f"values became 0 in the cast to {casts[0].dtype}"),
        (not_finite, "values that were cast are infinite or NaN, in the adapter too"),
    ):
        if count := sum(counts.values()):
            ((begin, _),) = counts.most_common(1)
            name = next(entry.name for entry in tensors if entry.begin <= begin < entry.end)
            yield f"{count} of {total} {what}; {name} has the most."
