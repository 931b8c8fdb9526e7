"""Run one case in one process and judge every adapter.

    python -m tests.gpu.engine --work DIR --case NAME --result FILE [--stock]

Writes one JSON object per line to FILE: `{"base": ...}` first, then one for each check.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.gpu.cases import PLAIN, Case, Check, as_stock
from tests.gpu.kinds_cases import ALL

# Room above the noise, the base model's own error or the adapter's in the reference, whichever is
# more. A token whose router scores nearly tie goes to another expert in bf16 or FP8, so one adapter's
# noise is not another's: for qwen16's it is 0.02 to 0.05 in bf16, and 0.10 to 0.21 in FP8. Half of the
# experts wrong gives 0.137 and more in bf16.
ERROR_FACTOR, ERROR_ROOM, MIN_CORRELATION = 1.35, 0.035, 0.9
# The base model's answer to two tokens, before and after a request with an adapter.
LEAK_ROOM = 0.02


@dataclass(frozen=True, slots=True)
class Expected:
    """Reference log-probabilities of one model."""

    prompts: Tensor
    values: dict[str, Tensor]
    suffix: str

    @staticmethod
    def load(work: Path, case: Case) -> "Expected":
        values = load_file(work / "models" / case.model / "reference.safetensors")
        return Expected(values.pop("prompts"), values, case.weights)

    def of(self, name: str) -> Tensor:
        return self.values[name + self.suffix]

    def judge(self, name: str, got: Tensor, base: Tensor) -> dict[str, Any]:
        """Compare an adapter's answer, and what it changed, with the reference."""
        error = (got - self.of(name)).abs().mean().item()
        base_error = (base - self.of("base")).abs().mean().item()
        effects = torch.stack([(got - base).flatten(), (self.of(name) - self.of("base")).flatten()])
        correlation = torch.corrcoef(effects)[0, 1].item()
        limit = max(ERROR_FACTOR * base_error, base_error + ERROR_ROOM)
        noisy = self.values.get(f"{name}{self.suffix}_noisy")
        if noisy is not None:
            limit = max(limit, (noisy - self.of(name)).abs().mean().item() + ERROR_ROOM)
        return {
            "error": round(error, 4),
            "limit": round(limit, 4),
            "correlation": round(correlation, 4),
            "right": error <= limit and correlation > MIN_CORRELATION,
        }


def prompt_log_probs(prompts: Tensor, answers: list[list[Any]]) -> Tensor:
    """From vLLM's prompt_logprobs (for each prompt: None, then {token: Logprob})."""
    rows = [
        [answer[place][int(token)].logprob for place, token in enumerate(prompt) if place > 0]
        for prompt, answer in zip(prompts, answers)
    ]
    return torch.tensor(rows)


def as_input(prompts: Tensor) -> Any:
    """What `LLM.generate` takes."""
    return [{"prompt_token_ids": prompt.tolist()} for prompt in prompts]


def adapter_path(work: Path, case: Case, check: Check) -> Path:
    """Where `__main__` keeps the adapter in this form."""
    suffix = "" if check.form == PLAIN else f".{check.form}"
    return work / "models" / case.model / f"{check.adapter}{suffix}"


def engine_arguments(work: Path, case: Case) -> dict[str, Any]:
    """Keywords of `vllm.LLM`."""
    arguments: dict[str, Any] = {
        "model": str(work / "models" / case.model / f"model{case.weights}"),
        "skip_tokenizer_init": True,
        "tensor_parallel_size": 2,
        "enable_expert_parallel": case.ep,
        "enable_lora": True,
        "max_loras": case.max_loras,
        "max_cpu_loras": case.max_cpu_loras,
        "max_lora_rank": 32,
        "fully_sharded_loras": case.fully_sharded,
        "enforce_eager": not case.graphs,
        "max_model_len": 512,
        "max_num_seqs": 16,
        "enable_prefix_caching": False,
        "gpu_memory_utilization": 0.06,
        # A fixed size also skips the memory profile, whose assertion fails when another engine
        # on the same GPU releases memory meanwhile (gpu_worker.py, determine_available_memory).
        "kv_cache_memory_bytes": 1 << 30,
    }
    if case.graphs:
        # The prompts of a check are 192 tokens in one batch: they must fit a captured size.
        arguments["compilation_config"] = {"cudagraph_capture_sizes": [1, 4, 16, 256]}
    return arguments | dict(case.engine)


