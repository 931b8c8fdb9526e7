"""`lorashard split` of many adapters: a bar for all of them, what became of each, and a summary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from lorashard.cli import bars, render
from lorashard.cli.error_json import json_of
from lorashard.cli.split_result import outcome_json, say_result
from lorashard.cli.upload import say_changes, show_hub_bars
from lorashard.errors import BatchError
from lorashard.parameters import with_flags

if TYPE_CHECKING:
    from lorashard.split.batch import AdapterOutcome, Splitter
    from lorashard.split.pipeline import SplitRequest
    from lorashard.split.selection import SplitJob


def split_batch(
    jobs: Sequence[SplitJob],
    request: SplitRequest,
    *,
    url: str | None,
    private: bool,
    workers: int,
    force: bool,
    resume: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Split all of them; report failures at the end. Raises BatchError if there are any.

    url: where all of them go, each into a folder of its own; None = to local directories.
    """
    from lorashard.split.batch import split_here, split_jobs  # noqa: PLC0415

    splitter: Splitter = split_here
    if url is not None:
        from lorashard.to_url import UrlOutput, split_job_to_url  # noqa: PLC0415
        from lorashard.uploading.contents import ShardsContent  # noqa: PLC0415

        UrlOutput(url, ShardsContent(request.ep_size)).check()
        show_hub_bars(quiet=True)  # this one's is on the screen
        splitter = partial(split_job_to_url, private=private)
    with bars.batch_bar("split", len(jobs), quiet=quiet) as bar:
        render.if_interrupted(
            lambda: (
                f"{bar.count.num_finished} of {len(jobs)} adapters are finished. The same command "
                "with --resume does the rest."
            )
        )

        def finished(outcome: AdapterOutcome) -> None:
            bar.finish(outcome.adapter)
            if outcome.error is not None:
                shown = json_of(outcome.error)
                text = _about(outcome.adapter, shown["error"])
                render.say_error(text, shown["hint"], shown["rule"])
            elif outcome.result is not None:
                say_changes(
                    outcome.result.uploaded, about=outcome.adapter, dry_run=dry_run, quiet=quiet
                )
                say_result(outcome.result, quiet=quiet)
                if not (as_json or quiet):
                    render.print_line(str(outcome.result.out))

        outcomes = split_jobs(
            jobs,
            request,
            workers=workers,
            force=force,
            resume=resume,
            dry_run=dry_run,
            split=splitter,
            started=bar.start,
            progress=bar.advance,
            finished=finished,
        )
    _say_notes(outcomes, quiet=quiet)
    if as_json:
        render.print_json([outcome_json(outcome) for outcome in outcomes])
    counts = Counter(outcome.status for outcome in outcomes)
    ignored = f", {counts['ignored']} ignored as shards" if counts["ignored"] else ""
    render.say(
        f"{counts['done']} split, {counts['skipped']} already there, "
        f"{counts['failed']} failed{ignored}",
        quiet=quiet,
    )
    errors = []
    for outcome in outcomes:
        if outcome.error is not None:
            reason = with_flags(outcome.error.message)
            render.say(f"  failed: {_about(outcome.adapter, reason)}", quiet=quiet)
            errors.append(outcome.error)
    if errors:
        again = "Run it again with --resume to retry only those that failed."
        all_failed = "None was split; the messages above say why."
        hint = all_failed if len(errors) == len(outcomes) else again
        raise BatchError(errors, len(outcomes), noun="adapters", hint=hint)


def _say_notes(outcomes: Sequence[AdapterOutcome], *, quiet: bool) -> None:
    """Each note once, with the adapters that it is about."""
    about: dict[str, list[str]] = {}
    for outcome in outcomes:
        for note in outcome.result.notes if outcome.result is not None else ():
            about.setdefault(note, []).append(outcome.adapter)
    for note, adapters in about.items():
        others = f" and {len(adapters) - 1} more" if len(adapters) > 1 else ""
        render.say_note(note, about=adapters[0] + others, quiet=quiet)


def _about(adapter: str, text: str) -> str:
    """The text with the adapter's name before it, if it does not name it."""
    is_named = text.startswith((f"{adapter}:", f"{adapter}/", f"{adapter} "))
    return text if is_named else f"{adapter}: {text}"
