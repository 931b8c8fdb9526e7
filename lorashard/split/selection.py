"""What `split` was given -> the adapters to split, and where the shards of each go.

In: names, patterns such as `runs/*`, lists and Hub collections. Out: one `SplitJob` for each adapter.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TextIO

from lorashard.adapter.config import CONFIG_NAME
from lorashard.adapter.read import is_no_folder
from lorashard.errors import AdapterError, ShardError
from lorashard.shards.directory import claims_to_be_shards
from lorashard.shards.names import directory_name
from lorashard.storage.hub import last_name, translating_errors
from lorashard.storage.remote import RemoteFolder, is_remote, locate

_MAX_LIST_CHARACTERS = 16 * 2**20
_PATTERN = re.compile(r"[*?\[]")
_COLLECTION = re.compile(r"(?:hf://|https?://[^/]+/)collections/([^/]+/[^/]+)/?")


@dataclass(frozen=True, slots=True)
class SplitJob:
    """One adapter to split, as the user named it, and the directory for its shards, or their URL."""

    adapter: str
    target: Path | str

    def __str__(self) -> str:
        return self.adapter


def find_adapters(names: Iterable[str]) -> tuple[str, ...]:
    """Each adapter once, in the order given; the matches of a pattern are sorted.

    Raises AdapterError for a pattern or a collection without any adapter.
    """
    adapters: dict[str, None] = {}
    for name in names:
        collection = _COLLECTION.fullmatch(name)
        if collection:
            adapters.update(dict.fromkeys(_adapters_in_collection(name, collection[1])))
        elif _is_pattern(name):
            matches = _match_remote(name) if "://" in name else _match_local(name)
            if not matches:
                raise AdapterError(f"{name}: no adapter matches.", hint="Check the pattern.")
            adapters.update(dict.fromkeys(matches))
        else:
            adapters[name] = None
    return tuple(adapters)


def is_batch(names: Sequence[str]) -> bool:
    """Whether these names are a batch, even if it turns out to hold only one adapter."""
    return len(names) != 1 or any(_COLLECTION.fullmatch(n) or _is_pattern(n) for n in names)


def check_names_are_fixed(names: Iterable[str]) -> None:
    """Raise AdapterError for a name that another machine, or a later moment, may read differently.

    Parts of a list are disjoint only if all of them see the same list.
    """
    for name in names:
        if _COLLECTION.fullmatch(name) or _is_pattern(name):
            raise AdapterError(
                f"{name}: a part needs a list in which each adapter is named, since what this one finds may "
                "change from one part to the next.",
                hint="Write what it finds into a file once, and give that to every part with --from.",
            )


def read_list(file: TextIO) -> tuple[str, ...]:
    """The adapters of a list, one per line; skips empty lines and those that begin with #.

    Raises AdapterError if it is larger than any list, as a device without end is.
    """
    text = file.read(_MAX_LIST_CHARACTERS + 1)
    if len(text) > _MAX_LIST_CHARACTERS:
        raise AdapterError(
            f"{file.name}: more than {_MAX_LIST_CHARACTERS} characters are no list of adapters.",
            hint="A list is a text file with one adapter per line.",
        )
    # A NUL is in no name, and no pattern can have one.
    names = (line.strip().replace("\0", "\\0") for line in text.split("\n"))
    return tuple(name for name in names if name and not name.startswith("#"))


def plan_jobs(
    adapters: Sequence[str], out: Path | str | None, ep_size: int, *, batch: bool
) -> tuple[SplitJob, ...]:
    """A target for each adapter: OUT itself; in a batch OUT/NAME-epN; without OUT, ADAPTER-epN.

    out: a directory, or a URL as text.

    `directory_name` says how: those of checkpoint-130 are called epN-of-checkpoint-130.

    Without OUT, the shards of a remote adapter go into the current directory.
    Raises ShardError if two adapters would get the same target.
    """
    if out is not None and not batch:
        return (SplitJob(adapters[0], out),)
    jobs: dict[Path | str, SplitJob] = {}
    for adapter in adapters:
        beside = Path(last_name(adapter) if is_remote(adapter) else os.path.abspath(adapter))
        name = directory_name(beside.name, ep_size)
        target = (
            f"{out.rstrip('/')}/{name}" if isinstance(out, str) else (out or beside.parent) / name
        )
        if target in jobs:
            raise ShardError(
                f"{jobs[target].adapter} and {adapter} would both be written to {target}.",
                hint="Run them one by one, each with its own `out`.",
            )
        jobs[target] = SplitJob(adapter, target)
    return tuple(jobs.values())


def _is_pattern(text: str) -> bool:
    # Path.exists raises for a text that no file can have as its name: it is too long, for example.
    return _PATTERN.search(text) is not None and not os.path.exists(text)  # noqa: PTH110


def _match_local(pattern: str) -> list[str]:
    """Directories that hold an adapter; skips the shards that were written beside them."""
    return sorted(
        match
        for match in glob.glob(pattern)  # noqa: PTH207 - Path.glob takes no absolute pattern
        if Path(match).is_dir() and _is_adapter(Path(match))
    )


def _is_adapter(path: Path) -> bool:
    if claims_to_be_shards(path):
        return False
    return is_no_folder(path / CONFIG_NAME) or any(path.glob(f"*/{CONFIG_NAME}"))


def _match_remote(pattern: str) -> list[str]:
    """The folders that match, listed level by level; their content is read when they are split."""
    parts = pattern.rstrip("/").split("/")
    first = next(number for number, part in enumerate(parts) if _PATTERN.search(part))
    base = locate("/".join(parts[:first]))
    if not isinstance(base, RemoteFolder):
        return _match_local("/".join([str(base), *parts[first:]]))
    folders = [base]
    for part in parts[first:]:
        folders = [
            folder.child(name)
            for folder in folders
            for name in (folder.folders() if _PATTERN.search(part) else [part])
            if fnmatchcase(name, part)
        ]
    return sorted(str(folder) for folder in folders)


def _adapters_in_collection(text: str, slug: str) -> list[str]:
    from huggingface_hub import HfApi

    with translating_errors(text):
        items = HfApi().get_collection(slug).items
    models = [f"hf://{item.item_id}" for item in items if item.item_type == "model"]
    if not models:
        raise AdapterError(
            f"{text}: no models in this collection.", hint="Is it the right collection?"
        )
    return models
