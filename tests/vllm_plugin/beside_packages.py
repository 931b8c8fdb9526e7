"""Packages that patch how vLLM loads LoRA, and how each adds an adapter; used inside a vLLM release.

Their own code runs, as `make .venv/.beside` installs it. What it imports beside vLLM (Ray, a trainer)
is not there, and not needed for this part of it. SkyRL's wrap and prime-rl are not released: what they
replace is rebuilt here.
"""

from __future__ import annotations

import ast
import importlib
import json
import sys
import types
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file

INSTALLED = Path(__file__).resolve().parents[2] / ".venv" / "beside"
# What an adapter arrives as: in memory, whole or only the experts of this rank; or as files.
FORMS = ("tensors", "own experts", "plain", "shards")


class Adding:
    """How a package adds an adapter, by a request of its own. layouts, forms: what it can be given."""

    layouts: tuple[str, ...] = ("L1", "L2", "L3", "L8")
    forms: tuple[str, ...] = FORMS

    def __init__(self, make_request: Callable[..., Any]) -> None:
        self._make_request = make_request

    def add(
        self, engine: Any, path: Path, tensors: dict[str, torch.Tensor] | None, lora_id: int
    ) -> None:
        """Add the adapter. path: of its files; tensors: its tensors, if it is in memory."""
        if tensors is None:
            add_files(engine, path, lora_id)
            return
        engine.add_adapter(
            self._make_request(
                lora_name=f"a{lora_id}", lora_int_id=lora_id, lora_path="in memory",
                peft_config=config_of(path), lora_tensors=tensors,
            )
        )  # fmt: skip


def add_files(engine: Any, path: Path, lora_id: int) -> None:
    from tests.vllm_plugin import harness

    engine.add_adapter(harness.request(engine, path, f"a{lora_id}", lora_id))


