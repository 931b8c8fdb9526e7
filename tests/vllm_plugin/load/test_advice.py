"""What to run for a directory that loads from one file, and that running it is right."""

from __future__ import annotations

import json
import shlex
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorashard import SplitRequest, split_adapter
from lorashard.shards.placement import Ranks, linear_placement, round_robin_placement
from lorashard.vllm_plugin.engine.live import LiveExperts
from lorashard.vllm_plugin.load.advice import is_first_concerned, resplit_advice
from lorashard.vllm_plugin.load.assembly import assemble
from lorashard.vllm_plugin.load.fill import LayerPlan
from lorashard.vllm_plugin.load.rows import find_runs
from lorashard.vllm_plugin.load.shard_source import open_shard_directory
from tests.strategies import rank_lists
from tests.tiny import MODULE, E, H, I, run_cli, save_adapter, save_fused

LINEAR = linear_placement(E, 2).ranks
ROUND_ROBIN = round_robin_placement(E, 2).ranks
EXPLICIT: Ranks = ((3, 0), (1, 2))


def live(ranks: Ranks, ep_rank: int = 0) -> LiveExperts:
    return LiveExperts(
        MODULE, "2d", E, ep_rank, len(ranks), ranks[ep_rank], gated=True, hidden_size=H,
        intermediate_size=I, buffer_intermediate=I, max_lora_rank=8, interleaved=False,
        shared_outer=False,
    )  # fmt: skip


def advice(directory: Path, engine: Ranks, ep_rank: int = 0) -> str | None:
    """What the engine would say after loading the directory."""
    here = live(engine, ep_rank)
    with ExitStack() as stack:
        contents = open_shard_directory(directory, stack)
    plans = []
    for module in contents.modules:
        own = ep_rank if len(module.ranks) == here.ep_size else None
        plans.append(
            LayerPlan(
                here.name,
                assemble(here, module.stacks, module.gate_up, module.name),
                find_runs(module.ranks, here.local_experts, own),
                here.local_experts,
                module.scaling,
                (),
            )
        )
    return resplit_advice(directory, here, [m.ranks for m in contents.modules], plans)


def cut(folder: Path, name: str, ep_size: int, placement: Any, save: Any = save_adapter) -> Path:
    source = save(folder / "source of it all")
    split_adapter(source, folder / name, SplitRequest(ep_size, placement))
    return folder / name


def commands(text: str) -> list[list[str]]:
    """The arguments of each lorashard command in the advice."""
    _, found, line = text.partition("A directory that loads faster: ")
    assert found
    parts: list[list[str]] = [[]]
    for word in shlex.split(line):
        if word == "&&":
            parts.append([])
        else:
            parts[-1].append(word)
    assert all(part[0] == "lorashard" for part in parts)
    return [part[1:] for part in parts]


@pytest.mark.parametrize("ep_rank", [0, 1])
@pytest.mark.parametrize(
    ("placement", "engine"), [("linear", LINEAR), ("round_robin", ROUND_ROBIN)]
)
def test_a_directory_cut_for_this_engine_needs_none(
    tmp_path: Path, placement: Any, engine: Ranks, ep_rank: int
) -> None:
    assert advice(cut(tmp_path, "out", 2, placement), engine, ep_rank) is None


@pytest.mark.parametrize(
    ("ep_size", "placement", "engine", "save"),
    [
        (4, "linear", LINEAR, save_adapter),
        (2, "linear", ROUND_ROBIN, save_adapter),
        (1, "linear", LINEAR, save_fused),
    ],
    ids=["another ep size", "another strategy", "one file for all"],
)
def test_the_commands_make_a_directory_that_needs_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    ep_size: int, placement: Any, engine: Ranks, save: Any,
) -> None:  # fmt: skip
    directory = cut(tmp_path, "it's a $HOME; of shards", ep_size, placement, save)
    before = advice(directory, engine)
    assert before is not None
    work = tmp_path / "elsewhere"
    work.mkdir()
    monkeypatch.chdir(work)
    for command in commands(before):
        done = run_cli(*command)
        assert done.returncode == 0, done.stderr
    (made,) = (path for path in [*work.iterdir(), *tmp_path.iterdir()] if "-merged-ep" in path.name)
    assert [advice(made, engine, ep_rank) for ep_rank in range(len(engine))] == [None, None]


def test_an_engine_with_a_map_of_its_own_is_asked_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = advice(cut(tmp_path, "out", 2, "linear"), EXPLICIT)
    assert before is not None
    (tmp_path / "MAP.json").write_text(json.dumps({"ranks": EXPLICIT}))
    monkeypatch.chdir(tmp_path)
    merge, split = commands(before)
    assert split[-2:] == ["--expert-map", "MAP.json"]
    for command in (merge, split):
        done = run_cli(*command)
        assert done.returncode == 0, done.stderr
    assert advice(tmp_path / "out-merged-ep2", EXPLICIT) is None


def test_the_files_that_were_needed_are_named(tmp_path: Path) -> None:
    text = advice(cut(tmp_path, "out", 4, "linear"), LINEAR, ep_rank=1)
    assert text is not None
    assert "cut for 4 ranks" in text
    assert "(ep_size 2)" in text
    assert "gathered from rank files 2, 3." in text


def test_the_same_experts_in_another_order_are_another_placement(tmp_path: Path) -> None:
    swapped = tuple(tuple(reversed(experts)) for experts in LINEAR)
    assert advice(cut(tmp_path, "out", 2, "linear"), swapped) is not None


def test_an_adapter_without_layers_of_this_stage_needs_none(tmp_path: Path) -> None:
    assert resplit_advice(tmp_path, live(LINEAR), [], []) is None


@given(
    cut_for=st.integers(1, 4).flatmap(lambda ep_size: rank_lists(E, ep_size)),
    rule=st.sampled_from([linear_placement, round_robin_placement]),
    ep_size=st.integers(1, 4),
)
def test_of_all_ranks_the_first_that_is_concerned_tells(
    cut_for: list[list[int]], rule: Any, ep_size: int
) -> None:
    engine: Ranks = rule(E, ep_size).ranks
    cut_ranks = tuple(map(tuple, cut_for))
    concerned = [
        k for k in range(ep_size) if len(cut_ranks) != ep_size or cut_ranks[k] != engine[k]
    ]
    telling = [k for k in concerned if is_first_concerned(live(engine, k), cut_ranks)]
    assert telling == concerned[:1]
