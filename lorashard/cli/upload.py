"""Uploads as commands show them: a bar, what changed there, and the upload's part of the JSON.

`push` uploads what is there; with `-o URL`, other commands upload what they have made.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorashard.cli import bars, render
from lorashard.cli.bars import ByteBar
from lorashard.errors import ShardError

if TYPE_CHECKING:
    from lorashard.progress import Stage
    from lorashard.to_url import UrlOutput
    from lorashard.uploading.contents import Content, Uploaded


def is_url(out: str | None) -> bool:
    """Whether `-o` names a place that is uploaded to."""
    return out is not None and "://" in out


def refuse_private(out: str | None, *, private: bool) -> None:
    """Raise ShardError for --private with a local directory."""
    if private and not is_url(out):
        raise ShardError(
            "--private is for -o hf://owner/name: a local directory has no such thing."
        )


@contextmanager
def opened_output(
    out: str, content: Content, *, private: bool, force: bool
) -> Iterator[tuple[Path, UrlOutput | None]]:
    """Where to make what goes to `out`: `out` itself, or a temporary directory and the URL it is for.

    What the upload would refuse is refused at once.
    """
    refuse_private(out, private=private)
    render.if_interrupted(lambda: f"{out} is as it was.")
    if not is_url(out):
        yield Path(out), None
        return
    from lorashard.to_url import UrlOutput, temporary_output  # noqa: PLC0415

    output = UrlOutput(out, content, private=private, force=force)
    output.check()
    output.preview()
    with temporary_output() as path:
        yield path, output


def upload_with_bar(output: UrlOutput, made: Path, *, name: str, quiet: bool) -> Uploaded:
    """Upload what was made. name: of what is uploaded, on the bar."""
    with bars.progress_bar(f"upload {name}", quiet=quiet) as bar:
        stage = shown_stages(
            bar, name, output.url, output.content.last, again_of(output), quiet=quiet
        )
        return output.upload(made, stage, bar.advance)


def again_of(output: UrlOutput) -> str:
    """What to do if the upload is interrupted."""
    from lorashard.uploading.contents import AdapterContent  # noqa: PLC0415

    # Nobody sees of a part of an adapter whose it is, so that even this is not replaced unasked.
    forced = " with --force" if isinstance(output.content, AdapterContent) else ""
    return f"Run the same command again{forced}."


def push_with_bar(
    shards: Path, target: str, *, private: bool, force: bool, dry_run: bool, quiet: bool
) -> Uploaded:
    """Check and upload a shard directory. Raises what `push_shards` raises."""
    from lorashard.shards.names import MANIFEST_NAME  # noqa: PLC0415
    from lorashard.transfer.push import push_shards  # noqa: PLC0415

    with bars.progress_bar(f"check {shards.name}", quiet=quiet) as bar:
        stage = shown_stages(bar, shards.name, target, MANIFEST_NAME, "Push again.", quiet=quiet)
        return push_shards(
            shards, target, private=private, force=force, dry_run=dry_run, stage=stage,
            progress=bar.advance,
        )  # fmt: skip


def shown_stages(
    bar: ByteBar, name: str, target: str, last: str, again: str, *, quiet: bool
) -> Stage:
    """Show each stage on the bar; and once the upload has begun, tell an interruption as one of it.

    name: on the bar. last: the file without which the target is incomplete. again: what to do then.
    """

    def begin(stage: str, size_bytes: int) -> None:
        if stage != "upload":
            bar.restart(size_bytes, f"{stage} {name}")
            return
        if size_bytes:
            bar.restart(size_bytes, f"upload {name}")
            state = f"{target} is incomplete if it has no {last}. {again}"
        else:
            bar.hide()
            show_hub_bars(quiet=quiet)
            state = f"{target} is as it was: an upload to the Hub is one commit, at the end."
        render.if_interrupted(lambda: state)

    render.if_interrupted(lambda: f"{target} is as it was.")
    return begin


def show_hub_bars(*, quiet: bool) -> None:
    """Leave the bars of an upload to the Hub to huggingface_hub, or have none."""
    if quiet or not sys.stderr.isatty():
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()


def say_changes(
    uploaded: Uploaded | None, *, about: str | None = None, dry_run: bool = False, quiet: bool
) -> None:
    """Say what an upload has removed or left alone at its place, or would. about: as `say_note` has it."""
    from lorashard.uploading.card import CARD_NAME  # noqa: PLC0415

    if uploaded is None:
        return
    if uploaded.removed:
        gone = "would be removed" if dry_run else "removed"
        render.say_note(f"{gone} there: {', '.join(uploaded.removed)}", about=about, quiet=quiet)
    if uploaded.kept_card:
        text = f"{CARD_NAME} there was edited; it is left as it is."
        render.say_note(text, about=about, quiet=quiet)


def upload_json(uploaded: Uploaded) -> dict[str, Any]:
    """What was done at the place."""
    return {
        "place": uploaded.place,
        "revision": uploaded.revision,
        "removed": list(uploaded.removed),
        "kept_card": uploaded.kept_card,
    }


def output_json(out: object, uploaded: Uploaded | None) -> dict[str, Any]:
    """The fields of a result that say where it is."""
    if uploaded is None:
        return {"out": str(out)}
    return {"out": uploaded.place, "pushed": upload_json(uploaded)}
