"""A small real MoE adapter, split, verified, inspected, planned and merged back.

python -m tests.demo                   needs lorashard alone; everything it makes is in .demo
python -m tests.demo --make-adapter    makes the adapter anew, in tests/demo_data: with torch,
                                       transformers and PEFT
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "tests" / "demo_data"  # what make_adapter makes
DEMO = Path(".demo")  # relative to ROOT, so that the command lines below can be copied
ADAPTER, SHARDS, RESTORED = DEMO / "adapter", DEMO / "adapter-ep2", DEMO / "restored"


def main() -> None:
    os.chdir(ROOT)
    shutil.rmtree(DEMO, ignore_errors=True)
    if sys.argv[1:] == ["--make-adapter"]:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        make_adapter(DEMO / "model", ADAPTER)
        shutil.copytree(DEMO, DATA, dirs_exist_ok=True)
        return
    print("A random Qwen3-MoE (2 layers, 8 experts) with a LoRA on attention and all experts, as")
    print("PEFT saved it.")
    shutil.copytree(DATA, DEMO)
    run("split", ADAPTER, "--ep-size", "2", "-o", SHARDS)
    run("verify", SHARDS, "--against", ADAPTER)
    run("inspect", SHARDS)
    run("plan", ADAPTER, "--ep-size", "4")
    run("merge", SHARDS, "-o", RESTORED)
    compare(ADAPTER, RESTORED)
    print("\nWhat is where:")
    for path, meaning in (
        (DEMO / "model", "the base model's config.json"),
        (ADAPTER, "the adapter as PEFT saved it"),
        (SHARDS, "one file per expert-parallel rank, plus what all ranks need and the manifest"),
        (RESTORED, "the adapter again, merged from the shards"),
    ):
        names = ", ".join(sorted(child.name for child in path.iterdir()))
        print(f"  {path!s:<20}{meaning}\n{'':<22}{names}")


def make_adapter(model_dir: Path, adapter_dir: Path) -> None:
    """Save a LoRA of a tiny Qwen3-MoE, as PEFT writes it; all factors random, none zero."""
    warnings.simplefilter("ignore", FutureWarning)  # transformers' own, about PEFT
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=64,
        moe_intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
    )
    config.save_pretrained(model_dir)
    model = Qwen3MoeForCausalLM(config)
    model.name_or_path = str(model_dir)  # what PEFT records as the base model
    lora = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        init_lora_weights=False,  # lora_B is random too, as after training
    )
    get_peft_model(model, lora).save_pretrained(adapter_dir, save_embedding_layers=False)
    (adapter_dir / "README.md").unlink(missing_ok=True)  # PEFT's model card template


def run(command: str, *arguments: str | Path) -> None:
    """Print a command line, run it with this Python, and stop if it fails."""
    words = [command, *map(str, arguments)]
    print(f"\n$ lorashard {shlex.join(words)}", flush=True)
    finished = subprocess.run([sys.executable, "-m", "lorashard", *words], check=False)
    if finished.returncode != 0:
        sys.exit(finished.returncode)


def compare(adapter: Path, restored: Path) -> None:
    """Stop unless both directories hold the same files with the same bytes."""
    for original in sorted(adapter.iterdir()):
        if original.read_bytes() != (restored / original.name).read_bytes():
            sys.exit(f"{restored / original.name} differs from {original}")
        print(
            f"{original.name}: identical to the one in {adapter} ({original.stat().st_size:,} bytes)"
        )


if __name__ == "__main__":
    main()
