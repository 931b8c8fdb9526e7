"""All ranks of a group load an adapter, or none does: real gloo groups, in four processes."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import subprocess
import sys
import time
import weakref
from functools import cache, partial
from typing import Any

import pytest

from lorashard.vllm_plugin.load.agreement import (
    Exchange,
    Outcome,
    describe,
    do_together,
    has_failed,
    held_by_all,
    raise_failure,
    tensor_parallel_group,
)
from tests.tiny import REPO

# Ranks 0 and 1 are one tensor-parallel group, 2 and 3 another; "all" is a group of the four.
# In every case each rank loads; its answer is the result or the error. `odd`: ranks that have read
# another version than the rest.
SCRIPT = """
import json, os, sys
from datetime import timedelta
import torch.distributed as dist
from lorashard.vllm_plugin.load.agreement import Exchange, Outcome, do_together, held_by_all

CASES = json.loads(sys.argv[1])
folder = sys.argv[2]

def longest():
    return Outcome(chr(1) * 2000, "f" * 64, tuple(range(2**63 - 8, 2**63)), True, 99)

def work(rank):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank,
                            world_size=4, timeout=timedelta(seconds=30))
    pairs = [dist.new_group(ranks) for ranks in [(0, 1), (2, 3)]]
    groups = {"none": None, "pair": pairs[rank // 2], "all": dist.new_group([0, 1, 2, 3])}
    answers = {}
    for name, (group, failing, odd) in CASES.items():
        def load():
            if rank in failing:
                raise KeyError(f"file of rank {rank}")
            return f"{name} {rank}"
        try:
            digest = (bytes([rank in odd]) * 32).hex()
            answers[name] = ["loaded", do_together(load, Exchange(groups[group]), lambda: digest)]
        except Exception as err:
            answers[name] = [type(err).__name__, str(err)]
    for name, held in json.loads(sys.argv[3]).items():
        exchange = Exchange(groups["all"], 5)
        exchange.say(Outcome(held=tuple(held[rank])))
        answers[name] = sorted(held_by_all(exchange.hear()))
    exchange = Exchange(groups["all"], 8)
    exchange.say(longest() if rank == 1 else Outcome())
    answers["longest"] = [heard == longest() for heard in exchange.hear()]
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(answers, file)
    dist.barrier()

children = []
for rank in range(4):
    child = os.fork()
    if not child:
        code = 1
        try:
            work(rank)
            code = 0
        except BaseException as err:
            print(rank, repr(err), file=sys.stderr, flush=True)
        os._exit(code)
    children.append(child)
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children))
"""

CASES: dict[str, tuple[str, list[int], list[int]]] = {
    "all well": ("all", [], []),
    "one of two": ("pair", [1], []),
    "both": ("pair", [0, 1, 2, 3], []),
    "two of four": ("all", [1, 2], []),
    "the last of four": ("all", [3], []),
    "another version": ("all", [], [2]),
    "another version and a failure": ("all", [3], [2]),
    "a pair has another version": ("pair", [], [2, 3]),
    "no group": ("none", [2], [1]),
    "well again": ("all", [], []),
}
# Numbers that each of the four ranks names.
BEYOND_INT64 = 2**70 + 5
HELD: dict[str, list[list[int]]] = {
    "the same": [[3, 1], [1, 3], [3, 1], [1, 3]],
    "some in common": [[1, 2, 4], [2], [4, 2, 7, 9, 11], [2, 4]],
    "one has none": [[1, 2], [], [1], [1, 2, 3]],
    "none at all": [[], [], [], []],
    "large": [[BEYOND_INT64, 0], [0, BEYOND_INT64], [BEYOND_INT64, 0, 1], [0, BEYOND_INT64]],
}


@cache
def answers(folder: str) -> list[dict[str, list[str]]]:
    """What each rank got in each case."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(CASES), folder, json.dumps(HELD)],
        env=os.environ | {
            "PYTHONPATH": str(REPO), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1",
        },
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = []
    for rank in range(4):
        with open(f"{folder}/{rank}.json") as file:  # noqa: PTH123 - a plain name
            found.append(json.load(file))
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[str]]]:
    return answers(str(tmp_path_factory.mktemp("ranks")))


