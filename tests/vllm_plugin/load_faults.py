"""Run inside a vLLM release, in two workers: loads that fail on rank 1 alone, at each line in turn.

The lines are those of lorashard and of vLLM's LoRA code that a load executes, in reader threads too.
Both workers live through all of it, without a garbage collection. After each fault they compare what
they have, and load the adapter again.
"""

from __future__ import annotations

import gc
import linecache
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from types import CodeType, FrameType, SimpleNamespace
from typing import Any
from unittest import mock

import torch.distributed as dist
import vllm
from safetensors.torch import load_file

import lorashard
from lorashard import SplitRequest, split_adapter
from lorashard.vllm_plugin import register

register()

from vllm.distributed import parallel_state  # noqa: E402
from vllm.lora.lora_model import LoRAModel  # noqa: E402
from vllm.lora.peft_helper import PEFTHelper  # noqa: E402
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager  # noqa: E402

from lorashard.vllm_plugin.load import filled_region  # noqa: E402
from lorashard.vllm_plugin.load.bounded_exchange import Meetings  # noqa: E402
from lorashard.vllm_plugin.load.device_copy import DeviceCopy  # noqa: E402
from lorashard.vllm_plugin.load.kept_plans import KeptPlans  # noqa: E402
from lorashard.vllm_plugin.patches import reading_ahead  # noqa: E402
from lorashard.vllm_plugin.patches.adapter_loading import attached_loader  # noqa: E402
from tests.vllm_plugin import beside_packages, harness  # noqa: E402
from tests.vllm_plugin.harness_selfcheck import SIZES, adapter_of, mismatches, modules  # noqa: E402
from tests.vllm_plugin.loading import expected_of  # noqa: E402

TIMEOUT_S = 10  # of what ranks agree in; a load takes some milliseconds
CALLER_LIMIT_S = 2  # for which a rank waits for one whose caller has failed
ROOTS = tuple(
    str(Path(str(package.__file__)).parent / part)
    for package, parts in ((lorashard, ("",)), (vllm, ("lora", "utils/cache.py")))
    for part in parts
)
# The patches' outermost functions: what raises in them outside of their `try`, nobody settles. They only
# keep what they are called with there, and their handlers call what is settled. All else is safe.
BEFORE_ANYTHING = (
    ("lorashard/vllm_plugin/patches/adapter_adding.py", "add_adapter"),
    ("lorashard/vllm_plugin/patches/adapter_packing.py", "_add_adapter"),
    ("lorashard/vllm_plugin/patches/reading_ahead.py", "is_to_be_read"),
)
NEVER_RAISE = frozenset({
    "pass", "continue", "break", "return", "try:", "else:", "finally:",
    "region.is_leased = False",  # a plain attribute, in a finalizer
})  # fmt: skip
ERRORS = (OSError, RuntimeError, MemoryError)


@dataclass(frozen=True, slots=True)
class Line:
    """A line of code. file: from `lorashard` or `vllm` on."""

    file: str
    function: str
    number: int


def can_raise(line: Line) -> bool:
    """Whether something can go wrong there that the rank can tell the others."""
    if (line.file, line.function) in BEFORE_ANYTHING:
        return False
    package = lorashard if line.file.startswith("lorashard") else vllm
    file = Path(str(package.__file__)).parents[1] / line.file
    return linecache.getline(str(file), line.number).strip() not in NEVER_RAISE


@dataclass(frozen=True, slots=True)
class State:
    """What one rank has, to be compared. versions: by the number of each active adapter."""

    error: str
    seconds: float
    was_reached: bool
    registered: tuple[int, ...]
    versions: dict[int, int | None]
    slots_agree: bool
    regions: int  # those that are free, and one for each adapter


@cache
def _is_followed(code: CodeType) -> bool:
    return code.co_filename.startswith(ROOTS)


def _line(frame: FrameType) -> Line:
    file = frame.f_code.co_filename
    at = max(file.rfind("/lorashard/"), file.rfind("/vllm/lora/"), file.rfind("/vllm/utils/"))
    return Line(file[at + 1 :], frame.f_code.co_name, frame.f_lineno)


