"""The source's bytes from its shards, and data that is not where the plan says."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
from blake3 import blake3

from lorashard import SplitRequest, split_adapter
from lorashard.errors import ShardError
from lorashard.shards.directory import locate_shards, opened_files
from lorashard.shards.plan import ReadOp, Target
from lorashard.shards.replan import CheckedShards, check_shards
from lorashard.writing import restore
from lorashard.writing.blocks import Block, split_into_blocks
from lorashard.writing.restore import find_misplaced, restore_source
from tests.tiny import MODULE, RANK_FILES, per_expert_tensors, save_adapter, save_fused


def checked(adapter: Path, out: Path, **options: object) -> CheckedShards:
    split_adapter(adapter, out, SplitRequest(ep_size=2, **options))  # type: ignore[arg-type]
    return check_shards(locate_shards(out))


def test_the_bytes_and_the_digest_are_those_of_the_source(tmp_path: Path) -> None:
    for save in (save_adapter, save_fused):
        adapter = save(tmp_path / save.__name__)
        shards = checked(adapter, tmp_path / f"{save.__name__}-shards")
        header, written, sizes = shards.manifest.source.header, bytearray(), list[int]()
        with opened_files(shards.files) as files:
            digest = restore_source(shards.plan, header, files, written.extend, sizes.append)
        source = (adapter / "adapter_model.safetensors").read_bytes()
        assert header + written == source
        assert digest == blake3(source).hexdigest()
        assert sum(sizes) == len(written)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    cut = partial(split_into_blocks, column_block_bytes=64)

    def split_into_small_blocks(
        reads: Sequence[ReadOp], _: int = 0, *, is_aligned: bool = False
    ) -> Iterator[Block]:
        return cut(reads, block_bytes=64, is_aligned=is_aligned)

    monkeypatch.setattr(restore, "split_into_blocks", split_into_small_blocks)


@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.usefixtures("small_blocks")
def test_a_block_stays_what_it_is_while_the_next_ones_are_read(
    tmp_path: Path, threads: int
) -> None:
    for save in (save_adapter, save_fused):
        adapter = save(tmp_path / save.__name__)
        shards = checked(adapter, tmp_path / f"{save.__name__}-shards")
        written, sizes = bytearray(shards.manifest.source.header), list[int]()

        def write_slowly(data: memoryview, written: bytearray = written) -> None:
            time.sleep(0.002)
            written.extend(data)

        with opened_files(shards.files) as files:
            digest = restore_source(
                shards.plan, bytes(written), files, write_slowly, sizes.append, threads=threads
            )
        source = (adapter / "adapter_model.safetensors").read_bytes()
        assert len(sizes) > 4
        assert written == source
        assert digest == blake3(source).hexdigest()


@pytest.mark.parametrize("threads", [1, 8])
@pytest.mark.usefixtures("small_blocks")
def test_an_error_of_either_side_is_raised_and_ends_the_threads(
    tmp_path: Path, threads: int
) -> None:
    shards, before = checked(save_adapter(tmp_path / "a"), tmp_path / "s"), threading.active_count()

    def fail(_: memoryview) -> None:
        raise OSError("disk full")

    with opened_files(shards.files) as files, pytest.raises(OSError, match="disk full"):
        restore_source(shards.plan, b"", files, fail, lambda _: None, threads=threads)
    assert threading.active_count() == before
    path = tmp_path / "s" / RANK_FILES[1]

    def restore_as_it_is_cut() -> None:
        with opened_files(shards.files) as files:
            os.truncate(path, path.stat().st_size - 1)
            restore_source(shards.plan, b"", files, len, lambda _: None, threads=threads)

    with pytest.raises(ShardError, match="while being read"):
        restore_as_it_is_cut()
    assert threading.active_count() == before


def test_a_copy_that_differs_is_found_where_it_is(tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text('{"ranks": [[0, 1], [2, 3, 0]]}')
    adapter = save_adapter(tmp_path / "a", per_expert_tensors())
    shards = checked(adapter, tmp_path / "out", expert_map=tmp_path / "map.json")
    with opened_files(shards.files) as files:
        assert list(find_misplaced(shards.plan, files)) == []
    path = tmp_path / "out" / RANK_FILES[1]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # the last slot is the copy of expert 0
    path.write_bytes(content)
    with opened_files(shards.files) as files:
        ((target, fault),) = find_misplaced(shards.plan, files)
    assert (target.file, fault) == (2, "differs from another copy of the same expert")
    assert 0 < target.offset < len(content)


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_the_rest_of_a_smaller_r_is_zero(tmp_path: Path, dtype: str | None) -> None:
    tensors = per_expert_tensors()
    small = ".mlp.experts.3."
    for name in [name for name in tensors if small in name]:
        tensor = tensors[name]
        tensors[name] = (tensor[:1] if "lora_A" in name else tensor[:, :1]).contiguous()
    patterns = {f"{MODULE}.3.{name}": 1 for name in ("gate_proj", "up_proj", "down_proj")}
    adapter = save_adapter(tmp_path / "a", tensors, rank_pattern=patterns)
    shards = checked(adapter, tmp_path / "out", dtype=dtype)
    path = tmp_path / "out" / RANK_FILES[1]
    right = path.read_bytes()
    assert misplaced(shards) == []
    for entry in shards.plan.files[2].tensors:
        assert right[entry.end - 1] == 0
        content = bytearray(right)
        content[entry.end - 1] = 1
        path.write_bytes(content)
        ((target, fault),) = misplaced(shards)
        assert entry.begin <= target.offset < entry.end
        assert fault == "is not zero, though nothing of the source belongs there"


def misplaced(shards: CheckedShards) -> list[tuple[Target, str]]:
    with opened_files(shards.files) as files:
        return list(find_misplaced(shards.plan, files))
