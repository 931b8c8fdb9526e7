"""Split an adapter the obvious way, with safetensors and torch: the rival to beat.

    python -m tests.bench.naive ADAPTER OUT --ep-size 8

It writes the tensors of a shard directory, without manifest, digests or checks, and knows
only PEFT's two plain layouts.
"""

import argparse
import json
import re
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

_PER_EXPERT = re.compile(r"base_model\.model\.(.*\.experts)\.(\d+)\.(\w+)\.(lora_[AB])\.weight")
_FUSED = re.compile(r"base_model\.model\.(.*\.experts)(\.base_layer)?\.(lora_[AB])\.weight")


def split(adapter: Path, out: Path, ep_size: int) -> None:
    out.mkdir(parents=True)
    config_text = (adapter / "adapter_config.json").read_text(encoding="utf-8")
    (out / "adapter_config.json").write_text(config_text, encoding="utf-8")
    lora_rank = json.loads(config_text)["r"]

    with safe_open(adapter / "adapter_model.safetensors", "pt") as source:
        per_expert: dict[str, dict[int, str]] = {}
        fused: dict[str, str] = {}
        replicated: dict[str, torch.Tensor] = {}
        for name in source.keys():  # noqa: SIM118 (safe_open is not a mapping)
            if match := _PER_EXPERT.fullmatch(name):
                module, expert, projection, matrix = match.groups()
                experts = per_expert.setdefault(f"{module}.{projection}.{matrix}", {})
                experts[int(expert)] = name
            elif match := _FUSED.fullmatch(name):
                module, is_gate_up, matrix = match.groups()
                projection = "gate_up_proj" if is_gate_up else "down_proj"
                fused[f"{module}.{projection}.{matrix}"] = name
            else:
                replicated[name] = source.get_tensor(name)
        save_file(replicated, out / "replicated.safetensors")

        for ep_rank in range(ep_size):
            shard: dict[str, torch.Tensor] = {}
            for target, experts in per_expert.items():
                num_local = len(experts) // ep_size
                local = range(ep_rank * num_local, (ep_rank + 1) * num_local)
                shard[target] = torch.stack(
                    [source.get_tensor(experts[expert]) for expert in local]
                )
            for target, name in fused.items():
                tensor = source.get_tensor(name)
                if target.endswith("lora_A"):
                    by_expert = tensor.reshape(-1, lora_rank, tensor.shape[1])
                else:
                    # The expert varies fastest along the columns of lora_B.
                    columns = tensor.reshape(tensor.shape[0], lora_rank, -1)
                    by_expert = columns.permute(2, 0, 1)
                num_local = by_expert.shape[0] // ep_size
                local_experts = by_expert[ep_rank * num_local :][:num_local]
                shard[target] = local_experts.contiguous()
            save_file(shard, out / f"ep-{ep_rank:05d}-of-{ep_size:05d}.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("adapter", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--ep-size", type=int, required=True)
    args = parser.parse_args()
    split(args.adapter, args.out, args.ep_size)


if __name__ == "__main__":
    main()
