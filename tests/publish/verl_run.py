"""One rank of verl's FSDP2 on the CPU: python verl_run.py RANK WORLD FOLDER.

verl shards a tiny MoE model with a real PEFT adapter, and collects its LoRA. Beside that, the worker
of docs/recipes/trainers.md writes what each rank has; what it inherits from verl is left out.
"""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh

from tests.publish.fsdp_run import peft_model, train_step
from tests.tiny import REPO
from tests.vllm_plugin.beside_packages import stub, without_init

PAGE = REPO / "docs" / "recipes" / "trainers.md"


def page_code(name: str) -> str:
    """The page's block of Python that has this name in it."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (found,) = (block for block in blocks if name in block)
    return str(found)


def verl_fsdp() -> Any:
    """verl's functions for FSDP, without what its package imports beside them."""
    without_init("verl", "verl.utils", "verl.workers", "verl.plugin")
    stub("verl.utils.model", check_exclude_modules=None, check_target_modules=None)
    return importlib.import_module("verl.utils.fsdp_utils")


def page_worker() -> Any:
    """The page's worker, with stand-ins for verl's worker, which needs Ray, and for its decorator."""
    without_init("verl.single_controller", "verl.single_controller.base")
    stub(
        "verl.single_controller.base.decorator",
        Dispatch=SimpleNamespace(ONE_TO_ALL="one to all"),
        register=lambda dispatch_mode: lambda method: method,
    )
    stub("verl.workers.engine_workers", ActorRolloutRefWorker=type("Worker", (), {}))
    names: dict[str, Any] = {}
    exec(page_code("PublishingWorker"), names)
    return names["PublishingWorker"]()


def main() -> None:
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )
    verl = verl_fsdp()
    model = peft_model()
    settings = {
        "mesh": init_device_mesh("cpu", (world,)),
        "shard_placement_fn": verl.get_shard_placement_fn(world),
    }
    verl.apply_fsdp2(model, settings, {})
    train_step(model)
    worker = page_worker()
    worker.actor = SimpleNamespace(engine=SimpleNamespace(module=model))
    worker.publish_lora(str(folder / "sharded"), ep_size=3)
    for layered in (False, True):
        collected = verl.collect_lora_params(model, layered_summon=layered, base_sync_done=True)
        if rank == 0:
            gathered = folder / f"gathered-{layered}"
            model.peft_config["default"].save_pretrained(gathered)
            save_file(
                {name: tensor.contiguous() for name, tensor in collected.items()},
                gathered / "adapter_model.safetensors",
                metadata={"format": "pt"},
            )
    if rank == 0:
        model.base_model.model.config.save_pretrained(folder / "base")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
