"""Time loading, slot swaps and requests without LoRA: stock vLLM beside the plugin, on one host.

    python -m tests.gpu.load_time --work DIR --out FILE

The model has GLM-4.5-Air's shapes with 8 MoE layers and dummy weights. Stock loads the plain
adapters, the plugin the shard directories of the same adapters, and then the plain ones as well.
"""

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.gpu.load_adapters import ADAPTERS_PER_FORMAT, FORMATS, LORA_RANK, adapter_directory
from tests.gpu.prepare import lorashard
from tests.gpu.processes import child_environment, exit_after, run

NUM_LOADS, NUM_SWAPS, NUM_PROMPTS = 5, 10, 64
ENGINE_LIMIT_S = 240.0


def resident_gb() -> dict[str, float]:
    """Resident memory of each vLLM worker, 1e9 bytes."""
    import psutil

    found: dict[str, float] = {}
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            name = " ".join(child.cmdline()) or child.name()
            found[f"{name[:40]}:{child.pid}"] = round(child.memory_info().rss / 1e9, 3)
    workers = {name: size for name, size in found.items() if "Worker" in name}
    return workers or {name: size for name, size in found.items() if size > 1}


class Engine:
    """One vLLM of either kind; the plugin is on or off by the environment."""

    def __init__(self, work: Path, plugin: bool) -> None:
        from vllm import LLM

        self._work, self.has_plugin, self._last_id = work, plugin, 0
        self._llm = LLM(
            model=str(work / "model"),
            load_format="dummy",
            skip_tokenizer_init=True,
            enable_lora=True,
            max_loras=1,
            max_cpu_loras=2,
            max_lora_rank=LORA_RANK,
            tensor_parallel_size=2,
            enable_expert_parallel=True,
            enforce_eager=True,
            gpu_memory_utilization=0.45,
            kv_cache_memory_bytes=2 << 30,
            max_model_len=256,
            max_num_seqs=NUM_PROMPTS,
            enable_prefix_caching=False,
            # Stock takes fused adapters on this model in this mode alone.
            enable_mixed_moe_lora_format=not plugin,
        )

    def request(self, form: str, number: int, *, plain: bool = False) -> Any:
        """An adapter under an id of its own: vLLM has never seen it."""
        from vllm.lora.request import LoRARequest

        self._last_id += 1
        path = adapter_directory(self._work, form, number, shards=self.has_plugin and not plain)
        is_3d = form == "fused" and not self.has_plugin
        name = f"{form}{self._last_id}"
        return LoRARequest(name, self._last_id, str(path), is_3d_lora_weight=is_3d)

    def load(self, adapter: Any) -> float:
        """Seconds to load, or to put back into a slot what is in host memory."""
        began = time.perf_counter()
        if not self._llm.llm_engine.add_lora(adapter):
            raise RuntimeError(f"{adapter.lora_path} was not loaded")
        return _since(began)

    def ask(self, adapter: Any, num_prompts: int = 1, max_tokens: int = 1) -> float:
        """Seconds for prompts of 64 tokens in one call."""
        from vllm import SamplingParams

        prompts: Any = [{"prompt_token_ids": [3 + p, *range(10, 73)]} for p in range(num_prompts)]
        sampling = SamplingParams(
            max_tokens=max_tokens, temperature=0, ignore_eos=True, detokenize=False
        )
        began = time.perf_counter()
        self._llm.generate(prompts, sampling, lora_request=adapter, use_tqdm=False)
        return _since(began)


def _since(began: float) -> float:
    return round(time.perf_counter() - began, 6)


def measure(engine: Engine) -> dict[str, Any]:
    """Everything that is timed, in order."""
    results: dict[str, Any] = {"without_lora": _without_lora(engine)}
    for form in FORMATS:
        results[form] = _measure_form(engine, form)
        if engine.has_plugin:
            numbers = [number % ADAPTERS_PER_FORMAT for number in range(NUM_LOADS)]
            plain = [engine.request(form, number, plain=True) for number in numbers]
            results[form]["plain_load_seconds"] = [engine.load(adapter) for adapter in plain]
    return results | {"without_lora_after": _without_lora(engine)}


