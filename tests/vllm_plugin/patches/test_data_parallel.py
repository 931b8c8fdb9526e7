"""What goes along in the exchange of data-parallel engines. The rest: test_data_parallel_conformance.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lorashard.vllm_plugin.engine.agreed_slots import Adapter, Announcement, num_rows
from lorashard.vllm_plugin.patches import data_parallel, slot_agreement

SLOTS, ENGINES = 3, 2
OTHER = Announcement((Adapter.of(7, "another"),), frozenset({2}))


class WorkerLoRAManager:
    """What an agreement needs of vLLM's, with nothing in it."""

    def __init__(self) -> None:
        self._adapter_manager = SimpleNamespace(
            lora_slots=SLOTS, lora_index_to_id=[None] * SLOTS, list_adapters=dict
        )


class Exchange:
    """Stands for torch.distributed or vLLM's group: engine 1 says OTHER, and has 10 in each row of vLLM's."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def all_reduce(self, tensor: Any, group: object = None) -> None:
        self.shapes.append(tuple(tensor.shape))
        own = len(tensor) - num_rows(SLOTS)
        tensor[:own, 1] = 10
        tensor[own:, 1] = torch.tensor(OTHER.encode(SLOTS))

    cpu_all_reduce_ = all_reduce


@pytest.fixture
def agreement() -> Iterator[Any]:
    """That of engine 0, in this process."""
    manager = WorkerLoRAManager()
    yield slot_agreement.attach_agreement(manager, 0, ENGINES, lambda own: [own] * ENGINES)
    slot_agreement._of_process.clear()


def function(source: str, **names: Any) -> tuple[Callable[..., Any], dict[str, Any]]:
    """A function of a module of vLLM's, and the module's names."""
    exec(source, names)
    return names["exchange"], names


def by_dist(exchange: Exchange) -> tuple[Callable[..., Any], dict[str, Any]]:
    source = "def exchange(tensor):\n    dist.all_reduce(tensor, group=1)\n    return tensor"
    return function(source, dist=exchange)


def by_group(exchange: Exchange) -> tuple[Callable[..., Any], dict[str, Any]]:
    source = "def exchange(tensor):\n    get_dp_group().cpu_all_reduce_(tensor)\n    return tensor"
    return function(source, get_dp_group=lambda: exchange)


@pytest.mark.parametrize("way", [by_dist, by_group])
def test_announcements_go_along_and_vllms_rows_stay_as_they_are(
    way: Callable[..., Any], agreement: Any
) -> None:
    exchange = Exchange()
    original, names = way(exchange)
    before = dict(names)
    agreement.is_serving = True
    agreement.want([SimpleNamespace(lora_int_id=5, lora_name="mine", lora_path="/x")])
    with data_parallel._rows_along(original, agreement) as heard:
        reduced = original(torch.tensor([[1, 0], [2, 0]], dtype=torch.int32))
    assert reduced.tolist() == [[1, 10], [2, 10]]
    assert heard() == [Announcement((Adapter.of(5, "mine"),)), OTHER]
    assert exchange.shapes == [(2 + num_rows(SLOTS), ENGINES)]  # one exchange, not two
    assert names == before


def test_the_names_are_put_back_after_an_error(agreement: Any) -> None:
    original, names = by_dist(Exchange())
    before = names["dist"]
    with pytest.raises(AttributeError), data_parallel._rows_along(original, agreement):
        original("no tensor")
    assert names["dist"] is before


def test_a_step_without_an_exchange_is_an_error(agreement: Any) -> None:
    original, _ = function("def exchange(tensor):\n    return tensor", dist=Exchange())
    with data_parallel._rows_along(original, agreement) as heard:
        original(torch.zeros(2, 2))
    with pytest.raises(RuntimeError, match="without the exchange of the data-parallel engines"):
        heard()


def test_without_an_agreement_vllms_own_functions_run() -> None:
    exchange = Exchange()
    exchange.all_reduce = lambda tensor, group: None  # type: ignore[method-assign]
    original, _ = by_dist(exchange)
    tensor = torch.zeros(2, 2)
    assert data_parallel.wrap_run_all_reduce(original)(tensor) is tensor


def test_an_agreement_ends_with_its_engine() -> None:
    manager = WorkerLoRAManager()
    slot_agreement.attach_agreement(manager, 0, ENGINES, lambda own: [own])
    assert slot_agreement.current_agreement() is not None
    del manager
    import gc

    gc.collect()
    assert slot_agreement.current_agreement() is None


def test_what_cannot_be_said_is_said_to_be_a_failure(agreement: Any) -> None:
    agreement.is_serving = True
    agreement.want([SimpleNamespace(lora_int_id=1 << 90, lora_name="a", lora_path="/x")])
    said = agreement.announcement()
    assert (said.wanted, said.has_failed) == ((), True)
    with pytest.raises(ValueError, match="is not a number that lorashard can send"):
        agreement.agree([said, Announcement()])
    agreement.want([])
    said = [agreement.announcement(), Announcement(has_failed=True)]
    with pytest.raises(ValueError, match="data-parallel engine 1 cannot go on"):
        agreement.agree(said)


@pytest.mark.parametrize(
    ("num_engines", "expert_parallel", "most"), [(2, True, 2), (1, True, 3), (2, False, 3)]
)
def test_a_scheduler_is_limited_where_engines_share_experts(
    num_engines: int, expert_parallel: bool, most: int
) -> None:
    lora = SimpleNamespace(max_loras=3)
    parallel = SimpleNamespace(
        data_parallel_size=num_engines, data_parallel_rank=0, tensor_parallel_size=3 - num_engines,
        enable_expert_parallel=expert_parallel,
    )  # fmt: skip
    config = SimpleNamespace(
        lora_config=lora, parallel_config=parallel, model_config=SimpleNamespace()
    )
    scheduler = SimpleNamespace(lora_config=lora)
    data_parallel.limit_adapters(scheduler, config)
    assert scheduler.lora_config.max_loras == most
    assert lora.max_loras == 3
