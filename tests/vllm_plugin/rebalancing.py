"""Run inside a vLLM release, in 2 or 4 workers: EPLB moves experts, and every LoRA slot stays right.

Real: `EplbState` with its `step`, `rearrange` and maps, `rearrange_expert_weights_inplace`, the loop of
the transfer thread with `transfer_layer`, `_move_to_workspace`, the communicator, over gloo; and what
harness.py has. Stand-ins: the policy, which takes maps at random; CUDA's events and streams; vLLM's
group coordinators, around real groups; and the base weights, a few numbers for each expert.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, given, settings, strategies

from lorashard import SplitRequest, split_adapter
from lorashard.vllm_plugin import register

register()

from vllm.distributed import parallel_state  # noqa: E402
from vllm.distributed.eplb import async_worker, eplb_state  # noqa: E402
from vllm.lora.peft_helper import PEFTHelper  # noqa: E402
from vllm.model_executor.models.interfaces import MixtureOfExperts  # noqa: E402

from lorashard.vllm_plugin.load import filled_region  # noqa: E402
from lorashard.vllm_plugin.load.device_copy import DeviceCopy  # noqa: E402
from lorashard.vllm_plugin.patches import expert_rows, reading_ahead, row_batches  # noqa: E402
from lorashard.vllm_plugin.patches.expert_rows import attached_rows  # noqa: E402
from lorashard.vllm_plugin.patches.row_tables import moving_stacks  # noqa: E402
from tests.vllm_plugin import harness  # noqa: E402
from tests.vllm_plugin.harness_selfcheck import SIZES, adapter_of, modules  # noqa: E402
from tests.vllm_plugin.loading import expected_of  # noqa: E402

LAYOUTS = ("L1", "L2", "L1", "L6", "L4-down", "L8", "L1")  # of the adapters 1, 2, ...
NUM_BASE = 3  # numbers of an expert's base weight: fewer than one of its LoRA has
MANY_BASE = 3000  # more than one layer's LoRA has
INTERVAL = 3  # steps from one rearrangement to the next


class _Event:
    """Stand-in for CUDA's."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, *_: Any) -> None:
        """All is done at once."""

    wait = synchronize = record

    def elapsed_time(self, _: Any) -> float:
        return 1.0


class _Stream:
    """Stand-in for CUDA's."""

    def synchronize(self) -> None:
        """All is done at once."""


class _NoDevice:
    """Stand-in for `device_stream` and `torch.cuda.stream`."""

    def __init__(self, _: Any) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


