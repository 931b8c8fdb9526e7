"""Run inside a vLLM release, in 2 to 4 processes: data-parallel engines agree on LoRA slots.

Real: the exchange of the engines, over gloo (`coordinate_batch_across_dp` of the V1 model runner,
`dispatch_cg_and_sync_dp` of V2), `CudagraphDispatcher`, `CudaGraphManager`, `LoRAModelRunnerMixin`,
`LoraState`, the metadata of LoRA's kernels, and what harness.py has. Stand-ins: vLLM's group
coordinators, around real groups; the rest of the model runners, which calls these in their order; and
the forward pass, which takes what it would send and compute with, and compares.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, given, settings, strategies

from lorashard.vllm_plugin import register

STOCK = os.environ.get("LORASHARD_DISABLE") == "1"  # then it does nothing
register()

from tests.vllm_plugin import harness  # noqa: E402

# The wrapper around the GPU's kernels; what it tells them is the same on the CPU.
harness._PLATFORM.get_punica_wrapper = classmethod(
    lambda cls: "vllm.lora.punica_wrapper.punica_gpu.PunicaWrapperGPU"
)

from vllm.config.compilation import CUDAGraphMode  # noqa: E402
from vllm.distributed import parallel_state  # noqa: E402
from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta  # noqa: E402
from vllm.lora.punica_wrapper import punica_gpu  # noqa: E402
from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher  # noqa: E402
from vllm.v1.worker import dp_utils as v1_exchange  # noqa: E402
from vllm.v1.worker.gpu import cudagraph_utils  # noqa: E402
from vllm.v1.worker.gpu import model_runner as v2_runner  # noqa: E402
from vllm.v1.worker.gpu.lora_utils import LoraState, get_lora_capture_cases  # noqa: E402
from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin  # noqa: E402

from lorashard import SplitRequest, split_adapter  # noqa: E402
from lorashard.vllm_plugin.engine.agreed_slots import slot_share  # noqa: E402
from lorashard.vllm_plugin.engine.live import moe_wrappers  # noqa: E402
from lorashard.vllm_plugin.patches.slot_agreement import attached_agreement  # noqa: E402
from tests.vllm_plugin.harness_selfcheck import SIZES, adapter_of, modules  # noqa: E402
from tests.vllm_plugin.loading import expected_of  # noqa: E402

punica_gpu.LoRAKernelMeta = LoRAKernelMeta  # vLLM imports it where there is Triton

NUM_ADAPTERS = 6
SIZES_OF_GRAPHS = [1, 2, 4, 8, 16]
BASE = 0

# What an engine computes in a step: pairs (adapter or BASE, tokens), one for each request. () = idle.
Batch = Sequence[tuple[int, int]]


class _Group:
    """Stand-in for a GroupCoordinator, around a real group."""

    def __init__(self, size: int, rank: int) -> None:
        self.cpu_group = dist.new_group(list(range(size)), timeout=timedelta(seconds=60))
        self.device_group, self.device = self.cpu_group, torch.device("cpu")
        self.world_size, self.rank, self.rank_in_group = size, rank, rank
        self.is_first_rank = self.is_last_rank = True
        self.num_exchanges = 0

    def cpu_all_reduce_(self, tensor: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(tensor, group=self.cpu_group)
        return tensor


def _alone() -> Any:
    return SimpleNamespace(
        world_size=1, rank=0, rank_in_group=0, cpu_group=None, device_group=None,
        is_first_rank=True, is_last_rank=True,
    )  # fmt: skip


class Engine:
    """One data-parallel engine with one worker. version: of the model runner, 1 or 2."""

    def __init__(
        self, rank: int, size: int, folder: Path, *, version: int, max_loras: int = 4,
        max_cpu_loras: int = 5,
    ) -> None:  # fmt: skip
        self.rank, self.size, self.folder, self.version = rank, size, folder, version
        self.max_loras = max_loras
        if not dist.is_initialized():
            dist.init_process_group(
                "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size,
                timeout=timedelta(seconds=60),
            )  # fmt: skip
        parallel_state._DP = parallel_state._EP = _Group(size, rank)
        parallel_state._TP, parallel_state._PP = _alone(), _alone()
        self.adapters = {n: adapter_of("L1", seed=n) for n in range(1, NUM_ADAPTERS + 1)}
        self.expected = {n: expected_of(built) for n, built in self.adapters.items()}
        parallel: dict[str, Any] = {
            "data_parallel_size": size, "data_parallel_rank": rank, "tensor_parallel_size": 1,
            "disable_nccl_for_dp_synchronization": True, "num_ubatches": 0,
        }  # fmt: skip
        self.engine = harness.make_engine(
            **SIZES, ep_size=size, ep_rank=rank, module_names=modules(), max_loras=max_loras,
            max_cpu_loras=max_cpu_loras, parallel=parallel,
        )  # fmt: skip
        self.manager = self.engine._adapter_manager
        self.meta = next(
            iter(moe_wrappers(self.manager).values())
        ).punica_wrapper.token_mapping_meta
        self.agreement = None if STOCK else attached_agreement(self.engine)
        if self.agreement is not None:
            self.agreement.is_serving = True  # as after the warm-up
        self.parallel = SimpleNamespace(**parallel)
        self.runner = LoRAModelRunnerMixin()
        self.runner.lora_manager = self.engine
        self.runner.lora_config = self.engine.lora_config
        self._make_graphs()

    def _make_graphs(self) -> None:
        compilation = SimpleNamespace(
            cudagraph_mode=CUDAGraphMode.FULL, cudagraph_capture_sizes=SIZES_OF_GRAPHS,
            max_cudagraph_capture_size=SIZES_OF_GRAPHS[-1], cudagraph_specialize_lora=True,
            compile_sizes=[], adjust_cudagraph_sizes_for_spec_decode=lambda *_: None,
        )  # fmt: skip
        config = SimpleNamespace(
            compilation_config=compilation, lora_config=self.engine.lora_config,
            num_speculative_tokens=0, speculative_config=None, parallel_config=self.parallel,
            scheduler_config=SimpleNamespace(max_num_seqs=16),
            cache_config=SimpleNamespace(use_kda_recoverssm=False),
        )  # fmt: skip
        self.dispatcher = CudagraphDispatcher(config)
        self.dispatcher.initialize_cudagraph_keys(CUDAGraphMode.FULL, 1)
        cudagraph_utils.current_platform.get_global_graph_pool = lambda: None
        self.graphs = cudagraph_utils.CudaGraphManager(
            config, torch.device("cpu"), CUDAGraphMode.FULL, 1,
            lora_capture_cases=get_lora_capture_cases(self.engine.lora_config, compilation),
        )  # fmt: skip
        self.graphs._graphs_captured = True

    def write_adapters(self) -> None:
        """On one rank, for all."""
        if self.rank == 0:
            for number, built in self.adapters.items():
                built.write(self.path(number, "plain"))
                request = SplitRequest(self.size)
                split_adapter(self.path(number, "plain"), self.path(number, "shards"), request)
        dist.barrier()

    def path(self, number: int, form: str) -> Path:
        return self.folder / f"{form}{number}"

    def request(self, number: int, **options: Any) -> Any:
        form = "plain" if STOCK or number % 2 else "shards"
        return harness.request(
            self.engine, self.path(number, form), f"a{number}", number, **options
        )

    def add(self, number: int) -> None:
        """As EngineCore.add_lora does, between two steps of this engine."""
        self.runner.add_lora(self.request(number))

    def remove(self, number: int) -> None:
        self.runner.remove_lora(number)

    def step(self, batch: Batch) -> list[str]:
        """One step, at the same time on all engines. Returns what would be wrong on this one."""
        return (self._v1_step if self.version == 1 else self._v2_step)(batch)

    def _inputs(self, batch: Batch) -> tuple[tuple[int, ...], tuple[int, ...], set[Any]]:
        numbers = tuple(number for number, _ in batch)
        tokens = tuple(number for number, count in batch for _ in range(count))
        return numbers, tokens, {self.request(number) for number in set(numbers) - {BASE}}

    def _v1_step(self, batch: Batch) -> list[str]:
        prompts, tokens, requests = self._inputs(batch)
        if batch:
            self.runner._set_active_loras(prompts, tokens, requests)

        def dispatch(count: int, **options: Any) -> Any:
            return self.dispatcher.dispatch(
                count, has_lora=bool(requests), num_active_loras=len(requests), **options
            )

        num_tokens = len(tokens) or 1
        mode, graph = dispatch(num_tokens)
        _, across, synced = v1_exchange.coordinate_batch_across_dp(
            num_tokens_unpadded=num_tokens, allow_microbatching=False, parallel_config=self.parallel,
            num_tokens_padded=graph.num_tokens, cudagraph_mode=mode.value,
        )  # fmt: skip
        padded = int(across[self.rank])
        mode, graph = dispatch(padded, valid_modes={CUDAGraphMode(synced)})
        counts = np.ones(1, dtype=np.int32)
        with (
            nullcontext()
            if batch
            else self.runner.maybe_dummy_run_with_lora(self.runner.lora_config, counts, counts)
        ):
            return self._forward(tokens, padded, mode, graph.num_active_loras)

    def _v2_step(self, batch: Batch) -> list[str]:
        prompts, tokens, requests = self._inputs(batch)
        state = LoraState(32)
        names = [str(place) for place in range(len(batch))]
        for place, number in enumerate(prompts):
            request = next((r for r in requests if r.lora_int_id == number), None)
            state.add_request(names[place], place, request)
        with (
            nullcontext()
            if batch
            else self.runner.maybe_dummy_run_with_lora(
                self.runner.lora_config, np.ones(1, dtype=np.int32), None, True, self.max_loras
            )
        ):
            num_active = v2_runner.get_num_active_loras_for_dispatch(
                self.runner.lora_config, state, names, not batch
            )
            graph, _ = v2_runner.dispatch_cg_and_sync_dp(
                self.graphs, len(batch) or 1, len(tokens) or 1, None, self.size, self.rank,
                num_active_loras=num_active,
            )  # fmt: skip
            if batch:
                inputs = state.make_lora_inputs(
                    names, np.arange(len(batch)), np.array([count for _, count in batch])
                )
                self.runner._set_active_loras(*inputs)
            return self._forward(tokens, graph.num_tokens, graph.cg_mode, graph.num_active_loras)

    def _forward(
        self, tokens: Sequence[int], padded: int, mode: CUDAGraphMode, graph: int
    ) -> list[str]:
        """What would be wrong: own tokens that are sent, and all tokens that are computed here."""
        sent = self.meta.token_lora_mapping[:padded].tolist()
        # Where stock leaves a batch without LoRA, what it sends for padding is nobody's.
        owners = [*tokens, *((BASE,) * (padded - len(tokens)))]
        if STOCK:
            sent, owners = sent[: len(tokens)], list(tokens)
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, (sent, owners))
        pairs = {
            (owner, slot) for slots, of in gathered for slot, owner in zip(slots, of, strict=True)
        }
        wanted = {slot for owner, slot in pairs if owner != BASE}
        *_, active_ids, no_lora, num_active = self.meta.meta_args(padded, False)
        active = active_ids.tolist()[: int(num_active)]
        wrong = [f"base tokens with slot {s}" for owner, s in pairs if owner == BASE and s != -1]
        for owner, slot in pairs:
            if owner != BASE:
                wrong += self._wrong_in_slot(owner, slot)
        if wanted and bool(no_lora):
            wrong.append("LoRA is skipped for others' tokens")
        # Kernels of some releases look at max_loras of them.
        active = active if STOCK else active[: self.max_loras]
        wrong += [f"slot {slot} is not computed" for slot in wanted if slot not in active]
        if not STOCK:
            wrong += self._wrong_in_dense_layers(tokens)
        if mode != CUDAGraphMode.NONE and bool(wanted) != bool(graph):
            wrong.append(f"the graph for {graph} adapters, and there are {len(wanted)}")
        if not wanted and not bool(no_lora) and not STOCK:
            wrong.append("LoRA is computed for nobody")
        return wrong

    def _wrong_in_dense_layers(self, tokens: Sequence[int]) -> list[str]:
        """Where own tokens are not computed by the metadata with their own adapters, or are twice."""
        numbers = self.manager.lora_index_to_id
        found: list[tuple[int, int]] = []
        for place, slot in enumerate(self.meta.active_lora_ids.tolist()):
            begin = int(self.meta.lora_token_start_loc[place])
            count = int(self.meta.num_tokens_per_lora[place])
            if slot >= 0 and not bool(self.meta.no_lora_flag_cpu):
                of_slot = self.meta.token_indices_sorted_by_lora_ids[begin : begin + count]
                found += [(token, numbers[slot]) for token in of_slot.tolist()]
        right = [(place, number) for place, number in enumerate(tokens) if number != BASE]
        return [] if sorted(found) == right else [f"dense layers: {sorted(found)}, not {right}"]

    def _wrong_in_slot(self, owner: int, slot: int) -> list[str]:
        held = self.manager.lora_index_to_id[slot] if slot >= 0 else None
        if held != owner:
            return [f"adapter {owner} in slot {slot}, which holds {held}"]
        loaded = harness.deltas(self.engine, slot)
        return [
            f"adapter {owner} slot {slot}: {name} expert {expert} {projection}"
            for name in modules()
            for expert, deltas in loaded[name].items()
            for projection, delta in deltas.items()
            if not torch.allclose(
                delta, self.expected[owner][name, expert][projection], rtol=1e-5, atol=1e-6
            )
        ]


def _started(rank: int, size: int, folder: Path, version: int, **options: Any) -> Engine:
    engine = Engine(rank, size, folder, version=version, **options)
    engine.write_adapters()
    return engine


# One batch for each of two engines; further ones are idle.
Steps = Sequence[tuple[Batch, Batch]]


def _run(engine: Engine, steps: Steps) -> list[str]:
    wrong: list[str] = []
    for number, batches in enumerate(steps):
        own = batches[engine.rank] if engine.rank < len(batches) else ()
        wrong += [f"step {number}: {line}" for line in engine.step(own)]
    return wrong


def slots_of_each(engine: Engine) -> list[str]:
    """Fault i: engines give out slots in their own order."""
    for number in (1, 2):
        engine.add(number)
    engine.manager.remove_all_adapters()
    return _run(engine, [([(1, 2)], [(2, 2)]), ([(1, 1), (2, 3)], [(2, 1), (1, 1)])])


def idle_engine(engine: Engine) -> list[str]:
    """Fault ii: an idle engine's step removes its adapters."""
    for number in (1, 2):
        engine.add(number)
    wrong = _run(engine, [((), ())] * 2)
    missing = {1, 2} - engine.engine.list_adapters()
    return wrong + [f"adapter {number} was removed" for number in sorted(missing)]


