"""Run inside a vLLM release: what the plugin's patches do to vLLM's own classes.

Each function answers with plain values; tests/vllm_plugin/patches and engine/test_contracts.py say
which are right.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from lorashard import SplitRequest, convert_shards, split_adapter
from lorashard.vllm_plugin import register

register()

import torch  # noqa: E402
from vllm.lora import lora_weights, model_manager  # noqa: E402
from vllm.lora.lora_model import LoRAModel  # noqa: E402
from vllm.lora.peft_helper import PEFTHelper  # noqa: E402

from lorashard.vllm_plugin.engine.contracts import contract_breaks  # noqa: E402
from lorashard.vllm_plugin.load import host_memory  # noqa: E402
from lorashard.vllm_plugin.patches import (  # noqa: E402
    activations,
    adapter_loading,
    expert_parallel,
    punica,
    warm_up,
)
from tests.adapters import Adapter  # noqa: E402
from tests.vllm_plugin import harness  # noqa: E402
from tests.vllm_plugin.harness_selfcheck import (  # noqa: E402
    SIZES,
    adapter_of,
    mismatches,
    modules,
)
from tests.vllm_plugin.loading import expected_of  # noqa: E402

CONFIG = "adapter_config.json"
RISK = "LORASHARD_RISK_UNKNOWN_VLLM"


def engine_of(**options: Any) -> Any:
    return harness.make_engine(**SIZES | options, module_names=modules())


def folder() -> Path:
    return Path(tempfile.mkdtemp())


def plain() -> Path:
    return adapter_of("L1").write(folder())


def shards() -> Path:
    out = folder() / "shards"
    split_adapter(plain(), out, SplitRequest(2))
    return out


def load(engine: Any, path: Path, lora_id: int = 1, adapter: Adapter | None = None) -> str:
    """ "loaded" if the right values are in the buffers, else what is wrong.

    adapter: what `path` was made from; None = `adapter_of("L1")`.
    """
    try:
        engine.add_adapter(harness.request(engine, path, f"a{lora_id}", lora_id))
    except Exception as err:  # noqa: BLE001 - the answer
        return f"{type(err).__name__}: {err}"
    slot = harness.slot_of(engine, lora_id)
    wrong = mismatches(engine, slot, expected_of(adapter or adapter_of("L1")))
    return "; ".join(wrong) or "loaded"


@contextmanager
def logged(level: int = logging.WARNING) -> Iterator[list[str]]:
    """The plugin's warnings, or what it logs from another level on."""
    messages: list[str] = []
    handler = logging.Handler(level)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("vllm.lorashard")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def class_after_loads() -> dict[str, list[Any]]:
    """What became of a load, and whether what was in place of vLLM's class is there afterwards."""
    damaged = shards()
    for file in damaged.glob("ep-*"):
        file.unlink()
    paths = {"shards": shards(), "plain": plain(), "damaged": damaged, "missing": Path("/nowhere")}
    answers: dict[str, list[Any]] = {}
    for ep_size in (1, 2):
        engine = engine_of(ep_size=ep_size)
        before = engine._lora_model_cls
        assert (before is LoRAModel) == (ep_size == 1)
        for number, (name, path) in enumerate(paths.items(), start=1):
            outcome = load(engine, path, number)
            is_back = engine._lora_model_cls is before
            answers[f"{name}, ep_size {ep_size}"] = [outcome.replace(str(path), "PATH"), is_back]
    return answers


def stand_in() -> dict[str, Any]:
    """What vLLM finds in place of its class, during a load and by name."""
    engine = engine_of()
    seen: list[str] = []
    unpatched = type(engine)._load_adapter._lorashard_original

    def original(self: Any, lora_request: Any) -> Any:
        seen.append(type(self._lora_model_cls).__name__)
        return unpatched(self, lora_request)

    wrapped = adapter_loading.wrap_load_adapter(original)
    wrapped(engine, harness.request(engine, shards()))
    made = adapter_loading.LoraModelStandIn(engine, LoRAModel)
    return {
        "seen": seen,
        "other attributes": made.clone == LoRAModel.clone,
        "no attribute": hasattr(made, "no_such_thing"),
    }


