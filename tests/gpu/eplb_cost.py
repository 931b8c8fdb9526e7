"""What a rebalance costs with 0, 1 and 4 adapters in their slots, beside vLLM without LoRA.

    python -m tests.gpu.eplb_cost --work DIR --out FILE

GLM-4.5-Air's shapes with 8 MoE layers and dummy weights, adapters of r = 32; EPLB's synchronous way,
which can be timed, with the communicator of its default, asynchronous one. Maps at random. Both engines
are up at the same time, each on CPUs of its own, and take turns: adapters into their slots, a rearrangement
that is not counted, and some that are, so that all of these come right after another. Ratios are of medians
over all turns: every count takes part in each turn, so that a host that slows down meets all of them, and a
turn has too few to be a figure of its own.
"""

import argparse
import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.gpu.load_adapters import ADAPTERS_PER_FORMAT, LORA_RANK, adapter_directory
from tests.gpu.processes import child_environment, cpus_apart, exit_after, gpu_name, run

NUM_LORAS, TURNS, REPEATS = 4, 20, 4
ENGINE_LIMIT_S = 200.0
COMMUNICATORS = ("torch_nccl",)


@dataclass(frozen=True, slots=True)
class Turns:
    """Of processes that take turns. file: has the number of the turn. place: of this one, of `count`."""

    file: Path
    place: int
    count: int

    def wait(self) -> None:
        """Until it is this process's turn."""
        while self._number() % self.count != self.place:
            time.sleep(0.002)

    def end(self) -> None:
        """The next one's begins."""
        new = self.file.with_suffix(".new")
        new.write_text(str(self._number() + 1))
        new.replace(self.file)

    def _number(self) -> int:
        return int(self.file.read_text())