def others_tokens(engine: Engine) -> list[str]:
    """Fault iii: LoRA is skipped for others' tokens where own ones have none."""
    engine.add(1)
    return _run(engine, [([(1, 3)], [(BASE, 2)]), ([(BASE, 3)], [(1, 2)])])


def stale_mapping(engine: Engine) -> list[str]:
    """Fault iv: a batch without LoRA sends the mapping of the batch before."""
    engine.add(1)
    return _run(engine, [([(1, 3)], [(1, 3)]), ([(BASE, 3)], [(1, 2)])])


def graph_of_own(engine: Engine) -> list[str]:
    """Fault v: the CUDA graph is that for the number of own adapters."""
    engine.add(1)
    found = _run(engine, [([(1, 4)], [(BASE, 4)])])
    return [line for line in found if "graph" in line] if STOCK else found


def too_many(engine: Engine) -> list[str]:
    """Fault vi: each engine has enough slots, and all together have not. All are told so."""
    batches = [[(1, 1), (2, 1), (5, 1)], [(3, 1), (4, 1), (6, 1)]]
    try:
        return _run(engine, [(batches[0], batches[1])]) or ["nobody has noticed"]
    except ValueError as err:
        text = str(err)
    if not STOCK and "6 adapters in one step, and --max-loras is 4" not in text:
        return [text]
    return []


