"""`convert`: one core call, with progress."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorashard.adapter import CONFIG_NAME
from lorashard.cli import render
from lorashard.convert import prepare_conversion, write_conversion
from lorashard.emit import PeftLayout
from lorashard.manifest import MANIFEST_NAME
from lorashard.merge import is_plain_adapter
from lorashard.options import Orientation
from lorashard.output import check_target
from lorashard.pipeline import read_manifest
from lorashard.remote import local_copy, locate


def run_convert(
    shards: str,
    out: Path,
    layout: PeftLayout,
    model: str | None,
    orientation: Orientation | None,
    *,
    force: bool,
    quiet: bool,
) -> dict[str, Any]:
    """Write a plain adapter; returns what `--json` prints."""
    check_target(out, force=force, replaceable=is_plain_adapter)
    place = locate(shards)
    names = (MANIFEST_NAME, CONFIG_NAME, *read_manifest(place).files)
    with local_copy(place, names) as directory:
        prepared = prepare_conversion(directory, layout, model=model, orientation=orientation)
        conversion = prepared.conversion
        for note in conversion.notes:
            render.say(f"note: {note}", quiet=quiet)
        total = prepared.progress_bytes
        with render.progress_bar(f"convert {place.name}", total, quiet=quiet) as progress:
            write_conversion(prepared, out, force=force, progress=progress)
    num_experts = prepared.manifest.placement.num_experts
    render.say(
        f"{shards}: {num_experts} experts in {len(prepared.manifest.modules)} modules, {layout}, "
        f"{render.size(conversion.size_bytes)}",
        quiet=quiet,
    )
    return {
        "shards": shards,
        "out": str(out),
        "layout": layout,
        "num_experts": num_experts,
        "num_modules": len(prepared.manifest.modules),
        "size": conversion.size_bytes,
        "notes": list(conversion.notes),
    }