class Worker:
    """One ep rank."""

    def __init__(
        self, ep_rank: int, ep_size: int, folder: Path, *, num_redundant: int, wrapper: Any = "2d",
        max_loras: int = 2, max_cpu_loras: int = 3, shared_loras: bool = False,
        num_base: int = NUM_BASE,
    ) -> None:  # fmt: skip
        self.ep_rank, self.ep_size, self.num_base = ep_rank, ep_size, num_base
        _replace_cuda()
        if not dist.is_initialized():
            dist.init_process_group(
                "gloo", init_method=f"file://{folder}/rendezvous", rank=ep_rank,
                world_size=ep_size, timeout=timedelta(seconds=60),
            )  # fmt: skip
        for name in ("_TP", "_EP", "_EPLB"):
            setattr(parallel_state, name, _coordinator(ep_size, ep_rank))
        self.folder = folder
        self.adapters = {
            number: adapter_of("L8" if shared_loras else layout, seed=number)
            for number, layout in enumerate(LAYOUTS, start=1)
        }
        eplb = SimpleNamespace(
            num_redundant_experts=num_redundant, use_async=False, communicator="torch_nccl",
            window_size=2, step_interval=INTERVAL, policy="default", log_balancedness_interval=1,
            migration_batching_enabled=False,
        )  # fmt: skip
        parallel = {
            "enable_eplb": True,
            "eplb_config": eplb,
            "enable_elastic_ep": False,
            "num_ubatches": 0,
        }
        self.engine = harness.make_engine(
            **SIZES, wrapper=wrapper, ep_size=ep_size, ep_rank=ep_rank, module_names=modules(),
            max_loras=max_loras, max_cpu_loras=max_cpu_loras, parallel=parallel,
            num_redundant=num_redundant, shared_loras=shared_loras,
        )  # fmt: skip
        self.manager = self.engine._adapter_manager
        self.layers = [harness.layers(self.engine)[name] for name in modules()]
        model = self.manager.model
        self.num_physical = SIZES["num_experts"] + num_redundant
        self.num_local = self.num_physical // ep_size
        for layer_number, layer in enumerate(self.layers):
            self._put_base_weights(layer_number, layer.base_layer)
        model.moe_layers = [layer.base_layer for layer in self.layers]
        model.expert_weights = []
        model.num_moe_layers = len(self.layers)
        model.num_routed_experts = model.num_logical_experts = SIZES["num_experts"]
        model.num_physical_experts = self.num_physical
        model.num_local_physical_experts = self.num_local
        model.num_redundant_experts = num_redundant
        model.num_expert_groups = 1
        model.get_expert_mapping = None  # no weights are loaded, those of redundant experts neither
        model.set_eplb_state = partial(MixtureOfExperts.set_eplb_state, model)
        self.state = eplb_state.EplbState(
            SimpleNamespace(**parallel, data_parallel_size=1), torch.device("cpu")
        )
        self.state.add_model(model, SimpleNamespace(model="tiny", compute_hash=lambda: "tiny"))
        (self.model_state,) = self.state.model_states.values()
        self.rows = attached_rows(self.manager)
        self.random = random.Random(0)
        self.state.policy = SimpleNamespace(rebalance_experts=self._random_maps)
        self.gate = threading.Event()
        self.gate.set()
        announce = self.rows.announce
        self.rows.announce = lambda group: (self.gate.wait(), announce(group))[1]
        self.num_loads = 0

    def use_thread(self) -> None:
        """From now on experts are moved in vLLM's thread."""
        self.state.parallel_config.eplb_config.use_async = True
        self.state.is_async = True
        loop = partial(async_worker.transfer_run_periodically, self.state, _Stream())
        self.thread = threading.Thread(target=loop, daemon=True)
        self.thread.start()

    def _put_base_weights(self, layer_number: int, base_layer: Any) -> None:
        experts = [
            (self.ep_rank * self.num_local + slot) % SIZES["num_experts"]
            for slot in range(self.num_local)
        ]
        for name, sign in (("w13_weight", 1.0), ("w2_weight", -1.0)):
            values = torch.tensor(
                [[sign * _base(layer_number, e)] * self.num_base for e in experts]
            )
            # The first as FP8's, of one byte, which EPLB gets another view of.
            dtype = torch.int8 if name == "w13_weight" else values.dtype
            parameter = torch.nn.Parameter(
                values.view(self.num_local, self.num_base, 1).view(dtype), requires_grad=False
            )
            setattr(base_layer.routed_experts, name, parameter)
        object.__setattr__(base_layer, "router", SimpleNamespace(eplb_state=None))

    def _random_maps(self, *_: Any) -> torch.Tensor:
        """Each expert at least once; the same on all ranks."""
        rows = []
        for _layer in self.layers:
            experts = list(range(SIZES["num_experts"]))
            experts += self.random.choices(experts, k=self.num_physical - len(experts))
            self.random.shuffle(experts)
            rows.append(experts)
        return torch.tensor(rows)

    def path(self, number: int, form: str) -> Path:
        """Where an adapter is: "plain", or "shards" for other ranks."""
        return self.folder / f"{form}{number}"

    def write_adapters(self) -> None:
        """On one rank, for all."""
        if self.ep_rank == 0:
            for number, built in self.adapters.items():
                built.write(self.path(number, "plain"))
                split_adapter(
                    self.path(number, "plain"), self.path(number, "shards"), SplitRequest(2)
                )
        dist.barrier()

    def request(self, number: int) -> Any:
        """For an adapter, half of them shards."""
        form = ("plain", "shards")[number % 2]
        return harness.request(self.engine, self.path(number, form), f"a{number}", number)

    def load(self, number: int) -> None:
        """As vLLM adds an adapter: in a step, which is in inference mode, or between two."""
        self.num_loads += 1
        with torch.inference_mode(self.num_loads % 2 == 0):
            self.engine.add_adapter(self.request(number))

    def ask(self, number: int) -> Any:
        """Begin to read an adapter, that `add_read` adds."""
        request = reading_ahead._marked(
            self.request(number), f"{reading_ahead._TO_BE_READ}{number}"
        )
        with mock.patch.object(filled_region, "begin_copy", DeviceCopy):  # as on a GPU
            while not self.engine.add_adapter(request):
                time.sleep(0.001)
        return reading_ahead._marked(self.request(number), f"{reading_ahead._WAS_READ}{number}")

    def load_tensors(self, number: int) -> None:
        """As verl and AReaL add one: of tensors in memory, with all experts."""
        built = self.adapters[number]
        if built.spec.layout != "L1":  # what the config of others says does not come along
            return self.load(number)
        self.unload(number)
        model = self.engine._lora_model_cls.from_lora_tensors(
            number, dict(built.tensors), PEFTHelper.from_dict(built.config), device="cpu",
            dtype=torch.bfloat16,
        )  # fmt: skip
        while len(self.manager) >= self.manager.capacity:  # as LRUCacheWorkerLoRAManager does
            self.manager.remove_oldest_adapter()
        self.manager._add_adapter(model)
        self.manager.activate_adapter(number)
        return None

    def evict(self, number: int) -> None:
        """Out of its slot, and still in host memory."""
        self.manager.deactivate_adapter(number)

    def begin_cycle(self) -> None:
        """The next step rearranges, or begins to."""
        self.state.expert_rearrangement_step = INTERVAL - 1
        self.step()

    def commit(self) -> None:
        """A step in which a layer arrives, if one is on its way."""
        if self.model_state.rebalanced:
            self.wait_for_transfer()
        dist.barrier()
        self.state.expert_rearrangement_step = 0
        self.step()

    def unload(self, number: int) -> None:
        """As vLLM removes one."""
        self.engine.remove_adapter(number)

    def step(self) -> None:
        """What vLLM does after a forward pass."""
        self.state.step()

    def wait_for_transfer(self) -> None:
        """Until a layer waits to be committed on this rank."""
        while self.model_state.rebalanced and self.model_state.pending_result is None:
            assert self.thread.is_alive()
            time.sleep(0.0005)

    def finish_cycle(self) -> None:
        """Until nothing is on its way on any rank."""
        while self.model_state.rebalanced:
            self.commit()

    def wrong(self) -> list[str]:
        """Where a slot of an active adapter, or a base weight, is not what vLLM's maps say."""
        found: list[str] = []
        maps = self.model_state.physical_to_logical_map.tolist()
        first = self.ep_rank * self.num_local
        for layer_number, layer in enumerate(self.layers):
            held = maps[layer_number][first : first + self.num_local]
            for slot, expert in enumerate(held):
                weights = layer.base_layer.routed_experts
                held_value = weights.w13_weight[slot, 0].view(torch.float32).item()
                if held_value != _base(layer_number, expert):
                    found.append(f"base weight of layer {layer_number} slot {slot}")
        for number in filter(None, self.manager.lora_index_to_id):
            loaded = harness.deltas(self.engine, harness.slot_of(self.engine, number))
            expected = expected_of(self.adapters[number])
            for layer_number, name in enumerate(modules()):
                for physical, deltas in loaded[name].items():
                    wanted = expected[name, maps[layer_number][physical]]
                    found += [
                        f"adapter {number} layer {layer_number} slot {physical} {projection}"
                        for projection, delta in deltas.items()
                        if not torch.allclose(delta, wanted[projection], rtol=1e-5, atol=1e-6)
                    ]
        return found


