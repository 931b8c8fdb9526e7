"""One engine of vLLM that verl updates, in this process and vLLM's own.

    python -m tests.gpu.verl_engine --work DIR --engine NAME --result FILE [--stock]

Writes one JSON object per line to FILE: `{"base": ...}` first, then one for each update.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.gpu.adapter import LORA_RANK
from tests.gpu.cases import EP_SIZE, Case
from tests.gpu.engine import (
    ERROR_FACTOR,
    ERROR_ROOM,
    Expected,
    as_input,
    engine_arguments,
    prompt_log_probs,
)
from tests.gpu.loras import VERSIONS
from tests.gpu.processes import exit_after
from tests.gpu.reference import VOCABULARY
from tests.gpu.verl_files import worker_extension_module
from tests.gpu.verl_trainer import Sending, Trainers

NUM_EXPERTS = 15
UPDATE_LIMIT_S = 60.0
Result = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Way:
    """How tensors get into the workers, and which adapters do, in this order.

    transfer: by verl's transfer, through CUDA IPC or, with `use_shm`, through shared memory.
    """

    name: str
    adapters: tuple[str, ...]
    transfer: bool = True
    use_shm: bool = False
    own_experts: bool = False


WAYS = (
    # half: down_proj of every second expert; fused0: all experts of a projection in one tensor.
    Way("CUDA IPC", (*VERSIONS, "half", "fused0")),
    Way("CUDA IPC, own experts only", (*VERSIONS, "half"), own_experts=True),
    Way("shared memory", VERSIONS, use_shm=True),
    Way("on the CPU", (*VERSIONS, "half", "fused0"), transfer=False),
)

# One adapter at a time, as verl starts vLLM.
_EAGER = Case(
    "eager",
    "glm15-versions",
    (),
    max_loras=1,
    max_cpu_loras=1,
    engine={
        "max_lora_rank": LORA_RANK,
        "worker_extension_cls": "tests.gpu.verl_worker.Extension",
    },
)
_ROUND_ROBIN = {**_EAGER.engine, "expert_placement_strategy": "round_robin"}
ENGINES = (
    replace(_EAGER, name="graphs", graphs=True),
    _EAGER,
    replace(_EAGER, name="fully-sharded", fully_sharded=True),
    replace(_EAGER, name="round-robin", model="glm15g3-versions", engine=_ROUND_ROBIN),
)
STOCK_ENGINES = tuple(case for case in ENGINES if case.name in ("eager", "round-robin"))


def experts_of(case: Case) -> tuple[tuple[int, ...], ...]:
    """The experts of each rank."""
    if "expert_placement_strategy" in case.engine:
        return tuple(tuple(range(rank, NUM_EXPERTS, EP_SIZE)) for rank in range(EP_SIZE))
    first = -(-NUM_EXPERTS // EP_SIZE)
    return tuple(range(first)), tuple(range(first, NUM_EXPERTS))


def ways(stock: bool) -> tuple[Way, ...]:
    """All of them, or verl's own way, which is enough to show what stock does."""
    return WAYS[:1] if stock else WAYS