def elsewhere(rank: int) -> list[str]:
    message = f"Another rank could not load the adapter (rule ranks-differ): KeyError: 'file of rank {rank}'"
    return ["ValueError", message]


def own(rank: int) -> list[str]:
    return ["KeyError", f"'file of rank {rank}'"]


@pytest.mark.parametrize("case", ["all well", "well again"])
def test_where_all_succeed_each_gets_its_own_result(ranks: Any, case: str) -> None:
    assert [rank[case] for rank in ranks] == [["loaded", f"{case} {n}"] for n in range(4)]


def test_where_one_fails_it_raises_its_error_and_the_other_names_that(ranks: Any) -> None:
    assert [rank["one of two"] for rank in ranks[:2]] == [elsewhere(1), own(1)]


def test_a_group_without_a_failure_is_not_affected_by_another(ranks: Any) -> None:
    assert [rank["one of two"][0] for rank in ranks[2:]] == ["loaded", "loaded"]


def test_where_all_fail_each_raises_its_own_error(ranks: Any) -> None:
    assert [rank["both"] for rank in ranks] == [own(n) for n in range(4)]


def test_a_failure_reaches_every_rank_of_the_group(ranks: Any) -> None:
    found = [rank["the last of four"] for rank in ranks]
    assert found == [elsewhere(3), elsewhere(3), elsewhere(3), own(3)]


def test_of_two_failures_the_others_name_the_first_rank_s(ranks: Any) -> None:
    assert [rank["two of four"] for rank in ranks] == [elsewhere(1), own(1), own(2), elsewhere(1)]


def test_ranks_that_have_read_different_versions_all_fail(ranks: Any) -> None:
    for kind, message in (rank["another version"] for rank in ranks):
        assert kind == "ValueError"
        assert message.startswith("The ranks have read different versions of the adapter.")
        assert message.endswith(" same copy (rule replaced-while-read).")


def test_a_failure_is_named_rather_than_the_difference_that_it_makes(ranks: Any) -> None:
    found = [rank["another version and a failure"] for rank in ranks]
    assert found == [elsewhere(3), elsewhere(3), elsewhere(3), own(3)]


def test_each_group_may_have_a_version_of_its_own(ranks: Any) -> None:
    assert {rank["a pair has another version"][0] for rank in ranks} == {"loaded"}


def test_without_a_group_each_is_on_its_own(ranks: Any) -> None:
    kinds = [rank["no group"][0] for rank in ranks]
    assert kinds == ["loaded", "loaded", "KeyError", "loaded"]


@pytest.mark.parametrize(
    ("case", "common"),
    [
        ("the same", [1, 3]),
        ("some in common", [2]),
        ("one has none", []),
        ("none at all", []),
        ("large", [0, BEYOND_INT64]),
    ],
)
def test_ranks_find_what_all_of_them_have(ranks: Any, case: str, common: list[int]) -> None:
    assert [rank[case] for rank in ranks] == [common] * 4


def test_the_longest_that_a_rank_can_say_arrives_whole(ranks: Any) -> None:
    assert [rank["longest"] for rank in ranks] == [[False, True, False, False]] * 4


OUTCOMES = [
    Outcome(),
    Outcome("KeyError: 'gone'"),
    Outcome(version="abc", held=(3, 1), slot=2),
    Outcome(held=(BEYOND_INT64,), is_adding=True),
]


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_an_outcome_arrives_as_it_was_said_also_with_spaces_behind_it(outcome: Outcome) -> None:
    assert Outcome.decode(outcome.encode()) == outcome
    assert Outcome.decode(outcome.encode() + b"   ") == outcome


