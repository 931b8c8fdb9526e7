"""`verify`: one core call, the findings line by line."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

from lorashard.adapter import CONFIG_NAME, PICKLE_NAME, WEIGHTS_NAME
from lorashard.cli import render
from lorashard.errors import VerificationError
from lorashard.manifest import MANIFEST_NAME
from lorashard.pipeline import read_manifest
from lorashard.read import find_remote_adapter
from lorashard.remote import Place, RemoteFolder, local_copy, locate
from lorashard.verify import verify_shards


def run_verify(
    shards: str, against: str | None, *, allow_pickle: bool, as_json: bool, quiet: bool
) -> None:
    """Verify a directory. Raises VerificationError if anything is wrong with it."""
    place = locate(shards)
    manifest = read_manifest(place)
    names = [MANIFEST_NAME, CONFIG_NAME, *manifest.files]
    with ExitStack() as stack:
        directory = stack.enter_context(local_copy(place, names))
        source = None if against is None else stack.enter_context(_adapter_copy(locate(against)))
        findings = _verified(directory, source, allow_pickle=allow_pickle, quiet=quiet)
    if as_json:
        render.print_json({
            "shards": shards,
            "ok": not findings,
            "against": against,
            "findings": list(findings),
        })  # fmt: skip
    elif findings:
        for finding in findings:
            render.print_line(finding)
    elif not quiet:
        proven = "" if against is None else f", every value equal to {against}"
        render.print_line(
            f"{shards}: ok, {manifest.placement.num_experts} experts on "
            f"{manifest.placement.ep_size} ranks{proven}"
        )
    if findings:
        raise VerificationError(shards, findings)


def _adapter_copy(place: Place) -> AbstractContextManager[Path]:
    if isinstance(place, RemoteFolder):
        place = find_remote_adapter(place)
    return local_copy(place, (CONFIG_NAME, WEIGHTS_NAME, PICKLE_NAME))


def _verified(
    shards: Path, against: Path | None, *, allow_pickle: bool, quiet: bool
) -> tuple[str, ...]:
    manifest = read_manifest(shards)
    total = sum(file.digest.size_bytes for file in manifest.files.values())
    if against is not None:
        total += sum(digest.size_bytes for digest in manifest.source.files.values())
    with render.progress_bar(f"verify {shards.name}", total, quiet=quiet) as progress:
        return verify_shards(shards, against=against, allow_pickle=allow_pickle, progress=progress)
