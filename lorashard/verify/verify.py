"""A shard directory -> what is wrong with it.

Checked: that the manifest follows from the config and the source header in it, each file's
structure and digest, that no value is infinite or NaN, and that each expert's data is where the
placement says, as the source's digest shows. The digests of the files and that of the source are of
the same bytes in two orders, so they are read twice. `against` proves the values themselves, with
code of its own (reference/).
"""

from __future__ import annotations

import os
from collections.abc import Container, Iterator, Sequence
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from lorashard.adapter.config import CONFIG_NAME, WEIGHTS_NAME
from lorashard.adapter.notice import is_notice
from lorashard.dtypes import ELEMENT_SIZE, EXPONENT_BITS
from lorashard.errors import LorashardError, ShardError
from lorashard.header import TensorEntry
from lorashard.progress import Progress
from lorashard.shards.directory import (
    Shards,
    check_file,
    is_repository_file,
    local_shards,
    locate_shards,
    needed_files,
    opened_files,
    shard_directory_names,
)
from lorashard.shards.manifest import Manifest, ShardFile
from lorashard.shards.names import MANIFEST_NAME, REPLICATED_NAME
from lorashard.shards.plan import ShardPlan
from lorashard.shards.replan import (
    RebuiltPlan,
    describe_wrong_digest,
    find_contradictions,
    is_own_config,
    rebuild_plan,
)
from lorashard.shards.seal import CHANGED
from lorashard.storage.digests import read_in_steps
from lorashard.storage.local import LocalFile
from lorashard.storage.parallel import cancellable_pool, result_of
from lorashard.storage.small_files import read_small_file
from lorashard.verify.against import compare_with_adapter
from lorashard.writing.restore import describe_misplaced

_STEP = 2 * 2**20
_READERS = 2


def verify_shards(
    shards: Shards,
    *,
    against: str | os.PathLike[str] | None = None,
    allow_pickle: bool = False,
    ep_ranks: Sequence[int] | None = None,
    progress: Progress = lambda _: None,
) -> tuple[str, ...]:
    """Every fault found, one sentence each; empty if the directory is what it claims to be.

    shards: a directory, or hf://owner/name[@revision] or another URL, which is fetched first.
    against: the source adapter, named in the same ways. Of an adapter whose bytes are others, such
        as a copy that was saved again, only the first difference in a value is reported.
    ep_ranks: the ranks whose files must be there, as `pull` fetches them; all by default.
    progress: called with bytes read since the last call.
    Raises ManifestError if there is no manifest to check against, ShardError for ranks that it does
    not have, or together with `against`, which needs all of them, AdapterError if a remote place
    does not answer.
    """
    located = locate_shards(shards)
    if against is not None and ep_ranks is not None:
        raise ShardError(
            f"{located.place}: only the files of all ranks can be compared with the source.",
            hint="Leave out `ep_ranks`, or `against`.",
        )
    manifest = located.manifest
    with local_shards(located, ep_ranks) as directory:
        findings, rebuilt = _check_manifest(manifest, directory)
        if located.was_changed:
            findings.insert(0, f"{MANIFEST_NAME}: {CHANGED}")
        needed = manifest.files if ep_ranks is None else needed_files(manifest, ep_ranks, directory)
        readable, unreadable = _check_headers(manifest, directory, needed)
        findings.extend(unreadable)
        unexpected = tuple(_find_unexpected_files(manifest, directory))
        is_proven = against is None and proves_placement(manifest, ep_ranks)
        plan = rebuilt.plan if rebuilt and is_proven and not (findings or unexpected) else None
        damaged, misplaced = _check_data(manifest, directory, readable, plan, progress)
        findings.extend((*damaged, *unexpected))
        if not findings:  # data that is damaged is that of another adapter anyway
            findings.extend(misplaced)
        if against is not None and findings:
            findings.append(f"{against}: not compared, because the shards are damaged already")
        elif against is not None:
            findings.extend(
                compare_with_adapter(
                    manifest, directory, against, progress, allow_pickle=allow_pickle
                )
            )
    return tuple(findings)


def proves_placement(manifest: Manifest, ep_ranks: Sequence[int] | None) -> bool:
    """Whether these are all ranks, which it takes to prove that the placement is the data's."""
    return ep_ranks is None or set(ep_ranks) == set(range(manifest.placement.ep_size))


def _check_manifest(manifest: Manifest, shards: Path) -> tuple[list[str], RebuiltPlan | None]:
    """What is wrong with the config, and with the manifest as far as the config is right."""
    rebuilt = None
    findings = []
    try:
        config_bytes = read_small_file(shards, CONFIG_NAME)
        if is_own_config(manifest, config_bytes):
            rebuilt = rebuild_plan(manifest, config_bytes, shards)
        else:
            findings.append(describe_wrong_digest(shards, CONFIG_NAME))
    except LorashardError as err:
        findings.append(err.message)
    found = find_contradictions(manifest, rebuilt)
    findings.extend(f"{MANIFEST_NAME}: {contradiction}" for contradiction in found)
    return findings, rebuilt


