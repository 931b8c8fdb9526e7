"""`lorashard plan`: what a split would give each rank. Reads headers only."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from lorashard.cli import options as opt
from lorashard.cli import render
from lorashard.parameters import with_flags

if TYPE_CHECKING:
    from lorashard.reports.plan import PlannedSplit


def plan(
    adapter: opt.Adapter,
    ep_size: opt.EpSize,
    max_loras: Annotated[int, typer.Option(metavar="N", min=1, help="vLLM's --max-loras.")] = 1,
    max_lora_rank: Annotated[
        Optional[int],
        typer.Option(
            metavar="R",
            min=1,
            help="vLLM's --max-lora-rank. [default: the adapter's]",
            show_default=False,
        ),
    ] = None,
    placement: opt.Placement = "linear",
    expert_map: opt.ExpertMap = None,
    model: opt.Model = None,
    num_experts: opt.NumExperts = None,
    dtype: opt.Dtype = None,
    lora_b_layout: opt.LoraBLayout = None,
    orientation: opt.Orientation = None,
    allow_pickle: opt.AllowPickle = False,
    html: opt.HtmlPage = None,
    as_json: opt.Json = False,
) -> None:
    """Show what a split would give each rank: experts, bytes, GPU buffers, host memory."""
    from lorashard.reports.plan import examine_split  # noqa: PLC0415

    request = opt.split_request(
        ep_size=ep_size,
        placement=placement,
        expert_map=expert_map,
        model=model,
        num_experts=num_experts,
        lora_b_layout=lora_b_layout,
        orientation=orientation,
        dtype=dtype,
        allow_pickle=allow_pickle,
    )
    if html is not None:
        from lorashard.cli.page.files import check_page_target  # noqa: PLC0415

        check_page_target(html)
    planned = examine_split(adapter, request, max_loras, max_lora_rank)
    summary = planned.document
    if html is not None:
        _write_page(html, adapter, planned)
    if as_json:
        notes = [with_flags(note) for note in summary["notes"]]
        render.print_json(summary | {"notes": notes})
        return
    for note in summary["notes"]:
        render.say_note(note)
    counted = render.COUNTED_FROM_R if summary["counted_from_r"] else ""
    render.print_table(
        f"{adapter}: {summary['num_experts']} experts{counted}, {summary['placement']} on "
        f"{summary['ep_size']} ranks, {render.size(summary['total_bytes'])} in all",
        ("rank", "experts", "ids", "on disk", "to read", "GPU buffers", "host RAM", "without"),
        [
            (
                str(row["ep_rank"]),
                str(row["num_experts"]),
                render.ids(row["experts"]),
                render.size(row["bytes_on_disk"]),
                render.size(row["bytes_to_read"]),
                render.size(row["gpu_buffer_bytes"]),
                render.size(row["host_bytes"]),
                "at least " + render.size(row["host_bytes_without"]),
            )
            for row in summary["ranks"]
        ],
    )
    render.print_line(
        f"GPU buffers: expert LoRA of {summary['num_modules']} layers, --max-loras {max_loras} "
        f"--max-lora-rank {summary['max_lora_rank']}, 16-bit. Host RAM (estimated): to load this "
        "adapter from its shard, and without lorashard."
    )


def _write_page(html: Path, adapter: str, planned: PlannedSplit) -> None:
    from lorashard.cli.page.document import PagePart, make_page  # noqa: PLC0415
    from lorashard.cli.page.files import write_page  # noqa: PLC0415

    notes = tuple(with_flags(note) for note in planned.document["notes"])
    part = PagePart(
        adapter, planned.document, planned.experts(), notes, source_bytes=planned.source_bytes
    )
    write_page(html, make_page("plan", [part]))
    render.say(f"page written: {html}")
