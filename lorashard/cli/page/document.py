"""The page: a part for each path, each with facts, findings, maps, tables and the way of a load."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorashard import rules
from lorashard.cli import render
from lorashard.cli.page.load_path import load_path
from lorashard.cli.page.maps import MOST_ROWS, expert_map, legend, scrollable
from lorashard.cli.page.markup import Html, joined, name_of, tag
from lorashard.cli.page.style import STYLE
from lorashard.errors import LorashardError
from lorashard.inspect.findings import MANIFEST_CHANGED, Finding, findings_of, layers
from lorashard.inspect.picture import ModuleExperts, groups_of_modules, map_of_modules, map_of_ranks
from lorashard.version import __version__

# How a page of ours begins: a file that begins so may be replaced.
BEGINNING = "<!doctype html>\n<!-- lorashard page -->\n"
# Nothing is loaded, whatever a name in the adapter says; without scripts there is nothing to run.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_MOST_MAP_CHARACTERS = 350_000  # a page stays small enough to be sent around
_ASSUMED_GATE_UP = (
    "Neither the adapter nor --model says what the base model is; gate and up rows are assumed to be "
    "concatenated."
)
_Cells = Sequence[str | Html]


@dataclass(frozen=True, slots=True)
class PagePart:
    """What is known of one path.

    summary: the document of `--json`. experts: of each module. notes: what the command said.
    module_table: column names, then rows. source_bytes: the size of an adapter that a plan is for.
    """

    path: str
    summary: Mapping[str, Any]
    experts: tuple[ModuleExperts, ...]
    notes: tuple[str, ...] = ()
    module_table: tuple[tuple[str, ...], ...] = ()
    source_bytes: int = 0


def make_page(command: str, parts: Sequence[PagePart | LorashardError]) -> str:
    """The page of a command, for paths in the order in which they were named, or their errors."""
    first = next((part.path for part in parts if isinstance(part, PagePart)), "")
    more = f" and {len(parts) - 1} more" if len(parts) > 1 else ""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", f"lorashard {command}: {first}{more}"),
        tag("style", Html(STYLE)),
    )
    sections = [_part(p) if isinstance(p, PagePart) else _failed(p) for p in parts]
    footer = tag(
        "footer", f"lorashard {__version__}, {command}. Bytes are decimal.", class_="quiet"
    )
    body = tag("body", tag("main", *sections), footer)
    return f"{BEGINNING}{tag('html', head, body, lang='en')}\n"


def _part(part: PagePart) -> Html:
    shows = {"shards": _shards_facts, "adapter": _adapter_facts}.get(
        part.summary.get("kind", ""), _plan_facts
    )
    facts = shows(part.summary)
    return tag(
        "article",
        tag("h1", name_of(part.path)),
        _facts(facts),
        tag("h2", "Findings"),
        _findings([*_said(part), *findings_of(part.experts)]),
        *_maps(part),
        *_ranks(part.summary),
        *load_path(part.summary, part.source_bytes),
        *_modules(part.module_table),
    )


def _failed(error: LorashardError) -> Html:
    hint = f" {error.hint}" if error.hint else ""
    return tag(
        "article",
        tag("h1", "Not shown"),
        _findings([Finding("warning", f"{error.first_line}{hint}")]),
    )


def _said(part: PagePart) -> Iterator[Finding]:
    summary = part.summary
    if summary.get("manifest_changed"):
        yield Finding("warning", MANIFEST_CHANGED, rules.DAMAGED_BYTES.id)
    for note in part.notes:
        yield Finding("note", note)
    if summary.get("counted_from_r"):
        yield Finding("note", "The number of experts is counted from r; --model checks it.")
    if not summary.get("gate_up_known", True):
        yield Finding("note", _ASSUMED_GATE_UP)
    if summary.get("dtype_cast"):
        yield Finding(
            "note", f"The values were cast to {summary['dtype_cast']}: `merge` is impossible."
        )


def _findings(findings: Sequence[Finding]) -> Html:
    if not findings:
        return tag("p", "Nothing to point out.")
    items = [
        tag("li", *([tag("b", "Warning: ")] if f.kind == "warning" else []), f.text, class_=f.kind)
        for f in findings
    ]
    return tag("ul", *items, class_="findings")


def _facts(facts: Mapping[str, str]) -> Html:
    pairs = [(tag("dt", name), tag("dd", value)) for name, value in facts.items()]
    return tag("dl", *(cell for pair in pairs for cell in pair), class_="facts")


def _plan_facts(summary: Mapping[str, Any]) -> dict[str, str]:
    return {
        "plan for": f"{summary['ep_size']} ranks, {summary['placement']} placement",
        "experts": f"{summary['num_experts']} in {layers(summary['num_modules'])}",
        "shard directory": f"{render.size(summary['total_bytes'])}, of which "
        f"{render.size(summary['replicated_bytes'])} are for every rank",
        "vLLM": f"--max-loras {summary['max_loras']} --max-lora-rank {summary['max_lora_rank']}",
    }


def _shards_facts(summary: Mapping[str, Any]) -> dict[str, str]:
    placement, source = summary["placement"], summary["source"]
    facts = {
        "shards for": f"{placement['ep_size']} ranks, {placement['strategy']} placement",
        "experts": f"{summary['num_experts']} in {layers(summary['num_modules'])}",
        "size": render.size(sum(file["bytes"] for file in summary["files"].values())),
        "written by": f"lorashard {summary['lorashard_version']}",
    }
    if source["repo"]:
        facts["source"] = f"{source['repo']}@{source['revision'] or ''}".rstrip("@")
    return facts


def _adapter_facts(summary: Mapping[str, Any]) -> dict[str, str]:
    replicated = summary["replicated"]
    return {
        "adapter": "not split",
        "experts": f"{summary['num_experts']} in {layers(summary['num_modules'])}",
        "LoRA": f"r={summary['lora_rank']}, alpha={summary['lora_alpha']:g}, "
        f"{'alpha / sqrt(r)' if summary['use_rslora'] else 'alpha / r'}",
        "dtype": ", ".join(summary["dtypes"]),
        "size": f"{summary['num_tensors']:,} tensors, {render.size(summary['total_bytes'])}, of which "
        f"{render.size(summary['expert_bytes'])} are experts'",
        "for every rank": f"{replicated['num_tensors']:,} tensors, {render.size(replicated['bytes'])}",
    }


def _maps(part: PagePart) -> Iterator[Html]:
    modules = part.experts
    if not modules:
        return
    yield tag("h2", "Where the experts are" if modules[0].ranks else "Which experts are trained")
    if not modules[0].ranks:
        yield expert_map(map_of_modules(modules, MOST_ROWS), "Experts by layers", "layer")
        yield legend()
        return
    together = f", all {len(modules)} layers together" if len(modules) > 1 else ""
    whole = expert_map(map_of_ranks(modules, MOST_ROWS), f"Experts by ranks{together}", "")
    yield whole
    yield legend()
    groups = groups_of_modules(modules)
    if len(groups) > 1:
        yield _details(groups, _MOST_MAP_CHARACTERS - len(whole))


def _details(groups: Sequence[Sequence[ModuleExperts]], room: int) -> Html:
    """A map for each group of layers that are alike. room: characters for all of them."""
    drawn: list[Html] = []
    for group in groups:
        others = f" and {len(group) - 1} more like it" if len(group) > 1 else ""
        caption = f"{group[0].name}{others}"
        picture = expert_map(map_of_ranks(group, MOST_ROWS), caption, "")
        room -= len(picture)
        if room < 0:
            break
        drawn.append(picture)
    left_out = len(groups) - len(drawn)
    if left_out:
        text = f"{left_out} more are not drawn, to keep the page small; the expert map has them all, as has lorashard.json."
        drawn.append(tag("p", text, class_="quiet"))
    summary = tag("summary", f"Layer by layer: {len(groups)} groups of layers differ")
    return tag("details", summary, *drawn)


def _ranks(summary: Mapping[str, Any]) -> Iterator[Html]:
    if summary.get("kind") == "adapter":
        return
    plan = "ranks" in summary
    if plan:
        columns = [
            "rank",
            "experts",
            "ids",
            "on disk",
            "to read",
            "GPU buffers",
            "host memory",
            "without lorashard",
        ]
        keys = [
            "bytes_on_disk",
            "bytes_to_read",
            "gpu_buffer_bytes",
            "host_bytes",
            "host_bytes_without",
        ]
        rows = [
            (f"rank {rank['ep_rank']}", rank["experts"], [rank[key] for key in keys])
            for rank in summary["ranks"]
        ]
    else:
        columns = ["rank", "experts", "ids", "on disk", "to read"]
        sizes = [file["bytes"] for file in summary["files"].values()]
        rows = [
            (f"rank {ep_rank}", experts, [size, size + sizes[0]])
            for ep_rank, (experts, size) in enumerate(zip(summary["placement"]["ranks"], sizes[1:]))
        ]
    # One scale for all bars but those of the GPU, so that they can be compared.
    gpu = {2: max((sizes[2] for _, _, sizes in rows), default=0)} if plan else {}
    most = max((n for _, _, sizes in rows for c, n in enumerate(sizes) if c not in gpu), default=0)
    body: list[_Cells] = [
        (
            name,
            str(len(experts)),
            render.ids(experts),
            *(_bar(n, gpu.get(c, most)) for c, n in enumerate(sizes)),
        )
        for name, experts, sizes in rows[:MOST_ROWS]
    ]
    yield tag("h2", "Bytes and memory of each rank")
    yield table("Each rank", columns, body, ids_column=2)
    if len(rows) > MOST_ROWS:
        yield tag("p", f"The first {MOST_ROWS} of {len(rows)} ranks are shown.", class_="quiet")
    if plan:
        yield tag(
            "p",
            "GPU buffers: what vLLM allocates at start for the LoRA of experts, at 16 bits. Host memory "
            "is estimated: to load this adapter from its shard, and at least this much without lorashard.",
            class_="quiet",
        )  # fmt: skip


def _bar(size_bytes: int, largest: int) -> Html:
    width = 100 * size_bytes / largest if largest else 0
    drawn = tag("rect", class_="s3", width=f"{width:.1f}", height=1)
    box = tag(
        "svg",
        drawn,
        class_="bar",
        viewBox="0 0 100 1",
        preserveAspectRatio="none",
        aria_hidden="true",
    )
    return joined([box, render.size(size_bytes)])


def _modules(rows: Sequence[Sequence[str]]) -> Iterator[Html]:
    if rows:
        columns, *body = rows
        yield tag("h2", "Expert layers")
        yield table("Layers that are alike", columns, body[:MOST_ROWS], ids_column=len(columns) - 1)
        if len(body) > MOST_ROWS:
            yield tag("p", f"The first {MOST_ROWS} of {len(body)} are shown.", class_="quiet")


def table(caption: str, columns: Sequence[str], rows: Sequence[_Cells], ids_column: int) -> Html:
    """A table whose first column names its rows."""
    head = tag("tr", *(tag("th", column, scope="col") for column in columns))
    body = [
        tag(
            "tr",
            tag("th", name_of(first), scope="row"),
            *(
                tag("td", cell, class_="ids" if column == ids_column else None)
                for column, cell in enumerate(rest, 1)
            ),
        )
        for first, *rest in rows
    ]
    return scrollable(
        tag("table", tag("caption", caption), tag("thead", head), tag("tbody", *body)), caption
    )
