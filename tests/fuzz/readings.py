"""An accepted input of the target `layout` as files, and all that is made of it read in two ways.

The shards, what is merged, resharded and converted from them have the deltas that `verify --against`,
which is code of its own, reads from the source; and those that docs/format.md gives.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import torch

from lorashard import (
    LayoutOptions,
    LorashardError,
    SplitRequest,
    convert_shards,
    merge_shards,
    reshard_shards,
    split_adapter,
    verify_shards,
)
from lorashard.dtypes import CAST_DTYPES, ELEMENT_SIZE
from lorashard.header import TensorEntry
from tests.conversions import assert_same_deltas, deltas
from tests.fuzz.layout import index_of, options_of
from tests.fuzz.target import check

_MOST_BYTES = 200_000
_TORCH = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Compared:
    """What one input came to. converted: how many of the two layouts it could be converted to."""

    was_split: bool
    converted: int = 0


def compare_readings(document: dict[str, Any], folder: Path) -> Compared:
    """Raises WrongAnswer or AssertionError where two readings differ."""
    source = folder / "adapter"
    try:
        if not _write(document, source):
            return Compared(was_split=False)
        split_adapter(source, folder / "shards", _request(document))
    except LorashardError:
        return Compared(was_split=False)
    shards = folder / "shards"
    check(verify_shards(shards) == (), "verify finds something in what was just split")
    found = verify_shards(shards, against=source)
    check(not found, f"the second reading differs: {found[:3]}")
    cast = json.loads((shards / "lorashard.json").read_bytes())["options"]["dtype"]
    if cast is None:
        merge_shards(shards, folder / "merged")
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            same = (folder / "merged" / name).read_bytes() == (source / name).read_bytes()
            check(same, f"{name} is another one when merged")
    reshard_shards(shards, folder / "resharded", 3, strategy="round_robin")
    found = verify_shards(folder / "resharded", against=source)
    check(not found, f"resharded, the second reading differs: {found[:3]}")
    before = deltas(shards)
    assert_same_deltas(before, deltas(folder / "resharded"))
    converted = sum(_converts(shards, folder, layout, before) for layout in ("per_expert", "fused"))
    return Compared(was_split=True, converted=converted)


def _write(document: dict[str, Any], source: Path) -> bool:
    """The adapter with numbers that differ everywhere and are exact in float16; False if too large."""
    header, config, index = index_of(document)
    if index.file_size - index.data_begin > _MOST_BYTES:
        return False
    source.mkdir()
    (source / "adapter_config.json").write_bytes(config)
    chance = Random(len(header))
    data = b"".join(_values(entry, chance) for entry in index.tensors)
    (source / "adapter_model.safetensors").write_bytes(header + data)
    return True


def _values(entry: TensorEntry, chance: Random) -> bytes:
    kind = _TORCH.get(entry.dtype)
    if kind is None:
        return chance.randbytes(entry.size_bytes)
    count = entry.size_bytes // ELEMENT_SIZE[entry.dtype]
    values = torch.tensor(
        [chance.choice((-1, 1)) * chance.randrange(1, 16) / 8 for _ in range(count)]
    )
    return bytes(values.to(kind).view(torch.uint8).numpy().tobytes())


def _request(document: dict[str, Any]) -> SplitRequest:
    ep_size, cast = document.get("ep_size"), document.get("dtype")
    torch_names = {name: torch_name for torch_name, name in CAST_DTYPES.items()}
    return SplitRequest(
        ep_size if type(ep_size) is int and ep_size < 64 else 2,
        "round_robin" if document.get("strategy") == "round_robin" else "linear",
        expert_map=document.get("expert_map"),
        dtype=torch_names.get(cast) if isinstance(cast, str) else None,
        options=options_of(document),
        sync=False,
    )


def _converts(shards: Path, folder: Path, layout: str, before: dict[str, torch.Tensor]) -> bool:
    """Convert, split that again, and compare; False for what no PEFT adapter can be made of."""
    out, manifest = folder / layout, json.loads((shards / "lorashard.json").read_bytes())
    try:
        convert_shards(shards, out, layout)  # type: ignore[arg-type]
    except LorashardError:
        return False
    options = LayoutOptions(
        num_experts=manifest["placement"]["num_experts"], orientation="standard"
    )
    if any(info["gate_up"] == "none" for info in manifest["modules"].values()):
        options = replace(options, gate_up="none")
    split_adapter(out, folder / f"{layout}-again", SplitRequest(1, options=options, sync=False))
    assert_same_deltas(before, deltas(folder / f"{layout}-again"))
    return True
