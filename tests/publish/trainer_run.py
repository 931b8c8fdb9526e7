"""Trainings of a few steps. As a rank of several: python trainer_run.py RANK WORLD FOLDER KIND.

KIND is ddp (transformers' Trainer), fails (as ddp, and publishing fails on rank 0), lost (as ddp, and
rank 1 has no path) or fsdp2 (a step by hand, and the events of transformers' CallbackHandler: its Trainer shards on GPUs only).
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from lorashard import PublishCallback
from tests.publish.fsdp_run import peft_model, save_gathered, trained_model

STEPS, EVERY, EP_SIZE = 4, 2, 3
ROWS = [{"input_ids": [*range(i, i + 8)], "labels": [*range(i, i + 8)]} for i in range(16)]
WORDS = [f"word{i}" for i in range(29)]


class SaveWhole(TrainerCallback):
    """PEFT's own `save_pretrained`, in a folder for each step."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            model, folder = kwargs["model"], self._folder / str(state.global_step)
            model.save_pretrained(folder / "gathered")
            model.base_model.model.config.save_pretrained(folder / "base")


class Publisher:
    """Versions in the folders of `SaveWhole`. Notes which were complete as they were published."""

    def __init__(self, folder: Path, fails_at: int = 0, lost_at: int = 0) -> None:
        self._folder, self._fails_at, self._lost_at = folder, fails_at, lost_at
        self.published: list[int] = []

    def path(self, version: int) -> Path:
        if version == self._lost_at:
            raise FileNotFoundError("no disk")
        return self._folder / str(version) / "sharded"

    def publish(self, version: int) -> None:
        if version == self._fails_at:
            raise ConnectionError("no server")
        assert (self.path(version) / "lorashard.json").exists()
        self.published.append(version)


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """What any trainer's arguments are made of."""
    return {
        "output_dir": str(folder / "run"), "max_steps": STEPS, "per_device_train_batch_size": 2,
        "learning_rate": 0.01, "report_to": "none", "disable_tqdm": True, "use_cpu": True, "bf16": False,
        "save_strategy": "no",
    } | changes  # fmt: skip


def train(folder: Path, callbacks: list[Any], **changes: Any) -> Any:
    """The trainer after a real training, with dropout: what draws random numbers changes it."""
    trainer = Trainer(
        model=peft_model(attention_dropout=0.1),
        args=TrainingArguments(**settings(folder, **changes)),
        train_dataset=ROWS,
        callbacks=callbacks,
    )
    trainer.train()
    return trainer


def train_together(folder: Path, callback: PublishCallback) -> str:
    """Returns what the trainer has wrapped the model in."""
    trainer = train(folder, [SaveWhole(folder), callback], ddp_backend="gloo")
    return type(trainer.model_wrapped).__name__


def tokenizer() -> Any:
    """One token for each word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def train_by_hand(folder: Path, rank: int, world: int, publisher: Publisher) -> None:
    model = trained_model(world)
    (folder / "1").mkdir(exist_ok=True)
    save_gathered(model, folder / "1", rank)
    handler = CallbackHandler(
        [PublishCallback(publisher, ep_size=EP_SIZE, every=1)], model, None, None, None
    )
    args = TrainingArguments(**settings(folder))
    handler.on_train_begin(args, TrainerState(), TrainerControl())
    handler.on_step_end(args, TrainerState(global_step=1), TrainerControl())


def main() -> None:
    rank, world, folder, kind = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    # What torchrun sets. The address is not used: in a file, no other test can take the port away.
    os.environ |= {
        "RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{world}",
        "MASTER_ADDR": "localhost", "MASTER_PORT": "0",
    }  # fmt: skip
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )
    publisher = Publisher(
        folder,
        fails_at=EVERY if kind == "fails" else 0,
        lost_at=EVERY if kind == "lost" and rank == 1 else 0,
    )
    said: dict[str, Any] = {"error": None}
    try:
        if kind == "fsdp2":
            train_by_hand(folder, rank, world, publisher)
        else:
            callback = PublishCallback(publisher, ep_size=EP_SIZE, every=EVERY)
            said["wrapped"] = train_together(folder, callback)
    except Exception as err:  # noqa: BLE001 - the answer
        said["error"] = f"{type(err).__name__}: {err}"
    said["published"] = publisher.published
    (folder / f"{rank}.json").write_text(json.dumps(said))
    dist.barrier()
    # DDP's reducer must not be the last to hold the process group: PyTorch would then join gloo's
    # threads with the GIL held, which one of them may wait for.
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