def late_and_gone(engine: Engine) -> list[str]:
    """An adapter that only one engine was given; one that was removed on one; one that was evicted."""
    if engine.rank == 0:
        engine.add(1)
    wrong = _run(engine, [([(1, 2)], [(BASE, 1)])])
    if engine.rank == 1:
        engine.remove(1)  # engine 0 still uses it
    wrong += _run(engine, [([(1, 2)], ())])
    if engine.rank == 0:
        engine.remove(1)
    wrong += _run(engine, [((), [(BASE, 1)])])
    if 1 in engine.engine.list_adapters():
        wrong.append("an adapter that all engines were to remove is still there")
    if engine.rank == 0:
        for number in range(1, 6):
            engine.add(number)
        engine.manager.remove_oldest_adapter()
    return wrong + _run(engine, [([(BASE, 1)], [(1, 1)]), ([(2, 1)], [(1, 4)])])


def new_version(engine: Engine) -> list[str]:
    """load_inplace under the same number, on one engine before the other."""
    for number in (1, 2):
        engine.add(number)
    wrong = _run(engine, [([(1, 2)], [(1, 1)])])
    new = harness.request(engine.engine, engine.path(3, "plain"), "a1", 1, load_inplace=True)
    engine.expected[1] = engine.expected[3]
    if engine.rank == 0:
        engine.runner.add_lora(new)
    wrong += _run(engine, [([(1, 2)], [(1, 1)])])
    if engine.rank == 1:
        engine.runner.add_lora(new)
    return wrong + _run(engine, [([(1, 2)], [(1, 1)]), ((), [(1, 1)])])


