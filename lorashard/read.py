"""The files of an adapter directory -> AdapterIndex. The only reader of source headers."""

from __future__ import annotations

import json
import os
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

_MAX_CONFIG_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """An adapter on disk. `header` is the raw start of `weights`, up to its data."""

    config_path: Path
    config_bytes: bytes
    weights_path: Path
    header: bytes
    index: AdapterIndex


def read_adapter(path: Path) -> AdapterSource:
    """Read config and header of the adapter in directory `path`; no tensor data.

    Raises AdapterError (HeaderError for a damaged file).
    """
    directory = find_adapter(path)
    config_path, weights_path = directory / CONFIG_NAME, directory / WEIGHTS_NAME
    config_bytes = read_config(config_path)
    if not weights_path.is_file():
        raise _no_weights(directory)
    raw, header = read_header(weights_path)
    config = parse_config(config_bytes, str(config_path))
    index = AdapterIndex(config, header.tensors, header.data_begin, header.file_size)
    return AdapterSource(config_path, config_bytes, weights_path, raw, index)


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
    if named:
        listed = ", ".join(str(child) for child in named[:5])
        raise AdapterError(
            f"{path} holds {len(named)} adapters: {listed}.", hint="Name one of them."
        )
    raise AdapterError(
        f"{path}: no {CONFIG_NAME}.", hint="Is this a PEFT adapter, saved with save_pretrained?"
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


def read_model_facts(path: Path) -> ModelFacts:
    """What the base model's config.json says; `path` is the model's directory or that file."""
    file = path / "config.json" if path.is_dir() else path
    return parse_model_config(_json_object(read_config(file), file), str(file))


def read_json(path: Path) -> Any:
    """Parsed JSON of a small file. Raises AdapterError with the place of a mistake."""
    return _parse_json(read_config(path), path)


def _json_object(raw: bytes, path: Path) -> dict[str, Any]:
    parsed = _parse_json(raw, path)
    if not isinstance(parsed, dict):
        raise AdapterError(f"{path}: not a JSON object.", hint="Check the path.")
    return parsed


def _parse_json(raw: bytes, path: Path) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as err:
        raise AdapterError(f"{path}: not JSON ({err}).", hint="Check the path.") from err


def _no_weights(directory: Path) -> AdapterError:
    if (directory / PICKLE_NAME).is_file():
        return UnsupportedAdapterError(
            f"{PICKLE_NAME} (a pickle)",
            str(directory),
            hint="--allow-pickle reads it with torch.load(weights_only=True).",
        )
    return AdapterError(
        f"{directory}: no {WEIGHTS_NAME}.",
        hint="Is the download complete? A shard directory is read with verify, inspect or merge.",
    )
