"""What an adapter's expert LoRA costs one worker: GPU buffers and host memory. Pure arithmetic.

Legend: S = max_loras (slots), E_local experts on the ep rank, r = max_lora_rank, H hidden size,
I = full expert intermediate size (under expert parallelism vLLM's MoE tp_size is 1: no slicing).
"""

from __future__ import annotations

from typing import Literal

from lorashard.vllm_options import Wrapper


def expert_buffer_bytes(
    *,
    num_local_experts: int,
    max_loras: int,
    max_lora_rank: int,
    hidden_size: int,
    intermediate_size: int,
    gated: bool,
    element_size: int,
    wrapper: Wrapper = "2d",
) -> int:
    """Bytes of one MoE layer's stacked expert LoRA buffers on one ep rank's GPU.

    vLLM 0.33.0 lora/layers/fused_moe.py:172-237 (2d) and :491-518 (3d's own lora_B):

        w13 lora_A  n x [S, E_local, r, H]      2d: n = 2 if gated else 1; 3d: n = 1, shared
        w13 lora_B  n x [S, E_local, I, r]      3d: 1 x [S, E_local, 2I, r], gated or not
        w2  lora_A      [S, E_local, r, I]
        w2  lora_B      [S, E_local, H, r]

    They are allocated when the model loads, whole, whatever the adapters' own ranks are. S is
    max_loras, without the extra "no LoRA" slot (`lora_slots`, lora/model_manager.py:348 and :563).
    max_lora_rank is vLLM's setting (1, 8, 16, 32, 64, 128, 256, 320 or 512), not the adapter's r.

    Not counted: `adapter_enabled`, 4 * (S + 1) bytes; the allocator's rounding to 512 bytes; and
    `enable_moe_shared_loras` (>= 0.26), which keeps w13 lora_A and w2 lora_B once for all experts.
    A backend that pads the experts (MXFP4) pads these too: pass the padded H and I.
    Checked against vLLM in tests/vllm_plugin/test_memory_conformance.py.
    """
    gate_up_inputs, gate_up_outputs = (2, 2) if gated else (1, 1)
    if wrapper == "3d":
        gate_up_inputs, gate_up_outputs = 1, 2
    features = (
        gate_up_inputs * hidden_size  # w13 lora_A
        + gate_up_outputs * intermediate_size  # w13 lora_B
        + intermediate_size  # w2 lora_A
        + hidden_size  # w2 lora_B
    )
    return max_loras * num_local_experts * max_lora_rank * features * element_size


def host_bytes_stock(
    layout: Literal["per_expert", "fused"],
    adapter_expert_bytes: int,
    rank_expert_bytes: int,
    replicated_bytes: int,
    *,
    rank_lora_b_bytes: int = 0,
) -> int:
    """Host memory that an unpatched vLLM >= 0.22.1 worker takes to load an adapter: at least this.

    adapter_expert_bytes: expert tensors of all ranks. rank_expert_bytes: of this ep rank alone;
    rank_lora_b_bytes: the lora_B among them (used for `fused` only; left out, the floor is lower).

    All in bytes after vLLM's cast to its LoRA dtype.

    per_expert: own experts are pinned tensor by tensor (0.33.0 lora/lora_model.py:169-176), then
    stacked and the stacks pinned (lora/lora_weights.py:218-240, lora/model_manager.py:941-945).
    fused: every tensor of the file is pinned whole, then the own lora_B is copied out and pinned
    again; the own lora_A is a view, which keeps all ranks' lora_A pinned while the adapter is
    cached (lora/model_manager.py:1094-1112, 2d; :985-1007, 3d).
    PyTorch's pinned-memory cache keeps what is freed, so both copies stay with the process; the
    next adapter uses the first one again.

    A floor because that cache also rounds each block up to a power of two. Measured on 0.33.0
    (GLM-4.5-Air shapes, 8 MoE layers, r 32, bf16, ep_size 2), first load: per-expert 0.55 GB a
    rank, 1.23 GB growth (floor 1.10; with the rounding 1.22); fused 0.83 GB file, 0.42 GB a rank,
    1.22 GB growth (floor 1.06; with the rounding 1.22).
    Not counted: the file's pages mapped while it is read, which the kernel can drop.
    """
    if layout == "per_expert":
        return 2 * rank_expert_bytes + replicated_bytes
    return adapter_expert_bytes + rank_lora_b_bytes + replicated_bytes


def host_bytes_lorashard(rank_expert_bytes: int, replicated_bytes: int) -> int:
    """Host memory to load one shard: read once into one pinned buffer, copied to the GPU from it.

    With the plugin the memory is prepared at start and the load itself adds nothing: 0.00 GB for the
    adapter above, in a buffer of 0.58 GB (docs/vllm.md). Holds for memory registered page by page
    (`cudaHostRegister`); from `torch.empty(pin_memory=True)` such a buffer takes 1.0 GB, rounded up
    to a power of two.
    """
    return rank_expert_bytes + replicated_bytes
