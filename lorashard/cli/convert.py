"""`lorashard convert`: a shard directory -> a plain PEFT adapter."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Optional

import typer

from lorashard.adapter.options import ExpertLayout, Orientation
from lorashard.cli import bars, render
from lorashard.cli import options as opt
from lorashard.cli.upload import opened_output, output_json, say_changes, upload_with_bar
from lorashard.parameters import with_flags


def convert(
    shards: opt.Shards,
    out: opt.AdapterOutput,
    layout: Annotated[
        ExpertLayout,
        typer.Option(
            "--layout",
            help="per_expert: a pair for each expert, for vLLM and PEFT with transformers 4. "
            "fused: one pair for all, for PEFT >= 0.19 with transformers 5.",
            show_default=False,
        ),
    ],
    model: opt.Model = None,
    orientation: Annotated[
        Optional[Orientation],
        typer.Option(
            "--orientation",
            help="How PEFT stores the fused parameters, if no model is named.",
            show_default=False,
        ),
    ] = None,
    force: opt.Force = False,
    private: opt.Private = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Write a plain PEFT adapter in the layout of your choice, with the same weight changes."""
    from lorashard.adapter.read import is_plain_adapter  # noqa: PLC0415
    from lorashard.convert.convert import prepare_conversion, write_conversion  # noqa: PLC0415
    from lorashard.shards.directory import (  # noqa: PLC0415
        local_shards,
        locate_shards,
    )
    from lorashard.storage.staging import check_target  # noqa: PLC0415
    from lorashard.uploading.contents import AdapterContent  # noqa: PLC0415

    uploaded = None
    with opened_output(out, AdapterContent(), private=private, force=force) as (path, output):
        check_target(path, force=force, replaceable=is_plain_adapter)
        located = locate_shards(shards)
        name = located.place.name
        with local_shards(located) as directory:
            local = replace(located, place=directory)
            prepared = prepare_conversion(local, layout, model=model, orientation=orientation)
            conversion = prepared.conversion
            for note in conversion.notes:
                render.say_note(note, quiet=quiet)
            with bars.progress_bar(f"convert {name}", prepared.progress_bytes, quiet=quiet) as bar:
                write_conversion(prepared, path, force=force, progress=bar.advance)
        if output is not None:
            uploaded = upload_with_bar(output, path, name=name, quiet=quiet)
    say_changes(uploaded, quiet=quiet)
    num_experts = located.manifest.placement.num_experts
    num_modules = len(located.manifest.modules)
    render.say(
        f"{shards}: {num_experts} experts in {num_modules} modules, {layout}, "
        f"{render.size(conversion.size_bytes)}",
        quiet=quiet,
    )
    result = {
        "shards": shards,
        **output_json(out, uploaded),
        "layout": layout,
        "num_experts": num_experts,
        "num_modules": num_modules,
        "size": conversion.size_bytes,
        "notes": [with_flags(note) for note in conversion.notes],
    }
    render.print_result(result, result["out"], as_json=as_json, quiet=quiet)
