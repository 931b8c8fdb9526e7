"""A shard directory and the adapter that it was split from -> where their values differ.

`reference` compares; here are the adapter, here or remote, two threads, and whether it is the
source at all.
"""

from __future__ import annotations

import json
import os
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import chain
from pathlib import Path

from lorashard.adapter.config import CONFIG_NAME, PICKLE_NAME, WEIGHTS_NAME, parse_config
from lorashard.adapter.notice import is_notice
from lorashard.adapter.read import find_adapter, find_remote_adapter
from lorashard.adapter.several_files import refuse_several_files
from lorashard.errors import AdapterError
from lorashard.progress import Progress
from lorashard.shards.directory import has_digest
from lorashard.shards.manifest import Manifest, format_manifest
from lorashard.storage.packages import import_package
from lorashard.storage.parallel import cancellable_pool, in_order
from lorashard.storage.remote import Location, RemoteFolder, local_copy, locate
from lorashard.storage.small_files import read_small_file
from lorashard.verify.reference.compare import compare_with_source

_THREADS = 2
_AHEAD = 2 * _THREADS  # comparisons: some are longer than others


def compare_with_adapter(
    manifest: Manifest,
    shards: Path,
    against: str | os.PathLike[str],
    progress: Progress,
    *,
    allow_pickle: bool,
) -> tuple[str, ...]:
    """Every difference from the source; of an adapter that is not the source, the first one.

    shards: a directory whose files are those of the manifest.
    against: a directory, or hf://owner/name[@revision] or another URL, which is fetched first.
    progress: called with the bytes of the adapter that were compared since the last call.
    """
    with _local_adapter(locate(against)) as adapter:
        if is_notice(adapter / WEIGHTS_NAME):
            raise AdapterError(
                f"{adapter} holds shards, not the adapter that they were split from.",
                hint="Name the adapter.",
            )
        parse_config(read_small_file(adapter, CONFIG_NAME), str(adapter / CONFIG_NAME))
        if manifest.dtype is not None:
            import_package("torch", "comparing values that were cast")
        if allow_pickle and _weights_name(adapter) == PICKLE_NAME:
            import_package("torch", "reading a pickle")
        # Checked, with every field there; of the source's header, `reference` has its own reading.
        headless = replace(manifest, source=replace(manifest.source, header=b""))
        document = json.loads(format_manifest(headless))
        with cancellable_pool(_THREADS, progress) as (pool, advance):
            comparisons = compare_with_source(
                shards, adapter, document, advance, allow_pickle=allow_pickle
            )
            findings = chain.from_iterable(in_order(pool, list, comparisons, ahead=_AHEAD))
            first = next(findings, None)
            if first is None:
                return ()
            if _is_source(manifest, adapter):
                return first, *findings
    # Another one differs nearly everywhere, so the first difference will do.
    not_it = "not the adapter that the shards were split from, as its BLAKE3 shows"
    return (f"{against}: {not_it}. The first difference is: {first}",)


def _local_adapter(place: Location) -> AbstractContextManager[Path]:
    place = find_remote_adapter(place) if isinstance(place, RemoteFolder) else find_adapter(place)
    names = place.files() if isinstance(place, RemoteFolder) else os.listdir(place)
    if not {WEIGHTS_NAME, PICKLE_NAME} & set(names):
        refuse_several_files(place)
    return local_copy(place, (CONFIG_NAME, WEIGHTS_NAME, PICKLE_NAME))


def _is_source(manifest: Manifest, adapter: Path) -> bool:
    """Whether the weights of an adapter have the digest that the manifest records."""
    name = _weights_name(adapter)
    recorded = manifest.source.files.get(name)
    return recorded is not None and has_digest(adapter / name, recorded)


def _weights_name(adapter: Path) -> str:
    names = (WEIGHTS_NAME, PICKLE_NAME)
    return next((name for name in names if (adapter / name).exists()), WEIGHTS_NAME)
