"""Run inside a vLLM release: hundreds of versions of an adapter through one engine, as in an RL loop.

Each version is a new directory under a new name and number. The one before the last is removed and
its directory deleted. test_swaps_conformance.py calls `swap_many`.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from lorashard import SplitRequest, split_adapter
from lorashard.vllm_plugin import register

register()

from tests.adapters import Adapter, Spec, build  # noqa: E402
from tests.vllm_plugin import harness  # noqa: E402
from tests.vllm_plugin.harness_selfcheck import expected_deltas, mismatches  # noqa: E402

KEEP = 2  # versions that are loaded at a time
SIZES = {"num_experts": 16, "hidden_size": 512, "intermediate_size": 256}
MODULES = ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts")


def swap_many(steps: int) -> dict[str, Any]:
    """What was wrong at which step; MB of resident memory after each; MB that a rank reads a step."""
    work = Path(tempfile.mkdtemp())
    weights = [_weights(seed) for seed in range(4)]
    shards = []
    for seed, adapter in enumerate(weights):
        plain = adapter.write(work / f"plain-{seed}")
        split_adapter(plain, work / f"shards-{seed}", SplitRequest(2))
        shards.append(work / f"shards-{seed}")
    engine = harness.make_engine(
        **SIZES, ep_rank=1, module_names=MODULES, attention=False, max_loras=1, max_cpu_loras=KEEP
    )
    known: dict[int, Any] = {}
    served: list[tuple[int, Path]] = []
    wrong, resident = [], []
    for step in range(steps):
        kind, path = step % len(shards), work / f"mine-v{step:04}"
        shutil.copytree(shards[kind], path)
        engine.add_adapter(harness.request(engine, path, path.name, step + 1))
        served.append((step + 1, path))
        slot = harness.slot_of(engine, step + 1)
        if kind not in known:
            wrong += mismatches(engine, slot, expected_deltas(weights[kind]))
            known[kind] = harness.buffers(engine, slot)
        elif not harness.are_equal(known[kind], harness.buffers(engine, slot)):
            wrong.append(f"step {step}: not the weights of its version")
        while len(served) > KEEP:
            number, old = served.pop(0)
            engine.remove_adapter(number)
            shutil.rmtree(old)
        resident.append(resident_mb())
    size = (shards[0] / "ep-00001-of-00002.safetensors").stat().st_size
    shutil.rmtree(work)
    return {"wrong": wrong, "resident_mb": resident, "mb_a_step": size / 1e6}


def _weights(seed: int) -> Adapter:
    return build(
        Spec(
            "L1",
            num_experts=SIZES["num_experts"],
            num_layers=len(MODULES),
            lora_rank=8,
            hidden=SIZES["hidden_size"],
            intermediate=SIZES["intermediate_size"],
            dtype=torch.bfloat16,
            fill="random",
            seed=seed,
        )
    )


def resident_mb() -> float:
    """Memory of this process, in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise AssertionError("no VmRSS")
