"""axolotl trains a tiny model with the plugin of docs/recipes: each version against its checkpoint.

    python tests/axolotl_run.py FOLDER

Needs an environment of its own, where it was run on the CPU: pip install axolotl==0.19.0
torch==2.13.0, and lorashard. A fresh FOLDER gets the model, the data, the plugin from the page with
other numbers, and what axolotl's own command makes of a config that names it.
"""

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))
CONFIG = {
    "plugins": ["publishing.PublishShards"],
    "adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0,
    "lora_target_modules": ["q_proj", "o_proj"],
    "lora_target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "sequence_len": 32, "micro_batch_size": 2, "gradient_accumulation_steps": 1, "val_set_size": 0,
    "max_steps": 4, "save_steps": 2, "learning_rate": 0.01, "optimizer": "adamw_torch",
    "bf16": False, "fp16": False, "tf32": False,
}  # fmt: skip


def write_plugin(folder: Path) -> None:
    page = (REPO / "docs" / "recipes" / "README.md").read_text()
    (example,) = re.findall(r"```python\n((?:(?!```).)*BasePlugin.*?)```", page, re.DOTALL)
    given = {'"/shards"': repr(str(folder)), "ep_size=8": "ep_size=3", "every=10": "every=2"}
    for word, mine in given.items():
        assert word in example, word
        example = example.replace(word, mine)
    (folder / "publishing.py").write_text(textwrap.dedent(example))


def write_inputs(folder: Path) -> None:
    from tests.publish.fsdp_run import peft_model
    from tests.publish.trainer_run import WORDS, tokenizer

    peft_model().unload().save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    rows = [json.dumps({"text": " ".join(WORDS[i : i + 8])}) for i in range(16)]
    (folder / "data.jsonl").write_text("\n".join(rows))
    paths = {
        "base_model": str(folder / "model"),
        "output_dir": str(folder / "run"),
        "dataset_prepared_path": str(folder / "prepared"),
        "datasets": [{"path": str(folder / "data.jsonl"), "ds_type": "json", "type": "completion"}],
    }
    (folder / "config.yml").write_text(json.dumps(CONFIG | paths))  # JSON is YAML


def check(folder: Path, step: int) -> None:
    """The version is what `split` writes of axolotl's checkpoint."""
    from lorashard import SplitRequest, split_adapter, verify_shards

    published, saved = folder / f"mine-v{step:05d}", folder / "run" / f"checkpoint-{step}"
    # PEFT writes sets in any order.
    (saved / "adapter_config.json").write_bytes((published / "adapter_config.json").read_bytes())
    assert not verify_shards(published, against=saved)
    split = folder / f"split-{step}"
    split_adapter(saved, split, SplitRequest(3, model=folder / "model"))
    for file in sorted({file.name for d in (published, split) for file in d.iterdir()}):
        assert (published / file).read_bytes() == (split / file).read_bytes(), file
    print(f"{published.name}: as of checkpoint-{step}")


def main() -> None:
    folder = Path(sys.argv[1]).absolute()
    folder.mkdir()
    write_plugin(folder)
    write_inputs(folder)
    environment = os.environ | {
        "PYTHONPATH": f"{folder}{os.pathsep}{REPO}", "AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "axolotl.cli.train", str(folder / "config.yml")]
    subprocess.run(command, env=environment, check=True)
    assert sorted(path.name for path in folder.glob("mine-v*")) == ["mine-v00002", "mine-v00004"]
    for step in (2, 4):
        check(folder, step)


if __name__ == "__main__":
    main()
