"""The adapter_model.safetensors of a shard directory: a notice to programs that look for an adapter.

Its one tensor, a single zero, has a sentence for a name. A vLLM without the plugin refuses tensors
for which its model has no module, and prints their names.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

from lorashard.errors import AdapterError
from lorashard.header import TensorEntry, build_header
from lorashard.storage.locked_directory import has_content
from lorashard.storage.remote import Location

# vLLM takes what is before `.lora_A` for a module's name. So there is no dot in it, and nothing that
# vLLM looks for in names: `experts`, `base_layer`, what a model renames or skips.
_SENTENCE = (
    "this is a lorashard shard directory and not a plain adapter, "
    "vLLM loads it with the lorashard plugin ({} lorashard where vLLM runs, "
    "and if VLLM_PLUGINS is set there it has to name lorashard)"
    ".lora_A.weight"
)
NOTICE_TENSOR = _SENTENCE.format("install")
# The first shard directories name a package index, which lorashard is not on.
_EARLIER_TENSOR = _SENTENCE.format("pip install")


def _file_of(tensor: str) -> bytes:
    return build_header([(tensor, "F32", (1, 1))], {"format": "pt"})[0] + struct.pack("<f", 0.0)


# The whole file, always the same, and what counts as it.
NOTICE: bytes = _file_of(NOTICE_TENSOR)
NOTICES: tuple[bytes, ...] = (NOTICE, _file_of(_EARLIER_TENSOR))


def is_notice(path: Path) -> bool:
    """Whether a local file is the notice, byte for byte, or the one of the first directories."""
    return any(has_content(path, notice) for notice in NOTICES)


def may_be_notice(size_bytes: int | None) -> bool:
    """Whether a file of this size can be a notice, before it is read."""
    return any(size_bytes == len(notice) for notice in NOTICES)


def refuse_notice(place: Location, tensors: Sequence[TensorEntry]) -> None:
    """Raise AdapterError if `tensors`, those of what is to be read as an adapter, are the notice's."""
    if any(entry.name in (NOTICE_TENSOR, _EARLIER_TENSOR) for entry in tensors):
        raise AdapterError(
            f"{place} holds shards, not an adapter.",
            hint="`lorashard reshard` places shards anew; verify, inspect, merge and convert read them.",
        )