class Trace:
    """Notes the lines that are executed, or raises once, at one of them."""

    def __init__(self, fault: Line | None = None, error: type[Exception] = RuntimeError) -> None:
        self.lines: dict[Line, None] = {}
        self.was_reached = False
        self._fault = fault
        self._error = error
        self._lock = threading.Lock()

    def enter(self, frame: FrameType, event: str, _: Any) -> Any:
        return self._at if _is_followed(frame.f_code) else None

    def _at(self, frame: FrameType, event: str, _: Any) -> Any:
        if event != "line":
            return self._at
        if self._fault is None:
            self.lines[_line(frame)] = None
        elif frame.f_lineno == self._fault.number and _line(frame) == self._fault:
            with self._lock:
                is_first, self.was_reached = not self.was_reached, True
            if is_first:
                raise self._error("a fault on this rank")
        return self._at

    @contextmanager
    def following(self) -> Iterator[None]:
        sys.settrace(self.enter)
        try:
            yield
        finally:
            sys.settrace(None)


class Worker:
    """One of two ranks, with an engine and adapters to load into it."""

    def __init__(self, ep_rank: int, folder: Path) -> None:
        self.ep_rank = ep_rank
        self.folder = folder
        self._trace: Trace | None = None
        self._num_read = 0
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/rendezvous", rank=ep_rank, world_size=2,
            timeout=timedelta(seconds=120),
        )  # fmt: skip
        # Two versions of one adapter, in each form.
        self.adapters = [adapter_of("L1", seed=seed) for seed in range(2)]
        self.plain = [folder / f"plain{version}" for version in range(2)]
        self.shards = [folder / f"shards{version}" for version in range(2)]
        if ep_rank == 0:
            for built, plain, shards in zip(self.adapters, self.plain, self.shards, strict=True):
                built.write(plain)
                split_adapter(plain, shards, SplitRequest(2))
        dist.barrier()
        self.tensors = [load_file(path / "adapter_model.safetensors") for path in self.plain]
        self._in_memory = beside_packages.skyrl()._make_request
        # Where another package wraps this, nothing is read ahead, so it does for its own form alone.
        self._skyrls = LRUCacheWorkerLoRAManager._load_adapter
        del LRUCacheWorkerLoRAManager._load_adapter
        self.reset()

    def reset(self) -> None:
        """A new engine, and a new group to agree in: after a hang the old one is of no use."""
        self.engine = harness.make_engine(**SIZES, ep_rank=self.ep_rank, module_names=modules())
        self.loader = attached_loader(self.engine)
        submit = self.loader._threads.submit
        self.loader._threads.submit = lambda do, *arguments: submit(self._followed, do, *arguments)
        group = dist.new_group([0, 1], timeout=timedelta(seconds=TIMEOUT_S))
        parallel_state._TP = SimpleNamespace(world_size=2, cpu_group=group)
        self.loader.meetings = Meetings.of(group)
        self.loader.meetings.limit = timedelta(seconds=CALLER_LIMIT_S)
        self.known: list[Any] = [None, None]
        for version in range(2):
            self.add_shards(1, version)
            slot = harness.slot_of(self.engine, 1)
            wrong = mismatches(self.engine, slot, expected_of(self.adapters[version]))
            assert wrong == [], wrong
            self.known[version] = harness.buffers(self.engine, slot)
            self.engine.remove_adapter(1)

    def _followed(self, do: Callable[..., Any], *arguments: Any) -> Any:
        """In a reader thread."""
        if self._trace is None:
            return do(*arguments)
        with self._trace.following():
            return do(*arguments)

    def _files(self, path: Path, number: int, *, load_inplace: bool) -> None:
        name = f"a{number}"
        wanted = harness.request(self.engine, path, name, number, load_inplace=load_inplace)
        with self._following():
            self.engine.add_adapter(wanted)

    def add_shards(self, number: int, version: int, *, load_inplace: bool = False) -> None:
        self._files(self.shards[version], number, load_inplace=load_inplace)

    def add_plain(self, number: int, version: int, *, load_inplace: bool = False) -> None:
        self.loader.plans = KeptPlans()
        self._files(self.plain[version], number, load_inplace=load_inplace)

    def add_read_shards(
        self, number: int, version: int, *, load_inplace: bool = False, withdraws: bool = False
    ) -> None:
        """As `AsyncLLM.add_lora` does: they are read before.

        withdraws: the slot that they were written into is given to another adapter on this rank.
        """
        wanted = harness.request(
            self.engine, self.shards[version], f"a{number}", number, load_inplace=load_inplace
        )
        self._num_read += 1
        marks = (reading_ahead._TO_BE_READ, reading_ahead._WAS_READ)
        to_be_read, was_read = (
            reading_ahead._marked(wanted, f"{mark}{self._num_read}") for mark in marks
        )
        with mock.patch.object(filled_region, "begin_copy", DeviceCopy):  # as on a GPU
            while not self.engine.add_adapter(to_be_read):
                time.sleep(0.001)
        if withdraws:
            self.loader.slot_ahead.withdraw()
        with self._following():
            self.engine.add_adapter(was_read)

    def add_tensors(self, number: int, version: int, *, load_inplace: bool = False) -> None:
        self.loader.plans = KeptPlans()
        wanted = self._in_memory(
            lora_name=f"a{number}", lora_int_id=number, lora_path="in memory",
            peft_config=beside_packages.config_of(self.plain[version]),
            lora_tensors=self.tensors[version], **({"load_inplace": True} if load_inplace else {}),
        )  # fmt: skip
        with (
            mock.patch.object(LRUCacheWorkerLoRAManager, "_load_adapter", self._skyrls),
            self._following(),
        ):
            self.engine.add_adapter(wanted)

    def add_to_manager(self, number: int, version: int, *, load_inplace: bool = False) -> None:
        """As AReaL does."""
        self.loader.plans = KeptPlans()
        config = beside_packages.config_of(self.plain[version])
        received = {name: tensor.clone() for name, tensor in self.tensors[version].items()}
        model = LoRAModel.from_lora_tensors(
            number, received, PEFTHelper.from_dict(config), device="cpu",
            dtype=self.engine.lora_config.lora_dtype,
        )  # fmt: skip
        self.engine.remove_adapter(number)
        manager = self.engine._adapter_manager
        with self._following():
            manager._add_adapter(model)
        manager.activate_adapter(number)

    @contextmanager
    def _following(self) -> Iterator[None]:
        if self._trace is None:
            yield
            return
        with self._trace.following():
            yield

    def attempt(self, add: Callable[[], None], trace: Trace | None = None) -> State:
        """What this rank has after it."""
        began, error = time.monotonic(), ""
        self._trace = trace
        try:
            add()
        except Exception as err:  # noqa: BLE001 - compared
            error = f"{type(err).__name__}: {err}"
        self._trace = None
        manager = self.engine._adapter_manager
        active = set(manager._active_adapters)
        registered = tuple(manager.list_adapters())
        return State(
            error,
            time.monotonic() - began,
            trace is not None and trace.was_reached,
            registered,
            {number: self._version(number) for number in sorted(active)},
            active == set(manager.lora_index_to_id) - {None} and active <= set(registered),
            self._regions() + len(registered),
        )

    def _regions(self) -> int:
        """How many are free."""
        return len(self.loader.regions.sizes())

    def _version(self, number: int) -> int | None:
        found = harness.buffers(self.engine, harness.slot_of(self.engine, number))
        for version, known in enumerate(self.known):
            if harness.are_equal(known, found):
                return version
        return None


