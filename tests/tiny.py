"""Tiny adapters for the tests that touch files, and the command line run as a user runs it.

Values are small and finite; tests/adapters.py has the ones that encode their own place.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lorashard import SplitRequest, split_adapter

REPO = Path(__file__).parents[1]
E, R, H, I = 4, 2, 8, 6  # noqa: E741 - experts, lora_rank, hidden and intermediate size
MODULE = "model.layers.0.mlp.experts"
RANK_FILES = ("ep-00000-of-00002.safetensors", "ep-00001-of-00002.safetensors")
CONFIG = {
    "peft_type": "LORA",
    "peft_version": "0.18.1",
    "base_model_name_or_path": "some/qwen3-moe",
    "r": R,
    "lora_alpha": 2 * R,
    "bias": "none",
    "target_modules": ["gate_proj", "up_proj", "down_proj", "q_proj"],
    "target_parameters": None,
    "rank_pattern": {},
    "alpha_pattern": {},
}
FUSED_CONFIG = {
    "peft_version": "0.21.2",
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}

Tensors = dict[str, Tensor]


def per_expert_tensors(seed: int = 0, hidden: int = H, layers: int = 1) -> Tensors:
    """One tensor per expert, and attention for all ranks."""
    numbers = _Values(seed)
    tensors: Tensors = {}
    for layer in range(layers):
        block = f"base_model.model.model.layers.{layer}"
        tensors[f"{block}.self_attn.q_proj.lora_A.weight"] = numbers(R, hidden)
        tensors[f"{block}.self_attn.q_proj.lora_B.weight"] = numbers(hidden, R)
        for expert in range(E):
            for name, (inside, out) in {
                "gate_proj": (hidden, I), "up_proj": (hidden, I), "down_proj": (I, hidden),
            }.items():  # fmt: skip
                key = f"{block}.mlp.experts.{expert}.{name}"
                tensors[f"{key}.lora_A.weight"] = numbers(R, inside)
                tensors[f"{key}.lora_B.weight"] = numbers(out, R)
    return tensors


def fused_tensors(seed: int = 0) -> Tensors:
    """What PEFT makes of target_parameters: down_proj is the outer parameter."""
    numbers = _Values(seed)
    block = "base_model.model.model.layers.0"
    return {
        f"{block}.self_attn.q_proj.lora_A.weight": numbers(R, H),
        f"{block}.self_attn.q_proj.lora_B.weight": numbers(H, R),
        f"{block}.mlp.experts.base_layer.lora_A.weight": numbers(E * R, H),
        f"{block}.mlp.experts.base_layer.lora_B.weight": numbers(2 * I, E * R),
        f"{block}.mlp.experts.lora_A.weight": numbers(E * R, I),
        f"{block}.mlp.experts.lora_B.weight": numbers(H, E * R),
    }


def save_config(directory: Path, **changes: Any) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(CONFIG | changes, indent=2)
    (directory / "adapter_config.json").write_text(text)


def save_adapter(directory: Path, tensors: Tensors | None = None, **config: Any) -> Path:
    """A per-expert adapter in safetensors form, unless `tensors` says otherwise."""
    save_config(directory, **config)
    tensors = per_expert_tensors() if tensors is None else tensors
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    return directory


def save_fused(directory: Path, **config: Any) -> Path:
    return save_adapter(directory, fused_tensors(), **FUSED_CONFIG | config)


def save_pickled(directory: Path, content: object = None, **config: Any) -> Path:
    """The same adapter as `save_adapter`, or any object, as adapter_model.bin."""
    save_config(directory, **config)
    content = per_expert_tensors() if content is None else content
    torch.save(content, directory / "adapter_model.bin")
    return directory


def save_header(directory: Path, header: object, data: bytes = b"", **config: Any) -> Path:
    """An adapter whose weights have this header: bytes, or an object to write as JSON."""
    save_config(directory, **config)
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    content = struct.pack("<Q", len(raw)) + raw + data
    (directory / "adapter_model.safetensors").write_bytes(content)
    return directory


def flip_bit(path: Path, position: int) -> None:
    """Positions count from the end if negative."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def split_wrongly_placed(directory: Path, dtype: str | None = None) -> Path:
    """Shards whose placement was edited: experts 0 and 1 of rank 0 in each other's place."""
    expert_map, shards = directory / "map.json", directory / "misplaced"
    expert_map.write_text('{"ranks": [[0, 1], [2, 3]]}')
    adapter = save_adapter(directory / "source")
    split_adapter(adapter, shards, SplitRequest(2, expert_map=expert_map, dtype=dtype))
    placement = json.loads((shards / "lorashard.json").read_text())["placement"]
    edit_json(shards / "lorashard.json", placement=placement | {"ranks": [[1, 0], [2, 3]]})
    return shards


def edit_json(path: Path, **changes: Any) -> None:
    """Change fields of a JSON file; of a manifest, without the digest that would tell of it."""
    document = json.loads(path.read_text()) | changes
    document.pop("blake3", None)
    path.write_text(json.dumps(document))


def change_version(shards: Path) -> None:
    """Change what only the manifest's own digest can tell."""
    manifest = shards / "lorashard.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"lorashard_version": "', '"lorashard_version": "1', 1))


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below a directory by its relative path, links as what they point to."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        if not path.is_symlink()
        else os.fsencode(path.readlink())
        for path in sorted(directory.rglob("*"))
        if path.is_file() or path.is_symlink()
    }


def run_cli(*args: object, **env: str) -> subprocess.CompletedProcess[str]:
    """`python -m lorashard ARGS` without a terminal."""
    return subprocess.run(
        [sys.executable, "-m", "lorashard", *map(str, args)],
        env={**os.environ, "PYTHONPATH": str(REPO), **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@contextmanager
def mounted_tmpfs(path: Path, options: str):
    """A small real file system at `path`; False where this user may not mount one."""
    path.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
    try:
        done = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        done = False
    try:
        yield done
    finally:
        if done:
            subprocess.run(["umount", "--lazy", str(path)], check=False)


class _Values:
    """A run of numbers that bfloat16 holds exactly, the same with every release of torch."""

    def __init__(self, seed: int) -> None:
        self._next = 101 * seed

    def __call__(self, rows: int, cols: int) -> Tensor:
        numbers = torch.arange(self._next, self._next + rows * cols)
        self._next += rows * cols
        return ((numbers * 37 % 253 - 126) / 64).to(torch.bfloat16).view(rows, cols)
