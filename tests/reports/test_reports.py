"""Python's reports are the documents of the commands; one shape of call for all verbs."""

from __future__ import annotations

import inspect
import json
import os
from pathlib import Path
from typing import Any

import pytest

import lorashard
from lorashard import (
    Placement,
    SplitRequest,
    inspect_path,
    open_shards,
    plan_split,
    reshard_shards,
    run_doctor,
    split_adapter,
    split_adapters,
)
from lorashard.errors import AdapterError, PlacementError, UnknownTensorError
from lorashard.parameters import with_flags
from tests.imports import imported_by
from tests.tiny import RANK_FILES, contents, run_cli, save_adapter, save_fused

RANKS = [[3, 0], [1, 2]]


def printed(*arguments: object, code: int = 0) -> Any:
    done = run_cli(*arguments, "--json")
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return save_fused(tmp_path / "adapter", base_model_name_or_path="/local/model")


def test_inspect_is_what_the_command_prints(adapter: Path, tmp_path: Path) -> None:
    split_adapter(adapter, tmp_path / "shards", 2)
    for path in (adapter, tmp_path / "shards"):
        assert inspect_path(path) == printed("inspect", path)
    assert inspect_path(adapter, num_experts=4) == printed("inspect", adapter, "--num-experts", 4)
    with pytest.raises(AdapterError):
        inspect_path(tmp_path / "nowhere")


def test_plan_is_what_the_command_prints(adapter: Path) -> None:
    found = plan_split(adapter, 2, strategy="round_robin", max_loras=3, dtype="float32")
    options = ("--placement", "round_robin", "--max-loras", 3, "--dtype", "float32")
    shown = printed("plan", adapter, "--ep-size", 2, *options)
    assert "`model`" in found["notes"][0]
    assert found | {"notes": [with_flags(note) for note in found["notes"]]} == shown
    assert plan_split(adapter, SplitRequest(2)) == plan_split(adapter, 2)


def test_doctor_is_what_the_command_prints(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORASHARD_DISABLE", raising=False)
    command = "LORASHARD_DISABLE=1 vllm serve MODEL --enable-lora -tp 2 -ep --port 8000"
    for arguments, words in (
        ({"path": adapter, "tensor_parallel_size": 2, "enable_expert_parallel": True}, (adapter, "-tp", 2, "-ep")),
        ({"path": adapter, "command": command}, (adapter, "--", *command.split())),
        ({"command": command.split()}, ("--", *command.split())),
    ):  # fmt: skip
        report = run_doctor(**arguments)  # type: ignore[arg-type]
        shown = json.loads(run_cli("doctor", "--json", *words).stdout)
        assert (report.ok, report.ep_size, report.outcome) == (
            shown["ok"], shown["ep_size"], shown["outcome"],
        )  # fmt: skip
        assert [problem.about for problem in report.problems] == [
            problem["about"] for problem in shown["problems"]
        ]
        assert list(report.ignored) == shown["ignored"]
    assert "LORASHARD_DISABLE" not in os.environ


@pytest.mark.parametrize("as_what", ["path", "text", "ranks", "document", "placement"])
def test_an_expert_map_is_a_file_its_content_or_a_placement(
    adapter: Path, tmp_path: Path, as_what: str
) -> None:
    file = tmp_path / "map.json"
    file.write_text(json.dumps({"ranks": RANKS}))
    given: Any = {
        "path": file, "text": str(file), "ranks": RANKS, "document": {"ranks": RANKS},
        "placement": Placement("explicit", 4, tuple(map(tuple, RANKS))),
    }[as_what]  # fmt: skip
    expected = [list(ranks) for ranks in RANKS]
    manifest = split_adapter(adapter, tmp_path / "out", 2, expert_map=given)
    assert [list(ranks) for ranks in manifest.placement.ranks] == expected
    split_adapter(adapter, tmp_path / "linear", 2)
    reshard_shards(tmp_path / "linear", tmp_path / "moved", 2, expert_map=given)
    assert contents(tmp_path / "moved") == contents(tmp_path / "out")
    plan = plan_split(adapter, 2, expert_map=given)
    assert [rank["experts"] for rank in plan["ranks"]] == expected


def test_the_placement_of_other_shards_with_layers_is_a_map(adapter: Path, tmp_path: Path) -> None:
    layers = {"ranks": [[0, 1], [2, 3]], "layers": {"0": [[2, 0], [1, 3]]}}
    one = split_adapter(adapter, tmp_path / "one", 2, expert_map=layers)
    assert one.placement.layers
    two = split_adapter(adapter, tmp_path / "two", 2, expert_map=one.placement)
    assert two.placement == one.placement
    with pytest.raises(PlacementError, match="ranks"):
        split_adapter(adapter, tmp_path / "three", 3, expert_map=one.placement)


def test_a_split_takes_its_options_in_the_call_or_in_a_request(
    adapter: Path, tmp_path: Path
) -> None:
    split_adapter(adapter, tmp_path / "a", 2, strategy="round_robin", dtype="float32", sync=False)
    request = SplitRequest(2, strategy="round_robin", dtype="float32")
    split_adapter(adapter, tmp_path / "b", request)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    with pytest.raises(TypeError, match="has all options"):
        split_adapter(adapter, tmp_path / "c", request, dtype="float16")
    with pytest.raises(PlacementError, match="ep_size is '2'; it must be a whole number"):
        split_adapter(adapter, tmp_path / "c", "2")  # type: ignore[arg-type]


def test_a_batch_in_python_reports_bytes_and_outcomes(tmp_path: Path) -> None:
    adapters = [save_adapter(tmp_path / name) for name in ("a", "b")]
    done: list[int] = []
    outcomes = split_adapters(
        [*adapters, tmp_path / "nowhere"], tmp_path / "out", 2, progress=done.append
    )
    assert [outcome.status for outcome in outcomes] == ["done", "done", "failed"]
    assert sum(done) == sum(inspect_path(adapter)["total_bytes"] for adapter in adapters)


def test_an_unknown_tensor_is_named_with_one_that_is_like_it(adapter: Path, tmp_path: Path) -> None:
    split_adapter(adapter, tmp_path / "shards", 2)
    rank = open_shards(tmp_path / "shards").rank(0)
    for read in (rank.read_bytes, rank.tensor):
        with pytest.raises(UnknownTensorError, match=RANK_FILES[0]) as caught:
            read("model.layers.0.mlp.experts.gate_up_proj.lora_C")
        assert isinstance(caught.value, KeyError)
        assert "Did you mean 'model.layers.0.mlp.experts.gate_up_proj.lora_" in str(caught.value)
    with pytest.raises(UnknownTensorError, match="`entries` has those"):
        rank.tensor("nope")


SOURCES = {"adapter", "adapters", "shards", "path"}


def test_each_verb_names_its_source_first_and_options_by_keyword() -> None:
    verbs = [
        getattr(lorashard, name)
        for name in lorashard.__all__
        if name.endswith(("_adapter", "_adapters", "_shards", "_path", "_split"))
    ]
    assert len(verbs) == 11
    for verb in verbs:
        parameters = inspect.signature(verb).parameters.values()
        positional = [p for p in parameters if p.kind is not p.KEYWORD_ONLY]
        assert positional[0].name in SOURCES, verb
        assert len(positional) <= 3, verb
        by_keyword = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
        assert all(p.default is not p.empty for p in by_keyword), verb


def test_reports_need_no_torch(adapter: Path) -> None:
    code = f"import lorashard; lorashard.inspect_path({str(adapter)!r}); lorashard.plan_split({str(adapter)!r}, 2)"
    assert imported_by(code) & {"torch", "vllm"} == set()
