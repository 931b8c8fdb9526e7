"""The files of an adapter, here or remote -> AdapterIndex. The only reader of source headers."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorashard.adapter import (
    CONFIG_NAME,
    PICKLE_NAME,
    WEIGHTS_NAME,
    AdapterIndex,
    parse_config,
)
from lorashard.errors import AdapterError, UnsupportedAdapterError
from lorashard.header import LENGTH_BYTES, Header, header_length, parse_header
from lorashard.options import ModelFacts, parse_model_config
from lorashard.remote import Place, RemoteFile, RemoteFolder
from lorashard.sources import ByteSource, LocalFile

_MODEL_CONFIG = "config.json"
_MAX_CONFIG_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """An adapter, its tensor data not read yet.

    header: the raw start of the weights, up to their data. repo, revision: on the Hub, else None.
    """

    place: Place
    config_bytes: bytes
    weights: Path | RemoteFile
    header: bytes
    index: AdapterIndex
    repo: str | None = None
    revision: str | None = None

    def opened(self) -> AbstractContextManager[ByteSource]:
        """The weights' bytes, from their data on. Raises AdapterError."""
        if isinstance(self.weights, Path):
            return closing(LocalFile(self.weights))
        return self.weights.opened(self.index.data_begin)


def read_adapter(place: Place) -> AdapterSource:
    """Read config and header of the adapter in `place`; no tensor data.

    Raises AdapterError (HeaderError for a damaged file).
    """
    if isinstance(place, RemoteFolder):
        return _read_remote(find_remote_adapter(place))
    directory = find_adapter(place)
    config_path, weights_path = directory / CONFIG_NAME, directory / WEIGHTS_NAME
    config_bytes = read_config(config_path)
    if not weights_path.is_file():
        raise _no_weights(directory, has_pickle=(directory / PICKLE_NAME).is_file())
    raw, header = read_header(weights_path)
    index = _index(config_bytes, header, str(config_path))
    return AdapterSource(directory, config_bytes, weights_path, raw, index)


def _read_remote(folder: RemoteFolder) -> AdapterSource:
    weights = folder.file(WEIGHTS_NAME)
    config = read_small(folder, CONFIG_NAME)
    if weights is None:
        raise _no_weights(folder, has_pickle=folder.has(PICKLE_NAME))
    prefix = weights.read(0, min(LENGTH_BYTES, weights.size_bytes))
    length = header_length(prefix, weights.size_bytes, weights.name)
    text = weights.read(LENGTH_BYTES, LENGTH_BYTES + length)
    index = _index(config, parse_header(text, weights.size_bytes, weights.name), str(folder))
    return AdapterSource(
        folder, config, weights, prefix + text, index, folder.repo, folder.revision
    )


def _index(config_bytes: bytes, header: Header, where: str) -> AdapterIndex:
    config = parse_config(config_bytes, where)
    return AdapterIndex(config, header.tensors, header.data_begin, header.file_size)


def find_remote_adapter(folder: RemoteFolder) -> RemoteFolder:
    """The folder that holds the adapter: `folder`, or its one named adapter in a sub-folder."""
    if folder.file(CONFIG_NAME) is not None:
        return folder
    named = [child for child in map(folder.child, folder.folders()) if child.file(CONFIG_NAME)]
    if len(named) == 1:
        return named[0]
    raise _no_adapter(folder, named)


def read_small(folder: RemoteFolder, name: str) -> bytes:
    """A small remote file. Raises AdapterError if it is missing or absurdly large."""
    file = folder.file(name)
    if file is None:
        raise AdapterError(f"{folder}: no {name}.", hint="Check the path.")
    if file.size_bytes > _MAX_CONFIG_BYTES:
        raise AdapterError(
            f"{file.name}: larger than {_MAX_CONFIG_BYTES} bytes.", hint="Save again."
        )
    return file.read(0, file.size_bytes)


def find_adapter(path: Path) -> Path:
    """The directory that holds the adapter: `path`, or its one named adapter in a sub-folder."""
    if not path.is_dir():
        what = "is a file; name its directory" if path.exists() else "does not exist"
        raise AdapterError(
            f"{path} {what}.", hint=f"An adapter is a directory with {CONFIG_NAME} in it."
        )
    if (path / CONFIG_NAME).is_file():
        return path
    # PEFT saves an adapter that is not called "default" into a sub-folder of its name.
    named = sorted(child for child in path.iterdir() if (child / CONFIG_NAME).is_file())
    if len(named) == 1:
        return named[0]
    raise _no_adapter(path, named)


def _no_adapter(place: Place, named: Sequence[Place]) -> AdapterError:
    if named:
        listed = ", ".join(str(child) for child in named[:5])
        return AdapterError(
            f"{place} holds {len(named)} adapters: {listed}.", hint="Name one of them."
        )
    return AdapterError(
        f"{place}: no {CONFIG_NAME}.", hint="Is this a PEFT adapter, saved with save_pretrained?"
    )


def read_header(path: Path) -> tuple[bytes, Header]:
    """The raw bytes up to the data, and the validated header, of a safetensors file."""
    file_size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(LENGTH_BYTES)
        text = file.read(header_length(prefix, file_size, str(path)))
    return prefix + text, parse_header(text, file_size, str(path))


def read_config(path: Path) -> bytes:
    """A small JSON file as bytes. Raises AdapterError if it is missing or absurdly large."""
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise AdapterError(
                f"{path}: larger than {_MAX_CONFIG_BYTES} bytes.", hint="Save again."
            )
        return path.read_bytes()
    except OSError as err:
        raise AdapterError(
            f"{path}: {os.strerror(err.errno or 0)}.", hint="Check the path."
        ) from err


def read_model_facts(model: Place) -> ModelFacts:
    """What the base model's config.json says; `model` is its place, or locally that file."""
    if isinstance(model, RemoteFolder):
        raw = read_small(model, _MODEL_CONFIG)
        return parse_model_config(_json_object(raw, model), f"{model}/{_MODEL_CONFIG}")
    file = model / _MODEL_CONFIG if model.is_dir() else model
    return parse_model_config(_json_object(read_config(file), file), str(file))


def read_json(path: Path) -> Any:
    """Parsed JSON of a small file. Raises AdapterError with the place of a mistake."""
    return _parse_json(read_config(path), path)


def _json_object(raw: bytes, path: Place) -> dict[str, Any]:
    parsed = _parse_json(raw, path)
    if not isinstance(parsed, dict):
        raise AdapterError(f"{path}: not a JSON object.", hint="Check the path.")
    return parsed


def _parse_json(raw: bytes, path: Place) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as err:
        raise AdapterError(f"{path}: not JSON ({err}).", hint="Check the path.") from err


def _no_weights(directory: Place, *, has_pickle: bool) -> AdapterError:
    if has_pickle and isinstance(directory, RemoteFolder):
        return UnsupportedAdapterError(
            f"{PICKLE_NAME} (a pickle)",
            str(directory),
            hint="Download it, for example with `hf download`, and see --allow-pickle.",
        )
    if has_pickle:
        return UnsupportedAdapterError(
            f"{PICKLE_NAME} (a pickle)",
            str(directory),
            hint="--allow-pickle reads it with torch.load(weights_only=True).",
        )
    return AdapterError(
        f"{directory}: no {WEIGHTS_NAME}.",
        hint="Is the download complete? A shard directory is read with verify, inspect or merge.",
    )
