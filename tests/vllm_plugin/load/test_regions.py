"""Host memory that adapters are read into, on the CPU: taken, given back, used again."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorashard.vllm_plugin.load.regions import RegionPool

MIB = 2**20
GRAIN = 2 * MIB  # regions are multiples of it


@pytest.fixture(scope="module")
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as made:
        yield made


@pytest.fixture
def pool(threads: ThreadPoolExecutor) -> RegionPool:
    return RegionPool(3, torch.device("cpu"), threads)


def address(lease: Any) -> int:
    return int(lease.ctypes.data)


@pytest.mark.parametrize("size", [1, 1000, GRAIN, GRAIN + 1, 33 * MIB])
def test_a_lease_has_the_size_that_was_asked_for_and_can_be_written(
    pool: RegionPool, size: int
) -> None:
    lease = pool.take(size)
    assert lease.nbytes == size
    lease[:] = 7
    assert lease[-1] == 7


def test_a_region_comes_back_when_its_lease_is_gone(pool: RegionPool) -> None:
    lease = pool.take(1000)
    assert pool.sizes() == ()
    del lease
    assert pool.sizes() == (GRAIN,)


def test_it_comes_back_with_the_last_tensor_and_not_before(pool: RegionPool) -> None:
    lease = pool.take(1000)
    tensors = list(torch.from_numpy(lease).split(100))
    views = [tensor.view(torch.bfloat16).view(5, 10) for tensor in tensors]
    del lease, tensors
    while views:
        assert pool.sizes() == ()
        views.pop()
    assert pool.sizes() == (GRAIN,)


def test_it_does_not_come_back_while_a_slice_of_a_slice_is_there(pool: RegionPool) -> None:
    view = pool.take(1000)[10:900][::2]
    assert pool.sizes() == ()
    del view
    assert pool.sizes() == (GRAIN,)


def test_it_does_not_come_back_while_a_memoryview_is_there(pool: RegionPool) -> None:
    view = memoryview(pool.take(1000))[10:20]
    assert pool.sizes() == ()
    del view
    assert pool.sizes() == (GRAIN,)


def test_memory_is_used_again(pool: RegionPool) -> None:
    lease = pool.take(GRAIN)
    first = address(lease)
    del lease
    for size in (1, GRAIN):
        lease = pool.take(size)
        assert address(lease) == first
        del lease
    assert pool.sizes() == (GRAIN,)


def test_the_smallest_region_that_fits_is_taken(pool: RegionPool) -> None:
    leases = {size: pool.take(size * MIB) for size in (6, 2, 4)}
    places = {size: address(lease) for size, lease in leases.items()}
    leases.clear()
    taken = [pool.take(size * MIB) for size in (3, 1, 3)]
    assert [address(lease) for lease in taken] == [places[4], places[2], places[6]]


def test_warm_regions_are_ready_and_taken(pool: RegionPool) -> None:
    pool.warm(2, 5 * MIB)
    assert pool.sizes() == (6 * MIB, 6 * MIB)
    leases = [pool.take(5 * MIB) for _ in range(2)]
    assert pool.sizes() == ()
    leases.clear()
    assert pool.sizes() == (6 * MIB, 6 * MIB)


@pytest.mark.parametrize(("count", "ready"), [(0, 0), (-1, 0), (1, 1), (3, 3), (9, 3)])
def test_no_more_regions_are_warmed_than_the_limit(
    pool: RegionPool, count: int, ready: int
) -> None:
    pool.warm(count, MIB)
    assert len(pool.sizes()) == ready


def test_warming_counts_what_is_there_and_what_is_held(pool: RegionPool) -> None:
    held = pool.take(MIB)
    pool.warm(2, MIB)
    pool.warm(2, MIB)
    assert len(pool.sizes()) == 1
    assert held.nbytes == MIB


def test_a_region_that_fits_nothing_makes_room_for_a_larger_one(pool: RegionPool) -> None:
    leases = [pool.take(size * MIB) for size in (2, 4, 6)]
    leases.clear()
    lease = pool.take(8 * MIB)
    assert sorted(pool.sizes()) == [4 * MIB, 6 * MIB], "the smallest one went"
    del lease
    assert sorted(pool.sizes()) == [4 * MIB, 6 * MIB, 8 * MIB]


def test_more_than_the_limit_can_be_held_and_the_surplus_goes_at_the_next_need(
    pool: RegionPool,
) -> None:
    leases = [pool.take(MIB) for _ in range(5)]
    assert len({address(lease) for lease in leases}) == 5
    leases.clear()
    larger = pool.take(4 * MIB)
    assert sorted(pool.sizes()) == [GRAIN, GRAIN]
    assert larger.nbytes == 4 * MIB


def test_a_lease_that_hangs_in_a_cycle_is_looked_for_before_the_limit_is_passed(
    pool: RegionPool,
) -> None:
    gc.disable()
    try:
        leases = [pool.take(MIB) for _ in range(2)]
        places = {address(lease) for lease in leases}
        failed: list[Any] = [pool.take(MIB)]
        hanging = address(failed[0])
        failed.append(failed)  # as a traceback holds the frame that holds it
        del failed
        assert pool.sizes() == ()
        larger = pool.take(4 * MIB)
        assert pool.sizes() == ()
        leases.clear()
        assert sorted(pool.sizes()) == [GRAIN, GRAIN], "the one in the cycle was freed"
        assert address(larger) not in places
        assert hanging not in places
    finally:
        gc.enable()
    gc.collect()
    assert sorted(pool.sizes()) == [GRAIN, GRAIN], "so it does not come back"


@settings(deadline=None, max_examples=60)
@given(
    limit=st.integers(1, 4),
    warmed=st.integers(0, 4),
    steps=st.lists(st.integers(1, 5 * MIB) | st.just(0) | st.just(-1), max_size=14),
)
def test_leases_never_overlap_and_what_is_not_held_stays_within_the_limit(
    threads: ThreadPoolExecutor, limit: int, warmed: int, steps: list[int]
) -> None:
    """A positive step takes that many bytes, 0 drops the oldest lease, -1 the newest."""
    pool = RegionPool(limit, torch.device("cpu"), threads)
    pool.warm(warmed, GRAIN)
    leases: list[tuple[int, Any]] = []
    most_held = 0
    for number, step in enumerate(steps):
        if step > 0:
            lease = pool.take(step)
            lease[[0, -1]] = number
            leases.append((number, lease))
            del lease
        elif leases:
            leases.pop(step)
        most_held = max(most_held, len(leases))
        ends = sorted((address(lease), address(lease) + lease.nbytes) for _, lease in leases)
        assert all(end <= begin for (_, end), (begin, _) in pairwise(ends))
        assert all(lease[0] == lease[-1] == number for number, lease in leases)
        assert len(pool.sizes()) + len(leases) <= max(limit, most_held)
    leases.clear()
    assert len(pool.sizes()) <= max(limit, most_held)


class Event:
    """Stands for torch.cuda.Event: all work that a stream had when it was recorded."""

    def __init__(self, cuda: Cuda, stream: str) -> None:
        self._cuda = cuda
        self._stream = stream

    def synchronize(self) -> None:
        self._cuda.log.append(f"wait for {self._stream}")


class Stream:
    def __init__(self, cuda: Cuda, name: str) -> None:
        self._cuda = cuda
        self._name = name

    def record_event(self) -> Event:
        self._cuda.log.append(f"record {self._name}")
        return Event(self._cuda, self._name)


class Cuda:
    """Stands for torch.cuda with two streams, and for cudart. Addresses in the log are named."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.registered: dict[int, int] = {}  # address -> bytes
        self.code = 0
        self.default = Stream(self, "default")
        self.current = Stream(self, "current")

    def cudart(self) -> Cuda:
        return self

    def cudaHostRegister(self, begin: int, size: int, flags: int) -> int:
        assert flags == 1, "portable: for copies to every device"
        assert is_mapped(begin, size)
        self.log.append("register")
        if self.code == 0:
            self.registered[begin] = size
        return self.code

    def cudaHostUnregister(self, begin: int) -> int:
        assert is_mapped(begin, self.registered.pop(begin))
        self.log.append("unregister")
        return 0