def run_checks(
    case: Case,
    expected: Expected,
    ask: Callable[[Check | None, int, Tensor], Tensor],
    report: Callable[[dict[str, Any]], None],
    leak_room: float = LEAK_ROOM,
    generated_error: Callable[[Check, int], float] | None = None,
) -> None:
    """Ask for the base model and every adapter, `case.rounds` times, and report each.

    Two tokens of one request are a batch that vLLM's LoRA kernels assign otherwise without expert
    parallelism; the base model is asked about them too, before any adapter and after each, and may
    differ by less than leak_room. generated_error: how far what is generated with an adapter is from
    the same text as a prompt, in log-probabilities.
    """
    prompts, short = expected.prompts, expected.prompts[:1, :2]
    base = ask(None, 0, prompts)
    base_short = ask(None, 0, short)
    base_error = (base - expected.of("base")).abs().mean().item()
    report({"base": True, "error": round(base_error, 4)})
    for number in range(case.rounds):
        for place, check in enumerate(case.checks):
            line: dict[str, Any] = {
                "adapter": check.adapter,
                "form": check.form,
                "round": number,
                "optional": check.optional,
            }
            started = time.perf_counter()
            try:
                line |= expected.judge(check.adapter, ask(check, place + 1, prompts), base)
                ask(check, place + 1, short)
                leak = (ask(None, 0, short) - base_short).abs().mean().item()
                line |= {"leak": round(leak, 4), "right": line["right"] and leak < leak_room}
                if generated_error is not None:
                    error = generated_error(check, place + 1)
                    line["generated_error"] = round(error, 4)
                    line["right"] = line["right"] and error < ERROR_ROOM
            except Exception as err:  # noqa: BLE001 - whatever the engine raises is the result
                line |= {"right": False, "failure": f"{type(err).__name__}: {err}"[:2000]}
            report(line | {"seconds": round(time.perf_counter() - started, 2)})
    after = ask(None, 0, prompts)
    drift = (after - base).abs().mean().item()
    # FP8 without any adapter is not the same twice: up to 0.036 with stock vLLM's kernels.
    room = max(ERROR_ROOM, (ERROR_FACTOR - 1) * base_error)
    report({"base": True, "after": True, "error": round(drift, 4), "right": drift < room})


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.engine")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--case", choices=[case.name for case in ALL], required=True)
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--stock", action="store_true")
    return parser.parse_args()


def _main() -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    args = _parse_arguments()
    case = next(case for case in ALL if case.name == args.case)
    if args.stock:
        case = as_stock(case)
    expected = Expected.load(args.work, case)
    ask_for = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1, detokenize=False)

    def report(line: dict[str, Any]) -> None:
        print("RESULT", json.dumps(line), flush=True)
        with args.result.open("a") as file:
            file.write(json.dumps(line) + "\n")

    started = time.perf_counter()
    llm = LLM(**engine_arguments(args.work, case))
    report({"started": round(time.perf_counter() - started, 1)})

    def request(check: Check, adapter_id: int) -> LoRARequest:
        path = adapter_path(args.work, case, check)
        name = f"{check.adapter}-{check.form}-{adapter_id}"
        options = {"is_3d_lora_weight": True} if check.is_3d else {}
        return LoRARequest(name, adapter_id, str(path), **options)

    def ask(check: Check | None, adapter_id: int, prompts: Tensor) -> Tensor:
        lora = None
        if check is not None:
            lora = request(check, adapter_id)
            # Loading on its own first: an adapter that fails here fails alone, while one that
            # fails inside a step takes the engine with it.
            llm.llm_engine.add_lora(lora)
        outputs = llm.generate(as_input(prompts), ask_for, lora_request=lora, use_tqdm=False)
        return prompt_log_probs(prompts, [output.prompt_logprobs for output in outputs])

    def generated_error(check: Check, adapter_id: int) -> float:
        generate = SamplingParams(
            max_tokens=case.generated_tokens,
            temperature=0,
            logprobs=1,
            ignore_eos=True,
            detokenize=False,
        )
        outputs = llm.generate(
            as_input(expected.prompts),
            generate,
            lora_request=request(check, adapter_id),
            use_tqdm=False,
        )
        made = [output.outputs[0] for output in outputs]
        said = [
            [place[token].logprob for token, place in zip(one.token_ids, one.logprobs)]
            for one in made
        ]
        tokens = torch.tensor([list(one.token_ids) for one in made])
        again = ask(check, adapter_id, torch.cat([expected.prompts, tokens], dim=1))
        return (again[:, -case.generated_tokens :] - torch.tensor(said)).abs().mean().item()

    if case.warmup_tokens:
        warm = SamplingParams(
            max_tokens=case.warmup_tokens, temperature=0, ignore_eos=True, detokenize=False
        )
        llm.generate(as_input(expected.prompts), warm, use_tqdm=False)
    run_checks(
        case, expected, ask, report,
        generated_error=generated_error if case.generated_tokens else None,
    )  # fmt: skip
    report({"finished": True})


if __name__ == "__main__":
    from tests.gpu.processes import exit_after

    exit_after(_main)
