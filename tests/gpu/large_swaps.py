"""Versions of an adapter of full size through one engine: memory after each load.

    python -m tests.gpu.large_swaps --work DIR --out FILE [--tp 1] [--steps 200] [--stock-steps 60]

GLM-4.5-Air's shapes with 8 MoE layers and dummy weights; one tensor per expert and fused in turn.
Each version is a new directory under a new name, the one before the last is removed. Stock loads
the plain adapters. rl_swaps.py shows that answers are right; here they are only asked for.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from tests.gpu.load_adapters import ADAPTERS_PER_FORMAT, FORMATS, LORA_RANK, adapter_directory
from tests.gpu.prepare import lorashard
from tests.gpu.processes import ROOT, child_environment, exit_after, run

KEEP = 2  # versions that are loaded at a time
ENGINE_LIMIT_S = 300.0


def start_engine(model: Path, tp: int, *, stock: bool) -> Any:
    """A vLLM of either kind; the plugin is on or off by the environment."""
    from vllm import LLM

    return LLM(
        model=str(model),
        load_format="dummy",
        skip_tokenizer_init=True,
        enable_lora=True,
        max_loras=1,
        max_cpu_loras=KEEP + 1,
        max_lora_rank=LORA_RANK,
        tensor_parallel_size=tp,
        enable_expert_parallel=True,
        fully_sharded_loras=not stock,
        # Stock takes fused adapters on this model in this mode alone.
        enable_mixed_moe_lora_format=stock,
        enforce_eager=True,
        gpu_memory_utilization=0.6,
        kv_cache_memory_bytes=2 << 30,
        max_model_len=256,
        max_num_seqs=8,
    )


def swap(work: Path, steps: int, tp: int, *, stock: bool) -> list[dict[str, Any]]:
    """Load `steps` versions; seconds and MB of each."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest
    from watch_server import gpu_memory, memory_of_tree

    engine = start_engine(work / "model", tp, stock=stock)
    sampling = SamplingParams(max_tokens=1, temperature=0, detokenize=False)
    prompt: Any = [{"prompt_token_ids": [3, *range(10, 73)]}]
    rows: list[dict[str, Any]] = []
    served: list[tuple[int, Path]] = []
    for step in range(steps):
        form, number = FORMATS[step // 2 % len(FORMATS)], step % ADAPTERS_PER_FORMAT
        path = work / "versions" / f"v{step:04}"
        shutil.copytree(_source(work, form, number, tp, stock=stock), path, copy_function=os.link)
        is_3d = stock and form == "fused"
        request = LoRARequest(path.name, step + 1, str(path), is_3d_lora_weight=is_3d)
        began = time.perf_counter()
        if not engine.llm_engine.add_lora(request):
            raise RuntimeError(f"{path} was not loaded")
        seconds = time.perf_counter() - began
        engine.generate(prompt, sampling, lora_request=request, use_tqdm=False)
        served.append((step + 1, path))
        while len(served) > KEEP:
            old, directory = served.pop(0)
            engine.llm_engine.remove_lora(old)
            shutil.rmtree(directory)
        row = {"step": step, "form": form, "load_s": round(seconds, 4)}
        rows.append(row | memory_of_tree(os.getpid()) | (gpu_memory() if step % 10 == 0 else {}))
    return rows


def _source(work: Path, form: str, number: int, tp: int, *, stock: bool) -> Path:
    plain = adapter_directory(work, form, number, shards=False)
    return plain if stock else plain.with_name(f"{plain.name}-ep{tp}")


def _prepare(work: Path, logs: Path, tp: int) -> None:
    """Generate on the GPU in a process that gives it back, and split."""
    log = logs / "load_adapters.log"
    failed = run(["-m", "tests.gpu.load_adapters", str(work)], log, child_environment(True), 200)
    if failed:
        raise RuntimeError(f"load_adapters: {failed}\n{log.read_text()[-1500:]}")
    for form in FORMATS:
        for number in range(ADAPTERS_PER_FORMAT):
            shards = _source(work, form, number, tp, stock=False)
            if not shards.exists():
                plain = adapter_directory(work, form, number, shards=False)
                lorashard("split", str(plain), "--ep-size", str(tp), "-o", str(shards), "-q",
                          "--model", str(work / "model"))  # fmt: skip


def _measure(kind: str, args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """One engine in a process of its own."""
    from watch_server import flatness

    log = args.out.parent / f"large_swaps_{kind}.log"
    out = args.out.with_suffix(f".{kind}.json")
    out.unlink(missing_ok=True)
    shutil.rmtree(work / "versions", ignore_errors=True)
    (work / "versions").mkdir()
    steps = args.stock_steps if kind == "stock" else args.steps
    command = ["-m", "tests.gpu.large_swaps", "--work", str(args.work), "--out", str(out)]
    command += ["--engine", kind, "--tp", str(args.tp), "--steps", str(steps)]
    run(command, log, child_environment(stock=kind == "stock"), ENGINE_LIMIT_S)
    if not out.exists():
        raise RuntimeError(f"{kind}: see {log}\n{log.read_text(errors='replace')[-1500:]}")
    rows = json.loads(out.read_text())
    out.unlink()
    loads = {
        form: statistics.median(row["load_s"] for row in rows[2:] if row["form"] == form)
        for form in FORMATS
    }
    return {"steps": steps, "memory": flatness(rows, 0.1), "load_s": loads, "rows": rows}


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.large_swaps")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tp", type=int, choices=[1, 2], default=1)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--stock-steps", type=int, default=60)
    parser.add_argument("--engine", choices=["stock", "plugin"])
    args = parser.parse_args()
    args.out = args.out.absolute()
    work = args.work.absolute() / "load"
    sys.path.insert(0, str(ROOT / "docs" / "recipes"))
    if not args.engine:
        _prepare(work, args.out.parent, args.tp)
        document: dict[str, Any] = {"tp": args.tp}
        for kind in ("plugin", "stock"):
            document[kind] = _measure(kind, args, work)
            args.out.write_text(json.dumps(document))
            print(kind, {k: v for k, v in document[kind].items() if k != "rows"}, flush=True)
        return

    def swapped() -> None:
        rows = swap(work, args.steps, args.tp, stock=args.engine == "stock")
        args.out.write_text(json.dumps(rows))

    exit_after(swapped)


if __name__ == "__main__":
    _main()