def is_mapped(begin: int, size: int) -> bool:
    """Whether a range is memory of this process."""
    with open("/proc/self/maps") as maps:  # noqa: PTH123 - a plain name
        ranges = [[int(x, 16) for x in line.split()[0].split("-")] for line in maps]
    return any(low <= begin and begin + size <= high for low, high in ranges)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    made = Cuda()
    monkeypatch.setattr(torch.cuda, "cudart", made.cudart)

    def stream_of_thread(device: torch.device) -> Stream:
        assert device.index == 1
        here = threading.current_thread() is threading.main_thread()
        return made.current if here else made.default

    def default_stream(device: torch.device) -> Stream:
        assert device.index == 1
        return made.default

    monkeypatch.setattr(torch.cuda, "current_stream", stream_of_thread)
    monkeypatch.setattr(torch.cuda, "default_stream", default_stream)
    return made


@pytest.fixture
def gpu_pool(cuda: Cuda, threads: ThreadPoolExecutor) -> Iterator[RegionPool]:
    pool = RegionPool(1, torch.device("cuda", 1), threads)
    yield pool
    pool.close()
    assert cuda.registered == {}


def test_a_region_is_registered_whole_and_once(cuda: Cuda, gpu_pool: RegionPool) -> None:
    for size in (3 * MIB, MIB):
        lease = gpu_pool.take(size)
        assert cuda.registered == {address(lease): 4 * MIB}
        del lease
    assert cuda.log.count("register") == 1


