"""`make demo`: runs with lorashard alone, on the adapter that PEFT makes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import demo
from tests.imports import imported_by


def test_the_stored_adapter_is_the_one_that_peft_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the config names the model by a relative path
    demo.make_adapter(demo.DEMO / "model", demo.ADAPTER)
    for name in ("model/config.json", "adapter/adapter_config.json"):
        made, stored = (
            json.loads((folder / name).read_text()) for folder in (demo.DEMO, demo.DATA)
        )
        for config in (made, stored):
            for key in ("target_modules", "target_parameters"):  # sets to PEFT
                config[key] = sorted(config.get(key, ()))
        assert made == stored
    made, stored = (
        tensors(folder / "adapter" / "adapter_model.safetensors")
        for folder in (demo.DEMO, demo.DATA)
    )
    assert made == stored


def tensors(path: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in load_file(path).items()}


def test_the_demo_needs_neither_torch_nor_peft_and_ends_well() -> None:
    heavy = {"torch", "peft", "transformers", "numpy"}
    assert imported_by("import tests.demo") & heavy == set()
    done = subprocess.run(
        [sys.executable, "-m", "tests.demo"],
        cwd=demo.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "every value equal to .demo/adapter" in done.stdout
    assert "adapter_model.safetensors: identical" in done.stdout
