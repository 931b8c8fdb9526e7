"""Run inside a vLLM release: packages that patch the loading of LoRA, and what lands in the buffers.

Each process has one package, and one order of it and the plugin.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from importlib import metadata
from typing import Any
from unittest import mock

import torch
import vllm
from safetensors.torch import load_file

from lorashard.vllm_plugin import register
from tests.vllm_plugin.beside_packages import Adding, installed

ENGINES = (
    ("2d", 8, ((2, "linear"),)),
    ("2d", 15, ((2, "linear"), (3, "linear"), (2, "round_robin"))),
    ("3d", 15, ((2, "linear"), (2, "round_robin"))),
)


def run(package: str, plugin_first: bool) -> dict[str, Any]:
    """How many loads were looked at, and what is wrong, or refused, and how."""
    # The sources of a release have no metadata, which verl asks for the version.
    version = metadata.version
    metadata.version = lambda name: vllm.__version__ if name == "vllm" else version(name)
    if plugin_first:
        register()
    adding = installed(package)
    register()
    checked, wrong = 0, []
    for what, lines in _loads(adding):
        checked += 1
        wrong += [f"{what}: {line}" for line in lines[:2]]
    return {"checked": checked, "wrong": wrong}


def _loads(adding: Adding) -> Iterator[tuple[str, list[str]]]:
    from tests.vllm_plugin import loading  # once the plugin is registered

    for wrapper, num_experts, cuts in ENGINES:
        engines = loading.engines(num_experts, cuts, wrapper=wrapper)
        for engine, ep_size, strategy, where in engines:
            for layout, form in itertools.product(adding.layouts, adding.forms):
                kind = "own shards" if form == "shards" else "plain"
                path = loading.on_disk(layout, num_experts, True, kind, ep_size, strategy)
                tensors = None
                if form in ("tensors", "own experts"):
                    tensors = load_file(path / "adapter_model.safetensors")
                    if form == "own experts":
                        tensors = dict(_own(engine, tensors))
                before = {name: tensor.clone() for name, tensor in (tensors or {}).items()}
                try:
                    adding.add(engine, path, tensors, 1)
                    lines = _differences(engine, loading.adapter(layout, num_experts))
                    engine.remove_adapter(1)
                except Exception as err:  # noqa: BLE001 - told with the rest
                    lines = [f"{type(err).__name__}: {err}"]
                changed = [n for n, t in (tensors or {}).items() if not t.equal(before[n])]
                lines += [f"{name} of the caller was changed" for name in changed]
                yield f"{layout} as {form} on {wrapper}, {where}", lines


def _differences(engine: Any, built: Any) -> list[str]:
    from tests.vllm_plugin import harness, loading
    from tests.vllm_plugin.harness_selfcheck import differences, wrong_attention

    slot = harness.slot_of(engine, 1)
    found = dict(differences(engine, slot, loading.expected_of(built)))
    wrong = [place for place, difference in found.items() if not difference <= 1e-6]
    return wrong + list(wrong_attention(engine, slot, built))


def _own(engine: Any, tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors without those of experts on other ranks, where each expert has its own."""
    from tests.vllm_plugin import harness

    local = {
        str(expert)
        for layer in harness.layers(engine).values()
        if hasattr(layer, "w13_lora_a_stacked")
        for expert in harness.global_experts(layer)
    }
    for name, tensor in tensors.items():
        parts = name.split(".")
        number = parts[parts.index("experts") + 1] if "experts" in parts else ""
        if not number.isdecimal() or number in local:
            yield name, tensor


def displaced() -> dict[str, Any]:
    """What is said where a package takes the place of `_add_adapter`, at the start and later."""
    register()
    from vllm.lora.model_manager import LoRAModelManager
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager, WorkerLoRAManager

    from lorashard.vllm_plugin.patches.foreign import find_foreign_patches
    from tests.vllm_plugin import patched

    ours = LoRAModelManager._add_adapter
    theirs = ours._lorashard_original

    def somebodys_add_adapter(self: Any, lora: Any) -> None:
        theirs(self, lora)

    def somebodys_wrap(self: Any, lora: Any) -> None:
        ours(self, lora)

    said: dict[str, Any] = {}
    engine = patched.engine_of()
    LoRAModelManager._add_adapter = somebodys_add_adapter
    said["at a load"] = patched.load(engine, patched.plain())
    try:
        patched.engine_of()
    except ValueError as err:
        said["at the start"] = str(err)
    with mock.patch.dict(os.environ, LORASHARD_RISK_PATCHED_BY_OTHERS="1"):
        said["accepted"] = patched.load(engine, patched.plain())
    LoRAModelManager._add_adapter = somebodys_wrap
    said["calls ours"] = patched.load(patched.engine_of(), patched.plain())
    LoRAModelManager._add_adapter = ours

    def somebodys_load_adapter(self: Any, lora_request: Any) -> Any:
        return WorkerLoRAManager._load_adapter(self, lora_request)

    LRUCacheWorkerLoRAManager._load_adapter = somebodys_load_adapter
    said["foreign"] = [
        f"{found.place} is {found.by.partition(' ')[0].rpartition('.')[2]}"
        for found in find_foreign_patches()
    ]
    return said
