"""One flipped bit in a shard directory, in every byte of header and manifest and in some of the data.

`verify` finds each, and names the file; where a value or a tensor's place is concerned, also the
tensor. The plugin's loader refuses each with LORASHARD_VERIFY=full, and without it all but those in
data and in what no load reads. LORASHARD_EVERY_BIT=1 flips every bit instead of one of each byte, in two
adapters instead of one.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import safetensors

from lorashard import SplitRequest, split_adapter, verify_shards
from lorashard.errors import LorashardError, ManifestError
from lorashard.vllm_plugin.load.contents import REPLICATED
from lorashard.vllm_plugin.load.shard_source import open_shard_directory
from tests.tiny import MODULE, save_adapter, save_fused

MANIFEST = "lorashard.json"
FILES = ("replicated.safetensors", "ep-00000-of-00002.safetensors", "ep-00001-of-00002.safetensors")
EVERY_BIT = os.environ.get("LORASHARD_EVERY_BIT", "") not in ("", "0")
DATA_STEP = 1 if EVERY_BIT else 29  # bytes; no multiple of an element's size


@pytest.fixture(params=[save_adapter, save_fused][: 1 + EVERY_BIT])
def shards(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    save: Callable[[Path], Path] = request.param
    split_adapter(save(tmp_path / "adapter"), tmp_path / "shards", SplitRequest(2))
    return tmp_path / "shards"


def flips(path: Path, begin: int, end: int, step: int = 1) -> Iterator[tuple[int, bytes]]:
    """The file with one bit changed, again and again, and as it was in the end; where it was changed."""
    content = path.read_bytes()
    for position in range(begin, end, step):
        for bit in range(8) if EVERY_BIT else (position * 5 % 8,):
            changed = bytearray(content)
            changed[position] ^= 1 << bit
            path.write_bytes(changed)
            yield position, bytes(changed)
    path.write_bytes(content)


def findings_of(shards: Path) -> tuple[str, ...]:
    try:
        return verify_shards(shards)
    except ManifestError as err:
        return (err.message,)


def load(shards: Path) -> None:
    """Open all that a rank could read. Raises LorashardError."""
    with ExitStack() as stack:
        contents = open_shard_directory(shards, stack)
        for ep_rank in (REPLICATED, 0, 1):
            contents.sources.source_of(ep_rank)


def header_end(path: Path) -> int:
    return 8 + int(struct.unpack("<Q", path.read_bytes()[:8])[0])


def test_verify_finds_each_flip_in_the_manifest_and_names_it(shards: Path) -> None:
    for position, _ in flips(shards / MANIFEST, 0, (shards / MANIFEST).stat().st_size):
        assert any(MANIFEST in finding for finding in findings_of(shards)), position
    assert findings_of(shards) == ()


def test_a_load_refuses_each_flip_in_the_manifest(shards: Path) -> None:
    for _ in flips(shards / MANIFEST, 0, (shards / MANIFEST).stat().st_size):
        with pytest.raises(LorashardError):
            load(shards)
    load(shards)


@pytest.mark.parametrize("name", FILES)
def test_verify_finds_each_flip_in_a_header_and_names_the_file(shards: Path, name: str) -> None:
    for position, _ in flips(shards / name, 0, header_end(shards / name)):
        assert any(name in finding for finding in findings_of(shards)), position
    assert findings_of(shards) == ()


@pytest.mark.parametrize("name", FILES)
def test_a_load_refuses_each_flip_in_a_header_that_means_something(
    shards: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = dict(safetensors.deserialize((shards / name).read_bytes()))
    harmless = 0
    for position, changed in flips(shards / name, 0, header_end(shards / name)):
        try:
            load(shards)
        except LorashardError:
            continue
        # Only what is told to people: a key or a value of the metadata.
        assert dict(safetensors.deserialize(changed)) == original, position
        harmless += 1
        monkeypatch.setenv("LORASHARD_VERIFY", "full")
        with pytest.raises(LorashardError):
            load(shards)
        monkeypatch.delenv("LORASHARD_VERIFY")
    assert harmless <= 200 if EVERY_BIT else harmless <= 30
    load(shards)


@pytest.mark.parametrize("name", FILES)
def test_each_flip_in_data_is_found_and_refused_by_a_full_load(
    shards: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shards / name
    size = path.stat().st_size
    monkeypatch.setenv("LORASHARD_VERIFY", "full")
    for position, _ in flips(path, header_end(path), size, DATA_STEP):
        assert any(name in finding for finding in findings_of(shards)), position
        with pytest.raises(LorashardError, match=name):
            load(shards)
    load(shards)


@pytest.mark.parametrize("name", FILES[1:])
def test_a_value_that_becomes_infinite_is_named_with_its_tensor(shards: Path, name: str) -> None:
    path = shards / name
    content = bytearray(path.read_bytes())
    content[-2:] = b"\x80\x7f"  # bf16's infinity; the last tensor of the file
    path.write_bytes(content)
    assert any(
        f"{MODULE}.up_proj.lora_B" in f or "gate_up_proj.lora_B" in f for f in findings_of(shards)
    )
