"""What a rebalance costs with 0, 1 and 4 adapters in their slots, beside vLLM without LoRA.

    python -m tests.gpu.eplb_cost --work DIR --out FILE

GLM-4.5-Air's shapes with 8 MoE layers and dummy weights, adapters of r = 32; EPLB's synchronous way,
which can be timed, with the communicator of its default, asynchronous one. Maps at random. Each engine
takes turns: adapters into their slots, a rearrangement that is not counted, and some that are, so that
all of these come right after another. Ratios are of medians over all turns: every count takes part in each
turn, so that a host that slows down meets all of them, and a turn has too few to be a figure of its own.
--short: one engine, in which nothing of LoRA travels as long as no adapter is used.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from tests.gpu.load_adapters import ADAPTERS_PER_FORMAT, LORA_RANK, adapter_directory
from tests.gpu.processes import child_environment, exit_after, run

NUM_LORAS, TURNS, REPEATS = 4, 15, 2
ENGINE_LIMIT_S = 150.0
COMMUNICATORS = ("torch_nccl",)


def measure(work: Path, communicator: str, *, lora: bool, repeats: int) -> dict[str, Any]:
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
        gpu_memory_utilization=0.8,
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
    turns = (5, TURNS, repeats, counts)
    seconds = llm.collective_rpc("rearrange_in_turn", args=turns)[0]
    seconds = {count: [round(value, 4) for value in timed] for count, timed in seconds.items()}
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


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.eplb_cost")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--short", action="store_true", help="one engine")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="counted ones of a turn")
    parser.add_argument("--engine", help="COMMUNICATOR or COMMUNICATOR:lora, for one engine")
    args = parser.parse_args()
    if args.engine:
        communicator, _, lora = args.engine.partition(":")

        def measured() -> None:
            found = measure(args.work / "load", communicator, lora=bool(lora), repeats=args.repeats)
            args.out.write_text(json.dumps(found))

        exit_after(measured)
    logs = args.out.parent
    document: dict[str, Any] = {"as_expected": False}
    log = logs / "eplb-load_adapters.log"
    command = ["-m", "tests.gpu.load_adapters", str(args.work / "load"), "--form", "per_expert"]
    run(command, log, child_environment(stock=True), 150.0)
    for communicator in COMMUNICATORS[:1] if args.short else COMMUNICATORS:
        engines: dict[str, Any] = {}
        for kind in (f"{communicator}:lora", communicator)[: 1 if args.short else 2]:
            out = logs / f"eplb-cost-{kind.replace(':', '-')}.json"
            out.unlink(missing_ok=True)
            command = ["-m", "tests.gpu.eplb_cost", "--work", str(args.work), "--out", str(out)]
            command += ["--repeats", str(args.repeats), "--engine", kind]
            environment = child_environment(stock=False)
            ended = run(command, out.with_suffix(".log"), environment, ENGINE_LIMIT_S)
            engines[kind] = json.loads(out.read_text()) if out.exists() else {"ended": ended}
        document[communicator] = engines
        if all("seconds" in engine for engine in engines.values()):
            summary = summarise(*(list(engines.values()) * 2)[:2])
            document[communicator]["summary"] = summary
            document["as_expected"] = True
            print(json.dumps({communicator: summary}), flush=True)
        args.out.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    _main()
