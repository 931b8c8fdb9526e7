"""Shards -> per-expert deltas, read with plain safetensors as docs/format.md describes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open


def compare_deltas(shards: Path, expected: Path) -> tuple[int, float]:
    """Compare with `experts|<module>|<expert>|<projection>` tensors [out, in] of a file.

    Returns how many were compared and the worst relative error. Every expected expert delta must
    be there, on every rank that the placement names.
    """
    with safe_open(expected, "pt") as file:
        wanted = {k: file.get_tensor(k) for k in file.keys() if k.startswith("experts|")}  # noqa: SIM118 - safe_open is no dict
    manifest = json.loads((shards / "lorashard.json").read_text())
    worst, seen, compared = 0.0, set(), 0
    for key, delta in expert_deltas(shards, manifest):
        if key in wanted:
            seen.add(key)
            compared += 1
            scale = float(wanted[key].abs().max().clamp_min(1e-12))
            worst = max(worst, float((delta - wanted[key]).abs().max()) / scale)
        else:
            module, expert = key.split("|")[1:3]
            if int(expert) in manifest["modules"][module]["absent_experts"]:
                assert not delta.any(), f"{key}: an untrained expert is not zero"
    missing = sorted(set(wanted) - seen)
    assert not missing, f"no shard has {missing[:3]} ({len(missing)} in all)"
    return compared, worst


def expert_deltas(
    shards: Path, manifest: dict[str, Any], dtype: torch.dtype = torch.float32
) -> Any:
    """Yield (key, scaling * lora_B @ lora_A) for every slot of every rank, computed in `dtype`."""
    placement = manifest["placement"]
    replicated = safe_open(shards / "replicated.safetensors", "pt")
    shared = set(replicated.keys())
    for ep_rank in range(placement["ep_size"]):
        name = f"ep-{ep_rank:05d}-of-{placement['ep_size']:05d}.safetensors"
        with safe_open(shards / name, "pt") as file:
            for module, info in manifest["modules"].items():
                experts = placement.get("layers", {}).get(module, placement["ranks"])[ep_rank]
                for projection, scaling in info["scaling"].items():
                    factors = {}
                    for matrix in ("lora_A", "lora_B"):
                        tensor = f"{module}.{projection}.{matrix}"
                        source = replicated if tensor in shared else file
                        stack = source.get_tensor(tensor).to(dtype)
                        factors[matrix] = stack.expand(len(experts), -1, -1)
                    for slot, expert in enumerate(experts):
                        scale = scaling[expert] if isinstance(scaling, list) else scaling
                        delta = scale * (factors["lora_B"][slot] @ factors["lora_A"][slot])
                        for part, value in split_gate_up(projection, delta, info["gate_up"]):
                            yield f"experts|{module}|{expert}|{part}", value


def split_gate_up(
    projection: str, delta: torch.Tensor, gate_up: str
) -> list[tuple[str, torch.Tensor]]:
    if projection != "gate_up_proj":
        return [(projection, delta)]
    if gate_up == "interleaved":
        return [("gate_proj", delta[0::2]), ("up_proj", delta[1::2])]
    half = len(delta) // 2
    return [("gate_proj", delta[:half]), ("up_proj", delta[half:])]