def of_both(state: State) -> list[State]:
    states: list[Any] = [None, None]
    dist.all_gather_object(states, astuple(state))
    return [State(*fields) for fields in states]


@dataclass(frozen=True, slots=True)
class Case:
    """How the adapter comes, and what is there before.

    before: "nothing", "another version" of it, or "a full engine" with two other adapters.
    """

    form: str
    before: str


def try_case(worker: Worker, case: Case, every: int) -> dict[str, Any]:
    """How many lines were tried, at how many it came to the fault, and what went wrong, by line."""
    add = getattr(worker, f"add_{case.form}")
    prepare(worker, case, add)
    turn = 0

    def next_load() -> tuple[int, Callable[[], None]]:
        nonlocal turn
        turn += 1
        if case.before == "another version":
            return 1, partial(add, 1, turn % 2, load_inplace=True)
        present = set(worker.engine.list_adapters())
        number = min({1, 2, 3} - present) if case.before == "a full engine" else 1
        return number, partial(add, number, turn % 2)

    def clear() -> None:
        if case.before == "nothing":
            worker.engine.remove_adapter(1)

    trace = Trace()
    for recorded in (None, None, trace):
        _, load = next_load()
        state = worker.attempt(load, recorded)
        assert not state.error, state.error
        clear()
    found: list[Any] = [list(map(astuple, trace.lines))]
    dist.broadcast_object_list(found, src=1)
    followed = [Line(*fields) for fields in found[0]]
    # Another sample for each case.
    lines = list(filter(can_raise, followed))[CASES.index(case) * every // len(CASES) :: every]
    wrong: dict[str, list[str]] = {}
    reached = 0
    begin = worker.attempt(lambda: None)
    for index, line in enumerate(lines):
        number, load = next_load()
        version = turn % 2
        before = begin.versions.get(number)
        fault = Trace(line, ERRORS[index % 3]) if worker.ep_rank == 1 else None
        states = of_both(worker.attempt(load, fault))
        reached += states[1].was_reached
        problems = list(judge(states, number, version, before, begin.regions))
        if not problems:
            states = of_both(worker.attempt(load))
            problems = [
                f"again: {problem}" for problem in judge_again(states, number, version, begin)
            ]
        gc.collect()
        if problems:
            wrong[f"{line.file}:{line.number} {line.function}"] = problems
            worker.reset()
            prepare(worker, case, add)
        clear()
        begin = worker.attempt(lambda: None)
    for number in worker.engine.list_adapters():
        worker.engine.remove_adapter(number)
    return {"lines": len(lines), "reached": reached, "wrong": wrong}


def prepare(worker: Worker, case: Case, add: Callable[..., None]) -> None:
    if case.before == "another version":
        add(1, 0)
    elif case.before == "a full engine":
        add(1, 0)
        add(2, 0)


def judge(
    states: list[State], number: int, version: int, before: int | None, regions: int
) -> Iterator[str]:
    """What must not be after a fault. before: the version that was there."""
    first, second = states
    if not second.was_reached and second.error:  # how readers share the work is never the same
        yield f"it fails without a fault: {second.error[:200]}"
    for ep_rank, state in enumerate(states):
        if state.seconds > TIMEOUT_S - 1:
            yield f"rank {ep_rank} waited: {state.error[:200]}"
        if not state.slots_agree:
            yield f"rank {ep_rank}: the slots are not those of the adapters"
        if state.regions != regions:
            yield f"rank {ep_rank}: {regions - state.regions} regions are not back"
        if state.versions.get(number) not in (None, before, version):
            yield f"rank {ep_rank} has other values"
    if first.registered != second.registered:
        yield f"the ranks have {first.registered} and {second.registered}"
    if first.versions != second.versions:
        yield f"the ranks serve {first.versions} and {second.versions}"
    if bool(first.error) != bool(second.error) and number not in first.registered:
        yield f"the ranks say {first.error[:200]!r} and {second.error[:200]!r}"


def judge_again(states: list[State], number: int, version: int, begin: State) -> Iterator[str]:
    for ep_rank, state in enumerate(states):
        if state.error:
            yield f"rank {ep_rank}: {state.error[:300]}"
        elif state.versions.get(number) != version:
            yield f"rank {ep_rank} has other values: {state.versions}"
        if not state.slots_agree:
            yield f"rank {ep_rank}: the slots are not those of the adapters"
        if state.regions != begin.regions:
            yield f"rank {ep_rank}: {begin.regions - state.regions} regions are not back"
    if states[0].registered != states[1].registered:
        yield f"the ranks have {states[0].registered} and {states[1].registered}"


def try_callers_that_fail(worker: Worker) -> dict[str, list[str]]:
    """What goes wrong where one rank's caller fails before it adds the adapter, by the turn."""
    add = worker.add_to_manager
    add(1, 0)
    begin = worker.attempt(lambda: None)
    wrong: dict[str, list[str]] = {}
    for turn in range(6):
        fails = worker.ep_rank == turn % 2
        load = partial(add, 1, (turn + 1) % 2)
        states = of_both(worker.attempt(partial(_fail, worker) if fails else load))
        states = [replace(state, was_reached=True) for state in states]
        problems = [f"no error on rank {rank}" for rank in (0, 1) if not states[rank].error]
        problems += judge(states, 1, (turn + 1) % 2, None, begin.regions)
        states = of_both(worker.attempt(load))
        problems += judge_again(states, 1, (turn + 1) % 2, begin)
        if problems:
            wrong[str(turn)] = problems
    worker.engine.remove_adapter(1)
    return wrong


def try_different_versions(worker: Worker) -> dict[str, list[str]]:
    """What goes wrong where a path has another version on each rank, of one form, by how it comes."""
    wrong: dict[str, list[str]] = {}
    for form, add in (("shards", worker.add_shards), ("plain", worker.add_plain)):
        begin = worker.attempt(lambda: None)
        states = of_both(worker.attempt(partial(add, 1, worker.ep_rank)))
        states = [replace(state, was_reached=True) for state in states]
        problems = [
            f"rank {ep_rank}: {state.error[:200]!r}"
            for ep_rank, state in enumerate(states)
            if "have read different versions of the adapter" not in state.error
        ]
        problems += judge(states, 1, 0, None, begin.regions)
        states = of_both(worker.attempt(partial(add, 1, 1)))
        problems += judge_again(states, 1, 1, begin)
        worker.engine.remove_adapter(1)
        if problems:
            wrong[form] = problems
    return wrong


def try_a_slot_on_one_rank(worker: Worker) -> dict[str, list[str]]:
    """What goes wrong where one rank alone has an adapter in a slot as it is added, by that rank."""
    wrong: dict[str, list[str]] = {}
    for has_none in (None, 0, 1):
        begin = worker.attempt(lambda: None)
        withdraws = worker.ep_rank == has_none
        states = of_both(worker.attempt(partial(worker.add_read_shards, 1, 1, withdraws=withdraws)))
        problems = list(judge_again(states, 1, 1, begin))
        slots: list[Any] = [None, None]
        dist.all_gather_object(slots, worker.engine._adapter_manager.lora_index_to_id)
        # The last free one, or vLLM's first.
        expected = [[None, 1] if has_none is None else [1, None]] * 2
        if slots != expected:
            problems.append(f"the slots are {slots}")
        worker.engine.remove_adapter(1)
        if problems:
            wrong[f"no slot on rank {has_none}"] = problems
    return wrong


def _fail(worker: Worker) -> None:
    """A caller's steps before it adds an adapter: the one before it is gone."""
    worker.engine.remove_adapter(1)
    raise OSError("the caller fails")


CASES = (
    Case("shards", "nothing"),
    Case("read_shards", "nothing"),
    Case("plain", "nothing"),
    Case("tensors", "nothing"),
    Case("to_manager", "nothing"),
    Case("shards", "another version"),
    Case("read_shards", "another version"),
    Case("tensors", "another version"),
    Case("shards", "a full engine"),
    Case("plain", "a full engine"),
)


def run(ep_rank: int, folder: str, every: int, names: tuple[str, ...] = ()) -> Any:
    """What each case finds, by its name, and what goes wrong otherwise.

    every: of how many lines one is looked at.
    """
    worker = Worker(ep_rank, Path(folder))
    gc.collect()
    gc.freeze()
    gc.disable()
    found = {}
    for case in CASES:
        name = f"{case.form}, with {case.before}"
        if names and name not in names:
            continue
        began = time.monotonic()
        found[name] = try_case(worker, case, every)
        found[name]["seconds"] = round(time.monotonic() - began, 1)
    others = {}
    if not names:
        for look in (try_callers_that_fail, try_different_versions, try_a_slot_on_one_rank):
            others |= look(worker)
    dist.barrier()
    return found, others
