"""vLLM's `moe_lora_align_block_size` on a GPU, with its own CUDA op, against what it must give.

python -m tests.gpu.align --out FILE

Every adapter's tokens must be sorted into blocks of one local expert each, by the expert map, and
nothing else may be named. Both kernels of the op are reached: up to 1,024 ids of up to 64 experts,
and more.
"""

import argparse
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lorashard.vllm_plugin import register

MAX_LORAS = 4


@dataclass(frozen=True, slots=True)
class Batch:
    """One call. placement: which experts of `num_experts` are local."""

    num_experts: int
    placement: str
    num_tokens: int
    top_k: int
    block_size: int
    adapters: tuple[int, ...]  # the slots that tokens use; -1 is no adapter


def batches() -> Iterator[Batch]:
    """Few and many tokens and experts, every kind of placement."""
    for num_experts, placement, num_tokens, block_size, adapters in itertools.product(
        (8, 15, 60, 64, 128, 256),
        ("first half", "last half", "every other", "none"),
        (1, 7, 192, 2048),
        (16, 64),
        ((0,), (-1, 2), (-1, 0, 1, 3)),
    ):
        yield Batch(num_experts, placement, num_tokens, 4, block_size, adapters)


def expert_map(batch: Batch) -> Tensor:
    """Global expert -> local slot, -1 for experts of other ranks."""
    half = batch.num_experts - batch.num_experts // 2
    local = {
        "first half": range(half),
        "last half": range(half, batch.num_experts),
        "every other": range(1, batch.num_experts, 2),
        "none": range(0),
    }[batch.placement]
    found = torch.full((batch.num_experts,), -1, dtype=torch.int32)
    found[list(local)] = torch.arange(len(local), dtype=torch.int32)
    return found


def wrapper(device: torch.device) -> Any:
    """The release's own PunicaWrapperGPU."""
    from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

    config = SimpleNamespace(max_loras=MAX_LORAS, specialize_active_lora=False)
    return PunicaWrapperGPU(4096, 16, device, lora_config=config)


def problems(punica: Any, batch: Batch, generator: torch.Generator) -> list[str]:
    """What is wrong with the answer to one call."""
    device = torch.device("cuda")
    scores = torch.rand(batch.num_tokens, batch.num_experts, generator=generator)
    topk_ids = scores.topk(batch.top_k).indices.to(torch.int32)
    choice = torch.randint(len(batch.adapters), (batch.num_tokens,), generator=generator)
    tokens = torch.tensor(batch.adapters, dtype=torch.int32)[choice]
    enabled = torch.zeros(MAX_LORAS + 1, dtype=torch.int32)
    enabled[[slot for slot in batch.adapters if slot >= 0]] = 1
    placed = expert_map(batch)
    punica.token_mapping_meta.prepare_tensors(tokens.to(device))
    _, sorted_ids, expert_ids, padded = punica.moe_lora_align_block_size(
        topk_ids.to(device), batch.num_tokens, batch.block_size, int((placed >= 0).sum()),
        MAX_LORAS, enabled.to(device), placed.to(device),
    )[:4]  # fmt: skip
    torch.cuda.synchronize()
    if bool((tokens < 0).all()):
        return []  # no adapter in the batch: vLLM asks nothing of the op
    found = []
    for slot in sorted({int(slot) for slot in tokens.unique()} - {-1}):
        rows = sorted_ids.view(MAX_LORAS, -1)[slot].cpu()
        blocks = expert_ids.view(MAX_LORAS, -1)[slot].cpu()
        used = int(padded[slot])
        found += _slot_problems(slot, rows[:used], blocks, batch, topk_ids, tokens, placed)
    return found


def _slot_problems(
    slot: int, rows: Tensor, blocks: Tensor, batch: Batch, topk_ids: Tensor, tokens: Tensor,
    placed: Tensor,
) -> Iterator[str]:  # fmt: skip
    local = placed[topk_ids.long()].flatten()
    mine = (tokens == slot).repeat_interleave(batch.top_k) & (local >= 0)
    wanted = set(mine.nonzero().flatten().tolist())
    named: list[int] = []
    for place, block in enumerate(rows.split(batch.block_size)):
        ids = block[block < topk_ids.numel()].tolist()
        expert = int(blocks[place])
        if expert >= 0:
            named += ids
        if expert >= int((placed >= 0).sum()):
            yield f"slot {slot} block {place}: expert {expert} is not local"
        if expert >= 0 and any(int(local[i]) != expert for i in ids):
            yield f"slot {slot} block {place}: ids of other experts than {expert}"
    if sorted(named) != sorted(wanted):
        yield f"slot {slot}: {len(named)} ids, not {len(wanted)}"
    beyond = blocks[-(-len(rows) // batch.block_size) :]
    if bool((beyond != -1).any()):
        yield f"slot {slot}: blocks beyond the end name experts {beyond.unique().tolist()}"


def _main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.align", description=__doc__)
    parser.add_argument("--work", type=Path, help="taken as by the other tests, and not used")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    register()
    punica = wrapper(torch.device("cuda"))
    generator = torch.Generator().manual_seed(0)
    wrong: list[dict[str, Any]] = []
    calls = 0
    for batch in batches():
        calls += 1
        found = list(problems(punica, batch, generator))
        wrong += [asdict(batch) | {"problems": found[:3]}] if found else []
    method = type(punica).moe_lora_align_block_size
    document = {
        "calls": calls,
        "wrong": wrong[:20],
        "wrong_calls": len(wrong),
        "as_expected": not wrong,
        "patched": hasattr(method, "_lorashard_original"),
        "device": torch.cuda.get_device_name(),
    }
    args.out.write_text(json.dumps(document, indent=1))
    print(json.dumps(document)[:2000])
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(_main())