def _base(layer_number: int, expert: int) -> float:
    return 100.0 * layer_number + expert + 1


def _replace_cuda() -> None:
    torch.Event = torch.cuda.Event = _Event
    torch.cuda.stream = _NoDevice
    torch.cuda.Stream = _Stream
    from vllm.distributed.eplb import eplb_communicator, rebalance_execute

    for module in (async_worker, eplb_communicator, rebalance_execute):
        if hasattr(module, "device_stream"):
            module.device_stream = _NoDevice
    eplb_state.get_node_count = lambda: 1


def _coordinator(ep_size: int, ep_rank: int) -> Any:
    group = dist.new_group(list(range(ep_size)), timeout=timedelta(seconds=60))
    return SimpleNamespace(
        world_size=ep_size, rank=ep_rank, rank_in_group=ep_rank, cpu_group=group,
        device_group=group, device_communicator=None, device=torch.device("cpu"),
    )  # fmt: skip


def _skewed(worker: Worker, seed: int) -> Iterator[float]:
    """How long this rank dawdles before each thing it does."""
    numbers = random.Random(1000 * seed + worker.ep_rank)
    while True:
        yield numbers.choice((0.0, 0.0, 0.002, 0.005))


def random_runs(worker: Worker, *, in_thread: bool, num_steps: int, seed: int) -> list[str]:
    """Steps, and between them loads, reuses, unloads and evictions at random, ranks apart in time."""
    wrong: list[str] = []
    numbers = random.Random(seed)
    delays = _skewed(worker, seed)
    reading: list[Any] = []
    kinds: dict[str, Callable[[int], object]] = {
        "load": worker.load,
        "tensors": worker.load_tensors,
        "evict": worker.evict,
        "unload": worker.unload,
        "read": lambda number: reading or reading.append(worker.ask(number)),
        "add": lambda _: reading and worker.engine.add_adapter(reading.pop()),
    }
    for step in range(num_steps):
        for _ in range(numbers.choice((0, 1, 1, 2))):
            number = numbers.choice(tuple(worker.adapters))
            what = numbers.choice(("load", "load", *kinds))
            time.sleep(next(delays))
            kinds[what](number)
            wrong += [f"step {step} after {what} {number}: {line}" for line in worker.wrong()[:2]]
        if in_thread and numbers.random() < 0.5:
            worker.wait_for_transfer()
        time.sleep(next(delays))
        worker.step()
        wrong += [f"step {step}: {line}" for line in worker.wrong()[:2]]
        if wrong:
            return wrong
    worker.finish_cycle()
    return wrong + worker.wrong()