def with_an_expert_of_rank_0() -> Adapter:
    """As mergekit writes it for an expert that fine-tuning did not change."""
    names = [
        f"{module}.5.{p}" for module in modules() for p in ("gate_proj", "up_proj", "down_proj")
    ]
    zeros = dict.fromkeys(names, 0)
    fields = {"rank_pattern": zeros, "alpha_pattern": zeros}
    return adapter_of("L1", lora_ranks={5: 0}, config=fields)


def configurations_refused_by_vllm() -> dict[str, dict[str, str]]:
    """Loads of adapters whose configuration some releases refuse, by ep size and what it is."""
    rank_0 = with_an_expert_of_rank_0()
    no_targets, mlx, not_json = (folder() for _ in range(3))
    for path in (no_targets, mlx, not_json):
        adapter_of("L1").write(path)
    config = json.loads((no_targets / CONFIG).read_text())
    del config["target_modules"]
    (no_targets / CONFIG).write_text(json.dumps(config))
    (mlx / CONFIG).write_text('{"fine_tune_type": "lora", "lora_parameters": {"rank": 4}}')
    (mlx / "adapter_model.safetensors").rename(mlx / "adapters.safetensors")
    (not_json / CONFIG).write_text("[1, 2]")
    out = folder()
    split_adapter(rank_0.write(out / "rank 0"), out / "shards", SplitRequest(2))
    convert_shards(out / "shards", out / "converted", "per_expert")
    split_adapter(out / "converted", out / "split again", SplitRequest(2))
    adapters: dict[str, tuple[Path, Adapter | None]] = {
        name: (out / name, rank_0) for name in ("rank 0", "shards", "converted", "split again")
    }
    adapters |= {"no targets": (no_targets, None), "mlx": (mlx, None), "not JSON": (not_json, None)}
    answers: dict[str, dict[str, str]] = {}
    for ep_size in (1, 2):
        engine = engine_of(ep_size=ep_size, max_cpu_loras=len(adapters))
        answers[str(ep_size)] = {
            name: load(engine, path, number, adapter).replace(str(path), "PATH")
            for number, (name, (path, adapter)) in enumerate(adapters.items(), start=1)
        }
    return answers


INNER = 12
DENSE = {
    "self_attn.q_proj": (16, 16), "self_attn.k_proj": (16, 8), "self_attn.v_proj": (16, 8),
    "self_attn.o_proj": (16, 16), "mlp.shared_experts.gate_proj": (16, INNER),
    "mlp.shared_experts.up_proj": (16, INNER), "mlp.shared_experts.down_proj": (INNER, 16),
    "mlp.shared_expert_gate": (16, 3),
}  # fmt: skip


def with_dense(changed: str = "", matrix: str = "", by: int = 0) -> Adapter:
    """An adapter of experts and every dense layer, one of whose factors is larger by so much."""
    adapter = adapter_of("L1")
    tensors = {name: tensor for name, tensor in adapter.tensors.items() if ".experts." in name}
    for module, sizes in DENSE.items():
        inside, out = (
            size + (by if (module, matrix) == (changed, m) else 0)
            for m, size in zip(("lora_A", "lora_B"), sizes, strict=True)
        )
        key = f"base_model.model.model.layers.0.{module}"
        tensors[f"{key}.lora_A.weight"] = torch.ones(2, inside, dtype=torch.bfloat16)
        tensors[f"{key}.lora_B.weight"] = torch.ones(out, 2, dtype=torch.bfloat16)
    return replace(adapter, tensors=tensors)