def same_number_again(engine: Engine) -> list[str]:
    """An adapter that is removed, and another one that gets its number, on engines in their own time."""
    engine.add(1)
    wrong = _run(engine, [([(1, 2)], [(1, 1)])])
    new = harness.request(engine.engine, engine.path(3, "plain"), "another", 1)
    for rank in range(engine.size):
        if rank == engine.rank:
            engine.remove(1)
            engine.runner.add_lora(new)
        if rank == 0:
            wrong += _run(engine, [((), [(BASE, 1)])])
    engine.expected[1] = engine.expected[3]
    engine.request = lambda number, **_: new  # type: ignore[method-assign]
    return wrong + _run(engine, [([(1, 2)], [(1, 1)]), ((), [(1, 1)])])


def cannot_load(engine: Engine) -> list[str]:
    """An adapter that one engine cannot load any more: all raise, and nobody waits."""
    engine.add(1)
    path = engine.path(1, "plain")
    dist.barrier()
    if engine.rank == 0:
        path.rename(path.with_name("hidden"))
    else:
        engine.manager.remove_all_adapters()
    dist.barrier()
    try:
        engine.step([(1, 1)] if engine.rank == 0 else ())
    except ValueError as err:
        text = str(err)
    else:
        text = "no error"
    dist.barrier()
    if engine.rank == 0:
        path.with_name("hidden").rename(path)
    dist.barrier()
    fits = "data-parallel engine 1 could not load an adapter that is in use" in text
    return ([] if fits else [text]) + _run(engine, [([(1, 1)], [(2, 1)])])


