"""Planned reads carried out on a region: what set_lora gets, value by value."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lorashard.errors import ShardError
from lorashard.vllm_plugin.load.assembly import Assembly, DeviceFactor, Piece, ShardStack
from lorashard.vllm_plugin.load.contents import REPLICATED, Scaling
from lorashard.vllm_plugin.load.fill import Filler
from lorashard.vllm_plugin.load.reads import CopyJob, LayerPlan, place_factors, plan_reads
from lorashard.vllm_plugin.load.rows import Run

DTYPES = {torch.bfloat16: "BF16", torch.float32: "F32"}


class Image:
    """A ByteSource of bytes in memory."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.offsets: dict[str, int] = {}
        self.bytes = b""
        for name, tensor in tensors.items():
            self.offsets[name] = len(self.bytes)
            self.bytes += tensor.contiguous().view(torch.uint8).numpy().tobytes()

    def read_into(self, buffer: memoryview, offset: int) -> None:
        if offset + len(buffer) > len(self.bytes):
            raise ShardError("the source ends before.")
        buffer[:] = self.bytes[offset : offset + len(buffer)]


class Sources:
    """RankSources in memory, with a record of who opened what."""

    def __init__(self, images: dict[int, Image]) -> None:
        self.images = images
        self.opened: list[tuple[int, str]] = []

    def offset_of(self, ep_rank: int, name: str) -> int:
        return self.images[ep_rank].offsets[name]

    def source_of(self, ep_rank: int) -> Image:
        self.opened.append((ep_rank, threading.current_thread().name))
        return self.images[ep_rank]


@pytest.fixture(scope="module")
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(3) as made:
        yield made


def stack_of(name: str, tensor: Tensor, shared: bool = False) -> ShardStack:
    _, rows, cols = tensor.shape
    return ShardStack(name, "down_proj", "lora_B", DTYPES[tensor.dtype], rows, cols, shared)


def filled(
    threads: ThreadPoolExecutor,
    factor: DeviceFactor,
    sources: Sources,
    runs: tuple[Run, ...],
    scaling: Scaling = 1.0,
) -> Tensor:
    """The one tensor of a layer, in BF16, on a region that was full of other bytes."""
    (placed,), size = place_factors([Assembly((factor,), (), (), 0)], 2, 0)
    experts = tuple(range(factor.num_slots))
    plan = LayerPlan("layer", placed, runs, experts, {"down_proj": scaling})
    filler = Filler(np.full(size, 0xC3, np.uint8), sources, "BF16", threads)
    jobs = list(plan_reads([plan], sources.offset_of, "BF16"))
    assert filler.run([plan], jobs) == sum(job.size_bytes for job in jobs)
    tensor: Tensor = filler.tensor(placed[0])
    return tensor


def values(*shape: int, dtype: torch.dtype = torch.bfloat16, first: int = 1) -> Tensor:
    """Small distinct integers, which BF16 holds exactly."""
    count = int(np.prod(shape))
    return torch.arange(first, first + count).to(dtype).view(shape)


def whole(stack: ShardStack, num_slots: int) -> DeviceFactor:
    rows = range(stack.rows)
    return DeviceFactor(num_slots, stack.rows, stack.cols, (Piece(stack, rows, rows),))


@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_of_two_files_land_in_their_slots_scaled_one_by_one(
    threads: ThreadPoolExecutor, dtype: torch.dtype
) -> None:
    first, second = values(2, 3, 4, dtype=dtype), values(2, 3, 4, dtype=dtype, first=50)
    sources = Sources({0: Image({"x": first}), 1: Image({"pad": first, "x": second})})
    runs = (Run(1, src_slot=1, dst_slot=0, count=1), Run(0, src_slot=0, dst_slot=1, count=2))
    found = filled(threads, whole(stack_of("x", first), 3), sources, runs, (2.0, 0.5, 1.0))
    expected = torch.stack([second[1] * 2, first[0] / 2, first[1]]).to(torch.bfloat16)
    assert torch.equal(found, expected)


def test_rows_go_where_their_pieces_say_and_all_else_is_zero(threads: ThreadPoolExecutor) -> None:
    data = values(2, 4, 3)
    stack = stack_of("x", data)
    pieces = (
        Piece(stack, range(0, 4, 2), range(2)),  # every other row to the top left
        Piece(stack, range(1, 4, 2), range(3, 5), first_col=3),  # the rest below, on the right
    )
    sources = Sources({0: Image({"x": data})})
    found = filled(threads, DeviceFactor(2, 5, 6, pieces), sources, (Run(0, 0, 0, 2),), 3.0)
    expected = torch.zeros(2, 5, 6, dtype=torch.bfloat16)
    expected[:, 0:2, 0:3] = data[:, 0::2] * 3
    expected[:, 3:5, 3:6] = data[:, 1::2] * 3
    assert torch.equal(found, expected)


def test_a_shared_factor_is_repeated_and_scaled_for_each_expert(
    threads: ThreadPoolExecutor,
) -> None:
    data = values(1, 2, 3)
    sources = Sources({REPLICATED: Image({"x": data})})
    found = filled(
        threads, whole(stack_of("x", data, shared=True), 3), sources, (), (1.0, 2.0, 0.0)
    )
    assert torch.equal(found, torch.cat([data, data * 2, data * 0]))