def every_point(worker: Worker) -> list[str]:
    """A write of a slot at each point of a layer's way, the ranks before and after it in any mixture.

    Points: before the layer leaves, on its way, arrived but not committed, and after.
    """
    wrong: list[str] = []
    cases = 0
    for mixture in range(2**worker.ep_size):
        leaves_first = bool(mixture >> worker.ep_rank & 1)
        for number, other in ((1, 2), (2, 3), (3, 4)):
            for layer in range(len(worker.layers)):
                for is_cached in (True, False):
                    cases += 1
                    found = _one_point(worker, layer, number, other, is_cached, leaves_first)
                    what = f"ranks {mixture:b}, adapter {number}, layer {layer}, {is_cached=}"
                    wrong += [f"{what}: {line}" for line in found[:2]]
                    if wrong:
                        return wrong
    assert cases
    return wrong


def _one_point(
    worker: Worker, layer: int, number: int, other: int, is_cached: bool, leaves_first: bool
) -> list[str]:
    """Adapter `number` comes into a slot while `layer` is about to leave, or has left."""
    worker.finish_cycle()
    for each in worker.adapters:
        worker.unload(each)
    worker.load(other)
    if is_cached:  # in host memory, but not in a slot
        worker.load(number)
        worker.evict(number)
    dist.barrier()
    if layer == 0:
        worker.gate.clear()
    worker.begin_cycle()
    for before in range(layer):
        worker.wait_for_transfer()
        dist.barrier()
        if before == layer - 1:
            worker.gate.clear()
        worker.commit()
    found = worker.wrong()
    if leaves_first:
        worker.gate.set()
        time.sleep(0.003)
    worker.load(number)
    worker.gate.set()
    found += worker.wrong()
    worker.wait_for_transfer()
    dist.barrier()
    worker.load(5)  # arrived, but not committed
    found += worker.wrong()
    worker.commit()
    found += worker.wrong()
    worker.load(number)
    worker.finish_cycle()
    return found + worker.wrong()


