"""What is uploaded, shards or a plain adapter, and what that does to what is at the place. Pure.

In: the names at a place and its model card. Out: an `UploadPlan`, or the error that says what is in
the way.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from lorashard.adapter.config import CONFIG_NAME, PICKLE_NAME, WEIGHTS_NAME
from lorashard.errors import OutputExistsError
from lorashard.shards.names import MANIFEST_NAME, shard_file_names
from lorashard.uploading.card import is_untouched

RANK_FILE = re.compile(r"ep-\d{5}-of-\d{5}\.safetensors")
_ADAPTER_NAMES = (CONFIG_NAME, WEIGHTS_NAME, PICKLE_NAME)


@dataclass(frozen=True, slots=True)
class Uploaded:
    """What was done, or would be. revision: the commit on the Hub, of a dry run None. removed: files of what was replaced.

    kept_card: whether the place had a model card that someone had edited, so that it was left alone.
    """

    place: str
    revision: str | None
    names: tuple[str, ...]
    removed: tuple[str, ...]
    kept_card: bool


@dataclass(frozen=True, slots=True)
class UploadPlan:
    """names: files to upload; without the last nobody takes the place for finished.

    removed: files of what is replaced that are to be deleted there.
    keeps_card: whether the place has a model card that someone has edited.
    replaces: whether the place has what this upload would replace.
    """

    names: tuple[str, ...]
    removed: tuple[str, ...]
    keeps_card: bool
    replaces: bool


@dataclass(frozen=True, slots=True)
class ShardsContent:
    """The shards of `ep_size` ranks. On the Hub they replace others, which its history keeps."""

    ep_size: int
    last = MANIFEST_NAME
    replaces_on_hub = True

    def plan(self, place: str, present: Collection[str], card: str | None) -> UploadPlan:
        """What to do, given the names at `place` and its model card.

        Raises OutputExistsError if there is an adapter.
        """
        if WEIGHTS_NAME in present or PICKLE_NAME in present:
            raise OutputExistsError(
                place,
                reason="already holds an adapter, whose adapter_config.json would be replaced",
                hint=f"Choose another place, for example {place}/ep{self.ep_size}.",
            )
        names = (CONFIG_NAME, *shard_file_names(self.ep_size), MANIFEST_NAME)
        stale = (name for name in present if RANK_FILE.fullmatch(name) and name not in names)
        return UploadPlan(names, tuple(sorted(stale)), _keeps(card), MANIFEST_NAME in present)


@dataclass(frozen=True, slots=True)
class AdapterContent:
    """A plain adapter. It does not show who wrote the one that it would replace, so that is asked for everywhere."""

    last = CONFIG_NAME
    replaces_on_hub = False

    def plan(self, place: str, present: Collection[str], card: str | None) -> UploadPlan:
        """What to do, given the names at `place` and its model card.

        Raises OutputExistsError if there are shards, finished or not.
        """
        if MANIFEST_NAME in present or any(RANK_FILE.fullmatch(name) for name in present):
            raise OutputExistsError(
                place,
                reason="already holds shards, whose adapter_config.json would be replaced",
                hint=f"Choose another place, for example {place}/adapter.",
            )
        removed = tuple(name for name in present if name == PICKLE_NAME)
        replaces = any(name in present for name in _ADAPTER_NAMES)
        return UploadPlan((WEIGHTS_NAME, CONFIG_NAME), removed, _keeps(card), replaces)


Content = ShardsContent | AdapterContent


def _keeps(card: str | None) -> bool:
    return card is not None and not is_untouched(card)
