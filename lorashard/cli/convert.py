"""`convert`: one core call, with progress."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorashard.adapter.config import CONFIG_NAME
from lorashard.adapter.options import Orientation
from lorashard.adapter.read import is_plain_adapter
from lorashard.cli import render
from lorashard.convert.convert import prepare_conversion, write_conversion
from lorashard.convert.peft_tensors import PeftLayout
from lorashard.shards.directory import read_manifest
from lorashard.shards.names import MANIFEST_NAME
from lorashard.storage.remote import local_copy, locate
from lorashard.storage.staging import check_target


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
