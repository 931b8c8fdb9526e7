"""`lorashard merge`: a shard directory -> its source adapter."""

from __future__ import annotations

from lorashard.cli import bars, render
from lorashard.cli import options as opt
from lorashard.cli.upload import opened_output, output_json, say_changes, upload_with_bar


def merge(
    shards: opt.Shards,
    out: opt.AdapterOutput,
    force: opt.Force = False,
    private: opt.Private = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Restore the source adapter, bit for bit."""
    from lorashard.adapter.config import WEIGHTS_NAME  # noqa: PLC0415
    from lorashard.merge import merge_shards  # noqa: PLC0415
    from lorashard.shards.directory import locate_shards  # noqa: PLC0415
    from lorashard.shards.replan import source_was_pickled  # noqa: PLC0415
    from lorashard.uploading.contents import AdapterContent  # noqa: PLC0415

    uploaded = None
    with opened_output(out, AdapterContent(), private=private, force=force) as (path, output):
        located = locate_shards(shards)
        name, weights = located.place.name, located.manifest.source.files[WEIGHTS_NAME]
        with bars.progress_bar(f"merge {name}", weights.size_bytes, quiet=quiet) as bar:
            manifest = merge_shards(located, path, force=force, progress=bar.advance)
        if output is not None:
            uploaded = upload_with_bar(output, path, name=name, quiet=quiet)
    say_changes(uploaded, quiet=quiet)
    if source_was_pickled(manifest):
        render.say(
            f"note: the source was a pickle; its tensors are written as {WEIGHTS_NAME}.",
            quiet=quiet,
        )
    result = {
        "shards": shards,
        **output_json(out, uploaded),
        "size": weights.size_bytes,
        "blake3": weights.blake3,
    }
    render.print_result(result, result["out"], as_json=as_json, quiet=quiet)
