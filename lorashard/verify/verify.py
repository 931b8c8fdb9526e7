"""A shard directory -> what is wrong with it. Reads every byte of it once.

Checked: the manifest and each file's structure, that each expert stands exactly where the
placement wants it, every digest, and that no value is infinite or NaN. `against` proves the
values themselves, with code of its own (reference/).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from lorashard.adapter.config import CONFIG_NAME, parse_config
from lorashard.adapter.read import find_adapter
from lorashard.dtypes import ELEMENT_SIZE, EXPONENT_BITS
from lorashard.errors import LorashardError, ShardError
from lorashard.header import TensorEntry
from lorashard.progress import Progress
from lorashard.shards.directory import check_file, needed_files, read_manifest
from lorashard.shards.manifest import Manifest, ShardFile, describe_module, format_manifest
from lorashard.shards.names import MANIFEST_NAME, REPLICATED_NAME
from lorashard.shards.placement import linear_placement, round_robin_placement
from lorashard.shards.replan import replan
from lorashard.storage.digests import read_in_steps
from lorashard.storage.local import LocalFile
from lorashard.storage.small_files import read_small_file
from lorashard.verify.reference.compare import compare_with_source

_STEP = 2 * 2**20
_READERS = 2


def verify_shards(
    shards: str | os.PathLike[str],
    *,
    against: str | os.PathLike[str] | None = None,
    allow_pickle: bool = False,
    ep_ranks: Sequence[int] | None = None,
    progress: Progress = lambda _: None,
) -> tuple[str, ...]:
    """Every fault found, one sentence each; empty if the directory is what it claims to be.

    ep_ranks: the ranks whose files must be there, as `pull` fetches them; all by default.
    progress: called with bytes read since the last call.
    Raises ManifestError if there is no manifest to hold anything against, ShardError for ranks
    that it does not have, or together with `against`, which needs all of them.
    """
    shards = Path(shards)
    manifest = read_manifest(shards)
    if against is not None and ep_ranks is not None:
        raise ShardError(
            f"{shards}: the source can only be compared with the files of all ranks.",
            hint="Leave the ranks out, or --against.",
        )
    wanted = manifest.files if ep_ranks is None else needed_files(manifest, ep_ranks, str(shards))
    findings = [
        *_check_placement(manifest),
        *(_check_config(manifest, shards) or _check_description(manifest, shards)),
    ]
    sound = []
    for name, recorded in manifest.files.items():
        if name in wanted or (shards / name).exists():
            try:
                check_file(shards / name, recorded)
                sound.append(name)
            except ShardError as err:
                findings.append(err.message)
        findings.extend(_check_coverage(manifest, name))
    with ThreadPoolExecutor(max_workers=_READERS) as pool:
        checks = [pool.submit(_check_bytes, manifest, shards, name, progress) for name in sound]
        for check in checks:
            findings.extend(check.result())
    findings.extend(_unexpected_files(manifest, shards))
    if against is not None and findings:
        findings.append(f"{against}: not compared with, because of what is wrong already")
    elif against is not None:
        source = find_adapter(Path(against))
        parse_config(read_small_file(source, CONFIG_NAME), str(source / CONFIG_NAME))
        raw = json.loads(format_manifest(manifest))  # checked, with every field there
        findings.extend(
            compare_with_source(shards, source, raw, progress, allow_pickle=allow_pickle)
        )
    return tuple(findings)


def _check_placement(manifest: Manifest) -> Iterator[str]:
    placement = manifest.placement
    rules = {"linear": linear_placement, "round_robin": round_robin_placement}
    rule = rules.get(placement.strategy)
    if rule and rule(placement.num_experts, placement.ep_size).ranks != placement.ranks:
        yield (
            f"{MANIFEST_NAME}: the ranks listed are not the {placement.strategy} placement of "
            f"{placement.num_experts} experts on {placement.ep_size} ranks"
        )


def _check_config(manifest: Manifest, shards: Path) -> list[str]:
    try:
        content = read_small_file(shards, CONFIG_NAME)
    except LorashardError as err:
        return [err.message]
    if blake3(content).hexdigest() != manifest.source.files[CONFIG_NAME].blake3:
        return [f"{shards / CONFIG_NAME}: BLAKE3 differs from the manifest's"]
    return []


def _check_description(manifest: Manifest, shards: Path) -> Iterator[str]:
    """What the manifest says of each module must follow from the config and the source header."""
    try:
        layout, _ = replan(manifest, read_small_file(shards, CONFIG_NAME), shards)
    except LorashardError as err:
        yield err.message
        return
    described = {module.name: describe_module(module) for module in layout.modules}
    for name in sorted(set(described) | set(manifest.modules)):
        if described.get(name) != manifest.modules.get(name):
            yield f"{MANIFEST_NAME}: module {name} is not described as its source has it"


def _check_coverage(manifest: Manifest, name: str) -> Iterator[str]:
    """Each module's stacks stand in each rank file, one slot for each expert of the placement."""
    if name == REPLICATED_NAME:
        return
    ep_rank = _ep_rank_of(manifest, name)
    shapes = {entry.name: entry.shape for entry in manifest.files[name].tensors}
    shared = {entry.name for entry in manifest.files[REPLICATED_NAME].tensors}
    expected = set()
    for module, info in manifest.modules.items():
        experts = manifest.placement.ranks_of(module)[ep_rank]
        for projection in info.scaling:
            for matrix in ("lora_A", "lora_B"):
                tensor = f"{module}.{projection}.{matrix}"
                if tensor in shared:
                    continue
                expected.add(tensor)
                shape = shapes.get(tensor)
                if shape is None:
                    yield f"{name}: {tensor} is missing"
                elif len(shape) != 3 or shape[0] != len(experts):
                    yield (
                        f"{name}: {tensor} is {list(shape)}, the placement puts "
                        f"{len(experts)} experts on rank {ep_rank}"
                    )
    for tensor in sorted(set(shapes) - expected):
        yield f"{name}: {tensor} belongs to no module of the manifest"


def _ep_rank_of(manifest: Manifest, name: str) -> int:
    return list(manifest.files).index(name) - 1  # the replicated file comes first


def _unexpected_files(manifest: Manifest, shards: Path) -> Iterator[str]:
    known = {MANIFEST_NAME, CONFIG_NAME, "README.md", *manifest.files}
    for name in sorted(set(os.listdir(shards)) - known):
        if name.startswith("."):
            continue  # .gitattributes of a repository, .cache of a download
        yield f"{shards / name}: not part of a shard directory"


def _check_bytes(manifest: Manifest, shards: Path, name: str, progress: Progress) -> list[str]:
    """Digest a file and look at its values, in one pass with one buffer."""
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
                    findings.append(_name_value(manifest, name, entry, data, position))
                progress(len(data))
                position += len(data)
    finally:
        file.close()
    if digest.hexdigest() != recorded.digest.blake3:
        findings.append(f"{shards / name}: BLAKE3 differs from the manifest's")
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
    found: npt.NDArray[np.bool_] = (bits & bits.dtype.type(mask)) == mask
    return found


def _all_finite(data: memoryview, dtype: str) -> bool:
    mask = EXPONENT_BITS[dtype]
    bits = np.frombuffer(data, f"u{ELEMENT_SIZE[dtype]}")
    # The largest masked value says it for all: twice as fast as comparing each.
    return len(bits) == 0 or int((bits & bits.dtype.type(mask)).max()) != mask


def _name_value(
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
