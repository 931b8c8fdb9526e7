"""What `split` says of its results: a line, or their fields as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorashard.cli import render
from lorashard.cli.error_json import json_of
from lorashard.cli.upload import output_json
from lorashard.parameters import with_flags

if TYPE_CHECKING:
    from lorashard.split.batch import AdapterOutcome
    from lorashard.split.run import SplitResult


def say_result(result: SplitResult, *, quiet: bool) -> None:
    """Say on one line what a split wrote, found or would write."""
    sizes = list(result.file_sizes.values())
    inferred = " (counted; --model checks it)" if result.num_experts_inferred else ""
    inferred += render.COUNTED_FROM_R if result.counted_from_r else ""
    if result.status == "skipped":
        remark = " (already there)"
    else:
        remark = " (dry run, nothing written)" if result.dry_run else ""
    if result.uploaded is not None:
        revision = result.uploaded.revision
        remark = f", to {result.out}{f' at {revision}' if revision else ''}{remark}"
    render.say(
        f"{result.adapter}: {result.num_experts} experts{inferred} in {result.num_modules} modules "
        f"on {result.placement.ep_size} ranks, {render.size(sizes[0])} replicated + "
        f"{render.size(max(sizes[1:]))} per rank{remark}",
        quiet=quiet,
    )


def result_json(result: SplitResult) -> dict[str, Any]:
    """The fields of one result."""
    return {
        "adapter": result.adapter,
        "status": result.status,
        **output_json(result.out, result.uploaded),
        "dry_run": result.dry_run,
        "num_experts": result.num_experts,
        "counted_from_r": result.counted_from_r,
        "num_modules": result.num_modules,
        "placement": result.placement.strategy,
        "ep_size": result.placement.ep_size,
        "ranks": [list(experts) for experts in result.placement.ranks],
        "files": dict(result.file_sizes),
        "notes": [with_flags(note) for note in result.notes],
    }


def outcome_json(outcome: AdapterOutcome) -> dict[str, Any]:
    """The fields of one adapter of a batch: of its result, or of its error."""
    if outcome.result is not None:
        return result_json(outcome.result)
    if outcome.error is None:
        return {"adapter": outcome.adapter, "status": outcome.status, "out": None}
    return {
        "adapter": outcome.adapter,
        "status": outcome.status,
        "out": str(outcome.target),
        **json_of(outcome.error),
    }
