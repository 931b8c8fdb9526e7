"""What a command makes, on its way to a URL: made in a temporary directory, uploaded, removed.

In: a URL, and what is going to be there. Out: an `Uploaded`. What the upload would refuse is refused
before anything is read.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from lorashard.adapter.config import WEIGHTS_NAME
from lorashard.errors import NoRoomError
from lorashard.progress import Progress, Stage
from lorashard.shards.placement import check_ep_size
from lorashard.split.pipeline import SplitRequest
from lorashard.split.run import SplitResult, run_split
from lorashard.split.selection import SplitJob
from lorashard.transfer.push import push_shards
from lorashard.uploading.contents import Content, ShardsContent, Uploaded
from lorashard.uploading.survey import check_place, is_on_hub, preview_upload
from lorashard.uploading.upload import upload_adapter

_NO_ROOM = "What is made is there until it is uploaded. Free some space, or set TMPDIR to a folder with more."


@dataclass(frozen=True, slots=True)
class UrlOutput:
    """A URL to which a command's output goes. private, force: as `push_shards` has them."""

    url: str
    content: Content
    private: bool = False
    force: bool = False

    def check(self) -> None:
        """Raise what an upload would raise of the place itself, whatever is in it."""
        if isinstance(self.content, ShardsContent):
            check_ep_size(self.content.ep_size)  # there is a name for each
        check_place(self.url)

    def preview(self) -> Uploaded:
        """What the upload would do. Raises OutputExistsError if something is in the way."""
        return preview_upload(self.url, self.content, force=self.force)

    def upload(self, directory: Path, stage: Stage, progress: Progress) -> Uploaded:
        """Upload what was made; shards are checked first. stage, progress: as `push_shards` has them.

        Raises what `push_shards` raises.
        """
        if isinstance(self.content, ShardsContent):
            return push_shards(
                directory, self.url, private=self.private, force=self.force, stage=stage,
                progress=progress,
            )  # fmt: skip
        size_bytes = (directory / WEIGHTS_NAME).stat().st_size
        stage("upload", 0 if is_on_hub(self.url) else size_bytes)
        return upload_adapter(
            directory, self.url, private=self.private, force=self.force, progress=progress
        )


@contextmanager
def temporary_output() -> Iterator[Path]:
    """A path for what is to be uploaded, in a temporary directory that is removed at the end.

    An error for want of room in it says what to do about that.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="lorashard-") as temporary:
            yield Path(temporary) / "output"
    except NoRoomError as err:
        raise NoRoomError(err.message, hint=_NO_ROOM) from err


def split_to_url(
    adapter: str,
    output: UrlOutput,
    request: SplitRequest,
    *,
    resume: bool = False,
    dry_run: bool = False,
    note: Callable[[str], None] = lambda _: None,
    stage: Stage = lambda *_: None,
    progress: Progress = lambda _: None,
) -> SplitResult:
    """Split one adapter and upload the shards; with `resume` only if they are not there.

    The place itself is taken to be there: `check` has said so.
    note, progress: as `run_split` has them. stage: called as "split", "check" or "upload" begins, with
    the bytes that it is going to report.
    """
    # Nobody needs the temporary copy after a crash.
    request = replace(request, sync=False)
    with temporary_output() as shards:
        result = run_split(
            adapter, shards, request, url=output.url, force=output.force, resume=resume,
            dry_run=dry_run, note=note,
            started=lambda size_bytes: stage("split", size_bytes), progress=progress,
        )  # fmt: skip
        if result.status == "skipped":
            return replace(result, out=output.url)
        uploaded = output.preview() if dry_run else output.upload(shards, stage, progress)
    return replace(result, out=uploaded.place, uploaded=uploaded)


def split_job_to_url(
    job: SplitJob,
    request: SplitRequest,
    *,
    private: bool = False,
    force: bool,
    resume: bool,
    dry_run: bool,
    started: Callable[[int, int], None],
    progress: Progress,
) -> SplitResult:
    """A `Splitter` for jobs whose targets are URLs."""
    output = UrlOutput(str(job.target), ShardsContent(request.ep_size), private, force)
    source_bytes = 0
    counts = True

    def begin(stage: str, size_bytes: int) -> None:
        nonlocal source_bytes, counts
        # The check is so much faster than an upload that it would spoil the estimate of what is left.
        counts = stage != "check"
        if stage == "split":
            source_bytes = size_bytes
            expected = 0 if is_on_hub(output.url) else size_bytes  # the shards are about as large
            started(source_bytes + expected, 0)
        elif stage == "upload":
            started(source_bytes + size_bytes, source_bytes)

    return split_to_url(
        job.adapter, output, request, resume=resume, dry_run=dry_run, stage=begin,
        progress=lambda size_bytes: progress(size_bytes if counts else 0),
    )  # fmt: skip
