"""Run inside a vLLM release: a whole engine core on the CPU, without a model's forward pass.

The plugin is loaded as in a server: by vLLM, inside of EngineCore.__init__, by its entry point.

Real: EngineCore and its scheduler, prefix cache and executor base class from __init__ on, and each
worker's LoRA manager (harness.py), to which a step gives the adapters of its requests, as vLLM's
model runner does. Stand-in: the rest of the worker. Whatever a request asks, its next token is 7.
"""

from __future__ import annotations

import os
import tempfile
from collections import deque
from concurrent.futures import Future
from functools import cache
from inspect import signature
from typing import Any

# Before anything of vLLM reads it.
os.environ["VLLM_PLUGINS"] = "lorashard"

import torch
from transformers import Qwen3MoeConfig
from vllm import config, sampling_params
from vllm.config.lora import LoRAConfig
from vllm.lora.layers import LoRAMapping
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.core import EngineCore
from vllm.v1.executor.abstract import Executor
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.serial_utils import run_method

BLOCK = 16  # tokens of a block of the KV cache
TOKEN = 7
MAX_LEN = 256


@cache
def model_config() -> Any:
    """Of a small MoE model, from its config.json."""
    path = tempfile.mkdtemp()
    Qwen3MoeConfig(
        architectures=["Qwen3MoeForCausalLM"], hidden_size=16, intermediate_size=8,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=8, vocab_size=64,
        num_experts=8, moe_intermediate_size=8, max_position_embeddings=MAX_LEN,
    ).save_pretrained(path)  # fmt: skip
    return config.ModelConfig(
        model=path, skip_tokenizer_init=True, dtype="bfloat16", max_model_len=MAX_LEN,
        enforce_eager=True,
    )  # fmt: skip


def config_of(*, expert_parallel: bool, asynchronous: bool) -> Any:
    cache_config = config.CacheConfig(block_size=BLOCK, enable_prefix_caching=True)
    cache_config.num_gpu_blocks_override = 64
    return config.VllmConfig(
        model_config=model_config(),
        scheduler_config=config.SchedulerConfig(
            max_num_seqs=8, max_num_batched_tokens=MAX_LEN, max_model_len=MAX_LEN,
            enable_chunked_prefill=True, is_encoder_decoder=False, async_scheduling=asynchronous,
        ),
        cache_config=cache_config,
        parallel_config=config.ParallelConfig(
            tensor_parallel_size=2, enable_expert_parallel=expert_parallel
        ),
        device_config=config.DeviceConfig("cpu"),
        lora_config=LoRAConfig(max_lora_rank=8, max_loras=2, max_cpu_loras=2),
    )  # fmt: skip


class Worker:
    """One rank. `manager` is vLLM's WorkerLoRAManager."""

    def __init__(self, ep_rank: int, ep_size: int) -> None:
        from tests.vllm_plugin import patched  # it loads the plugin, if vLLM has not

        self.manager = patched.engine_of(ep_rank=ep_rank, ep_size=ep_size)
        self._loras: dict[str, Any] = {}

    def add_lora(self, lora_request: Any) -> bool:
        return bool(self.manager.add_adapter(lora_request))

    def remove_lora(self, lora_id: int) -> bool:
        return bool(self.manager.remove_adapter(lora_id))

    def list_loras(self) -> set[int]:
        return set(self.manager.list_adapters())

    def get_kv_cache_spec(self) -> dict[str, Any]:
        spec = FullAttentionSpec(
            block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.bfloat16
        )
        return {"model.layers.0.self_attn.attn": spec}

    def determine_available_memory(self) -> int:
        return 2**30

    def get_supported_kv_cache_layouts(self) -> list[str]:
        return ["NHD"]

    def get_supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    def execute_model(self, scheduled: Any) -> Any:
        for request_id in scheduled.finished_req_ids:
            self._loras.pop(request_id, None)
        for request in scheduled.scheduled_new_reqs:
            if request.lora_request is not None:
                self._loras[request.req_id] = request.lora_request
        ids = list(scheduled.num_scheduled_tokens)
        wanted = {lora for name, lora in self._loras.items() if name in ids}
        if ids:
            mapping = LoRAMapping((0,) * len(ids), (0,) * len(ids), is_prefill=True)
            self.manager.set_active_adapters(wanted, mapping)
        return ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={name: index for index, name in enumerate(ids)},
            sampled_token_ids=[[TOKEN] for _ in ids],
        )

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