def measure(
    work: Path, communicator: str, turns: Turns, *, lora: bool, repeats: int
) -> dict[str, Any]:
    """Seconds of some rearrangements, by the number of adapters."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    options: dict[str, Any] = {}
    if lora:
        options = {
            "enable_lora": True,
            "max_loras": NUM_LORAS,
            "max_cpu_loras": 2 * NUM_LORAS,
            "max_lora_rank": LORA_RANK,
        }
    llm = LLM(
        model=str(work / "model"),
        load_format="dummy",
        skip_tokenizer_init=True,
        tensor_parallel_size=2,
        enable_expert_parallel=True,
        enable_eplb=True,
        eplb_config={
            "use_async": False,
            "communicator": communicator,
            "step_interval": 10**6,
            "window_size": 8,
        },
        worker_extension_cls="tests.gpu.eplb_worker.Rebalancing",
        enforce_eager=True,
        gpu_memory_utilization=0.4,
        kv_cache_memory_bytes=1 << 30,
        max_model_len=256,
        max_num_seqs=8,
        **options,
    )
    found: dict[str, Any] = {"bytes": llm.collective_rpc("bytes_a_slot")[0]}
    prompt: Any = [{"prompt_token_ids": [3, *range(10, 40)]}]
    one = SamplingParams(max_tokens=1, temperature=0, detokenize=False)

    def request(number: int) -> Any:
        path = adapter_directory(work, "per_expert", number % ADAPTERS_PER_FORMAT, shards=False)
        return LoRARequest(f"a{number}", number, str(path))

    def activate(number: int) -> float:
        began = time.perf_counter()
        llm.llm_engine.add_lora(request(number))
        return round(time.perf_counter() - began, 4)

    if lora:
        for number in range(1, NUM_LORAS + 1):
            activate(number)
            llm.generate(prompt, one, lora_request=request(number), use_tqdm=False)
    counts = (0, 1, NUM_LORAS) if lora else (0,)
    seconds = _in_turns(llm, turns, repeats, counts)
    if lora:
        # Four more push the first four out of their slots; back in, their rows have to be moved.
        for number in range(NUM_LORAS + 1, 2 * NUM_LORAS + 1):
            activate(number)
        found["activate_in_place_s"] = [activate(number) for number in range(1, NUM_LORAS + 1)]
        for number in range(NUM_LORAS + 1, 2 * NUM_LORAS + 1):
            activate(number)
        llm.collective_rpc("rearrange", args=(6, 1))
        found["activate_after_rebalance_s"] = [activate(n) for n in range(1, NUM_LORAS + 1)]
        for number in range(NUM_LORAS + 1, 2 * NUM_LORAS + 1):
            activate(number)
        found["activate_again_s"] = [activate(number) for number in range(1, NUM_LORAS + 1)]
    return found | {"seconds": seconds}


def _in_turns(
    llm: Any, turns: Turns, repeats: int, counts: tuple[int, ...]
) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {str(count): [] for count in counts}
    for turn in range(TURNS):
        turns.wait()
        timed = llm.collective_rpc("rearrange_with", args=(5 + 100 * turn, repeats, counts))[0]
        for count, values in timed.items():
            seconds[count] += [round(value, 4) for value in values]
        turns.end()
    return seconds


def summarise(with_lora: dict[str, Any], without: dict[str, Any]) -> dict[str, Any]:
    """Medians. ratio: to vLLM without LoRA. Beside it the ratio of what travels, and the most that it
    may be.
    """
    base_bytes, lora_bytes = with_lora["bytes"]
    base = statistics.median(without["seconds"]["0"])
    summary: dict[str, Any] = {"without_s": base}
    for count, seconds in with_lora["seconds"].items():
        own = statistics.median(seconds)
        most = 1 + 1.2 * int(count) * lora_bytes / base_bytes
        summary[f"{count} adapters"] = {
            "s": own,
            "ratio": round(own / base, 3),
            "bytes_ratio": round(1 + int(count) * lora_bytes / base_bytes, 3),
            "most": round(most, 3),
        }
    return summary


def _turns_file(folder: Path, communicator: str) -> Path:
    return folder / f"eplb-cost-{communicator}.turn"


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.eplb_cost")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=REPEATS, help="counted ones of a turn")
    parser.add_argument("--engine", help="COMMUNICATOR or COMMUNICATOR:lora, for one engine")
    parser.add_argument("--place", type=int, help="of this engine in each turn")
    args = parser.parse_args()
    if args.engine:
        communicator, _, lora = args.engine.partition(":")

        def measured() -> None:
            turns = Turns(_turns_file(args.out.parent, communicator), args.place, 2)
            found = measure(
                args.work / "load", communicator, turns, lora=bool(lora), repeats=args.repeats
            )
            args.out.write_text(json.dumps(found))

        exit_after(measured)
    logs = args.out.parent
    document: dict[str, Any] = {"as_expected": False, "gpu": gpu_name()}
    log = logs / "eplb-load_adapters.log"
    command = ["-m", "tests.gpu.load_adapters", str(args.work / "load"), "--form", "per_expert"]
    run(command, log, child_environment(stock=True), 150.0)
    for communicator in COMMUNICATORS:
        kinds = (f"{communicator}:lora", communicator)
        _turns_file(logs, communicator).write_text("0")

        def engine(kind: str, place: int, cpus: list[int]) -> Any:
            out = logs / f"eplb-cost-{kind.replace(':', '-')}.json"
            out.unlink(missing_ok=True)
            command = ["-m", "tests.gpu.eplb_cost", "--work", str(args.work), "--out", str(out)]
            command += ["--repeats", str(args.repeats), "--engine", kind, "--place", str(place)]
            environment = child_environment(stock=False)
            ended = run(command, out.with_suffix(".log"), environment, ENGINE_LIMIT_S, cpus)
            return json.loads(out.read_text()) if out.exists() else {"ended": ended}

        with ThreadPoolExecutor(2) as pool:
            engines = list(pool.map(engine, kinds, (0, 1), cpus_apart(2)))
        document[communicator] = dict(zip(kinds, engines, strict=True))
        if all("seconds" in engine for engine in engines):
            summary = summarise(*engines)
            document[communicator]["summary"] = summary
            document["as_expected"] = True
            print(json.dumps({communicator: summary}), flush=True)
        args.out.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    _main()