def run(ep_rank: int, ep_size: int, folder: str, checks: list[str]) -> dict[str, Any]:
    """What each check finds."""
    found: dict[str, Any] = {}
    for name in checks:
        dist.barrier() if dist.is_initialized() else None
        where = Path(folder) / name
        where.mkdir(exist_ok=True)
        found[name] = CHECKS[name](ep_rank, ep_size, where)
    return found


def _started(ep_rank: int, ep_size: int, folder: Path, **options: Any) -> Worker:
    worker = Worker(ep_rank, ep_size, folder, **options)
    worker.write_adapters()
    return worker


def sync(ep_rank: int, ep_size: int, folder: Path) -> list[str]:
    """EPLB's synchronous way, with redundant experts; a message has the rows of one slot."""
    worker = _started(ep_rank, ep_size, folder, num_redundant=4)
    with mock.patch.object(row_batches, "SEND_BYTES", 1):
        return random_runs(worker, in_thread=False, num_steps=120, seed=1)


def sync_without_redundant(ep_rank: int, ep_size: int, folder: Path) -> list[str]:
    """The same without them, in the 3D layers; the buffer of the base weights holds all layers' rows."""
    worker = _started(ep_rank, ep_size, folder, num_redundant=0, wrapper="3d", num_base=MANY_BASE)
    exchange = mock.Mock(wraps=expert_rows.exchange_rows)
    with mock.patch.object(expert_rows, "exchange_rows", exchange):
        wrong = random_runs(worker, in_thread=False, num_steps=60, seed=2)
    together = {len(call.args[0]) for call in exchange.call_args_list}
    if together != {len(worker.layers)}:
        wrong.append(f"so many layers went together: {together}")
    return wrong


def thread(ep_rank: int, ep_size: int, folder: Path) -> list[str]:
    """EPLB's thread."""
    worker = _started(ep_rank, ep_size, folder, num_redundant=4)
    worker.use_thread()
    return random_runs(worker, in_thread=True, num_steps=200, seed=3)


def points(ep_rank: int, ep_size: int, folder: Path) -> list[str]:
    """See `every_point`."""
    worker = _started(ep_rank, ep_size, folder, num_redundant=4)
    worker.use_thread()
    return every_point(worker)


def shared_factors(ep_rank: int, ep_size: int, folder: Path) -> list[str]:
    """--enable-moe-shared-loras: factors that all experts share stay where they are."""
    try:
        worker = _started(ep_rank, ep_size, folder, num_redundant=4, shared_loras=True)
    except ValueError:
        return []  # a release without it
    worker.use_thread()
    return random_runs(worker, in_thread=True, num_steps=40, seed=4)


def sequences(ep_rank: int, ep_size: int, folder: Path) -> list[str]:
    """Hypothesis makes up what happens in which order, the same on all ranks; both ways in turn."""
    wrong: list[str] = []
    worker = _started(ep_rank, ep_size, folder, num_redundant=4, num_base=MANY_BASE)
    _tries(worker, wrong)
    worker = Worker(ep_rank, ep_size, folder, num_redundant=4)
    worker.use_thread()
    _tries(worker, wrong)
    return wrong


