"""The files of an adapter, here or remote -> AdapterSource. The only reader of source headers.

In: the place of an adapter. Out: its config and tensor table, and the way to its tensor data, of
which nothing is read yet. `opened_adapter` is where to begin.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from lorashard.adapter.base_model import ModelFacts, merge_facts, parse_model_config
from lorashard.adapter.config import (
    CONFIG_NAME,
    PICKLE_NAME,
    WEIGHTS_NAME,
    AdapterIndex,
    LoraConfig,
    parse_config,
)
from lorashard.adapter.layout import AdapterLayout, detect_layout
from lorashard.adapter.notice import refuse_notice
from lorashard.adapter.options import LayoutOptions
from lorashard.adapter.pickled import PickledTensors
from lorashard.adapter.several_files import refuse_several_files
from lorashard.errors import AdapterError, UnsupportedAdapterError
from lorashard.storage.local import ByteSource, LocalFile, WatchedFile, watch_file
from lorashard.storage.remote import Location, RemoteFile, RemoteFolder, locate
from lorashard.storage.safetensors_file import parse_raw_header, read_header, read_raw_header
from lorashard.storage.small_files import parse_json, read_small_file, read_small_path

_MODEL_CONFIG = "config.json"
_MLX_WEIGHTS_NAME = "adapters.safetensors"
_SHOWN = 5  # the last folders


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """An adapter, its tensor data not read yet.

    weights: a local file is open, as long as the block of `opened_adapter` lasts.
    header: the raw start of the weights, up to their data. repo, revision: on the Hub, else None.
    watched: the other local files that were read.
    """

    place: Location
    config_bytes: bytes
    weights: LocalFile | PickledTensors | RemoteFile
    header: bytes
    index: AdapterIndex
    repo: str | None = None
    revision: str | None = None
    watched: tuple[WatchedFile, ...] = ()

    def opened(self) -> AbstractContextManager[ByteSource]:
        """The weights' bytes, from their data on.

        Raises AdapterError, also if the adapter has changed by the end of the block since its header
        was read.
        """
        if isinstance(self.weights, RemoteFile):
            return self.weights.opened(self.index.data_begin)
        return _watched_weights(self.weights, self.watched)


@dataclass(frozen=True, slots=True)
class LocalAdapter:
    """The files of an adapter on this machine, not understood yet.

    header: the raw start of the weights, up to their data. watched: the config.
    """

    directory: Path
    config_bytes: bytes
    weights: LocalFile | PickledTensors
    header: bytes
    watched: WatchedFile

    def parsed(self) -> AdapterSource:
        """What config and header say. Raises AdapterError (HeaderError for a damaged file)."""
        header = parse_raw_header(self.header, self.weights)
        refuse_notice(self.directory, header.tensors)
        index = AdapterIndex(
            self.parsed_config(), header.tensors, header.data_begin, header.file_size
        )
        return AdapterSource(
            self.directory, self.config_bytes, self.weights, self.header, index,
            watched=(self.watched,),
        )  # fmt: skip

    def parsed_config(self) -> LoraConfig:
        """What the config says. Raises AdapterError."""
        return parse_config(self.config_bytes, str(self.watched.path))

    def opened(self) -> AbstractContextManager[ByteSource]:
        """The same as `AdapterSource.opened`."""
        return _watched_weights(self.weights, (self.watched,))


@contextmanager
def _watched_weights(
    weights: LocalFile | PickledTensors, others: Sequence[WatchedFile]
) -> Iterator[ByteSource]:
    def check_unchanged() -> None:
        for file in (*others, weights):
            file.check_unchanged()

    try:
        yield weights
    except AdapterError:
        check_unchanged()  # a better reason than a file that ended too early
        raise
    check_unchanged()


@contextmanager
def opened_adapter(adapter: Location, *, allow_pickle: bool) -> Iterator[AdapterSource]:
    """Read an adapter's headers; with allow_pickle, a local pickle is read into memory.

    Raises AdapterError (HeaderError for a damaged file).
    """
    if isinstance(adapter, RemoteFolder):
        yield _read_remote(find_remote_adapter(adapter))
        return
    with opened_files(adapter, allow_pickle=allow_pickle) as files:
        yield files.parsed()


@contextmanager
def opened_files(adapter: Path, *, allow_pickle: bool) -> Iterator[LocalAdapter]:
    """The files of a local adapter, as `opened_adapter` finds them. Raises AdapterError."""
    directory = find_adapter(adapter)
    config = watch_file(directory / CONFIG_NAME)
    has_weights = (directory / WEIGHTS_NAME).exists()
    if allow_pickle and not has_weights and (directory / PICKLE_NAME).exists():
        yield _read_local(directory, config, PickledTensors(directory / PICKLE_NAME))
        return
    if not is_no_folder(directory / WEIGHTS_NAME):
        read_small_file(directory, CONFIG_NAME)  # what is wrong with that is said first
        refuse_several_files(directory)
        raise _no_weights(directory)
    with closing(LocalFile(directory / WEIGHTS_NAME)) as weights:
        yield _read_local(directory, config, weights)


@dataclass(frozen=True, slots=True)
class DetectedLayout:
    """An adapter's layout, the options that led to it, and what the base model's config says."""

    facts: ModelFacts | None
    options: LayoutOptions
    layout: AdapterLayout


def read_adapter(place: Location) -> AdapterSource:
    """Read config and header of the adapter in `place`, and close it; no tensor data.

    Raises AdapterError (HeaderError for a damaged file).
    """
    with opened_adapter(place, allow_pickle=False) as source:
        return source


def find_adapter(path: Path) -> Path:
    """The directory that holds the adapter: `path`, or its one named adapter in a sub-folder."""
    if not path.is_dir():
        problem = "is a file; name its directory" if path.exists() else "does not exist"
        raise AdapterError(
            f"{path} {problem}.", hint=f"An adapter is a directory with {CONFIG_NAME} in it."
        )
    if is_no_folder(path / CONFIG_NAME):
        return path
    # PEFT saves an adapter that is not called "default" into a sub-folder of its name.
    named = sorted(child for child in path.iterdir() if is_no_folder(child / CONFIG_NAME))
    if len(named) == 1:
        return named[0]
    raise _no_adapter(path, named)


def is_no_folder(path: Path) -> bool:
    """Whether something has this name: a file, or a pipe or device, which is told when it is read."""
    return path.exists() and not path.is_dir()


def find_remote_adapter(folder: RemoteFolder) -> RemoteFolder:
    """The folder that holds the adapter: `folder`, or its one named adapter in a sub-folder."""
    if folder.file(CONFIG_NAME) is not None:
        return folder
    named = [child for child in map(folder.child, folder.folders()) if child.file(CONFIG_NAME)]
    if len(named) == 1:
        return named[0]
    raise _no_adapter(folder, named)


def is_plain_adapter(_path: Path, names: frozenset[str]) -> bool:
    """Whether a directory with these names holds an adapter and nothing else."""
    return names == {CONFIG_NAME, WEIGHTS_NAME}


def read_layout(
    source: AdapterSource,
    adapter: Location,
    options: LayoutOptions,
    model: str | os.PathLike[str] | None,
) -> DetectedLayout:
    """Detect the layout of an adapter that was opened, checked against its base model if named."""
    facts = read_model_facts(locate(model)) if model else None
    merged = merge_facts(options, facts)
    return DetectedLayout(facts, merged, detect_layout(source.index, merged, str(adapter)))


def read_model_facts(model: Location) -> ModelFacts:
    """What the base model's config.json says; `model` is its folder, or locally that file.

    Raises AdapterError.
    """
    if isinstance(model, Path) and not model.is_dir():
        raw, file = read_small_path(model), str(model)
    else:
        raw, file = read_small_file(model, _MODEL_CONFIG), f"{model}/{_MODEL_CONFIG}"
    config = parse_json(raw, model)
    if not isinstance(config, dict):
        raise AdapterError(f"{file}: not a JSON object.", hint="Check the path.")
    return parse_model_config(config, file)


def _read_local(
    directory: Path, config: WatchedFile, weights: LocalFile | PickledTensors
) -> LocalAdapter:
    config_bytes = read_small_file(directory, CONFIG_NAME)
    return LocalAdapter(directory, config_bytes, weights, read_raw_header(weights), config)


def _read_remote(folder: RemoteFolder) -> AdapterSource:
    weights = folder.file(WEIGHTS_NAME)
    config_bytes = read_small_file(folder, CONFIG_NAME)
    if weights is None:
        refuse_several_files(folder)
        raise _no_weights(folder)
    raw, header = read_header(weights)
    refuse_notice(folder, header.tensors)
    config = parse_config(config_bytes, str(folder))
    index = AdapterIndex(config, header.tensors, header.data_begin, header.file_size)
    return AdapterSource(folder, config_bytes, weights, raw, index, folder.repo, folder.revision)


def _no_adapter(place: Location, named: Sequence[Location]) -> AdapterError:
    if named:
        listed = ", ".join(str(child) for child in named[:5])
        return AdapterError(
            f"{place} holds {len(named)} adapters: {listed}.", hint="Name one of them."
        )
    return AdapterError(
        f"{place}: no {CONFIG_NAME}.", hint="Is this a PEFT adapter, saved with save_pretrained?"
    )


def _no_weights(place: Location) -> AdapterError:
    if _has(place, _MLX_WEIGHTS_NAME):
        return UnsupportedAdapterError(
            f"MLX's own format ({_MLX_WEIGHTS_NAME})",
            str(place),
            hint="lorashard reads PEFT's format; convert the adapter to that first.",
        )
    if _has(place, PICKLE_NAME):
        is_remote = isinstance(place, RemoteFolder)
        return UnsupportedAdapterError(
            f"{PICKLE_NAME} (a pickle)",
            str(place),
            hint="Download it, for example with `hf download`, and see `allow_pickle`."
            if is_remote
            else "`allow_pickle=True` reads it with torch.load(weights_only=True).",
        )
    if within := _folders_with_weights(place):
        return AdapterError(
            f"{place}: no {WEIGHTS_NAME}.",
            hint=f"Folders in it have weights: {', '.join(within[-_SHOWN:])}. Name one of them.",
        )
    return AdapterError(
        f"{place}: no {WEIGHTS_NAME}.",
        hint="Is the download complete? If these are shards already, use `lorashard reshard`.",
    )


def _has(place: Location, name: str) -> bool:
    return place.has(name) if isinstance(place, RemoteFolder) else (place / name).is_file()


def _folders_with_weights(place: Location) -> list[str]:
    """Names of the folders in it that hold adapters, as a trainer's checkpoints; the last one last."""
    if isinstance(place, RemoteFolder):
        found = [n for n in place.folders() if _has_weights(place.child(n))]
    else:
        found = [child.name for child in place.iterdir() if _has_weights(child)]
    return sorted(found, key=lambda name: (len(name), name))


def _has_weights(place: Location) -> bool:
    return _has(place, CONFIG_NAME) and (_has(place, WEIGHTS_NAME) or _has(place, PICKLE_NAME))