def _as_future(result: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(result)
    return future


class InProcess(Executor):  # type: ignore[misc]
    """Two workers in this process. What they do is theirs, the rest vLLM's base class's."""

    def _init_executor(self) -> None:
        self._answers: deque[Any] = deque()
        ep = self.vllm_config.parallel_config.enable_expert_parallel
        self.workers = [Worker(rank, 2 if ep else 1) for rank in range(2 if ep else 1)]

    def collective_rpc(  # type: ignore[override]
        self,
        method: Any,
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        non_block: bool = False,
        **_: Any,
    ) -> Any:
        answers = [run_method(worker, method, args, kwargs or {}) for worker in self.workers]
        return _as_future(answers) if non_block else answers

    def execute_model(self, scheduler_output: Any, non_block: bool = False) -> Any:
        answer = self.collective_rpc("execute_model", args=(scheduler_output,))[0]
        if answer.req_ids:
            self._answers.append(answer)
            answer = None  # the tokens come from `sample_tokens`
        return _as_future(answer) if non_block else answer

    def sample_tokens(self, grammar_output: Any, non_block: bool = False) -> Any:
        answer = self._answers.popleft()
        return _as_future(answer) if non_block else answer

    def compile_or_warm_up_model(self) -> None:
        """Nothing is compiled."""

    def initialize_from_config(self, kv_cache_configs: Any) -> None:
        """There is no KV cache."""

    @property
    def max_concurrent_batches(self) -> int:
        return 2 if self.vllm_config.scheduler_config.async_scheduling else 1

    def check_health(self) -> None:
        """It is here."""


def engine_core(
    *, expert_parallel: bool = True, asynchronous: bool = False, num_engines: int = 1
) -> Any:
    """VLLM's EngineCore, started. asynchronous: it schedules a step while one runs.

    num_engines: its scheduler's configuration says that it is the last of so many.
    """
    vllm_config = config_of(expert_parallel=expert_parallel, asynchronous=asynchronous)
    vllm_config.parallel_config.data_parallel_size = num_engines
    vllm_config.parallel_config.data_parallel_rank = num_engines - 1
    return EngineCore(vllm_config, InProcess, log_stats=False)


def send(core: Any, name: str, lora_request: Any, max_tokens: int, length: int = 40) -> None:
    """A request arrives, as from the API server: of `length` tokens, the same in all requests."""
    params = sampling_params.SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    known = {
        "request_id": name, "prompt_token_ids": list(range(length)), "mm_features": None,
        "sampling_params": params, "pooling_params": None, "arrival_time": 0.0,
        "lora_request": lora_request, "cache_salt": None, "data_parallel_rank": None,
        "eos_token_id": None,
    }  # fmt: skip
    fields = signature(EngineCoreRequest).parameters
    request = EngineCoreRequest(**{key: value for key, value in known.items() if key in fields})
    core.add_request(*core.preprocess_add_request(request))


def run_to_the_end(core: Any) -> None:
    for _ in range(1000):
        if not core.scheduler.has_unfinished_requests():
            core.step_fn()  # tells the workers which requests have ended
            return
        core.step_fn()
    raise AssertionError("requests do not end")


def loaded(core: Any) -> list[list[int]]:
    """The adapters of each worker."""
    return [sorted(worker.list_loras()) for worker in core.model_executor.workers]
