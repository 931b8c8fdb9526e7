"""What to run for a directory that each rank loads from one file, and that running it is right."""

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
from lorashard.vllm_plugin.load.advice import LayerOrigin, is_first_mismatch, resplit_advice
from lorashard.vllm_plugin.load.rows import find_runs
from lorashard.vllm_plugin.load.shard_source import open_shard_directory
from tests.strategies import rank_lists
from tests.tiny import E, run_cli, save_adapter, save_fused

# `make mutation`: for the command itself, whose mutated modules could not be run from another folder.
AS_IT_IS = {"MUTANT_UNDER_TEST": ""}
LINEAR = linear_placement(E, 2).ranks
ROUND_ROBIN = round_robin_placement(E, 2).ranks
ALL = tuple(range(E))
EXPLICIT: Ranks = ((3, 0), (1, 2))


def origin(ranks: Ranks, engine: Ranks, ep_rank: int = 0) -> LayerOrigin:
    """A layer whose experts are split as `ranks`, on a rank of an engine."""
    own = ep_rank if len(ranks) == len(engine) else None
    return LayerOrigin(engine[ep_rank], ranks, find_runs(ranks, engine[ep_rank], own))


def advice(directory: Path, engine: Ranks, ep_rank: int = 0) -> str | None:
    """What the engine would say after loading the directory."""
    with ExitStack() as stack:
        contents = open_shard_directory(directory, stack)
    origins = [origin(module.ranks, engine, ep_rank) for module in contents.modules]
    return resplit_advice(
        str(directory), origins, ep_rank=ep_rank, ep_size=len(engine), num_experts=E
    )


def split(folder: Path, name: str, ep_size: int, placement: Any, save: Any = save_adapter) -> Path:
    source = save(folder / "source of it all")
    split_adapter(source, folder / name, SplitRequest(ep_size, placement))
    return folder / name


def commands(text: str) -> list[list[str]]:
    """The arguments of each lorashard command in the advice."""
    _, found, line = text.partition("For faster loads: ")
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
def test_a_directory_split_for_this_engine_needs_none(
    tmp_path: Path, placement: Any, engine: Ranks, ep_rank: int
) -> None:
    assert advice(split(tmp_path, "out", 2, placement), engine, ep_rank) is None


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
    directory = split(tmp_path, "it's a $HOME; of shards", ep_size, placement, save)
    before = advice(directory, engine)
    assert before is not None
    work = tmp_path / "elsewhere"
    work.mkdir()
    monkeypatch.chdir(work)
    (resharding,) = commands(before)
    assert resharding[0] == "reshard"
    assert ("--placement" in resharding) == (engine != LINEAR)  # linear is the default
    done = run_cli(*resharding, **AS_IT_IS)
    assert done.returncode == 0, done.stderr
    (made,) = (path for path in [*work.iterdir(), *tmp_path.iterdir()] if "-resharded" in path.name)
    assert [advice(made, engine, ep_rank) for ep_rank in range(len(engine))] == [None, None]


def test_an_engine_with_a_map_of_its_own_is_asked_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = advice(split(tmp_path, "out", 2, "linear"), EXPLICIT)
    assert before is not None
    (tmp_path / "MAP.json").write_text(json.dumps({"ranks": EXPLICIT}))
    monkeypatch.chdir(tmp_path)
    (resharding,) = commands(before)
    assert resharding[-2:] == ["--expert-map", "MAP.json"]
    done = run_cli(*resharding, **AS_IT_IS)
    assert done.returncode == 0, done.stderr
    assert advice(tmp_path / "out-resharded", EXPLICIT) is None


def test_the_files_that_were_needed_are_named(tmp_path: Path) -> None:
    text = advice(split(tmp_path, "out", 4, "linear"), LINEAR, ep_rank=1)
    assert text is not None
    assert text.startswith("split for 4 ranks, with a different placement from this engine's ")
    assert "(ep_size 2); ep rank 1 reads its experts from rank files 2, 3. For" in text


def test_one_rank_and_one_file_are_named_in_the_singular() -> None:
    text = resplit_advice("d", [origin((ALL,), LINEAR)], ep_rank=0, ep_size=2, num_experts=E)
    assert text is not None
    assert text.startswith("split for 1 rank, ")
    assert "from rank file 0. " in text


def test_of_many_files_eight_are_listed() -> None:
    one_each = linear_placement(12, 12).ranks
    text = resplit_advice(
        "d", [origin(one_each, (tuple(range(12)),))], ep_rank=0, ep_size=1, num_experts=12
    )
    assert text is not None
    assert "rank files 0, 1, 2, 3, 4, 5, 6, 7, …. For" in text


def test_one_layer_that_is_placed_differently_is_enough() -> None:
    origins = [origin(LINEAR, LINEAR), origin(ROUND_ROBIN, LINEAR)]
    assert resplit_advice("d", origins[:1], ep_rank=0, ep_size=2, num_experts=E) is None
    assert resplit_advice("d", origins, ep_rank=0, ep_size=2, num_experts=E) is not None


def test_the_same_experts_in_another_order_are_another_placement(tmp_path: Path) -> None:
    swapped = tuple(tuple(reversed(experts)) for experts in LINEAR)
    assert advice(split(tmp_path, "out", 2, "linear"), swapped) is not None


def test_an_adapter_without_layers_on_this_rank_needs_none() -> None:
    assert resplit_advice("d", [], ep_rank=0, ep_size=2, num_experts=E) is None


@pytest.mark.parametrize(
    ("ranks", "gives"), [(((0, 1), (3, 2)), True), (((1, 0), (3, 2)), False), ((ALL,), False)]
)
def test_the_second_rank_gives_it_if_the_first_has_its_own_file(ranks: Ranks, gives: bool) -> None:
    of_second = origin(ranks, LINEAR, 1)
    assert is_first_mismatch(of_second, ep_rank=1, ep_size=2, num_experts=E) is gives


def test_each_rank_of_an_engine_with_a_map_of_its_own_gives_it() -> None:
    for ep_rank in (0, 1):
        assert is_first_mismatch(
            origin(LINEAR, EXPLICIT, ep_rank), ep_rank=ep_rank, ep_size=2, num_experts=E
        )


@given(
    split_for=st.integers(1, 4).flatmap(lambda ep_size: rank_lists(E, ep_size)),
    rule=st.sampled_from([linear_placement, round_robin_placement]),
    ep_size=st.integers(1, 4),
)
def test_of_all_ranks_that_need_advice_the_first_gives_it(
    split_for: list[list[int]], rule: Any, ep_size: int
) -> None:
    engine: Ranks = rule(E, ep_size).ranks
    ranks = tuple(map(tuple, split_for))
    concerned = [k for k in range(ep_size) if len(ranks) != ep_size or ranks[k] != engine[k]]
    giving = [
        k
        for k in concerned
        if is_first_mismatch(origin(ranks, engine, k), ep_rank=k, ep_size=ep_size, num_experts=E)
    ]
    assert giving == concerned[:1]