def two_names(engine: Engine) -> list[str]:
    """Engines that mean different adapters by one number."""
    own = harness.request(
        engine.engine, engine.path(engine.rank + 1, "plain"), f"name{engine.rank}", 1
    )
    engine.request = lambda number, **_: own  # type: ignore[method-assign]
    try:
        engine.step([(1, 1)])
    except ValueError as err:
        fits = "the number 1 is that of two adapters" in str(err)
        return [] if fits else [str(err)]
    return ["nobody has noticed"]


def no_further_exchange(engine: Engine) -> list[str]:
    """Steps whose adapters are in their slots have no exchange of ours."""
    for number in (1, 2):
        engine.add(number)
    wrong = _run(engine, [([(1, 2)], [(2, 2)])])
    assert engine.agreement is not None
    engine.agreement._gather = lambda _: wrong.append("an exchange of our own")
    return wrong + _run(
        engine, [([(2, 2)], [(1, 2)]), ((), [(1, 1)]), ([(BASE, 1)], ()), ([(1, 1)], [(2, 9)])]
    )


def random_steps(engine: Engine) -> list[str]:
    """Batches at random, and between them additions and removals on engines in their own time."""
    same, own = random.Random(engine.version), random.Random(engine.rank)
    wrong: list[str] = []
    for _ in range(80):
        numbers = [same.randint(1, NUM_ADAPTERS) for _ in range(engine.size)]
        what = same.choice(("add", "add", "remove", "nothing"))
        time.sleep(own.choice((0.0, 0.002)))
        if (what != "nothing" and same.random() < 0.7) or own.random() < 0.5:
            getattr(engine, "add" if what == "nothing" else what)(numbers[engine.rank])
        batches = [_random_batch(engine, same, rank) for rank in range(engine.size)]
        wrong += engine.step(batches[engine.rank])
        if wrong:
            break
    return wrong


