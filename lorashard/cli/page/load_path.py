"""The way of an adapter's bytes to a rank's GPU, step by step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lorashard.cli.page.markup import Html, tag
from lorashard.cli.render import size

_Step = tuple[str, str, str]  # where the bytes are, how many, what happens there


def load_path(summary: Mapping[str, Any], source_bytes: int) -> Iterator[Html]:
    """The steps for the rank that reads most; of a plan, those without lorashard as well."""
    yield tag("h2", "How a rank loads it")
    if summary.get("kind") == "adapter":
        yield tag(
            "p",
            f"Without shards, every rank parses the whole adapter: {size(summary['total_bytes'])} in "
            f"{summary['num_tensors']:,} tensors. ",
            tag("code", "lorashard plan ADAPTER --ep-size N --html FILE"),
            " shows what each rank would read from shards.",
        )
        return
    if "ranks" in summary:
        rank = max(summary["ranks"], key=lambda rank: rank["bytes_to_read"])
        number = rank["ep_rank"]
        yield tag("h3", f"With lorashard (rank {number}, which reads most)")
        yield _steps([
            _reads(summary["files"], number, rank["bytes_to_read"]),
            ("Host memory", size(rank["host_bytes"]), "one buffer, read into once"),
            ("GPU", size(rank["gpu_buffer_bytes"]), "vLLM's buffers for the LoRA of experts"),
        ])  # fmt: skip
        yield tag("h3", "Without lorashard")
        yield _steps(
            [
                ("Storage", size(source_bytes), "every rank parses the whole adapter"),
                (
                    "Host memory",
                    "at least " + size(rank["host_bytes_without"]),
                    "its part is taken out and repacked",
                ),
                ("GPU", size(rank["gpu_buffer_bytes"]), "the same buffers"),
            ]
        )
        return
    names, sizes = list(summary["files"]), [f["bytes"] for f in summary["files"].values()]
    number = sizes[1:].index(max(sizes[1:]))
    yield tag("h3", f"With lorashard's plugin (rank {number}, which reads most)")
    yield _steps(
        [
            _reads(names, number, sizes[0] + sizes[1 + number]),
            ("Host memory", "as much", "one buffer, read into once"),
            ("GPU", "vLLM's buffers", "as large as --max-loras and --max-lora-rank make them"),
        ]
    )


def _reads(names: Sequence[str], ep_rank: int, size_bytes: int) -> _Step:
    return "Storage", size(size_bytes), f"{names[0]} and {names[1 + ep_rank]}"


def _steps(steps: Sequence[_Step]) -> Html:
    items = [tag("li", tag("b", f"{where}: {amount}"), what) for where, amount, what in steps]
    return tag("ol", *items, class_="path")