def _tries(worker: Worker, wrong: list[str]) -> None:
    numbers = strategies.sampled_from(tuple(worker.adapters))
    happenings = strategies.one_of(
        strategies.tuples(strategies.sampled_from((worker.begin_cycle, worker.commit))),
        strategies.tuples(
            strategies.sampled_from(
                (worker.load, worker.load_tensors, worker.unload, worker.evict, worker.load)
            ),
            numbers,
        ),
    )

    # Without a failure, and without what differs between processes, all ranks try the same.
    @settings(
        max_examples=20, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(strategies.lists(happenings, min_size=1, max_size=12))
    def try_one(happened: list[Any]) -> None:
        done = []
        for what, *arguments in happened:
            if wrong:
                return
            what(*arguments)
            done.append(f"{what.__name__}({', '.join(map(str, arguments))})")
            wrong.extend(f"after {done}: {line}" for line in worker.wrong()[:2])

    try_one()
    worker.finish_cycle()
    wrong.extend(worker.wrong())


def traffic(ep_rank: int, ep_size: int, folder: Path) -> list[str]:
    """Slots without an adapter do not travel, and without a rearrangement nothing happens."""
    worker = _started(ep_rank, ep_size, folder, num_redundant=0)
    sent: list[list[int]] = []
    communicator = worker.model_state.communicator
    add_send = communicator.add_send

    def counted(tensors: list[torch.Tensor], *args: Any, **kwargs: Any) -> None:
        sent.append([tensor.nbytes for tensor in tensors])
        add_send(tensors, *args, **kwargs)

    communicator.add_send = counted
    wrong: list[str] = []
    for num_adapters in range(3):
        if num_adapters:
            worker.load(num_adapters)
        sent.clear()
        worker.begin_cycle()
        stacks = moving_stacks(worker.layers[0])
        base = [sizes for sizes in sent if len(sizes) == 2]  # two base weights
        lora = [sizes for sizes in sent if len(sizes) == 1]
        row = sum(stack[0, 0].nbytes for stack in stacks)
        if len(base) + len(lora) < len(sent) or not base:
            wrong.append(f"{num_adapters} adapters: {sent}")
        if sum(map(sum, lora)) != len(base) * num_adapters * row:
            wrong.append(f"{num_adapters} adapters: {lora} bytes for {len(base)} experts")
        # There is room for a layer with an adapter in each slot, or two layers with half of them.
        most = -(-len(worker.layers) * num_adapters // worker.rows.num_slots)
        if len(lora) > most * (ep_size - 1):
            wrong.append(f"{num_adapters} adapters: {len(lora)} times something was sent")
        calls: list[str] = []
        for name in ("begin_transfer", "arrived", "activated", "_move"):
            setattr(worker.rows, name, partial(calls.append, name))
        worker.state.expert_rearrangement_step = 0
        worker.step()
        for name in ("begin_transfer", "arrived", "activated", "_move"):
            delattr(worker.rows, name)
        wrong += [f"{name} was called in a step without a rearrangement" for name in calls]
    return wrong + worker.wrong()


def read_ahead(ep_rank: int, ep_size: int, folder: Path) -> list[str]:
    """Experts move after an adapter was read and copied to the device, and before it is added."""
    worker = _started(ep_rank, ep_size, folder, num_redundant=4)
    was_read = worker.ask(1)
    worker.begin_cycle()
    worker.engine.add_adapter(was_read)
    wrong = worker.wrong()
    worker.evict(1)
    worker.manager.activate_adapter(1)  # from host memory
    return wrong + worker.wrong()


def after_a_failure(ep_rank: int, ep_size: int, folder: Path) -> list[str]:
    """An adapter that one rank cannot activate leaves ranks that differ in what they wrote, for once."""
    worker = _started(ep_rank, ep_size, folder, num_redundant=4)
    worker.load(1)
    activate = worker.manager.activate_adapter

    def fail(number: int) -> None:
        raise RuntimeError(f"no room for adapter {number}")

    if ep_rank == 0:
        worker.manager.activate_adapter = fail
    wrong = []
    try:
        worker.load(2)
        wrong.append("adapter 2 was added")
    except (RuntimeError, ValueError):
        worker.manager.activate_adapter = activate
    worker.load(3)
    travelled = []
    begin = worker.rows.begin_transfer
    worker.rows.begin_transfer = lambda said: travelled.append(begin(said)) or travelled[-1]
    for _ in range(2):
        worker.begin_cycle()
        wrong += worker.wrong()
    slots = {harness.slot_of(worker.engine, number) for number in (1, 3)}
    if travelled[-1] != slots or travelled[0] == slots:
        wrong.append(f"slots {slots} are used, {travelled} have travelled")
    return wrong


def profile(ep_rank: int, ep_size: int, folder: Path) -> list[str]:
    """The rearrangement of a start, which only reserves memory."""
    worker = _started(ep_rank, ep_size, folder, num_redundant=4)
    worker.load(1)
    before = worker.model_state.physical_to_logical_map.tolist()
    worker.state.step(is_dummy=True, is_profile=True)
    changed = worker.model_state.physical_to_logical_map.tolist() != before
    return (["the maps have changed"] if changed else []) + worker.wrong()


def published_maps(ep_rank: int, ep_size: int, folder: Path) -> list[str]:
    """What the engine writes is a map for `split`, and what it makes is this rank's own file."""
    os.environ["LORASHARD_EXPERT_MAPS"] = str(folder / "maps")
    worker = _started(ep_rank, ep_size, folder, num_redundant=4)
    worker.begin_cycle()
    dist.barrier()
    document = json.loads((folder / "maps/expert-map.json").read_text())
    if ep_rank == 0:
        for number in (1, 5):  # one trains a part of the model
            request = SplitRequest(ep_size, expert_map=folder / "maps/expert-map.json")
            split_adapter(worker.path(number, "plain"), folder / f"own{number}", request)
    dist.barrier()
    for number in (1, 5):
        worker.engine.add_adapter(
            harness.request(worker.engine, folder / f"own{number}", f"own{number}", number)
        )
    del os.environ["LORASHARD_EXPERT_MAPS"]
    held = worker.rows.loader.maps.ranks_of(modules()[1], ep_size)
    written = document["layers"]["1"]["ranks"]
    same = [list(dict.fromkeys(experts)) for experts in held] == written
    return ([] if same else ["the map is not the engine's"]) + worker.wrong()


def redundant_experts_without_weights(ep_rank: int, ep_size: int, folder: Path) -> list[str]:
    """A model whose list of experts to load knows only the logical ones is refused, GLM-4-MoE's of 0.24 too."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    worker = _started(ep_rank, ep_size, folder, num_redundant=4)
    model, wrong = worker.manager.model, []

    def listing(num_listed: int) -> Any:
        return lambda: RoutedExperts.make_expert_params_mapping(
            model, "gate_proj", "down_proj", "up_proj", SIZES["num_experts"], num_listed
        )

    lists = [(0, listing(0)), (4, listing(4))]
    del model.get_expert_mapping
    if hasattr(model, "get_expert_mapping"):  # of Glm4MoeForCausalLM, until 0.25
        lists.append((0, partial(type(model).get_expert_mapping, model)))
    for num_listed, experts in lists:
        model.get_expert_mapping = experts
        config = SimpleNamespace(model="tiny", compute_hash=lambda of=experts: str(id(of)))
        model.expert_weights = []
        try:
            worker.state.add_model(model, config)
        except ValueError as err:
            if num_listed or "num_redundant_experts 0" not in str(err):
                wrong.append(f"{num_listed} redundant experts listed: {err}")
        else:
            wrong += [] if num_listed else ["the model was taken on"]
    return wrong


CHECKS: dict[str, Callable[..., list[str]]] = {
    check.__name__: check
    for check in (
        sync, sync_without_redundant, thread, points, read_ahead, shared_factors, sequences, traffic,
        after_a_failure, profile,
        published_maps, redundant_experts_without_weights,
    )
}  # fmt: skip