class Rollout:
    """An engine of vLLM, used as verl's server uses it."""

    def __init__(self, llm: Any, work: Path, case: Case) -> None:
        self._llm, self._trainers, self._experts = llm, Trainers(EP_SIZE), experts_of(case)
        self._adapters = work / "models" / case.model
        self._verl = worker_extension_module()
        llm.collective_rpc("monkey_patch_model", kwargs={"vocab_size": VOCABULARY})

    def update(self, adapter: str, way: Way) -> Result:
        """Replace the adapter; returns how its tensors arrived. Raises what vLLM raises."""
        path = self._adapters / adapter
        config = json.loads((path / "adapter_config.json").read_text())
        try:
            if way.transfer:
                self._transfer(path, config, way)
            else:
                arguments = {"adapter": str(path), "peft_config": config}
                self._call("update_from_file", arguments)
        finally:
            self._llm.reset_prefix_cache()
        arrived: list[Result] = self._llm.collective_rpc("arrived")
        return {
            "tensors": [rank["tensors"] for rank in arrived],
            "devices": sorted({device for rank in arrived for device in rank["devices"]}),
        }

    def _transfer(self, path: Path, config: Result, way: Way) -> None:
        experts = self._experts if way.own_experts else (None,) * EP_SIZE
        self._trainers.send([Sending(path, way.use_shm, own) for own in experts])
        try:
            arguments = {"peft_config": config, "base_sync_done": True, "use_shm": way.use_shm}
            self._call("update_weights_from_ipc", arguments)
            self._trainers.wait()
        except BaseException:
            self._trainers.end()
            raise

    def _call(self, method: str, arguments: Result) -> None:
        self._llm.collective_rpc(method, timeout=UPDATE_LIMIT_S, kwargs=arguments)

    def answers(self, prompts: Tensor, *, adapter: bool) -> Tensor:
        """Prompt log-probabilities; with the adapter if the engine has it."""
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        verl = self._verl
        request = None
        if adapter:
            if verl.VLLM_LORA_INT_ID not in self._llm.llm_engine.list_loras():
                raise RuntimeError("the engine does not have the adapter")
            request = LoRARequest(verl.VLLM_LORA_NAME, verl.VLLM_LORA_INT_ID, verl.VLLM_LORA_PATH)
        wanted = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1, detokenize=False)
        outputs = self._llm.generate(
            as_input(prompts), wanted, lora_request=request, use_tqdm=False
        )
        return prompt_log_probs(prompts, [output.prompt_logprobs for output in outputs])


def run_updates(
    rollout: Rollout, expected: Expected, stock: bool, report: Callable[[Result], None]
) -> None:
    """All updates, each judged as soon as it is there."""
    base = rollout.answers(expected.prompts, adapter=False)
    error = (base - expected.of("base")).abs().mean().item()
    report({"base": True, "error": round(error, 4)})
    for way in ways(stock):
        for number, adapter in enumerate(way.adapters):
            line: Result = {"adapter": adapter, "form": way.name, "update": number}
            started = time.perf_counter()
            try:
                line |= rollout.update(adapter, way)
                line["update_seconds"] = round(time.perf_counter() - started, 3)
                got = rollout.answers(expected.prompts, adapter=True)
                line |= expected.judge(adapter, got, base)
            except Exception as err:  # noqa: BLE001 - whatever the engine raises is the result
                line |= {"right": False, "failure": f"{type(err).__name__}: {err}"[:2000]}
            report(line)
    if stock:
        return  # after an update that failed, 0.24.0's engine answers nothing more
    drift = (rollout.answers(expected.prompts, adapter=False) - base).abs().mean().item()
    room = max(ERROR_ROOM, (ERROR_FACTOR - 1) * error)
    report({"base": True, "after": True, "error": round(drift, 4), "right": drift < room})


def _main() -> None:
    from vllm import LLM

    parser = argparse.ArgumentParser(prog="python -m tests.gpu.verl_engine")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--engine", choices=[case.name for case in ENGINES], required=True)
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--stock", action="store_true")
    args = parser.parse_args()
    case = next(case for case in ENGINES if case.name == args.engine)

    def report(line: Result) -> None:
        print("RESULT", json.dumps(line), flush=True)
        with args.result.open("a") as file:
            file.write(json.dumps(line) + "\n")

    started = time.perf_counter()
    llm = LLM(**engine_arguments(args.work, case))
    seconds = round(time.perf_counter() - started, 1)
    report({"started": seconds, "gpu": torch.cuda.get_device_name(0)})
    rollout = Rollout(llm, args.work, case)
    run_updates(rollout, Expected.load(args.work, case), args.stock, report)
    report({"finished": True})


if __name__ == "__main__":
    exit_after(_main)
