"""Run inside a vLLM release, in two to four workers: loads, unloads and swaps of 8 adapters, bad ones mixed in.

Each worker has vLLM's own LoRA manager on the CPU; they agree through gloo. Every cycle is the same on
all ranks, and after it they compare what they have. test_many_loads_conformance.py calls `run`.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch.distributed as dist

from lorashard import SplitRequest, split_adapter
from lorashard.vllm_plugin import register

register()

from vllm.distributed import parallel_state  # noqa: E402

from lorashard.storage.syscalls import exchange  # noqa: E402
from lorashard.vllm_plugin.load.bounded_exchange import Meetings  # noqa: E402
from lorashard.vllm_plugin.patches.adapter_loading import attached_loader  # noqa: E402
from tests.vllm_plugin import harness  # noqa: E402
from tests.vllm_plugin.harness_selfcheck import SIZES, adapter_of, mismatches, modules  # noqa: E402
from tests.vllm_plugin.loading import expected_of  # noqa: E402
from tests.vllm_plugin.swaps import resident_mb  # noqa: E402

NUM_ADAPTERS, MAX_LORAS = 8, 3
TIMEOUT_S = 10  # of what ranks agree in
BAD_EVERY = 3  # cycles
# What goes wrong, and what is said of it by the rank that notices; None where it loads, and right.
BAD: dict[str, str | None] = {
    "missing": r"ep-0000\d-of-0000\d\.safetensors",
    "truncated": r"ep-0000\d-of-0000\d\.safetensors",
    "another model": r"expert",
    "another EP size": None,
    "replaced while being read": r"version|replaced|changed|written",
    "failing disk": r"Input/output error",
    "gone on one rank": r"No adapter found",
}
PART_OF_A_GROUP = re.compile(r"rank \d")


@dataclass(frozen=True, slots=True)
class State:
    """What one rank has after a cycle. adapters: of each active number, which of the 8; -1: none of them."""

    error: str
    seconds: float
    registered: tuple[int, ...]
    adapters: dict[int, int]
    slots: tuple[int | None, ...]
    regions: int  # those that are free, and one for each adapter
    resident_mb: float


class Worker:
    """One rank, with an engine and adapters to load into it."""

    def __init__(self, ep_rank: int, ep_size: int, folder: Path) -> None:
        self.ep_rank, self.ep_size, self.folder = ep_rank, ep_size, folder
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/rendezvous", rank=ep_rank, world_size=ep_size,
            timeout=timedelta(seconds=120),
        )  # fmt: skip
        self.shards = [folder / f"shards{number}" for number in range(NUM_ADAPTERS)]
        built = [adapter_of("L1", seed=seed) for seed in range(NUM_ADAPTERS)]
        if ep_rank == 0:
            for number, adapter in enumerate(built):
                plain = adapter.write(folder / f"plain{number}")
                split_adapter(plain, self.shards[number], SplitRequest(ep_size))
            split_adapter(folder / "plain0", folder / "another EP size", SplitRequest(ep_size + 1))
            other = adapter_of("L1", num_experts=4).write(folder / "plain other")
            split_adapter(other, folder / "another model", SplitRequest(ep_size))
        dist.barrier()
        self.engine = harness.make_engine(
            **SIZES, ep_rank=ep_rank, ep_size=ep_size, module_names=modules(),
            max_loras=MAX_LORAS, max_cpu_loras=MAX_LORAS,
        )  # fmt: skip
        loader = attached_loader(self.engine)
        group = dist.new_group([*range(ep_size)], timeout=timedelta(seconds=TIMEOUT_S))
        parallel_state._TP = SimpleNamespace(world_size=ep_size, cpu_group=group)
        loader.meetings = Meetings.of(group)
        self._loader = loader
        self._known = [self._right_buffers(number, adapter) for number, adapter in enumerate(built)]

    def _right_buffers(self, number: int, adapter: Any) -> Any:
        self.add(1, self.shards[number])
        slot = harness.slot_of(self.engine, 1)
        assert mismatches(self.engine, slot, expected_of(adapter)) == []
        found = harness.buffers(self.engine, slot)
        self.engine.remove_adapter(1)
        return found

    def add(self, number: int, path: Path, *, in_place: bool = False) -> None:
        wanted = harness.request(self.engine, path, f"a{number}", number, load_inplace=in_place)
        self.engine.add_adapter(wanted)

    def state(self, work: Callable[[], None]) -> State:
        """What this rank has after some work."""
        began, error = time.monotonic(), ""
        try:
            work()
        except Exception as err:  # noqa: BLE001 - compared
            error = f"{type(err).__name__}: {err}"
        seconds = time.monotonic() - began
        manager = self.engine._adapter_manager
        registered = tuple(manager.list_adapters())
        return State(
            error,
            seconds,
            registered,
            {number: self._adapter_in_slot(number) for number in manager._active_adapters},
            tuple(manager.lora_index_to_id),
            len(self._loader.regions.sizes()) + len(registered),
            resident_mb(),
        )

    def _adapter_in_slot(self, number: int) -> int:
        found = harness.buffers(self.engine, harness.slot_of(self.engine, number))
        for adapter, known in enumerate(self._known):
            if harness.are_equal(known, found):
                return adapter
        return -1


class Cycles:
    """The same cycles on each rank. held: which adapter each number has."""

    def __init__(self, worker: Worker, *, in_place: bool) -> None:
        self._worker, self._in_place = worker, in_place
        self._choose = random.Random(0)
        self.held: dict[int, int] = {}
        self.problems: list[str] = []
        self.tried: dict[str, int] = dict.fromkeys((*BAD, "load", "unload", "swap"), 0)
        self.said: dict[str, str] = {}
        self.resident: list[float] = []
        self.slowest_s = 0.0
        self.regions: list[int] = []
        self._next = 10

    def run(self, cycle: int) -> None:
        if cycle % BAD_EVERY == 0:
            self._bad([*BAD][cycle // BAD_EVERY % len(BAD)], cycle)
            return
        free = len(self.held) < MAX_LORAS
        kinds = (["load"] if free else []) + (["unload", "swap"] if self.held else [])
        kind, adapter = self._choose.choice(kinds), self._choose.randrange(NUM_ADAPTERS)
        number = self._next if kind == "load" else self._choose.choice([*self.held])
        worker = self._worker
        path = worker.shards[adapter]

        def work() -> None:
            if kind == "unload":
                worker.engine.remove_adapter(number)
            elif kind == "load" or self._in_place:
                worker.add(number, path, in_place=kind == "swap")
            else:
                worker.engine.remove_adapter(number)
                worker.add(number, path)

        states = self._all(work, kind)
        self._next += 1
        if kind == "unload":
            del self.held[number]
        else:
            self.held[number] = adapter
        self._judge(f"cycle {cycle}, {kind}", states, (self.held,))
        for rank, state in enumerate(states):
            if state.error:
                self.problems.append(f"cycle {cycle}, {kind}: rank {rank}: {state.error[:300]}")

    def _bad(self, kind: str, cycle: int) -> None:
        """A load that fails on all ranks, with the reason; or on none, and then it is right."""
        if len(self.held) == MAX_LORAS:
            number = self._choose.choice([*self.held])
            self._worker.engine.remove_adapter(number)
            del self.held[number]
        number, failing = self._next, self._choose.randrange(self._worker.ep_size)
        self._next += 1
        first, second = self._choose.sample(range(NUM_ADAPTERS), 2)
        path = self._worker.folder / f"bad-{cycle}"
        if self._worker.ep_rank == 0:
            _make(self._worker, kind, path, first, failing)
        dist.barrier()
        # What it may be if it loads.
        possible = {"another EP size": (0,), "replaced while being read": (first, second)}.get(
            kind, ()
        )
        with _trouble(self._worker, kind, path, second, failing) as asked:
            states = self._all(lambda: self._worker.add(number, asked), kind)
        outcomes = [self.held, *({**self.held, number: adapter} for adapter in possible)]
        where = f"cycle {cycle}, {kind}"
        self._judge(where, states, outcomes)
        errors = [state.error for state in states]
        if any(errors) or not possible:
            self.said[kind] = max(errors, key=len)[:300]
            self.problems += [
                f"{where}: {problem}" for problem in _wrong_reasons(BAD[kind], errors)
            ]
        if number in states[0].registered:
            self._worker.engine.remove_adapter(number)
        dist.barrier()
        if self._worker.ep_rank == 0:
            for left in self._worker.folder.glob(f"bad-{cycle}*"):
                shutil.rmtree(left)

    def _all(self, work: Callable[[], None], kind: str) -> list[State]:
        mine = self._worker.state(work)
        states: list[Any] = [None] * self._worker.ep_size
        dist.all_gather_object(states, astuple(mine))
        self.tried[kind] += 1
        self.resident.append(mine.resident_mb)
        self.regions.append(mine.regions)
        self.slowest_s = max(self.slowest_s, mine.seconds)
        return [State(*fields) for fields in states]

    def _judge(self, where: str, states: list[State], outcomes: Any) -> None:
        """Each rank has one and the same of the outcomes, in the same slots."""
        for rank, state in enumerate(states):
            if state.adapters != states[0].adapters or state.adapters not in outcomes:
                self.problems.append(
                    f"{where}: rank {rank} serves {state.adapters}, not {outcomes}"
                )
            if state.slots != states[0].slots or state.registered != states[0].registered:
                self.problems.append(f"{where}: rank {rank} has other slots: {state.slots}")
            if {*state.slots} - {None} != {*state.adapters}:
                self.problems.append(f"{where}: rank {rank}: the slots are not the adapters'")
            if state.seconds > TIMEOUT_S - 1:
                self.problems.append(f"{where}: rank {rank} waited {state.seconds:.1f} s")


def _wrong_reasons(reason: str | None, errors: list[str]) -> Iterator[str]:
    """What the ranks should have said otherwise. reason: as in BAD."""
    if reason is None or not all(errors):
        yield f"not all ranks refuse it, or none: {errors}"
        return
    if not any(re.search(reason, error) for error in errors):
        yield f"nobody says {reason}: {errors}"
    for rank, error in enumerate(errors):
        if not re.search(reason, error) and not PART_OF_A_GROUP.search(error):
            yield f"rank {rank} says {error[:300]!r}"


def _make(worker: Worker, kind: str, path: Path, adapter: int, failing: int) -> None:
    """The bad adapter; rank 0 makes it."""
    if kind in ("another model", "another EP size"):
        shutil.copytree(worker.folder / kind, path)
        return
    shutil.copytree(worker.shards[adapter], path)
    file = path / f"ep-{failing:05}-of-{worker.ep_size:05}.safetensors"
    if kind == "missing":
        file.unlink()
    elif kind == "truncated":
        os.truncate(file, file.stat().st_size // 2)


@contextmanager
def _trouble(worker: Worker, kind: str, path: Path, other: int, failing: int) -> Iterator[Path]:
    """What happens during the load on this rank; yields the path that it is told."""
    is_failing = worker.ep_rank == failing
    if kind == "failing disk" and is_failing:
        with mock.patch("os.preadv", _failing(path)):
            yield path
    elif kind == "gone on one rank" and is_failing:
        yield path.with_name(f"{path.name}-gone")
    elif kind == "replaced while being read" and worker.ep_rank == 0:
        twin = path.with_name(f"{path.name}-twin")
        shutil.copytree(worker.shards[other], twin)
        ends = threading.Event()

        def swap() -> None:
            while not ends.wait(0.0002):
                exchange(path, twin)

        thread = threading.Thread(target=swap)
        thread.start()
        yield path
        ends.set()
        thread.join()
    else:
        yield path


def _failing(folder: Path) -> Callable[..., int]:
    """`os.preadv` of a disk that fails below a folder, after the first reads."""
    preadv = os.preadv
    done = 0

    def read(fd: int, *arguments: Any) -> int:
        nonlocal done
        if str(Path(f"/proc/self/fd/{fd}").readlink()).startswith(str(folder)):
            done += 1
            if done > 2:
                raise OSError(5, os.strerror(5))
        return preadv(fd, *arguments)

    return read


def run(ep_rank: int, ep_size: int, folder: str, cycles: int) -> dict[str, Any]:
    """What was wrong, what was tried how often, and the resident memory after each cycle."""
    worker = Worker(ep_rank, ep_size, Path(folder))
    in_place = "load_inplace" in harness.LoRARequest.__struct_fields__
    all_of_them = Cycles(worker, in_place=in_place)
    for cycle in range(cycles):
        all_of_them.run(cycle)
        if len(all_of_them.problems) > 20:
            break
    dist.barrier()
    return {
        "problems": all_of_them.problems,
        "tried": all_of_them.tried,
        "said": all_of_them.said,
        "slowest_s": all_of_them.slowest_s,
        "resident_mb": all_of_them.resident,
        "regions": all_of_them.regions,
    }