def dense_sizes() -> dict[str, dict[str, list[Any]]]:
    """Loads of adapters with one wrong dense factor, by engine: the outcome, and what is kept."""
    real = harness._put_attention

    def put_all(model: Any, block: str, hidden_size: int) -> None:
        real(model, block, hidden_size)
        harness.put_dense_mlp(model, block, hidden_size, INNER)

    cases = [("", "", 0)] + [
        (module, matrix, by)
        for module in DENSE
        for matrix in ("lora_A", "lora_B")
        for by in (1, -1)
    ]
    folders = {}
    for module, matrix, by in cases:
        path = folders[f"{module} {matrix} {by}"] = folder()
        with_dense(module, matrix, by).write(path / "plain")
        split_adapter(path / "plain", path / "shards", SplitRequest(2))
    engines: dict[str, dict[str, Any]] = {
        "tp 1": {}, "tp 2": {"attention_tp_size": 2, "ep_rank": 1},
        "tp 4": {"attention_tp_size": 4, "ep_size": 4, "ep_rank": 3},
        "tp 2, fully sharded": {"attention_tp_size": 2, "fully_sharded": True},
    }  # fmt: skip
    answers: dict[str, dict[str, list[Any]]] = {}
    for name, options in engines.items():
        with mock.patch.object(harness, "_put_attention", put_all):
            engine = engine_of(**options)
        answers[name] = {}
        for case, path in folders.items():
            for form in ("plain", "shards") if name == "tp 1" else ("shards",):
                outcome = load(engine, path / form).replace(str(path), "PATH")
                answers[name][f"{case} {form}"] = [outcome, sorted(engine.list_adapters())]
                engine.remove_adapter(1)
    return answers


def no_tensors_on_this_rank() -> dict[str, Any]:
    """An adapter in memory that trains experts of other ranks alone takes the place of another."""
    engine = engine_of(max_loras=1)
    before = load(engine, plain())
    engine.remove_adapter(1)
    model = engine._lora_model_cls.from_lora_tensors(
        lora_model_id=2,
        tensors={},
        peft_helper=PEFTHelper.from_dict(adapter_of("L1").config),
        device="cpu",
        dtype=torch.bfloat16,
    )
    with logged() as messages:
        engine._adapter_manager.add_adapter(model)
    engine._adapter_manager.activate_adapter(2)
    slot = harness.slot_of(engine, 2)
    left = [
        f"{module}.{name}"
        for module, pairs in harness.buffers(engine, slot).items()
        for name, pair in pairs.items()
        if any(factor.count_nonzero() for factor in pair)
    ]
    engine.remove_adapter(2)
    after = load(engine, plain(), 3)
    return {"before": before, "left": left, "after": after, "warnings": messages}


def loader_of_an_engine_without_ep() -> list[Any]:
    """Whether there is a loader, and whether it was used: after a plain adapter, shards, plain."""
    engine = engine_of(ep_size=1)
    answers = []
    for number, path in enumerate((plain(), shards(), plain()), start=1):
        outcome = load(engine, path, number)
        loader = adapter_loading.attached_loader(engine)
        answers.append([outcome, loader is not None, bool(loader and loader.last_report)])
    return answers


def reverse_packed(self: Any, lora_model: Any) -> None:
    """Stands for a LoRAModelManager that packs what is packed already."""
    for lora in lora_model.loras.values():
        lora.lora_a = lora.lora_a[::-1]


def contracts_without_ep() -> dict[str, Any]:
    """An unknown vLLM without expert parallelism: shards are refused, plain adapters are not."""
    manager = model_manager.LoRAModelManager
    engine = engine_of(ep_size=1)
    with mock.patch.object(manager, "_create_merged_loras_inplace", reverse_packed):
        refused = load(engine, shards())
        has_loader = adapter_loading.attached_loader(engine) is not None
    with mock.patch.object(lora_weights.PackedLoRALayerWeights, "__init__", other_parameters):
        refused_too = load(engine, shards(), 2)
    allowed = engine_of(ep_size=1)
    missing = mock.patch.object(
        adapter_loading, "broken_patches", return_value=("a patch is not in place",)
    )
    with missing, mock.patch.dict(os.environ, {RISK: "1"}), logged() as messages:
        accepted = load(allowed, shards())
    return {
        "refused": refused, "refused too": refused_too, "has loader": has_loader,
        "plain": load(engine, plain(), 3), "accepted": accepted, "warnings": messages,
    }  # fmt: skip


def other_parameters(self: Any, name: str, lora_a: Any, lora_b: Any) -> None:
    """Stands for PackedLoRALayerWeights.__init__ of a later release."""