def _check_headers(
    manifest: Manifest, shards: Path, needed: Container[str]
) -> tuple[list[str], list[str]]:
    """The shard files whose headers are right, and what is wrong with the others."""
    readable, findings = [], []
    for name, recorded in manifest.files.items():
        if name in needed or (shards / name).exists():
            try:
                check_file(shards / name, recorded)
                readable.append(name)
            except ShardError as err:
                findings.append(err.message)
    return readable, findings


def _check_data(
    manifest: Manifest,
    shards: Path,
    readable: Sequence[str],
    plan: ShardPlan | None,
    progress: Progress,
) -> tuple[list[str], tuple[str, ...]]:
    """What is wrong with the bytes of the `readable` files, and what is in the wrong place.

    Both read the same bytes, in different orders, at the same time.
    plan: to find what is in the wrong place, which takes all files; None: that is not looked for.
    """
    with cancellable_pool(_READERS, progress) as (pool, advance):
        proof = pool.submit(_find_misplaced, manifest, shards, plan, advance)
        checks = [pool.submit(_check_bytes, manifest, shards, name, advance) for name in readable]
        damaged = [finding for check in checks for finding in result_of(check)]
        return damaged, () if damaged else result_of(proof)


def _find_misplaced(
    manifest: Manifest, shards: Path, plan: ShardPlan | None, progress: Progress
) -> tuple[str, ...]:
    if plan is None:
        return ()
    with opened_files([shards / name for name in manifest.files]) as files:
        return tuple(describe_misplaced(manifest, plan, files, progress))


def _find_unexpected_files(manifest: Manifest, shards: Path) -> Iterator[str]:
    for name in sorted(set(os.listdir(shards)) - shard_directory_names(manifest)):
        if not is_repository_file(name):
            yield f"{shards / name}: not part of a shard directory"
    weights = shards / WEIGHTS_NAME
    if weights.exists() and not is_notice(weights):
        yield f"{weights}: not the notice that belongs in a shard directory"


def _ep_rank_of(manifest: Manifest, name: str) -> int:
    return list(manifest.files).index(name) - 1  # the replicated file comes first


def _check_bytes(manifest: Manifest, shards: Path, name: str, progress: Progress) -> list[str]:
    """Digest a file and check its values, in one pass with one buffer."""
    recorded = manifest.files[name]
    file = LocalFile(shards / name)
    buffer = memoryview(bytearray(_STEP))
    digest = blake3()
    findings: list[str] = []
    position = 0
    try:
        for entry, begin, end in _areas(recorded):
            for data in read_in_steps(file, begin, end, buffer):
                digest.update(data)
                if entry and entry.dtype in EXPONENT_BITS and not _all_finite(data, entry.dtype):
                    findings.append(_locate_value(manifest, name, entry, data, position))
                progress(len(data))
                position += len(data)
    finally:
        file.close()
    if digest.hexdigest() != recorded.digest.blake3:
        findings.append(describe_wrong_digest(shards, name))
    return findings


def _areas(recorded: ShardFile) -> Iterator[tuple[TensorEntry | None, int, int]]:
    """The file front to back, as (tensor, begin, end): the header, which is None, then each tensor."""
    data_begin = recorded.tensors[0].begin if recorded.tensors else recorded.digest.size_bytes
    yield None, 0, data_begin
    for entry in recorded.tensors:
        yield entry, entry.begin, entry.end


def _not_finite(data: memoryview, dtype: str) -> npt.NDArray[np.bool_]:
    """Which elements are infinite or NaN: those with every exponent bit set."""
    mask = EXPONENT_BITS[dtype]
    bits = np.frombuffer(data, f"u{ELEMENT_SIZE[dtype]}")
    elements: npt.NDArray[np.bool_] = (bits & bits.dtype.type(mask)) == mask
    return elements


def _all_finite(data: memoryview, dtype: str) -> bool:
    mask = EXPONENT_BITS[dtype]
    bits = np.frombuffer(data, f"u{ELEMENT_SIZE[dtype]}")
    # Only the largest masked value is compared: twice as fast as comparing each.
    return len(bits) == 0 or int((bits & bits.dtype.type(mask)).max()) != mask


def _locate_value(
    manifest: Manifest, name: str, entry: TensorEntry, data: memoryview, begin: int
) -> str:
    position = int(_not_finite(data, entry.dtype).argmax())
    element = (begin - entry.begin) // ELEMENT_SIZE[entry.dtype] + position
    where = f"{name}: {entry.name}"
    if name != REPLICATED_NAME:
        slot = element // prod(entry.shape[1:])
        ep_rank = _ep_rank_of(manifest, name)
        module = entry.name.rsplit(".", 2)[0]
        where += f" expert {manifest.placement.ranks_of(module)[ep_rank][slot]} (slot {slot})"
    return f"{where}: element {element} is infinite or NaN"