def _random_batch(engine: Engine, numbers: random.Random, rank: int) -> Batch:
    share = slot_share(engine.max_loras, engine.size, rank)
    some = numbers.sample(range(1, NUM_ADAPTERS + 1), share)
    count = numbers.choice((0, 1, 1, 2, 3))
    return [(numbers.choice((BASE, *some)), numbers.randint(1, 4)) for _ in range(count)]


def sequences(engine: Engine) -> list[str]:
    """Hypothesis makes up batches and what happens between, the same on all engines."""
    wrong: list[str] = []
    shares = [slot_share(engine.max_loras, engine.size, rank) for rank in range(engine.size)]
    adapters = strategies.integers(1, NUM_ADAPTERS)
    batches = strategies.tuples(
        *(
            strategies.lists(adapters, max_size=share, unique=True).flatmap(
                lambda some: strategies.lists(
                    strategies.tuples(
                        strategies.sampled_from((BASE, *some)), strategies.integers(1, 5)
                    ),
                    max_size=4,
                )
            )
            for share in shares
        )
    )
    between = strategies.lists(
        strategies.tuples(
            strategies.sampled_from(("add", "remove")),
            strategies.integers(0, engine.size - 1),
            adapters,
        ),
        max_size=3,
    )

    # Without a failure, and without what differs between processes, all engines try the same.
    @settings(
        max_examples=30, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(strategies.lists(strategies.tuples(between, batches), min_size=1, max_size=6))
    def try_one(happened: list[Any]) -> None:
        for actions, of_each in happened:
            for what, rank, number in actions:
                if rank == engine.rank:
                    getattr(engine, what)(number)
            found: list[Any] = [None] * engine.size
            dist.all_gather_object(found, [] if wrong else engine.step(of_each[engine.rank]))
            wrong.extend(f"{happened}: {line}" for lines in found for line in lines[:2])
            if wrong:
                return

    try_one()
    return wrong


CHECKS: Mapping[str, Callable[[Engine], list[str]]] = {
    check.__name__: check
    for check in (
        slots_of_each, idle_engine, others_tokens, stale_mapping, graph_of_own, too_many,
        late_and_gone, new_version, same_number_again, cannot_load, two_names, no_further_exchange, random_steps,
        sequences,
    )
}  # fmt: skip


def run(rank: int, size: int, folder: str, version: int, checks: list[str]) -> dict[str, Any]:
    """What each check finds on this engine."""
    found: dict[str, Any] = {}
    for name in checks:
        where = Path(folder) / name
        where.mkdir(exist_ok=True)
        engine = _started(rank, size, where, version)
        found[name] = CHECKS[name](engine)
    return found