def contracts() -> dict[str, list[str]]:
    """What is said of this release, and of one that differs."""
    engine = engine_of()
    manager = engine._adapter_manager

    def breaks(*patches: str) -> list[str]:
        return list(contract_breaks(manager, LoRAModel, patches))

    answers = {"this release": breaks(), "patches": breaks("a patch is not in place")}
    with mock.patch.object(lora_weights.PackedLoRALayerWeights, "__init__", other_parameters):
        answers["signature"] = breaks()
        answers["patches and signature"] = breaks("a patch is not in place")
    packed_modules = manager.packed_modules
    del manager.packed_modules
    answers["attribute"] = breaks()
    manager.packed_modules = packed_modules
    (wrapper, *_) = (w for n, w in manager.modules.items() if n.endswith(".experts"))
    with mock.patch.object(wrapper, "tp_size", 2):
        answers["sharded twice"] = breaks()
    with mock.patch.object(type(manager), "_create_merged_loras_inplace", reverse_packed):
        answers["packing"] = breaks()
    answers["this release again"] = breaks()
    return answers


def buffers_at_start() -> dict[str, Any]:
    """How many buffers an engine starts with, by LORASHARD_WARM_BUFFERS, and with no /proc."""
    answers: dict[str, Any] = {}
    for count in ("0", "2"):
        with mock.patch.dict(os.environ, {"LORASHARD_WARM_BUFFERS": count}):
            loader = adapter_loading.attached_loader(engine_of())
        assert loader is not None
        answers[count] = len(loader.regions.sizes())
    with mock.patch.object(host_memory, "_MEMINFO", Path("/nowhere")), logged() as messages:
        engine = engine_of()
    answers["no meminfo"] = [load(engine, shards()), messages]
    with logged(logging.INFO) as messages:
        engine_of(ep_rank=1)
        engine_of()
        answers["log"] = list(messages)
        answers["without ep"] = adapter_loading.attached_loader(engine_of(ep_size=1)) is not None
    answers["log without ep"] = messages[len(answers["log"]) :]
    return answers


def needed() -> dict[str, bool]:
    """What the predicates of the fixes for older releases say about this one."""
    from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

    layer = harness.FusedMoEWithLoRA
    aligned = vars(PunicaWrapperGPU)["moe_lora_align_block_size"]
    original = getattr(aligned, "_lorashard_original", aligned)
    unpatched = type("PunicaWrapperGPU", (), {"moe_lora_align_block_size": original})
    return {
        "expert_parallel": expert_parallel.refuses_expert_parallelism(layer),
        "punica": punica.maps_uninitialised_ids(unpatched),
        "activations": activations.gives_lora_quantised_input(object),
    }


def dummies() -> dict[str, Any]:
    """The warm-up's dummy of one MoE layer, per kind of layer; None where vLLM makes it itself.

    Otherwise the shapes of lora_a and lora_b of every part, and whether all is zero.
    """
    answers: dict[str, Any] = {}
    kinds: dict[str, dict[str, Any]] = {
        "2d": {},
        "3d": {"wrapper": "3d"},
        "non-gated": {"gated": False},
    }
    for (kind, options), num_experts in itertools.product(kinds.items(), (8, 1)):
        engine = engine_of(**options, num_experts=num_experts, ep_rank=1)
        manager = engine._adapter_manager
        name = modules()[0]
        made_here = warm_up._fails_in_vllm(manager.modules[name])
        dummy = manager.create_dummy_lora(1, 4, engine.embedding_modules).loras[name]
        pairs = list(zip(dummy.lora_a, dummy.lora_b)) if made_here else []
        answers[f"{kind}, {num_experts} experts"] = (
            {
                "shapes": [[list(a.shape), list(b.shape)] for a, b in pairs],
                "zero": not any(tensor.any() for pair in pairs for tensor in pair),
            }
            if made_here
            else None
        )
    return answers


CHECKS: tuple[Callable[[], Any], ...] = (
    class_after_loads, stand_in, configurations_refused_by_vllm, dense_sizes,
    no_tensors_on_this_rank, loader_of_an_engine_without_ep, contracts_without_ep, contracts,
    buffers_at_start, needed, dummies,
)  # fmt: skip


def run_all() -> dict[str, Any]:
    """Every check's answer; what a check raises is its answer."""
    answers: dict[str, Any] = {}
    for check in CHECKS:
        try:
            answers[check.__name__] = check()
        except Exception:  # noqa: BLE001 - reported with the rest
            answers[check.__name__] = traceback.format_exc()[-2000:]
    return answers