def _measure_form(engine: Engine, form: str) -> dict[str, Any]:
    adapters = [engine.request(form, number % ADAPTERS_PER_FORMAT) for number in range(NUM_LOADS)]
    loads = []
    for adapter in adapters:
        before = resident_gb()
        seconds = engine.load(adapter)
        loads.append({"seconds": seconds, "before_gb": before, "after_gb": resident_gb()})
    # The last two are in host memory, one of them in the only slot.
    first, second = adapters[-2:]
    engine.ask(first)
    turns = [second, first] * (NUM_SWAPS // 2)
    return {
        "loads": loads,
        "swap_seconds": [engine.load(adapter) for adapter in turns],
        "request_with_swap_seconds": [engine.ask(adapter) for adapter in turns],
        "request_seconds": [engine.ask(first) for _ in range(NUM_SWAPS)],
    }


def _without_lora(engine: Engine) -> list[float]:
    """64 prompts, 16 tokens each; the first round warms up and is left out."""
    return [engine.ask(None, NUM_PROMPTS, max_tokens=16) for _ in range(5)][1:]


def _growth_gb(loads: Sequence[dict[str, Any]]) -> float:
    """Of the worker that grew most, from before the first load to after the last."""
    before, after = loads[0]["before_gb"], loads[-1]["after_gb"]
    return round(max((after[name] - before.get(name, 0.0) for name in after), default=0.0), 3)


def summarise(stock: dict[str, Any], plugin: dict[str, Any]) -> dict[str, Any]:
    """Stock divided by plugin, larger is better for us."""
    summary: dict[str, Any] = {}
    for form in FORMATS:
        ours, theirs = plugin[form], stock[form]
        first = [x["loads"][0]["seconds"] for x in (theirs, ours)]
        later = [statistics.median(y["seconds"] for y in x["loads"][1:]) for x in (theirs, ours)]
        swap = [statistics.median(x["swap_seconds"]) for x in (theirs, ours)]
        summary[form] = {
            "first_load_s": first,
            "later_load_s": later,
            "swap_s": swap,
            "plain_load_s": statistics.median(ours["plain_load_seconds"][1:]),
            "memory_growth_gb": [_growth_gb(x["loads"]) for x in (theirs, ours)],
            "ratio_first_load": _ratio(first),
            "ratio_later_load": _ratio(later),
            "ratio_swap": _ratio(swap),
        }
    without = [min(x["without_lora"] + x["without_lora_after"]) for x in (stock, plugin)]
    summary["without_lora_s"] = without
    summary["ratio_without_lora"] = _ratio(without)
    return summary


def _ratio(pair: Sequence[float]) -> float:
    stock, plugin = pair
    return round(stock / plugin, 3) if plugin > 0 else 0.0


def _prepare(work: Path, logs: Path) -> None:
    """Generate on the GPU in a process that gives it back, and split."""
    log = logs / "load_adapters.log"
    failed = run(["-m", "tests.gpu.load_adapters", str(work)], log, child_environment(True), 200)
    if failed:
        raise RuntimeError(f"load_adapters: {failed}\n{log.read_text()[-1500:]}")
    for form in FORMATS:
        for number in range(ADAPTERS_PER_FORMAT):
            shards = adapter_directory(work, form, number, shards=True)
            if not shards.exists():
                plain = adapter_directory(work, form, number, shards=False)
                lorashard("split", str(plain), "--ep-size", "2", "-o", str(shards), "-q",
                          "--model", str(work / "model"))  # fmt: skip


def _run_engine(kind: str, work: Path, logs: Path) -> dict[str, Any]:
    """Raises RuntimeError if the engine leaves no results."""
    out, log = logs / f"load_time_{kind}.json", logs / f"load_time_{kind}.log"
    out.unlink(missing_ok=True)
    command = ["-m", "tests.gpu.load_time", "--work", str(work), "--out", str(out)]
    environment = child_environment(stock=kind == "stock")
    run([*command, "--engine", kind], log, environment, ENGINE_LIMIT_S)
    if not out.exists():
        raise RuntimeError(f"{kind}: see {log}\n{log.read_text(errors='replace')[-1500:]}")
    results: dict[str, Any] = json.loads(out.read_text())
    return results


def _orchestrate(args: argparse.Namespace) -> None:
    work, logs = args.work / "load", args.out.parent
    results: dict[str, Any] = {}
    # What whoever prints the beginning should see comes first.
    head: dict[str, Any] = {"as_expected": False}
    try:
        _prepare(work, logs)
        for kind in ("stock", "plugin"):
            results[kind] = _run_engine(kind, work, logs)
        head = {"as_expected": True, "summary": summarise(results["stock"], results["plugin"])}
    except (RuntimeError, SystemExit) as err:
        head["failure"] = str(err)
    args.out.write_text(json.dumps(head | results, indent=1))


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.load_time")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--engine", choices=["stock", "plugin"])
    args = parser.parse_args()
    if not args.engine:
        _orchestrate(args)
        return

    def measured() -> None:
        results = measure(Engine(args.work, plugin=args.engine == "plugin"))
        args.out.write_text(json.dumps(results, indent=1))

    exit_after(measured)


if __name__ == "__main__":
    _main()
