"""Load adapters with the PEFT and transformers that are importable, and save what PEFT makes of them.

Usage: python load_adapters.py ADAPTER...

Each ADAPTER has its base model's config in ADAPTER.model/config.json. Writes
  ADAPTER.deltas.safetensors   float32 weight changes by PEFT's own get_delta_weight
  ADAPTER.json                 what PEFT warned of
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import peft
import torch
import transformers
from peft_deltas import collect_deltas
from safetensors.torch import save_file


def load(adapter: str) -> None:
    """The model's weights are random; only what the adapter adds to them is looked at."""
    config = transformers.AutoConfig.from_pretrained(f"{adapter}.model")
    model_class = getattr(transformers, config.architectures[0])
    base_model = model_class(config).to(torch.float32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(base_model, adapter)
    interleaved = config.model_type == "gpt_oss"
    save_file(
        collect_deltas(model, "default", interleaved=interleaved), f"{adapter}.deltas.safetensors"
    )
    Path(f"{adapter}.json").write_text(json.dumps([str(warning.message) for warning in caught]))


if __name__ == "__main__":
    for name in sys.argv[1:]:
        load(name)
