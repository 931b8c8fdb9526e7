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
NOTICE_TENSOR = (
    "this is a lorashard shard directory and not a plain adapter, "
    "vLLM loads it with the lorashard plugin (pip install lorashard where vLLM runs, "
    "and if VLLM_PLUGINS is set there it has to name lorashard)"
    ".lora_A.weight"
)

# The whole file, always the same.
NOTICE: bytes = build_header([(NOTICE_TENSOR, "F32", (1, 1))], {"format": "pt"})[0] + struct.pack(
    "<f", 0.0
)


def is_notice(path: Path) -> bool:
    """Whether a local file is the notice, byte for byte."""
    return has_content(path, NOTICE)


def refuse_notice(place: Location, tensors: Sequence[TensorEntry]) -> None:
    """Raise AdapterError if `tensors`, those of what is to be read as an adapter, are the notice's."""
    if any(entry.name == NOTICE_TENSOR for entry in tensors):
        raise AdapterError(
            f"{place} holds shards, not an adapter.",
            hint="`lorashard reshard` places shards anew; verify, inspect, merge and convert read them.",
        )
