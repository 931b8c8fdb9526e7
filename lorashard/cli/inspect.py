"""`lorashard inspect`: what an adapter or a shard directory holds. Reads headers only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorashard.adapter.options import LayoutOptions
from lorashard.cli import options as opt
from lorashard.cli import render
from lorashard.cli.several import look_at_each
from lorashard.errors import LorashardError

if TYPE_CHECKING:
    from lorashard.cli.page.document import PagePart
    from lorashard.inspect.picture import ModuleExperts


def inspect(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER_OR_SHARDS",
            help="Adapters or shard directories, local or remote.",
            show_default=False,
        ),
    ],
    model: opt.Model = None,
    num_experts: opt.NumExperts = None,
    lora_b_layout: opt.LoraBLayout = None,
    orientation: opt.Orientation = None,
    allow_pickle: opt.AllowPickle = False,
    html: opt.HtmlPage = None,
    as_json: opt.Json = False,
) -> None:
    """Show what adapters or shard directories hold; reads headers only."""
    from lorashard.reports.inspect import examine_path  # noqa: PLC0415

    opt.refuse_two_counts(model, num_experts)
    options = LayoutOptions(
        num_experts=num_experts, lora_b_layout=lora_b_layout, orientation=orientation
    )

    parts: list[PagePart | LorashardError] = []

    def look(path: str) -> tuple[dict[str, Any], None]:
        try:
            found = examine_path(path, options, model=model, allow_pickle=allow_pickle)
        except LorashardError as err:
            parts.append(err)
            raise
        summary = found.document
        if html is not None:
            parts.append(_page_part(path, summary, found.experts()))
        if not as_json:
            if path is not paths[0]:
                render.print_line("")
            show = _show_shards if summary["kind"] == "shards" else _show_adapter
            show(path, summary)
        return summary, None

    with _page_at_the_end(html, parts):
        look_at_each(paths, look, key="path", as_json=as_json)


@contextmanager
def _page_at_the_end(
    html: Path | None, parts: Sequence[PagePart | LorashardError]
) -> Iterator[None]:
    """Write the page of what the block adds to `parts`, also if some paths fail in it."""
    if html is None:
        yield
        return
    from lorashard.cli.page.document import make_page  # noqa: PLC0415
    from lorashard.cli.page.files import check_page_target, write_page  # noqa: PLC0415

    check_page_target(html)
    try:
        yield
    finally:
        if any(not isinstance(part, LorashardError) for part in parts):
            write_page(html, make_page("inspect", parts))
            render.say(f"page written: {html}")


def _page_part(
    path: str, summary: Mapping[str, Any], experts: tuple[ModuleExperts, ...]
) -> PagePart:
    from lorashard.cli.page.document import PagePart  # noqa: PLC0415

    table = (_MODULE_COLUMNS, *_module_rows(summary["modules"]))
    return PagePart(path, summary, experts, module_table=table)


def _show_adapter(path: str, summary: Mapping[str, Any]) -> None:
    replicated = summary["replicated"]
    kinds = ", ".join(f"{count} {kind}" for kind, count in replicated["by_kind"].items())
    scaled = "alpha / sqrt(r)" if summary["use_rslora"] else "alpha / r"
    counted = render.COUNTED_FROM_R if summary["counted_from_r"] else ""
    render.print_facts({
        "adapter": path,
        "experts": f"{summary['num_experts']} in {summary['num_modules']} modules{counted}",
        "LoRA": f"r={summary['lora_rank']}, alpha={summary['lora_alpha']:g}, scaling {scaled}",
        "dtype": ", ".join(summary["dtypes"]),
        "tensors": f"{summary['num_tensors']:,}, {render.size(summary['total_bytes'])}",
        "expert bytes": render.size(summary["expert_bytes"]),
        "replicated": f"{replicated['num_tensors']:,} tensors, "
        f"{render.size(replicated['bytes'])}" + (f" ({kinds})" if kinds else ""),
    })  # fmt: skip
    if not summary["gate_up_known"]:
        render.say(
            "note: neither the adapter nor --model says what the base model is; gate and up rows "
            "are assumed to be concatenated."
        )
    _show_modules(summary["modules"])


def _show_shards(path: str, summary: Mapping[str, Any]) -> None:
    from lorashard.inspect.findings import MANIFEST_CHANGED  # noqa: PLC0415

    if summary["manifest_changed"]:
        render.say(f"warning: {MANIFEST_CHANGED}")
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
    held = summary["held_ranks"]
    for ep_rank, experts in enumerate(placement["ranks"]):
        name, size = _file_row(next(files))
        if held is not None and ep_rank not in held:
            size += ", not here"
        rows.append((f"rank {ep_rank}", str(len(experts)), render.ids(experts), name, size))
    render.print_line("")
    render.print_table("Files", ("", "experts", "ids", "file", "size"), rows)
    _show_modules(summary["modules"])


def _file_row(item: tuple[str, Mapping[str, Any]]) -> tuple[str, str]:
    return item[0], render.size(item[1]["bytes"])


_MODULE_COLUMNS = ("module", "alike", "layout", "gate/up", "r", "scaling", "untrained experts")


def _show_modules(modules: Mapping[str, Mapping[str, Any]]) -> None:
    render.print_line("")
    render.print_table("Expert modules", _MODULE_COLUMNS, _module_rows(modules))


def _module_rows(modules: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """One row for each run of modules that differ in nothing but their name."""
    rows: list[tuple[str, Mapping[str, Any], int]] = []
    for name, module in modules.items():
        if rows and rows[-1][1] == module:
            rows[-1] = (rows[-1][0], module, rows[-1][2] + 1)
        else:
            rows.append((name, module, 1))
    return [
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
    ]


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