def test_a_layer_that_the_adapter_does_not_train_is_zero(threads: ThreadPoolExecutor) -> None:
    found = filled(threads, DeviceFactor(2, 3, 4, ()), Sources({}), ())
    assert found.shape == (2, 3, 4)
    assert not found.any()


def test_scaling_is_rounded_as_bf16_rounds_it(threads: ThreadPoolExecutor) -> None:
    data = values(1, 8, 8)
    sources = Sources({0: Image({"x": data})})
    found = filled(threads, whole(stack_of("x", data), 1), sources, (Run(0, 0, 0, 1),), 2 / 3)
    assert torch.equal(found, data * (2 / 3))
    assert not torch.equal(found.float(), data.float() * (2 / 3)), "so rounding matters here"


def test_bytes_are_copied_as_they_are(threads: ThreadPoolExecutor) -> None:
    sources = Sources({REPLICATED: Image({"x": values(40)})})
    region = np.zeros(100, np.uint8)
    jobs = [CopyJob(REPLICATED, 10, 5, 30), CopyJob(REPLICATED, 40, 60, 40)]
    assert Filler(region, sources, "BF16", threads).run([], jobs) == 70
    expected = np.zeros(100, np.uint8)
    expected[5:35] = list(sources.images[REPLICATED].bytes[10:40])
    expected[60:100] = list(sources.images[REPLICATED].bytes[40:80])
    np.testing.assert_array_equal(region, expected)


def test_it_says_how_many_jobs_are_done_from_the_first_on(threads: ThreadPoolExecutor) -> None:
    sources = Sources({REPLICATED: Image({"x": values(40)})})
    region = np.zeros(80, np.uint8)
    found: list[tuple[int, bytes]] = []

    def note(num_done: int) -> None:
        found.append((num_done, region[: 10 * num_done].tobytes()))

    jobs = [CopyJob(REPLICATED, at, at, 10) for at in range(0, 80, 10)]
    Filler(region, sources, "BF16", threads).run([], jobs, note)
    image = sources.images[REPLICATED].bytes
    assert found == [(number, image[: 10 * number]) for number in range(1, 9)]


def test_each_source_is_opened_once_and_by_the_thread_that_loads(
    threads: ThreadPoolExecutor,
) -> None:
    sources = Sources({0: Image({"x": values(40)}), 1: Image({"x": values(40)})})
    jobs = [CopyJob(rank, at, at, 10) for at in range(0, 80, 10) for rank in (0, 1)]
    Filler(np.zeros(80, np.uint8), sources, "BF16", threads).run([], jobs)
    this_thread = threading.current_thread().name
    assert sorted(sources.opened) == [(0, this_thread), (1, this_thread)]


class Slow(Image):
    """Fails at once at offset 0; anywhere else takes until it may go on."""

    def __init__(self) -> None:
        super().__init__({"x": values(40)})
        self.may_go_on = threading.Event()
        self.has_written = False

    def read_into(self, buffer: memoryview, offset: int) -> None:
        if offset == 0:
            threading.Timer(0.2, self.may_go_on.set).start()
            raise ShardError("first")
        self.may_go_on.wait(10)
        buffer[:] = b"x" * len(buffer)
        self.has_written = True


def test_an_error_is_raised_when_no_thread_writes_to_the_region_any_more(
    threads: ThreadPoolExecutor,
) -> None:
    source = Slow()
    sources: Any = Sources({0: source})
    with pytest.raises(ShardError, match="first"):
        Filler(np.zeros(80, np.uint8), sources, "BF16", threads).run(
            [], [CopyJob(0, 0, 0, 10), CopyJob(0, 10, 10, 10)]
        )
    assert source.has_written


def test_a_region_is_free_once_the_error_of_its_load_is_handled(
    threads: ThreadPoolExecutor,
) -> None:
    class Lease(np.ndarray):  # a plain array cannot be referred to weakly
        pass

    region = np.zeros(80, np.uint8).view(Lease)
    is_held = weakref.ref(region)
    filler = Filler(region, Sources({0: Image({})}), "BF16", threads)
    gc.disable()  # so that nothing but the reference counts frees it
    try:
        with suppress(ShardError):
            filler.run([], [CopyJob(0, 0, 0, 10)])
        del filler, region
        list(threads.map(lambda _: None, range(12)))  # let the reader forget its last job
        assert is_held() is None
    finally:
        gc.enable()


def test_slots_that_have_another_s_expert_are_copied_in_factors_of_all_slots_alone(
    threads: ThreadPoolExecutor,
) -> None:
    data, shared = values(2, 2, 3), values(1, 2, 3, first=40)
    factors = (whole(stack_of("x", data), 3), whole(stack_of("y", shared, shared=True), 1))
    (placed,), size = place_factors([Assembly(factors, (), (), 0)], 2, 0)
    plan = LayerPlan("layer", placed, (Run(0, 0, 0, 2),), (7, 4, 7), {"down_proj": 1.0})
    sources = Sources({0: Image({"x": data}), REPLICATED: Image({"y": shared})})
    filler = Filler(np.zeros(size, np.uint8), sources, "BF16", threads)
    filler.run([plan], list(plan_reads([plan], sources.offset_of, "BF16")))
    filler.copy_slots(plan, ((2, 0),))
    assert torch.equal(filler.tensor(placed[0]), data[[0, 1, 0]])
    assert torch.equal(filler.tensor(placed[1]), shared)
