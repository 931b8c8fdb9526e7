"""Run one EPLB case in one process: experts move all the time, and every answer is judged.

    python -m tests.gpu.eplb_engine --work DIR --case NAME --result FILE [--stock]

Writes one JSON object per line to FILE.
"""

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from tests.gpu.cases import Check
from tests.gpu.engine import (
    Expected,
    adapter_path,
    as_input,
    engine_arguments,
    prompt_log_probs,
    run_checks,
)
from tests.gpu.eplb_cases import CASES, STEP_INTERVAL, EplbCase

# Where experts are changes in which order their outputs are summed, and so the base model's answer to
# two tokens; with an adapter's deltas it changes by far more.
LEAK_ROOM = 0.1
NEVER = 10**6  # steps


class Engine:
    """A running vLLM, and how many of its experts are elsewhere now."""

    def __init__(self, work: Path, chosen: EplbCase) -> None:
        from vllm import LLM

        self._work, self._chosen, self._case = work, chosen, chosen.case()
        self._llm = LLM(**engine_arguments(work, self._case))
        self._random = random.Random(1)
        self._maps = self._llm.collective_rpc("expert_maps")[0]
        self._round = 0
        self.num_steps = self.num_moved = 0

    def _request(self, check: Check, number: int) -> Any:
        from vllm.lora.request import LoRARequest

        path = adapter_path(self._work, self._case, check)
        return LoRARequest(f"{check.adapter}-{check.form}", number, str(path))

    def ask(self, check: Check | None, number: int, prompts: Tensor) -> Tensor:
        """What a check asks for, in the middle of steps for other adapters and the base model."""
        from vllm import SamplingParams

        if len(prompts) > 1:
            self.work_on(prompts)
        sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1, detokenize=False)
        request = None if check is None else self._request(check, number)
        if request is not None:
            self._llm.llm_engine.add_lora(request)
        answers = self._llm.generate(
            as_input(prompts), sampling, lora_request=request, use_tqdm=False
        )
        self.num_steps += 1
        return prompt_log_probs(prompts, [answer.prompt_logprobs for answer in answers])

    def work_on(self, prompts: Tensor) -> None:
        """Some steps, for two adapters and the base model at once."""
        from vllm import SamplingParams

        steps = self._chosen.steps_between
        sampling = SamplingParams(
            max_tokens=steps,
            temperature=1.0,
            ignore_eos=True,
            detokenize=False,
            seed=self.num_steps,
        )
        places = range(1, len(self._chosen.checks) + 1)
        chosen = self._random.sample(places, 2)
        requests = [self._request(self._chosen.checks[n - 1], n) for n in chosen]
        given = [requests[0], requests[1], requests[0], None][: len(prompts)]
        shuffled = prompts[:, self._random.sample(range(prompts.shape[1]), 24)]
        self._llm.generate(as_input(shuffled), sampling, lora_request=given, use_tqdm=False)
        self.num_steps += steps
        maps = self._llm.collective_rpc("expert_maps")[0]
        self.num_moved += sum(
            a != b for old, new in zip(self._maps, maps) for a, b in zip(old, new)
        )
        self._maps = maps

    def hold_experts(self, interval: int) -> None:
        """A rearrangement after as many steps, from now on."""
        self._llm.collective_rpc("hold_experts", args=(interval,))

    def use_random_maps(self) -> None:
        """From the next rearrangement on."""
        self._llm.collective_rpc("use_random_maps", args=(11,))


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.eplb_engine")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--case", choices=[case.name for case in CASES], required=True)
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--stock", action="store_true")
    args = parser.parse_args()
    chosen = next(case for case in CASES if case.name == args.case)
    if args.stock:
        chosen = chosen.stock()
    case = chosen.case()
    expected = Expected.load(args.work, case)

    def report(line: dict[str, Any]) -> None:
        print("RESULT", json.dumps(line), flush=True)
        with args.result.open("a") as file:
            file.write(json.dumps(line) + "\n")

    started = time.perf_counter()
    engine = Engine(args.work, chosen)
    report({"started": round(time.perf_counter() - started, 1)})
    engine.hold_experts(NEVER)
    # At which check of all rounds.
    changes = {
        len(chosen.checks): lambda: engine.hold_experts(STEP_INTERVAL),
        (chosen.rounds - 1) * len(chosen.checks): engine.use_random_maps,
    }
    asked = 0

    def ask(check: Check | None, number: int, prompts: Tensor) -> Tensor:
        nonlocal asked
        if check is not None and len(prompts) > 1:
            changes.get(asked, lambda: None)()
            asked += 1
        return engine.ask(check, number, prompts)

    run_checks(case, expected, ask, report, LEAK_ROOM)
    report({"finished": True, "steps": engine.num_steps, "moved": engine.num_moved})


if __name__ == "__main__":
    from tests.gpu.processes import exit_after

    exit_after(_main)
