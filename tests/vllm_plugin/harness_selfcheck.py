"""The harness against unpatched vLLM: what stock loads right must come out right.

PYTHONPATH=<a release's sources> VLLM_PLUGINS= python tests/vllm_plugin/harness_selfcheck.py

A line per case; exit code 1 if one fails. Stock is right for evenly divided linear placement, and
is known to load other experts' weights for the rest: there the harness must see the difference.
Up to 0.20 stock refuses expert parallelism with LoRA: there the cases run on one rank.
"""

from __future__ import annotations

import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from lorashard.shards.placement import linear_placement, round_robin_placement
from tests.adapters import Adapter, Spec, build
from tests.vllm_plugin import harness

HIDDEN, INTERMEDIATE, EXPERTS, LORA_RANK, MAX_RANK = 16, 9, 8, 2, 8
SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_experts": EXPERTS,
    "max_lora_rank": MAX_RANK,
}
ATTENTION = {
    "q_proj": (HIDDEN, HIDDEN),
    "k_proj": (HIDDEN, HIDDEN // 2),
    "v_proj": (HIDDEN, HIDDEN // 2),
    "o_proj": (HIDDEN, HIDDEN),
}
HAS_EP = hasattr(harness.FusedMoEWithLoRA, "_ep_check")
LAST_RANK: dict[str, Any] = {"ep_size": 2, "ep_rank": 1} if HAS_EP else {"ep_size": 1}
FOLDER = tempfile.TemporaryDirectory()
SCALING = 2.0  # Spec: lora_alpha = 2 r; a power of two, so bf16 multiplies exactly

Expected = dict[tuple[str, int], dict[str, Tensor]]


def adapter_of(layout: str, seed: int = 0, **fields: Any) -> Adapter:
    """bf16, two layers, attention beside the experts."""
    spec = Spec(
        layout,
        num_experts=fields.pop("num_experts", EXPERTS),
        num_layers=2,
        lora_rank=LORA_RANK,
        hidden=HIDDEN,
        intermediate=fields.pop("intermediate", INTERMEDIATE),
        dtype=torch.bfloat16,
        fill="random",
        seed=seed,
        **fields,
    )
    adapter = build(spec)
    numbers = torch.Generator().manual_seed(1000 + seed)
    extra: dict[str, Tensor] = {}
    for layer in range(spec.num_layers):
        for name, (inside, out) in ATTENTION.items():
            key = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            extra[f"{key}.lora_A.weight"] = torch.randn(LORA_RANK, inside, generator=numbers)
            extra[f"{key}.lora_B.weight"] = torch.randn(out, LORA_RANK, generator=numbers)
    extra = {name: tensor.to(torch.bfloat16) for name, tensor in extra.items()}
    return replace(adapter, tensors=adapter.tensors | extra)


def expected_deltas(adapter: Adapter, *, interleaved: bool = False) -> Expected:
    """scaling * lora_B @ lora_A of every expert, from the adapter's own factors."""
    found: Expected = {}
    for (module, expert, projection), (a, b) in adapter.factors.items():
        delta = SCALING * b.float() @ a.float()
        parts = {projection: delta}
        if projection == "gate_up_proj":
            half = delta.shape[0] // 2
            gate, up = (delta[0::2], delta[1::2]) if interleaved else (delta[:half], delta[half:])
            parts = {"gate_proj": gate, "up_proj": up}
        found.setdefault((module, expert), {}).update(parts)
    return found


def differences(
    engine: Any, slot: int, expected: Expected, prefix: str = ""
) -> Iterator[tuple[str, float]]:
    """Every projection of every local expert: how far the buffers of a slot are from the adapter.

    Relative to the largest element that it should have, absolute where that is 0. prefix: what vLLM
    puts before names.
    """
    loaded = harness.deltas(engine, slot)
    assert {prefix + module for module, _ in expected} == set(loaded)
    for module, experts in loaded.items():
        for expert, projections in experts.items():
            wanted = expected[module.removeprefix(prefix), expert]
            assert set(wanted) == set(projections), (set(wanted), set(projections))
            for name, delta in projections.items():
                size = wanted[name].abs().max().item() or 1.0
                yield (
                    f"{module} expert {expert} {name}",
                    (delta - wanted[name]).abs().max().item() / size,
                )


def mismatches(
    engine: Any, slot: int, expected: Expected, prefix: str = "", limit: float = 1e-6
) -> list[str]:
    """Where the buffers of a slot differ from the adapter."""
    found = differences(engine, slot, expected, prefix)
    return [where for where, difference in found if not difference <= limit]


def wrong_attention(engine: Any, slot: int, adapter: Adapter, prefix: str = "") -> list[str]:
    wrong, seen = [], 0
    for module, pairs in harness.buffers(engine, slot).items():
        if ".self_attn." not in module:
            continue
        block = module.removeprefix(prefix).rpartition(".")[0]
        for name, (a, b) in pairs.items():
            key = f"base_model.model.{block}.{name}"
            lora_a, lora_b = (adapter.tensors[f"{key}.lora_{m}.weight"].float() for m in "AB")
            seen += 1
            if not torch.allclose(b.float() @ a.float(), SCALING * lora_b @ lora_a, rtol=1e-5):
                wrong.append(f"{block}.{name}")
    assert seen == 2 * len(ATTENTION)
    return wrong


def modules(prefix: str = "") -> list[str]:
    return [f"{prefix}model.layers.{layer}.mlp.experts" for layer in range(2)]


def write(adapter: Adapter) -> Path:
    return adapter.write(Path(tempfile.mkdtemp(dir=FOLDER.name)))


def loads_right(
    adapter: Adapter,
    *,
    prefix: str = "",
    is_3d: bool = False,
    interleaved: bool = False,
    ep_sizes: tuple[int, ...] = (1, 2, 4),
    **options: Any,
) -> None:
    path = write(adapter)
    expected = expected_deltas(adapter, interleaved=interleaved)
    for ep_size in ep_sizes if HAS_EP else (1,):
        owned: list[int] = []
        for ep_rank in range(ep_size):
            engine = harness.make_engine(
                **SIZES,
                ep_size=ep_size,
                ep_rank=ep_rank,
                module_names=modules(prefix),
                **options,
            )
            assert engine.add_adapter(harness.request(engine, path, is_3d=is_3d))
            slot = harness.slot_of(engine, 1)
            assert mismatches(engine, slot, expected, prefix) == []
            assert wrong_attention(engine, slot, adapter, prefix) == []
            owned += harness.deltas(engine, slot)[modules(prefix)[0]]
        assert sorted(owned) == list(range(EXPERTS))


def per_expert_on_2d() -> None:
    loads_right(adapter_of("L1"))


def per_expert_without_a_gate() -> None:
    loads_right(adapter_of("L1", gated=False), gated=False)


def fused_on_3d() -> None:
    loads_right(adapter_of("L2"), wrapper="3d")


def fused_on_3d_interleaved() -> None:
    loads_right(adapter_of("L2"), wrapper="3d", architecture="GptOssForCausalLM", interleaved=True)


def fused_on_2d_in_mixed_format() -> str | None:
    if lacks := what_is_lacking(mixed_format=True):
        return lacks
    loads_right(adapter_of("L2"), mixed_format=True, is_3d=True)
    loads_right(adapter_of("L2"), wrapper="3d", mixed_format=True, is_3d=True, ep_sizes=(2,))
    return None


def shared_factors() -> str | None:
    if lacks := what_is_lacking(shared_loras=True):
        return lacks
    loads_right(adapter_of("L8"), shared_loras=True)
    return None


def with_the_kernel_that_the_quant_method_selects() -> str | None:
    if lacks := what_is_lacking(own_kernel=False):
        return lacks
    loads_right(adapter_of("L1"), own_kernel=False)
    loads_right(adapter_of("L1", gated=False), gated=False, own_kernel=False)
    loads_right(adapter_of("L2"), wrapper="3d", own_kernel=False)
    return None


def what_is_lacking(**options: Any) -> str | None:
    try:
        harness.make_engine(**SIZES, **LAST_RANK, **options)
    except ValueError as err:
        return str(err)
    return None


def renamed_by_the_models_mapper() -> None:
    prefix = "language_model."
    mapper = {"orig_to_new_prefix": {"model.": f"{prefix}model."}}
    loads_right(adapter_of("L1"), prefix=prefix, mapper=mapper, ep_sizes=(2,))


def two_adapters_and_eviction() -> None:
    adapters = [adapter_of("L1", seed=seed) for seed in range(3)]
    engine = harness.make_engine(**SIZES, **LAST_RANK, module_names=modules())
    for lora_id, adapter in enumerate(adapters, start=1):
        engine.add_adapter(harness.request(engine, write(adapter), f"a{lora_id}", lora_id))
    assert engine.list_adapters() == {2, 3}
    for lora_id in (2, 3):
        slot = harness.slot_of(engine, lora_id)
        assert mismatches(engine, slot, expected_deltas(adapters[lora_id - 1])) == []
    assert mismatches(engine, harness.slot_of(engine, 2), expected_deltas(adapters[2]))


def warmup_with_dummies() -> None:
    """As at start: one dummy for each slot, the second a clone of the first."""
    for options in ({}, {"wrapper": "3d"}, {"gated": False}):
        for ranks in ({"ep_size": 1}, LAST_RANK):
            engine = harness.make_engine(**SIZES | options | ranks, module_names=modules())
            with engine.dummy_lora_cache():
                for lora_id in (1, 2):
                    wanted = harness.request(engine, f"warmup-{lora_id}", lora_id=lora_id)
                    assert engine.add_dummy_lora(wanted, rank=MAX_RANK)
                    engine._adapter_manager.activate_adapter(lora_id)
                    found = harness.deltas(engine, harness.slot_of(engine, lora_id))
                    assert set(found) == set(modules())
                    assert not any(
                        delta.any()
                        for experts in found.values()
                        for projections in experts.values()
                        for delta in projections.values()
                    )
            engine.remove_all_adapters()
            assert engine.list_adapters() == set()


def attention_is_sliced_over_tensor_parallel_ranks() -> None:
    adapter = adapter_of("L1", intermediate=8)
    path = write(adapter)
    for fully_sharded in (False, True):
        for rank in range(2):
            # Fully sharded, stock refuses expert parallelism; attention alone does not.
            engine = harness.make_engine(
                **SIZES | {"intermediate_size": 8},
                ep_size=2 if HAS_EP and not fully_sharded else 1,
                ep_rank=0 if fully_sharded else rank,
                attention_tp_size=1 if fully_sharded else 2,
                fully_sharded=fully_sharded,
                module_names=modules(),
            )
            engine.add_adapter(harness.request(engine, path))
            in_slot = harness.buffers(engine, 0)["model.layers.0.self_attn.o_proj"]["o_proj"]
            key = "base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight"
            part = adapter.tensors[key]
            if not fully_sharded:
                part = part.chunk(2, dim=1)[rank]
            assert torch.equal(in_slot[0][:LORA_RANK], part)


def tensor_parallelism_alone_slices_every_expert() -> None:
    for layout, wrapper in (("L1", "2d"), ("L2", "3d")):
        adapter = adapter_of(layout, intermediate=8)
        path = write(adapter)
        for tp_rank in range(2):
            engine = harness.make_engine(
                **SIZES | {"intermediate_size": 8},
                ep_size=1,
                ep_rank=tp_rank,
                attention_tp_size=2,
                wrapper=wrapper,
                module_names=modules(),
            )
            engine.add_adapter(harness.request(engine, path))
            expected = {
                key: {
                    name: delta.chunk(2, dim=1 if name == "down_proj" else 0)[tp_rank]
                    for name, delta in projections.items()
                }
                for key, projections in expected_deltas(adapter).items()
            }
            assert mismatches(engine, 0, expected) == []


def expert_maps_are_those_of_the_placement() -> None:
    for strategy, placement in {
        "linear": linear_placement(7, 3),
        "round_robin": round_robin_placement(7, 3),
    }.items():
        for ep_rank in range(3):
            engine = harness.make_engine(
                **SIZES | {"num_experts": 7}, ep_size=3, ep_rank=ep_rank, strategy=strategy
            )
            layer = harness.layers(engine)["model.layers.0.mlp.experts"]
            assert harness.global_experts(layer) == list(placement.ranks[ep_rank])


def stock_is_seen_to_be_wrong() -> None:
    for options in ({"strategy": "round_robin"}, {"num_experts": 7}):
        for layout, wrapper in (("L1", "2d"), ("L2", "3d")):
            adapter = adapter_of(layout, num_experts=options.get("num_experts", EXPERTS))
            engine = harness.make_engine(
                **SIZES | options, ep_size=2, ep_rank=1, module_names=modules(), wrapper=wrapper
            )
            engine.add_adapter(harness.request(engine, write(adapter)))
            assert mismatches(engine, 0, expected_deltas(adapter)), (options, layout)


def fully_sharded_with_expert_parallelism_is_refused() -> None:
    try:
        harness.make_engine(**SIZES, fully_sharded=True)
    except AssertionError as err:
        assert "fully_sharded" in str(err), err  # noqa: PT017 - vLLM's, and no pytest here
    else:
        raise AssertionError("stock took it")


def expert_parallelism_is_refused() -> None:
    try:
        harness.make_engine(**SIZES)
    except AssertionError as err:
        assert "EP support" in str(err), err  # noqa: PT017 - vLLM's, and no pytest here
    else:
        raise AssertionError("stock took it")


Case = Callable[[], str | None]
CASES: tuple[Case, ...] = (
    per_expert_on_2d,
    per_expert_without_a_gate,
    fused_on_3d,
    fused_on_3d_interleaved,
    fused_on_2d_in_mixed_format,
    shared_factors,
    with_the_kernel_that_the_quant_method_selects,
    renamed_by_the_models_mapper,
    two_adapters_and_eviction,
    warmup_with_dummies,
    attention_is_sliced_over_tensor_parallel_ranks,
    tensor_parallelism_alone_slices_every_expert,
)
WITH_EP: tuple[Case, ...] = (
    expert_maps_are_those_of_the_placement,
    stock_is_seen_to_be_wrong,
    fully_sharded_with_expert_parallelism_is_refused,
)
WITHOUT_EP: tuple[Case, ...] = (expert_parallelism_is_refused,)

if __name__ == "__main__":
    failed = 0
    with FOLDER:
        for case in CASES + (WITH_EP if HAS_EP else WITHOUT_EP):
            try:
                print("ok  ", case.__name__, case() or "")
            except Exception:  # noqa: BLE001 - a failed case, told with the rest
                failed += 1
                print("FAIL", case.__name__)
                traceback.print_exc()
    sys.exit(failed > 0)
