"""`verify`: one core call, the findings line by line."""

from __future__ import annotations

from pathlib import Path

from lorashard.cli import render
from lorashard.errors import VerificationError
from lorashard.pipeline import read_manifest
from lorashard.verify import verify_shards


def run_verify(
    shards: Path, against: Path | None, *, allow_pickle: bool, as_json: bool, quiet: bool
) -> None:
    """Verify a directory. Raises VerificationError if anything is wrong with it."""
    manifest = read_manifest(shards)
    total = sum(file.digest.size_bytes for file in manifest.files.values())
    if against is not None:
        total += sum(digest.size_bytes for digest in manifest.source.files.values())
    with render.progress_bar(f"verify {shards.name}", total, quiet=quiet) as progress:
        findings = verify_shards(
            shards, against=against, allow_pickle=allow_pickle, progress=progress
        )
    if as_json:
        render.print_json({
            "shards": str(shards),
            "ok": not findings,
            "against": None if against is None else str(against),
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
