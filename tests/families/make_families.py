"""Make LoRA adapters of every MoE family with the PEFT and transformers that are importable.

Usage: python make_families.py OUT [--only CASE ...] [--list]

Writes, for each case, OUT/<case>/ as PEFT's save_pretrained leaves it, and beside PEFT's files
  case.json                    what the case is; `refuse` if lorashard must refuse the adapter
  model/config.json            config of the base model
  expected_delta.safetensors   float32 weight changes by PEFT's own get_delta_weight
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from case import Case
from cases import cases_for, skipped_for
from peft_deltas import collect_deltas
from per_expert_adapter import write_per_expert_adapter
from safetensors.torch import save_file
from tiny_models import build_tiny_model

LORA_RANK = 4
LORA_ALPHA = 8

# Vision and audio towers have attention modules of the same names; users adapt the language model.
_TOWERS = r".*\b(vision_tower|vision_model|visual|audio_tower|embed_vision|embed_audio)\b.*"


def make_case(case: Case, out_dir: Path) -> None:
    """Write one adapter directory. Raises if the adapter does not cover the family's experts."""
    # Everything random below depends on the name alone, so a case is the same in any selection.
    torch.manual_seed(zlib.crc32(case.name.encode()))
    model = _make_adapter(case)

    case_dir = out_dir / case.name
    model.save_pretrained(case_dir, selected_adapters=[case.adapter_name])
    model.get_base_model().config.save_pretrained(case_dir / "model")
    # In float32 `get_delta_weight` does not round its result to the dtype of a bf16 base model.
    deltas = collect_deltas(model.float(), case.adapter_name, interleaved=case.family.interleaved)
    if case.refuse is None:
        _check_containers(case, deltas)
    save_file(deltas, case_dir / "expected_delta.safetensors")
    (case_dir / "case.json").write_text(json.dumps(_describe(case), indent=1) + "\n")


def _make_adapter(case: Case) -> peft.PeftModel:
    family = case.family
    base_model = build_tiny_model(
        family.model_class,
        family.config,
        num_experts=family.num_experts,
        num_layers=family.num_layers,
        dtype=case.dtype,
    )
    lora_options: dict[str, Any] = {
        "r": LORA_RANK,
        "lora_alpha": LORA_ALPHA,
        "target_modules": list(family.modules),
        "target_parameters": list(family.parameters) or None,
        "exclude_modules": _TOWERS if base_model.config.sub_configs else None,
        **case.lora,
    }
    config = peft.LoraConfig(**lora_options)
    if case.from_per_expert:
        with tempfile.TemporaryDirectory() as source:
            write_per_expert_adapter(base_model, config, Path(source))
            return peft.PeftModel.from_pretrained(base_model, source)
    model = peft.get_peft_model(
        base_model,
        config,
        adapter_name=case.adapter_name,
        autocast_adapter_dtype=case.dtype == torch.float32,
    )
    _randomize_adapter(model)
    return model


def _randomize_adapter(model: peft.PeftModel) -> None:
    """Fill everything the adapter trains: PEFT starts with lora_B at zero."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.2)


def _check_containers(case: Case, deltas: dict[str, torch.Tensor]) -> None:
    containers = {key.split("|")[1] for key in deltas if key.startswith("experts|")}
    unexpected = [name for name in containers if not re.fullmatch(case.family.container, name)]
    if unexpected or not containers:
        raise ValueError(f"{case.name}: expert containers are {sorted(containers)}")


def _describe(case: Case) -> dict[str, object]:
    description: dict[str, object] = {
        "case": case.name,
        "family": case.family.name,
        "env": {"transformers": transformers.__version__, "peft": peft.__version__},
        "num_experts": case.family.num_experts,
        "interleaved": case.family.interleaved,
    }
    if case.adapter_name != "default":
        description["adapter_name"] = case.adapter_name
    if case.refuse is not None:
        description["refuse"] = case.refuse
    return description


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="directory for the cases")
    parser.add_argument("--only", nargs="+", metavar="CASE", help="make these cases only")
    parser.add_argument("--list", action="store_true", help="print the case names and stop")
    options = parser.parse_args(arguments)

    cases = {case.name: case for case in cases_for(transformers.__version__)}
    if unknown := set(options.only or ()) - set(cases):
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    selected = [cases[name] for name in options.only or cases]
    if options.list:
        print(*(case.name for case in selected), sep="\n")
        for name, reason in skipped_for(transformers.__version__).items():
            print(f"skipped {name}: {reason}", file=sys.stderr)
        return 0

    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)  # the tensors are too small to share between threads
    for case in selected:
        started = time.monotonic()
        make_case(case, options.out)
        print(f"{case.name}  {time.monotonic() - started:.2f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
