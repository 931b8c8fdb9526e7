"""`lorashard merge`: a shard directory -> its source adapter."""

from __future__ import annotations

from lorashard.cli import bars, render
from lorashard.cli import options as opt


def merge(
    shards: opt.Shards,
    out: opt.AdapterOutput,
    force: opt.Force = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Restore the source adapter, bit for bit."""
    from lorashard.adapter.config import WEIGHTS_NAME  # noqa: PLC0415
    from lorashard.merge import merge_shards  # noqa: PLC0415
    from lorashard.shards.directory import locate_shards  # noqa: PLC0415
    from lorashard.shards.replan import source_was_pickled  # noqa: PLC0415

    located = locate_shards(shards)
    weights = located.manifest.source.files[WEIGHTS_NAME]
    render.if_interrupted(lambda: f"{out} is as it was.")
    label = f"merge {located.place.name}"
    with bars.progress_bar(label, weights.size_bytes, quiet=quiet) as bar:
        manifest = merge_shards(located, out, force=force, progress=bar.advance)
    if source_was_pickled(manifest):
        render.say(
            f"note: the source was a pickle; its tensors are written as {WEIGHTS_NAME}.",
            quiet=quiet,
        )
    result = {
        "shards": shards,
        "out": str(out),
        "size": weights.size_bytes,
        "blake3": weights.blake3,
    }
    render.print_result(result, out, as_json=as_json, quiet=quiet)