def test_a_lease_that_ends_records_what_the_device_may_still_read(
    cuda: Cuda, gpu_pool: RegionPool
) -> None:
    lease = gpu_pool.take(MIB)
    assert cuda.log == ["register"]
    del lease
    assert sorted(cuda.log[1:]) == ["record current", "record default"]


def test_one_event_is_enough_where_the_current_stream_is_the_default_one(
    cuda: Cuda, gpu_pool: RegionPool
) -> None:
    cuda.current = cuda.default
    gpu_pool.take(MIB)
    assert cuda.log == ["register", "record default"]


def test_memory_is_not_handed_out_again_before_the_device_has_read_it(
    cuda: Cuda, gpu_pool: RegionPool
) -> None:
    gpu_pool.take(MIB)
    cuda.log.clear()
    lease = gpu_pool.take(MIB)
    assert sorted(cuda.log) == ["wait for current", "wait for default"]
    cuda.log.clear()
    del lease
    gpu_pool.take(MIB)
    assert len([entry for entry in cuda.log if entry.startswith("wait")]) == 2, "not 4"


def test_memory_is_unregistered_before_it_is_unmapped_and_after_the_device_has_read_it(
    cuda: Cuda, gpu_pool: RegionPool
) -> None:
    gpu_pool.take(MIB)
    cuda.log.clear()
    lease = gpu_pool.take(3 * MIB)  # the limit is 1, so the smaller region goes
    assert sorted(cuda.log[:2]) == ["wait for current", "wait for default"]
    assert cuda.log[2:] == ["unregister", "register"]
    assert cuda.registered == {address(lease): 4 * MIB}


def test_a_lease_that_ends_in_another_thread_records_the_streams_of_the_one_that_took_it(
    cuda: Cuda, gpu_pool: RegionPool
) -> None:
    hanging: list[Any] = [gpu_pool.take(MIB)]
    thread = threading.Thread(target=hanging.clear)
    thread.start()
    thread.join()
    assert sorted(cuda.log[1:]) == ["record current", "record default"]


def test_a_pool_that_is_gone_has_unregistered_its_memory(
    cuda: Cuda, threads: ThreadPoolExecutor
) -> None:
    pool = RegionPool(3, torch.device("cuda", 1), threads)
    pool.warm(1, MIB)
    used = pool.take(MIB)
    del used
    assert len(cuda.registered) == 1
    pool.warm(3, MIB)
    held = pool.take(MIB)
    view = torch.from_numpy(held)
    place, taken = address(held), cuda.registered
    del pool, held
    gc.collect()
    assert list(taken) == [place], "what is in use stays"
    view.fill_(3)
    cuda.log.clear()
    del view
    assert cuda.registered == {}
    assert cuda.log[-1] == "unregister"
    assert {"wait for current", "wait for default"} <= set(cuda.log[:-1])
    assert not is_mapped(place, GRAIN)


def test_memory_that_cuda_refuses_is_used_without_it(
    cuda: Cuda, gpu_pool: RegionPool, caplog: pytest.LogCaptureFixture
) -> None:
    cuda.code = 2
    gpu_pool.take(MIB)
    lease = gpu_pool.take(3 * MIB)
    assert lease.nbytes == 3 * MIB
    assert cuda.log == ["register", "register"], "no event, nothing to unregister"
    assert "cudaHostRegister of 0.00 GB failed (error 2)" in caplog.messages[0]


def test_memory_of_an_engine_on_the_cpu_is_not_registered(cuda: Cuda, pool: RegionPool) -> None:
    pool.take(MIB)
    pool.take(3 * MIB)
    assert cuda.log == []
