"""Write a LoRA adapter of a real MoE model's size, filled with random values.

    python -m tests.bench.generate OUT --form per_expert --scale 0.05

The sizes are real and the values are not: speed does not depend on them.
"""

import argparse
import json
import math
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

from tests.bench.models import FORMS, MODELS, Form, MoeModel, adapter_shapes, scale_layers

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"

LORA_RANK = 32
LORA_ALPHA = 64
BF16_BYTES = 2

# Small enough for a core's cache, so writing is bound by the disk and not by memory.
_POOL_BYTES = 1 << 20


def adapter_config(model: MoeModel, form: Form) -> dict[str, object]:
    """Build the adapter_config.json fields that PEFT 0.21 writes for plain LoRA."""
    target_modules = [linear.name for linear in model.attention]
    target_parameters = None
    if form == "fused":
        target_parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    else:
        target_modules += ["gate_proj", "up_proj", "down_proj"]
    return {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": model.base_model,
        "bias": "none",
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_alpha": LORA_ALPHA,
        "lora_bias": False,
        "lora_dropout": 0.0,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "peft_type": "LORA",
        "peft_version": "0.21.2" if form == "fused" else "0.18.0",
        "r": LORA_RANK,
        "rank_pattern": {},
        "revision": None,
        "target_modules": target_modules,
        "target_parameters": target_parameters,
        "task_type": "CAUSAL_LM",
        "trainable_token_indices": None,
        "use_dora": False,
        "use_qalora": False,
        "use_rslora": False,
    }


def encode_header(shapes: dict[str, tuple[int, int]]) -> bytes:
    """Encode the length prefix and header as `safetensors.save_file` does.

    The library orders tensors by descending dtype size, then by name, and pads the
    JSON with spaces to 8 bytes. All tensors here are BF16, so names alone decide.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in sorted(shapes.items()):
        end = offset + math.prod(shape) * BF16_BYTES
        header[name] = {
            "dtype": "BF16",
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _finite_bf16_pool(seed: int = 0) -> memoryview:
    # Bit 14 is the exponent's top bit: without it |x| < 2, so nothing is inf or nan.
    mask = int.from_bytes(b"\xff\xbf" * (_POOL_BYTES // 2), "little")
    bits = random.Random(seed).getrandbits(_POOL_BYTES * 8)
    return memoryview((bits & mask).to_bytes(_POOL_BYTES, "little"))


def _tensor_chunks(pool: memoryview, tensor: int, size_bytes: int) -> Iterator[memoryview]:
    # Each tensor starts elsewhere in the pool (an odd number of elements apart, so the
    # starts do not repeat for 2**19 tensors): two tensors never hold the same bytes.
    begin = tensor * 7919 * BF16_BYTES % _POOL_BYTES
    while size_bytes:
        chunk = pool[begin : begin + size_bytes]
        yield chunk
        size_bytes -= len(chunk)
        begin = 0


def write_adapter(out: Path, model: MoeModel, form: Form) -> Path:
    """Write the adapter to `out`, or keep it if it is there already.

    Same model and form, same bytes. Returns the path of the weights.
    """
    out.mkdir(parents=True, exist_ok=True)
    config_text = json.dumps(adapter_config(model, form), indent=2, sort_keys=True)
    (out / CONFIG_NAME).write_text(config_text, encoding="utf-8")

    shapes = adapter_shapes(model, form, LORA_RANK)
    header = encode_header(shapes)
    weights = out / WEIGHTS_NAME
    if weights.exists():
        with weights.open("rb") as file:
            if file.read(len(header)) == header:
                return weights

    pool = _finite_bf16_pool()
    unfinished = weights.with_suffix(".unfinished")
    with unfinished.open("wb") as file:
        file.write(header)
        for tensor, (_, shape) in enumerate(sorted(shapes.items())):
            size_bytes = math.prod(shape) * BF16_BYTES
            file.writelines(_tensor_chunks(pool, tensor, size_bytes))
        file.flush()
        os.fsync(file.fileno())
    # A weights file under its final name is complete, so it can be reused.
    unfinished.replace(weights)
    return weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--form", choices=FORMS, required=True)
    parser.add_argument("--model", choices=sorted(MODELS), default="glm-4.5-air")
    parser.add_argument(
        "--scale",
        type=float,
        default=1.0,
        help="fraction of the model's layers to keep, at least 2 layers (shapes stay real)",
    )
    args = parser.parse_args()

    start = time.perf_counter()
    model = scale_layers(MODELS[args.model], args.scale)
    weights = write_adapter(args.out, model, args.form)
    seconds = time.perf_counter() - start
    gigabytes = weights.stat().st_size / 1e9
    speed = gigabytes / seconds
    print(f"{weights}: {gigabytes:.2f} GB in {seconds:.1f} s ({speed:.2f} GB/s)")


if __name__ == "__main__":
    main()
