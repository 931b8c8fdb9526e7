"""`verify`: one core call, the findings line by line."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

from lorashard.adapter.config import CONFIG_NAME, PICKLE_NAME, WEIGHTS_NAME
from lorashard.adapter.read import find_remote_adapter
from lorashard.cli import render
from lorashard.errors import VerificationError
from lorashard.shards.directory import needed_files, read_manifest
from lorashard.shards.names import MANIFEST_NAME
from lorashard.storage.remote import Location, RemoteFolder, local_copy, locate
from lorashard.verify.verify import verify_shards


def run_verify(
    shards: str,
    against: str | None,
    ep_ranks: Sequence[int] | None,
    *,
    allow_pickle: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Verify a directory, or what some ranks need of it. Raises VerificationError if it is wrong."""
    place = locate(shards)
    manifest = read_manifest(place)
    wanted = manifest.files if ep_ranks is None else needed_files(manifest, ep_ranks, shards)
    names = [MANIFEST_NAME, CONFIG_NAME, *wanted]
    with ExitStack() as stack:
        directory = stack.enter_context(local_copy(place, names))
        source = None if against is None else stack.enter_context(_adapter_copy(locate(against)))
        total = sum(
            manifest.files[name].digest.size_bytes for name in wanted if name in manifest.files
        )
        if source is not None:
            total += sum(digest.size_bytes for digest in manifest.source.files.values())
        with render.progress_bar(f"verify {place.name}", total, quiet=quiet) as progress:
            findings = verify_shards(
                directory,
                against=source,
                allow_pickle=allow_pickle,
                ep_ranks=ep_ranks,
                progress=progress,
            )
    if as_json:
        render.print_json({
            "shards": shards,
            "ok": not findings,
            "against": against,
            "ep_ranks": None if ep_ranks is None else list(ep_ranks),
            "findings": list(findings),
        })  # fmt: skip
    elif findings:
        for finding in findings:
            render.print_line(finding)
    elif not quiet:
        only = "" if ep_ranks is None else f", ranks {render.ids(ep_ranks)} checked"
        proven = "" if against is None else f", every value equal to {against}"
        render.print_line(
            f"{shards}: ok, {manifest.placement.num_experts} experts on "
            f"{manifest.placement.ep_size} ranks{proven}{only}"
        )
    if findings:
        raise VerificationError(shards, findings)


def _adapter_copy(place: Location) -> AbstractContextManager[Path]:
    if isinstance(place, RemoteFolder):
        place = find_remote_adapter(place)
    return local_copy(place, (CONFIG_NAME, WEIGHTS_NAME, PICKLE_NAME))