@pytest.mark.parametrize(
    ("outcomes", "said"),
    [
        ([Outcome(), Outcome(slot=3)], None),
        ([Outcome(version="a"), Outcome(version="a")], None),
        ([Outcome(), Outcome("OSError: gone"), Outcome("KeyError: 1")],
         "Another rank could not load the adapter (rule ranks-differ): OSError: gone"),
        ([Outcome(version="a"), Outcome(version="b")],
         ("The ranks have read different versions of the adapter. Was the directory replaced while it "
         "was being loaded, or do hosts have different copies of it? Load it again once every host has "
         "the same copy (rule replaced-while-read).")),
    ],
)  # fmt: skip
def test_what_any_rank_says_decides_for_all(outcomes: list[Outcome], said: str | None) -> None:
    assert has_failed(outcomes) == (said is not None)
    if said is None:
        raise_failure(outcomes)
        return
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        raise_failure(iter(outcomes))
    assert str(caught.value) == said


def test_what_all_have_is_what_each_has() -> None:
    assert held_by_all([Outcome(held=(1, 2, 3)), Outcome(held=(3, 2))]) == {2, 3}


def test_an_error_is_told_with_its_kind_and_no_more_than_fits() -> None:
    assert describe(KeyError("file")) == "KeyError: 'file'"
    assert describe(ValueError("x" * 5000)) == f"ValueError: {'x' * 1988}"


def test_only_what_is_said_first_counts() -> None:
    exchange = Exchange(None)
    assert not exchange.has_said
    exchange.say(Outcome(version="first"))
    assert exchange.has_said
    exchange.say(Outcome(version="second"))
    assert exchange.hear() == (Outcome(version="first"),)


def test_the_time_that_a_rank_has_waited_is_added_up() -> None:
    began = time.perf_counter()
    exchange = Exchange(None)
    exchange.say(Outcome())
    waited = [exchange.waited_s]
    for _ in range(50):
        exchange.hear()
        waited.append(exchange.waited_s)
    assert waited[0] == 0
    assert waited == sorted(waited)
    assert waited[-1] <= time.perf_counter() - began


def test_a_rank_says_what_it_has_loaded_and_where() -> None:
    exchange = Exchange(None)
    done: list[str] = []
    do_together(
        lambda: done.append("loaded"), exchange, lambda: f"after {done}", lambda: 5 * len(done)
    )
    assert exchange.hear() == (Outcome(version="after ['loaded']", slot=5),)


def test_a_rank_that_fails_says_so_and_nothing_else() -> None:
    exchange = Exchange(None)
    with pytest.raises(ZeroDivisionError):
        do_together(lambda: 1 / 0, exchange, lambda: "version", lambda: 3)
    assert exchange.hear() == (Outcome("ZeroDivisionError: division by zero"),)


def test_a_load_that_says_nothing_more_is_of_no_version_and_in_no_slot() -> None:
    exchange = Exchange(None)
    do_together(list, exchange)
    assert exchange.hear() == (Outcome(),)


def test_alone_the_result_and_the_error_are_those_of_the_load() -> None:
    result = object()
    assert do_together(lambda: result, Exchange(None)) is result
    error = OSError("no such file")

    def fail() -> object:
        raise error

    with pytest.raises(OSError, match="no such file") as caught:
        do_together(fail, Exchange(None))
    assert caught.value is error


def test_a_process_without_distributed_torch_is_on_its_own() -> None:
    assert tensor_parallel_group() is None


class Memory:
    """Stands for the region that a load reads into."""


def test_what_a_failed_load_has_read_is_free_once_its_error_is_handled() -> None:
    memory = Memory()
    is_alive = weakref.ref(memory)

    def fail(memory: Memory) -> object:
        raise ValueError("damaged")

    gc.disable()  # so that nothing but the reference counts frees it
    try:
        with contextlib.suppress(ValueError):
            do_together(partial(fail, memory), Exchange(None))
        del memory
        assert is_alive() is None
    finally:
        gc.enable()