def config_of(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((path / "adapter_config.json").read_text())
    return config


def verl() -> Adding:
    """Its hijack replaces `_load_adapter` of the subclass."""
    without_init("verl", "verl.utils", "verl.utils.vllm")
    utils = importlib.import_module("verl.utils.vllm.utils")
    utils.VLLMHijack.hijack()
    return Adding(utils.TensorLoRARequest)


def ms_swift() -> Adding:
    """The same, from `swift.rlhf_trainers.utils`, of whose module only this part is executed."""
    from msgspec import field
    from vllm.lora.request import LoRARequest

    file = INSTALLED / "swift" / "rlhf_trainers" / "utils.py"
    tree = ast.parse(file.read_text(encoding="utf-8"))
    wanted = {"TensorLoRARequest", "patch_vllm_load_adapter"}
    nodes: list[Any] = [node for node in ast.walk(tree) if getattr(node, "name", None) in wanted]
    names: dict[str, Any] = {"LoRARequest": LoRARequest, "field": field, "torch": torch}
    exec("from typing import *", names)
    exec(compile(ast.Module(nodes, []), str(file), "exec"), names)
    names["patch_vllm_load_adapter"]()
    return Adding(names["TensorLoRARequest"])


def skyrl() -> Adding:
    """A wrap around whatever is there, in the shape of SkyRL's open pull request."""
    from vllm.lora.peft_helper import PEFTHelper
    from vllm.lora.request import LoRARequest
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

    class InMemoryRequest(LoRARequest):  # type: ignore[misc]
        peft_config: Any = None
        lora_tensors: Any = None

    inner = LRUCacheWorkerLoRAManager._load_adapter

    def load_adapter(self: Any, lora_request: Any) -> Any:
        if not isinstance(lora_request, InMemoryRequest):
            return inner(self, lora_request)
        return self._lora_model_cls.from_lora_tensors(
            lora_request.lora_int_id,
            lora_request.lora_tensors,
            PEFTHelper.from_dict(lora_request.peft_config),
            device="cpu",
            dtype=self.lora_config.lora_dtype,
        )

    LRUCacheWorkerLoRAManager._load_adapter = load_adapter
    return Adding(InMemoryRequest)


class PrimeRl(Adding):
    """Its plugin gives LoRAModel another `from_local_checkpoint`, which accepts more names."""

    forms = ("plain", "shards")

    def __init__(self) -> None:
        from vllm.lora.lora_model import LoRAModel

        def from_local_checkpoint(
            cls: Any,
            lora_dir: str,
            expected_lora_modules: set[str],
            peft_helper: Any,
            *,
            lora_model_id: int | None = None,
            device: str = "cuda",
            dtype: torch.dtype | None = None,
            model_vocab_size: int | None = None,
            weights_mapper: Any = None,
            tensorizer_config_dict: dict[str, Any] | None = None,
            skip_prefixes: list[str] | None = None,
            moe_ep_spec: Any = None,
        ) -> Any:
            given = {
                "lora_model_id": lora_model_id, "device": device, "dtype": dtype,
                "model_vocab_size": model_vocab_size, "weights_mapper": weights_mapper,
                "skip_prefixes": skip_prefixes,
            }  # fmt: skip
            known = signature(cls.from_lora_tensors).parameters
            return cls.from_lora_tensors(
                tensors=load_file(Path(lora_dir) / "adapter_model.safetensors"),
                peft_helper=peft_helper,
                **{name: value for name, value in given.items() if name in known},
            )

        LoRAModel.from_local_checkpoint = classmethod(from_local_checkpoint)


class Areal(Adding):
    """Its worker extension makes a LoRAModel and gives it to the LoRAModelManager itself.

    layouts: those that vLLM's own LoRAModel.from_lora_tensors knows.
    """

    layouts = ("L1", "L2")
    forms = ("tensors", "own experts")

    def __init__(self) -> None:
        without_init("areal", "areal.engine", "areal.engine.vllm_ext")
        platform = SimpleNamespace(synchronize=lambda: None)
        stub("areal.engine.core.distributed", init_custom_process_group=None)
        stub("areal.infra.platforms", current_platform=platform)
        stub("areal.utils.constants", DIST_GROUP_DEFAULT_TIMEOUT=None)
        name = "areal.engine.vllm_ext.vllm_worker_extension"
        self._extension = importlib.import_module(name).VLLMWorkerExtension

    def add(
        self, engine: Any, path: Path, tensors: dict[str, torch.Tensor] | None, lora_id: int
    ) -> None:
        """Update an adapter that is there with tensors that the trainer would broadcast."""
        assert tensors is not None
        add_files(engine, path, lora_id)
        config = config_of(path)
        worker = self._extension()
        worker.sync = lambda: None
        worker.model_runner = SimpleNamespace(
            lora_manager=engine, device="cpu", model=engine._adapter_manager.model,
            vllm_config=SimpleNamespace(compilation_config=None),
        )  # fmt: skip
        worker.weight_update_groups = {"group": None}
        worker._lora_partial_shards = {}
        for name, value in {
            "weight_meta_group_name": "group",
            "lora_weight_meta_names": list(tensors),
            "lora_weight_meta_dtypes": [tensor.dtype for tensor in tensors.values()],
            "lora_weight_meta_shapes": [list(tensor.shape) for tensor in tensors.values()],
            "lora_name": f"a{lora_id}",
            "lora_int_id": lora_id,
            "lora_target_modules": config.get("target_modules") or ["all-linear"],
            "lora_rank": config["r"],
            "lora_alpha": config["lora_alpha"],
            "lora_bias": "none",
        }.items():
            setattr(worker, f"areal_{name}", value)
        sent, broadcast = iter(tensors.values()), torch.distributed.broadcast
        torch.distributed.broadcast = lambda into, **_: into.copy_(next(sent))  # type: ignore[assignment]
        try:
            done, message = worker.areal_update_weight_lora_xccl()
        finally:
            torch.distributed.broadcast = broadcast
        if not done:
            raise RuntimeError(message.strip().splitlines()[-1])


def without_init(*names: str) -> None:
    """Make packages whose modules can be imported without what their __init__ imports."""
    sys.path.append(str(INSTALLED))
    for name in names:
        stub(name, __path__=[str(INSTALLED.joinpath(*name.split(".")))])


def stub(name: str, **members: Any) -> None:
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(members)


_PACKAGES: dict[str, Callable[[], Adding]] = {
    "verl": verl, "ms-swift": ms_swift, "AReaL": Areal, "SkyRL's wrap": skyrl,
    "prime-rl's plugin": PrimeRl,
}  # fmt: skip
NAMES = tuple(_PACKAGES)


def installed(package: str) -> Adding:
    """Have a package patch vLLM, as it does by itself where it is used."""
    return _PACKAGES[package]()
