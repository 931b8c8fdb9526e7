"""A remote adapter or shard directory as a local one without its data, since a survey reads local files.

In: a place. Out: a local directory with the small files, and of each file of tensors its header and
its size; the data is a hole.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from lorashard.adapter.config import CONFIG_NAME, WEIGHTS_NAME
from lorashard.adapter.read import find_remote_adapter
from lorashard.shards.directory import claims_to_be_shards, manifest_bytes
from lorashard.shards.manifest_parser import parse_manifest
from lorashard.shards.names import MANIFEST_NAME
from lorashard.storage.remote import Location, RemoteFolder
from lorashard.storage.safetensors_file import read_raw_header
from lorashard.storage.small_files import read_small_file


@contextmanager
def local_outline(place: Location) -> Iterator[Path]:
    """The local directory itself, or the outline of a remote one, as long as the block lasts.

    A file that is not there is not in the outline either. Raises AdapterError for a place that does
    not answer, or has no adapter; ManifestError for a damaged manifest.
    """
    if isinstance(place, Path):
        yield place
        return
    with TemporaryDirectory(prefix="lorashard-") as temporary:
        outline = Path(temporary)
        if claims_to_be_shards(place):
            raw = manifest_bytes(place)
            (outline / MANIFEST_NAME).write_bytes(raw)
            names = tuple(parse_manifest(raw, f"{place}/{MANIFEST_NAME}").files)
        else:
            place, names = find_remote_adapter(place), (WEIGHTS_NAME,)
        if place.file(CONFIG_NAME) is not None:
            (outline / CONFIG_NAME).write_bytes(read_small_file(place, CONFIG_NAME))
        for name in names:
            _copy_header(place, name, outline)
        yield outline


def _copy_header(folder: RemoteFolder, name: str, outline: Path) -> None:
    file = folder.file(name)
    if file is not None:
        (outline / name).write_bytes(read_raw_header(file))
        os.truncate(outline / name, file.size_bytes)
