"""`lorashard split -o URL`: a split into a temporary directory, and a push of it."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lorashard.cli import bars, render
from lorashard.cli.split_result import result_json, say_result
from lorashard.cli.upload import push_with_bar, pushed_json, say_changes
from lorashard.errors import ShardError

if TYPE_CHECKING:
    from lorashard.split.pipeline import SplitRequest


def refuse_for_url(target: str, *, batch: bool, resume: bool) -> None:
    """Raise ShardError for what needs a local directory."""
    if batch:
        raise ShardError(
            f"{target}: several adapters go to a local directory, and this is a URL.",
            hint="Split them to a directory with -o DIR, and upload each with `lorashard push`; or "
            "split each with an -o of its own.",
        )
    if resume:
        raise ShardError(
            f"{target}: --resume looks at a local directory, and this is a URL.",
            hint="Leave it out; --force replaces shards that are there.",
        )


def split_to_url(
    adapter: str, target: str, request: SplitRequest, *, private: bool, force: bool, dry_run: bool,
    as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Split one adapter and upload the shards, which are on this disk meanwhile.

    What the upload would refuse is refused before the adapter is read.
    """
    from lorashard.shards.placement import check_ep_size  # noqa: PLC0415
    from lorashard.split.run import run_split  # noqa: PLC0415
    from lorashard.uploading.survey import preview_upload  # noqa: PLC0415

    render.if_interrupted(lambda: f"{target} is as it was.")
    check_ep_size(request.ep_size)  # the preview names a file for each
    pushed = preview_upload(target, request.ep_size, force=force)
    # Nobody needs the temporary copy after a crash.
    request = replace(request, sync=False)
    name = Path(adapter).name
    with tempfile.TemporaryDirectory(prefix="lorashard-") as temporary:
        shards = Path(temporary) / "shards"
        with bars.progress_bar(f"split {name}", quiet=quiet) as bar:
            result = run_split(
                adapter,
                shards,
                request,
                dry_run=dry_run,
                no_room="The shards are there until they are uploaded. Free some space, or set "
                "TMPDIR to a folder with more.",
                note=lambda text: render.say_note(text, quiet=quiet),
                started=bar.restart,
                progress=bar.advance,
            )
        say_result(result, quiet=quiet)
        if not dry_run:
            pushed = push_with_bar(
                shards, target, name=name, again="Run the same command again.", private=private,
                force=force, dry_run=False, quiet=quiet,
            )  # fmt: skip
    say_changes(pushed, dry_run=dry_run, quiet=quiet)
    render.say(
        f"{adapter}: {render.size(sum(result.file_sizes.values()))} to {pushed.place}"
        + (f" at {pushed.revision}" if pushed.revision else "")
        + (" (dry run, nothing uploaded)" if dry_run else ""),
        quiet=quiet,
    )
    document = result_json(result) | {"out": pushed.place, "pushed": pushed_json(pushed)}
    render.print_result(document, pushed.place, as_json=as_json, quiet=quiet)
