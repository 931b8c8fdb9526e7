"""`inspect` and `plan`: what is there, and what a split would give. Reads headers only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorashard.adapter.read import opened_adapter
from lorashard.cli import render
from lorashard.inspect.summary import summarize_adapter, summarize_plan, summarize_shards
from lorashard.shards.directory import has_manifest, read_manifest
from lorashard.split.pipeline import SplitRequest, prepared_split, read_layout
from lorashard.storage.remote import locate


def run_inspect(path: str, request: SplitRequest, *, as_json: bool) -> None:
    """Show an adapter or a shard directory."""
    place = locate(path)
    if has_manifest(place):
        summary = summarize_shards(read_manifest(place))
    else:
        with opened_adapter(place, allow_pickle=request.allow_pickle) as source:
            _, _, layout = read_layout(source, place, request)
            summary = summarize_adapter(source.index.config, source.index.tensors, layout)
    if as_json:
        render.print_json({"path": path, **summary})
    elif summary["kind"] == "shards":
        _show_shards(path, summary)
    else:
        _show_adapter(path, summary)


def run_plan(
    adapter: str,
    request: SplitRequest,
    max_loras: int,
    max_lora_rank: int | None,
    *,
    as_json: bool,
) -> None:
    """Show what each rank would hold and cost."""
    with prepared_split(locate(adapter), request) as prepared:
        lora_rank = max(module.lora_rank for module in prepared.layout.modules)
        summary = summarize_plan(
            prepared.layout,
            prepared.placement,
            prepared.plan,
            max_loras,
            max_lora_rank or lora_rank,
        )
    if as_json:
        render.print_json({"adapter": adapter, **summary})
        return
    for note in prepared.notes:
        render.say(f"note: {note}")
    render.print_table(
        f"{adapter}: {summary['num_experts']} experts, {summary['placement']} on "
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
        f"--max-lora-rank {summary['max_lora_rank']}, 16-bit. Host RAM, estimated: to load this "
        "adapter from its shard, and without lorashard."
    )


def _show_adapter(path: str, summary: Mapping[str, Any]) -> None:
    replicated = summary["replicated"]
    kinds = ", ".join(f"{count} {kind}" for kind, count in replicated["by_kind"].items())
    scaled = "alpha / sqrt(r)" if summary["use_rslora"] else "alpha / r"
    render.print_facts({
        "adapter": path,
        "experts": f"{summary['num_experts']} in {summary['num_modules']} modules",
        "LoRA": f"r={summary['lora_rank']}, alpha={summary['lora_alpha']:g}, scaling {scaled}",
        "dtype": ", ".join(summary["dtypes"]),
        "tensors": f"{summary['num_tensors']:,}, {render.size(summary['total_bytes'])}",
        "expert bytes": render.size(summary["expert_bytes"]),
        "replicated": f"{replicated['num_tensors']:,} tensors, "
        f"{render.size(replicated['bytes'])}" + (f" ({kinds})" if kinds else ""),
    })  # fmt: skip
    if not summary["gate_up_known"]:
        render.say("note: the base model is not named; gate and up rows are taken as concatenated.")
    _show_modules(summary["modules"])


def _show_shards(path: str, summary: Mapping[str, Any]) -> None:
    placement = summary["placement"]
    render.print_facts({
        "shards": path,
        "written by": f"lorashard {summary['lorashard_version']}",
        "experts": f"{summary['num_experts']} in {summary['num_modules']} modules",
        "placement": f"{placement['strategy']} on {placement['ep_size']} ranks"
        + (f", {len(placement['modules_placed_differently'])} modules placed differently"
           if placement["modules_placed_differently"] else ""),
        "cast to": summary["dtype_cast"] or "nothing",
    })  # fmt: skip
    files = iter(summary["files"].items())
    rows = [("replicated", "", "", *_file_row(next(files)))]
    for ep_rank, experts in enumerate(placement["ranks"]):
        rows.append(
            (f"rank {ep_rank}", str(len(experts)), render.ids(experts), *_file_row(next(files)))
        )
    render.print_line("")
    render.print_table("Files", ("", "experts", "ids", "file", "size"), rows)
    _show_modules(summary["modules"])


def _file_row(item: tuple[str, Mapping[str, Any]]) -> tuple[str, str]:
    return item[0], render.size(item[1]["bytes"])


def _show_modules(modules: Mapping[str, Mapping[str, Any]]) -> None:
    """One row for each run of modules that differ in nothing but their name."""
    rows: list[tuple[str, Mapping[str, Any], int]] = []
    for name, module in modules.items():
        if rows and rows[-1][1] == module:
            rows[-1] = (rows[-1][0], module, rows[-1][2] + 1)
        else:
            rows.append((name, module, 1))
    render.print_line("")
    render.print_table(
        "Expert modules",
        ("module", "alike", "layout", "gate/up", "r", "scaling", "untrained experts"),
        [
            (
                name,
                f"+{count - 1}" if count > 1 else "",
                module["source_layout"],
                module["gate_up"],
                _ranks(module),
                _scalings(module["scaling"]),
                render.ids(module["absent_experts"]),
            )
            for name, module, count in rows
        ],
    )


def _ranks(module: Mapping[str, Any]) -> str:
    ranks = module.get("lora_ranks") or {"": module["lora_rank"]}
    differ = " (some experts less)" if module["expert_lora_ranks"] else ""
    if len(set(ranks.values())) == 1:
        return str(next(iter(ranks.values()))) + differ
    return ", ".join(f"{name} {lora_rank}" for name, lora_rank in ranks.items()) + differ


def _scalings(scaling: Mapping[str, float | list[float]]) -> str:
    shown = {p: "per expert" if isinstance(s, list) else f"{s:g}" for p, s in scaling.items()}
    if len(set(shown.values())) == 1:
        return next(iter(shown.values()))
    return ", ".join(f"{projection} {scale}" for projection, scale in shown.items())
