"""One adapter split from Python: results, notes, progress, resume and dry runs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lorashard import SplitRequest, split_adapter, verify_shards
from lorashard.errors import OutputExistsError
from lorashard.split.run import run_split
from tests.tiny import RANK_FILES, contents, per_expert_tensors, save_adapter

REQUEST = SplitRequest(ep_size=2)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return save_adapter(tmp_path / "adapter")


def test_the_result_describes_the_files_that_were_written(adapter: Path, tmp_path: Path) -> None:
    result = run_split(adapter, tmp_path / "out", REQUEST)
    assert (result.status, result.num_experts, result.num_modules) == ("done", 4, 1)
    assert result.num_experts_inferred, "neither a model nor --num-experts says how many there are"
    assert list(result.file_sizes) == ["replicated.safetensors", *RANK_FILES]
    for name, size in result.file_sizes.items():
        assert (tmp_path / "out" / name).stat().st_size == size
    assert result.manifest is not None
    assert result.manifest.placement == result.placement


def test_a_dry_run_gives_the_same_result_and_writes_nothing(adapter: Path, tmp_path: Path) -> None:
    dry = run_split(adapter, tmp_path / "out", REQUEST, dry_run=True)
    assert not (tmp_path / "out").exists()
    assert (dry.dry_run, dry.manifest) == (True, None)
    wet = run_split(adapter, tmp_path / "out", REQUEST)
    assert (dry.file_sizes, dry.placement, dry.notes) == (wet.file_sizes, wet.placement, wet.notes)


def test_resume_keeps_a_finished_directory_and_returns_its_manifest(
    adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first = split_adapter(adapter, out, REQUEST)
    before = (out / RANK_FILES[0]).stat().st_ino
    assert split_adapter(adapter, out, REQUEST, resume=True) == first
    assert (out / RANK_FILES[0]).stat().st_ino == before
    assert run_split(adapter, out, REQUEST, resume=True).status == "skipped"


def test_resume_writes_what_is_not_there(adapter: Path, tmp_path: Path) -> None:
    split_adapter(adapter, tmp_path / "out", REQUEST, resume=True)
    assert verify_shards(tmp_path / "out", against=adapter) == ()


def test_resume_does_not_replace_other_shards_without_force(adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    split_adapter(adapter, out, REQUEST)
    save_adapter(adapter, per_expert_tensors(seed=1))
    before = contents(out)
    with pytest.raises(OutputExistsError, match="exists"):
        split_adapter(adapter, out, REQUEST, resume=True)
    assert contents(out) == before
    split_adapter(adapter, out, REQUEST, resume=True, force=True)
    assert verify_shards(out, against=adapter) == ()


def test_resume_refuses_a_finished_directory_with_a_strange_file_in_it(
    adapter: Path, tmp_path: Path
) -> None:
    split_adapter(adapter, tmp_path / "out", REQUEST)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(OutputExistsError):
        split_adapter(adapter, tmp_path / "out", REQUEST, resume=True, force=True)


def test_notes_come_before_any_byte_is_read_and_each_pass_is_announced(
    adapter: Path, tmp_path: Path
) -> None:
    size = (adapter / "adapter_model.safetensors").stat().st_size
    events: list[object] = []
    request = SplitRequest(ep_size=5)
    run_split(
        adapter, tmp_path / "out", request, resume=True,
        note=events.append, started=events.append, progress=lambda _: events.append("bytes"),
    )  # fmt: skip
    note, *announced = (event for event in events if event != "bytes")
    assert note == "1 of 5 ranks holds no expert."
    assert events[0] == note
    assert announced == [size, size], "one pass to compare, one to write"


def test_progress_adds_up_to_the_data_of_the_source(adapter: Path, tmp_path: Path) -> None:
    done: list[int] = []
    split_adapter(adapter, tmp_path / "out", REQUEST, progress=done.append)
    weights = (adapter / "adapter_model.safetensors").read_bytes()
    assert sum(done) == len(weights) - 8 - int.from_bytes(weights[:8], "little")


def test_only_without_sync_nothing_is_waited_for(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split_adapter(adapter, tmp_path / "synced", SplitRequest(ep_size=2))

    def no_fsync(_: int) -> None:
        raise AssertionError("fsync")

    def no_writeback(*_: int) -> None:
        raise AssertionError("fsync is prepared")

    monkeypatch.setattr(os, "fsync", no_fsync)
    monkeypatch.setattr("lorashard.writing.digest.start_writeback", no_writeback)
    request = SplitRequest(ep_size=2, sync=False)
    split_adapter(adapter, tmp_path / "out", request)
    assert contents(tmp_path / "out") == contents(tmp_path / "synced")
    with pytest.raises(AssertionError, match="fsync"):
        split_adapter(adapter, tmp_path / "again", SplitRequest(ep_size=2))
