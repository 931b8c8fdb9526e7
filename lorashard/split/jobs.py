"""What `split` was given -> the adapters it means: names, patterns, lists and Hub collections."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from lorashard.adapter.config import CONFIG_NAME
from lorashard.errors import AdapterError, ShardError
from lorashard.shards.names import MANIFEST_NAME, directory_name
from lorashard.storage.hub import last_name, translating_errors
from lorashard.storage.remote import RemoteFolder, is_remote, locate

_PATTERN = re.compile(r"[*?\[]")
_COLLECTION = re.compile(r"(?:hf://|https?://[^/]+/)collections/([^/]+/[^/]+)/?")


@dataclass(frozen=True, slots=True)
class Job:
    """One adapter to split, as it was named, and the directory for its shards."""

    adapter: str
    target: Path

    def __str__(self) -> str:
        return self.adapter


def find_adapters(named: Iterable[str]) -> tuple[str, ...]:
    """Every adapter once, in the order given; of a pattern sorted.

    Raises AdapterError for a pattern or a collection that means none.
    """
    found: dict[str, None] = {}
    for text in named:
        collection = _COLLECTION.fullmatch(text)
        if collection:
            found.update(dict.fromkeys(_in_collection(text, collection[1])))
        elif _is_pattern(text):
            matches = _matches_remote(text) if "://" in text else _matches_here(text)
            if not matches:
                raise AdapterError(f"{text}: no adapter matches.", hint="Check the pattern.")
            found.update(dict.fromkeys(matches))
        else:
            found[text] = None
    return tuple(found)


def names_several(named: Sequence[str]) -> bool:
    """Whether this is a batch, however many adapters it turns out to mean."""
    return len(named) != 1 or any(_COLLECTION.fullmatch(x) or _is_pattern(x) for x in named)


def read_list(lines: Iterable[str]) -> Iterator[str]:
    """One adapter a line; empty lines and those that begin with # say nothing."""
    for line in lines:
        text = line.strip()
        if text and not text.startswith("#"):
            yield text


def plan_jobs(
    adapters: Sequence[str], out: Path | None, ep_size: int, *, several: bool
) -> tuple[Job, ...]:
    """Each adapter's target: OUT, OUT/NAME-epN for several, or ADAPTER-epN beside it.

    A remote one's is in the current directory. Raises ShardError if two would have the same.
    """
    if out is not None and not several:
        return (Job(adapters[0], out),)
    jobs: dict[Path, Job] = {}
    for adapter in adapters:
        beside = Path(last_name(adapter) if is_remote(adapter) else os.path.abspath(adapter))
        target = (out or beside.parent) / directory_name(beside.name, ep_size)
        if target in jobs:
            raise ShardError(
                f"{jobs[target].adapter} and {adapter} would both be written to {target}.",
                hint="Run them one by one, each with its own -o.",
            )
        jobs[target] = Job(adapter, target)
    return tuple(jobs.values())


def _is_pattern(text: str) -> bool:
    return _PATTERN.search(text) is not None and not Path(text).exists()


def _matches_here(pattern: str) -> list[str]:
    """Directories that hold an adapter; shards that were written beside them are none."""
    return sorted(
        match
        for match in glob.glob(pattern)  # noqa: PTH207 - an absolute pattern is none for Path.glob
        if Path(match).is_dir() and _is_adapter(Path(match))
    )


def _is_adapter(path: Path) -> bool:
    if (path / MANIFEST_NAME).exists():
        return False
    return (path / CONFIG_NAME).is_file() or any(path.glob(f"*/{CONFIG_NAME}"))


def _matches_remote(pattern: str) -> list[str]:
    """Folder by folder. What is in them is looked at when they are split."""
    parts = pattern.rstrip("/").split("/")
    first = next(number for number, part in enumerate(parts) if _PATTERN.search(part))
    base = locate("/".join(parts[:first]))
    if not isinstance(base, RemoteFolder):
        return _matches_here("/".join([str(base), *parts[first:]]))
    folders = [base]
    for part in parts[first:]:
        folders = [
            folder.child(name)
            for folder in folders
            for name in (folder.folders() if _PATTERN.search(part) else [part])
            if fnmatchcase(name, part)
        ]
    return sorted(str(folder) for folder in folders)


def _in_collection(text: str, slug: str) -> list[str]:
    from huggingface_hub import HfApi

    with translating_errors(text):
        items = HfApi().get_collection(slug).items
    models = [f"hf://{item.item_id}" for item in items if item.item_type == "model"]
    if not models:
        raise AdapterError(f"{text}: no models in this collection.", hint="Is it the right one?")
    return models
