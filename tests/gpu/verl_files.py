"""verl's modules, imported without what verl requires.

The acceptance needs two things of verl: the extension that it gives to vLLM's workers, and the
transfer by which its trainer hands an adapter over. These are its own files, as
`pip install --no-deps --target` unpacks them, on PYTHONPATH. Only the `__init__` of the packages
above them is not run, because that imports the trainer. The transfer takes a one-line function
from a module that imports Ray and verl's configuration, which are not called on this way: empty
modules stand there.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from importlib.metadata import version
from pathlib import Path
from typing import Any

_PACKAGES = (
    "verl", "verl.utils", "verl.workers", "verl.workers.rollout",
    "verl.workers.rollout.vllm_rollout",
)  # fmt: skip


def worker_extension_module() -> Any:
    """Where vLLMColocateWorkerExtension is, and the name and id that verl gives to every adapter."""
    return _imported("verl.workers.rollout.vllm_rollout.utils")


def transfer_module() -> Any:
    """Where BucketedWeightSender is."""
    if importlib.util.find_spec("ray") is None:
        _put("ray")
    _put("verl.workers.config.rollout", PrometheusConfig=None)
    return _imported("verl.workers.rollout.vllm_rollout.bucketed_weight_transfer")


def release() -> str:
    """verl's version."""
    return version("verl")


def _imported(name: str) -> Any:
    if "verl" not in sys.modules:
        spec = importlib.util.find_spec("verl")
        if spec is None or spec.origin is None:
            raise SystemExit("verl is not on PYTHONPATH: pip install --no-deps --target DIR verl")
        root = Path(spec.origin).parents[1]
        for package in _PACKAGES:
            _put(package, __path__=[str(root.joinpath(*package.split(".")))])
    return importlib.import_module(name)


def _put(name: str, **members: Any) -> None:
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(members)
