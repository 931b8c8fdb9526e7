"""The ranks of a trainer that publish an adapter: each in a process of its own, with its experts.

    python -m tests.bench.trainer_ranks --rank 0 --world-size 4 --store FILE --layers 8

The adapter has GLM-4.5-Air's shapes. Each line on stdin is a command, `WAY EP_SIZE PATH`, and each line
on stdout says that this rank is done, and what each round of a commit took.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import Any

LORA_RANK, NUM_EXPERTS, HIDDEN, INTERMEDIATE = 32, 128, 4096, 1408
ATTENTION = {"q_proj": (4096, HIDDEN), "k_proj": (1024, HIDDEN), "v_proj": (1024, HIDDEN),
             "o_proj": (HIDDEN, 4096)}  # fmt: skip
EXPERTS = {"gate_proj": (HIDDEN, INTERMEDIATE), "up_proj": (HIDDEN, INTERMEDIATE),
           "down_proj": (INTERMEDIATE, HIDDEN)}  # fmt: skip
PREFIX = "base_model.model."
CONFIG = {
    "peft_type": "LORA", "r": LORA_RANK, "lora_alpha": 2 * LORA_RANK, "peft_version": "0.21.2",
    "target_modules": [*ATTENTION, *EXPERTS], "bias": "none", "use_rslora": False,
    "base_model_name_or_path": "glm-4.5-air-shapes",
}  # fmt: skip
MODEL = {
    "model_type": "glm4_moe", "architectures": ["Glm4MoeForCausalLM"], "hidden_size": HIDDEN,
    "moe_intermediate_size": INTERMEDIATE, "n_routed_experts": NUM_EXPERTS,
}  # fmt: skip


class Rank:
    """One rank's tensors: stacked experts of every MoE layer, and on rank 0 attention."""

    def __init__(self, rank: int, world_size: int, store: str, layers: int, device: str) -> None:
        import torch
        import torch.distributed as dist

        self.rank, self.world_size = rank, world_size
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank,
                                world_size=world_size)  # fmt: skip
        torch.manual_seed(rank)
        own = NUM_EXPERTS // world_size + 1
        values = torch.randn(2 * own * LORA_RANK * HIDDEN, device=device, dtype=torch.bfloat16)
        values.mul_(0.02)
        begin = 0

        def matrix(*size: int) -> Any:
            """Other values each time; to draw them all takes longer than what is measured."""
            nonlocal begin
            begin += 9973
            last = len(values) - prod(size)
            return values[begin % last :][: prod(size)].clone().view(size)

        def pair(*size: int, inside: int, out: int) -> tuple[Any, Any]:
            return matrix(*size, LORA_RANK, inside), matrix(*size, out, LORA_RANK)

        self.ids = range(rank * NUM_EXPERTS // world_size, (rank + 1) * NUM_EXPERTS // world_size)
        self.experts = {
            f"model.layers.{layer}.mlp.experts": {
                name: pair(len(self.ids), inside=inside, out=out)
                for name, (inside, out) in EXPERTS.items()
            }
            for layer in range(1, layers + 1)
        }
        self.attention = {
            f"model.layers.{layer}.self_attn.{name}": pair(inside=inside, out=out)
            for layer in range(layers + 1)
            for name, (out, inside) in ATTENTION.items()
        }

    def train(self) -> None:
        """Other values."""
        for layer in self.experts.values():
            for a, b in layer.values():
                a.mul_(1.01)
                b.mul_(1.01)

    def write(self, out: str, ep_size: int) -> dict[str, float]:
        """With lorashard: every rank writes its own. Seconds by what they went into."""
        import torch.distributed as dist

        from lorashard import AdapterWriter

        began = time.perf_counter()
        writer = AdapterWriter(
            out, CONFIG, ep_size=ep_size, model=MODEL, rank=self.rank, world_size=self.world_size,
            sync=False,
        )  # fmt: skip
        for module, factors in self.experts.items():
            writer.experts(module, self.ids, factors)
        if self.rank == 0:
            for module, (a, b) in self.attention.items():
                writer.dense(module, a, b)
        given = time.perf_counter() - began
        writer.commit(dist.barrier)
        return {"give": given, **writer.seconds}

    def gather(self, out: str) -> None:
        """The usual way: rank 0 gets all, and saves one file."""
        import torch
        import torch.distributed as dist
        from safetensors.torch import save_file

        tensors = {}
        for module, factors in self.experts.items():
            for name, pair in factors.items():
                for matrix, own in zip("AB", pair, strict=True):
                    host = own.cpu()
                    parts = [torch.empty_like(host) for _ in range(self.world_size)]
                    dist.gather(host, parts if self.rank == 0 else None)
                    if self.rank == 0:
                        for expert, values in enumerate(torch.cat(parts)):
                            key = f"{PREFIX}{module}.{expert}.{name}.lora_{matrix}.weight"
                            tensors[key] = values.clone()
        if self.rank == 0:
            for module, pair in self.attention.items():
                for matrix, values in zip("AB", pair, strict=True):
                    tensors[f"{PREFIX}{module}.lora_{matrix}.weight"] = values.cpu()
            Path(out).mkdir(parents=True)
            save_file(tensors, Path(out) / "adapter_model.safetensors", {"format": "pt"})
            Path(out, "adapter_config.json").write_text(json.dumps(CONFIG))
        dist.barrier()


class Trainer:
    """The processes, from outside."""

    def __init__(self, world_size: int, layers: int, devices: tuple[str, ...] = ("cpu",)) -> None:
        self._stack = ExitStack()
        folder = self._stack.enter_context(tempfile.TemporaryDirectory())
        self._ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.bench.trainer_ranks", "--rank", str(rank),
                 "--world-size", str(world_size), "--store", f"{folder}/store",
                 "--layers", str(layers), "--device", devices[rank % len(devices)]],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )
            for rank in range(world_size)
        ]  # fmt: skip
        self.rounds: dict[str, float] = {}  # of the last "write", the slowest rank's seconds
        self._wait()

    def close(self) -> None:
        """End the processes."""
        for process in self._ranks:
            process.kill()
            process.wait()
        self._stack.close()

    def run(self, way: str, out: Path | str = "", ep_size: int = 2) -> float:
        """Seconds until all ranks have done it: "train", "write" or "gather"."""
        began = time.perf_counter()
        for process in self._ranks:
            assert process.stdin is not None
            process.stdin.write(f"{way} {ep_size} {out}\n")
            process.stdin.flush()
        of_ranks = self._wait()
        seconds = time.perf_counter() - began
        if way == "write":
            self.rounds = {name: max(rank[name] for rank in of_ranks) for name in of_ranks[0]}
        return seconds

    def _wait(self) -> list[dict[str, float]]:
        answers = []
        for process in self._ranks:
            assert process.stdout is not None
            done, _, answer = process.stdout.readline().partition(" ")
            if done != "done":
                raise RuntimeError("a rank has ended")
            answers.append(json.loads(answer))
        return answers


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.trainer_ranks")
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--world-size", type=int, required=True)
    parser.add_argument("--store", required=True)
    parser.add_argument("--layers", type=int, default=45)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    rank = Rank(args.rank, args.world_size, args.store, args.layers, args.device)
    print("done {}", flush=True)
    for line in sys.stdin:
        way, ep_size, out = line.rstrip("\n").split(" ", 2)
        seconds: dict[str, float] = {}
        if way == "write":
            seconds = rank.write(out, int(ep_size))
        elif way == "gather":
            rank.gather(out)
        else:
            rank.train()
        print("done", json.dumps(seconds), flush=True)


if __name__ == "__main__":
    _main()
