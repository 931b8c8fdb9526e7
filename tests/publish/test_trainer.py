"""Real trainings that publish: each version is what `split` writes of what PEFT saves at that step."""

from __future__ import annotations

import gc
import json
import os
import random
import re
import textwrap
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from lorashard import PublishCallback
from lorashard.errors import AdapterError, OutputExistsError
from tests.imports import imported_by
from tests.publish.fsdp_run import peft_model
from tests.publish.ranks import run_ranks
from tests.publish.test_peft_models import split_of_saved
from tests.publish.test_writer import files_of
from tests.publish.trainer_run import (
    EP_SIZE,
    EVERY,
    STEPS,
    WORDS,
    Publisher,
    SaveWhole,
    settings,
    tokenizer,
    train,
)
from tests.tiny import REPO

RUN = REPO / "tests" / "publish" / "trainer_run.py"
RECIPE = REPO / "docs" / "recipes" / "README.md"
PUBLISHED = [step for step in range(1, STEPS + 1) if step % EVERY == 0]


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """A trainer leaves its settings in the environment."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def check_versions(folder: Path) -> None:
    """Those of a `Publisher`, against those of `SaveWhole`."""
    sharded = sorted(int(path.parent.name) for path in folder.glob("*/sharded"))
    assert sharded == PUBLISHED
    versions = [files_of(folder / str(step) / "sharded") for step in PUBLISHED]
    assert versions == [split_of_saved(folder / str(step)) for step in PUBLISHED]
    weights = [version["ep-00000-of-00003.safetensors"] for version in versions]
    assert len(set(weights)) == len(weights)  # it was trained in between


def check_equal(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    """To the bit."""
    assert some.keys() == others.keys()
    for name, tensor in some.items():
        assert torch.equal(tensor.view(torch.uint8), others[name].view(torch.uint8)), name


def step_end(callback: Any, model: Any, step: int) -> None:
    callback.on_step_end(None, TrainerState(global_step=step), TrainerControl(), model=model)


# transformers


def test_a_trainer_publishes_every_n_steps(tmp_path: Path) -> None:
    publisher = Publisher(tmp_path)
    callback = PublishCallback(publisher, ep_size=EP_SIZE, every=EVERY)
    train(tmp_path, [SaveWhole(tmp_path), callback])
    assert publisher.published == PUBLISHED
    check_versions(tmp_path)


def test_a_trainer_publishes_when_it_saves(tmp_path: Path) -> None:
    published: list[int] = []
    callback = PublishCallback(Publisher(tmp_path).path, ep_size=EP_SIZE, publish=published.append)
    train(tmp_path, [SaveWhole(tmp_path), callback], save_strategy="steps", save_steps=EVERY)
    assert published == PUBLISHED
    check_versions(tmp_path)


def test_publishing_changes_nothing_in_the_training(tmp_path: Path) -> None:
    callback = PublishCallback(tmp_path, name="mine", ep_size=EP_SIZE, every=1)
    with_it = train(tmp_path, [callback]).model.state_dict()
    without = train(tmp_path, []).model.state_dict()
    assert len(list(tmp_path.glob("mine-v*"))) == STEPS
    check_equal(with_it, without)


@pytest.mark.parametrize("training", [True, False])
def test_mode_gradients_and_random_numbers_stay_and_no_tensor_is_kept(
    tmp_path: Path, training: bool
) -> None:
    model = peft_model().train(training)
    tokens = torch.arange(8)[None]
    model(input_ids=tokens, labels=tokens).loss.backward()
    gradients = {
        n: (p.grad, p.grad.clone()) for n, p in model.named_parameters() if p.requires_grad
    }
    modes = [module.training for module in model.modules()]
    randomness = torch.get_rng_state(), random.getstate(), repr(np.random.get_state(legacy=False))  # noqa: NPY002 - what others use
    callback = PublishCallback(tmp_path, name="mine", ep_size=EP_SIZE, every=1)
    step_end(callback, model, 1)
    assert [module.training for module in model.modules()] == modes
    for name, parameter in model.named_parameters():
        if name in gradients:
            same, values = gradients[name]
            assert parameter.grad is same
            assert torch.equal(same, values)
    assert torch.equal(torch.get_rng_state(), randomness[0])
    assert (random.getstate(), repr(np.random.get_state(legacy=False))) == randomness[1:]  # noqa: NPY002
    gone = [weakref.ref(parameter) for parameter in model.parameters()]
    del model, parameter, gradients, same, values
    gc.collect()
    assert {ref() for ref in gone} == {None}
    assert callback is not None


def test_a_step_that_is_saved_twice_is_published_once(tmp_path: Path) -> None:
    published: list[int] = []
    callback = PublishCallback(tmp_path, name="mine", ep_size=EP_SIZE, publish=published.append)
    model = peft_model()
    for step in (3, 3, 4):
        state = TrainerState(global_step=step)
        callback.on_save(None, state, TrainerControl(), model=model)
    assert published == [3, 4]
    callback.on_train_begin(None, TrainerState(), TrainerControl(), model=model)
    with pytest.raises(OutputExistsError, match="mine-v00004"):  # another training is at this step
        callback.on_save(None, state, TrainerControl(), model=model)


def test_the_options_of_save_sharded_arrive(tmp_path: Path) -> None:
    callback = PublishCallback(
        tmp_path, name="mine", ep_size=2, every=1, strategy="round_robin", force=True, sync=False
    )
    for _ in range(2):
        callback.on_train_begin(None, TrainerState(), TrainerControl(), model=peft_model())
        step_end(callback, peft_model(), 12345)
    placement = json.loads((tmp_path / "mine-v12345" / "lorashard.json").read_text())["placement"]
    assert placement["strategy"] == "round_robin"


# What goes wrong


def test_a_version_that_cannot_be_published_ends_the_training(tmp_path: Path) -> None:
    publisher = Publisher(tmp_path, fails_at=EVERY)
    whole = SaveWhole(tmp_path)
    with pytest.raises(ConnectionError, match=r"^no server$"):
        train(tmp_path, [whole, PublishCallback(publisher, ep_size=EP_SIZE, every=EVERY)])
    assert not (tmp_path / str(EVERY + 1)).exists()


def test_a_model_without_an_adapter_is_refused_before_the_first_step(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    steps: list[int] = []

    class Count(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            steps.append(state.global_step)

    trainer = Trainer(
        model=peft_model().unload(),
        args=TrainingArguments(**settings(tmp_path)),
        train_dataset=[{"input_ids": [1, 2], "labels": [1, 2]}],
        callbacks=[Count(), PublishCallback(tmp_path, name="mine", ep_size=2, every=100)],
    )
    with pytest.raises(AdapterError, match="not a PeftModel"):
        trainer.train()
    assert steps == []


@pytest.mark.parametrize(
    ("to", "options"),
    [
        ("/shards", {}),
        (Path("/shards"), {}),
        (lambda step: f"/shards/{step}", {"name": "mine"}),
        (Publisher(Path("/shards")), {"name": "mine"}),
        (Publisher(Path("/shards")), {"publish": print}),
        ("/shards", {"name": "mine", "every": 0}),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(to: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"name|publish|every"):
        PublishCallback(to, ep_size=2, **options)


# As a class


def test_it_is_a_callback_of_transformers_as_well_as_one_of_ours(tmp_path: Path) -> None:
    class Mine(PublishCallback):
        pass

    for cls in (PublishCallback, Mine):
        made = cls(tmp_path, name="mine", ep_size=2)
        assert isinstance(made, TrainerCallback)
        assert isinstance(made, cls)
        assert type(made).__name__ == cls.__name__


def test_importing_it_imports_no_transformers() -> None:
    heavy = {"transformers", "peft", "torch"}
    assert imported_by("from lorashard import PublishCallback") & heavy == set()


# Several processes


def run(kind: str, folder: Path, world: int = 2) -> list[dict[str, Any]]:
    """What each rank has said."""
    run_ranks(RUN, world, folder, kind)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


def test_trainers_with_ddp_publish_together(tmp_path: Path) -> None:
    first, second = run("ddp", tmp_path)
    assert first["wrapped"] == second["wrapped"] == "DistributedDataParallel"
    assert (first["error"], second["error"]) == (None, None)
    assert (first["published"], second["published"]) == (PUBLISHED, [])
    check_versions(tmp_path)


def test_what_fails_on_rank_0_is_raised_on_every_rank(tmp_path: Path) -> None:
    first, second = run("fails", tmp_path)
    assert first["error"] == "ConnectionError: no server"
    said = "ShardError: Rank 0 could not publish 2: ConnectionError: no server"
    assert second["error"].startswith(said)


def test_a_rank_without_a_path_does_not_hold_the_others(tmp_path: Path) -> None:
    first, second = run("lost", tmp_path)
    said = "ShardError: Rank 1 has no path for 2: FileNotFoundError: no disk"
    assert first["error"].startswith(said)
    assert second["error"] == "FileNotFoundError: no disk"


def test_a_model_that_fsdp2_shards_is_published(tmp_path: Path) -> None:
    first, second = run("fsdp2", tmp_path)
    assert (first["error"], second["error"]) == (None, None)
    assert (first["published"], second["published"]) == ([1], [])
    assert files_of(tmp_path / "1" / "sharded") == split_of_saved(tmp_path / "1")


# TRL


def texts(column: str) -> Any:
    from datasets import Dataset

    return Dataset.from_list([{column: " ".join(WORDS[i : i + 8])} for i in range(16)])


def test_trls_sft_trainer_publishes(tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    def trained(callbacks: list[Any]) -> dict[str, torch.Tensor]:
        trainer = SFTTrainer(
            model=peft_model(attention_dropout=0.1),
            args=SFTConfig(**settings(tmp_path)),
            train_dataset=texts("text"),
            processing_class=tokenizer(),
            callbacks=callbacks,
        )
        trainer.train()
        return trainer.model.state_dict()

    publisher = Publisher(tmp_path)
    callback = PublishCallback(publisher, ep_size=EP_SIZE, every=EVERY)
    with_it = trained([SaveWhole(tmp_path), callback])
    assert publisher.published == PUBLISHED
    check_versions(tmp_path)
    check_equal(with_it, trained([]))


def test_trls_grpo_trainer_publishes_as_in_the_recipe(tmp_path: Path) -> None:
    from trl import GRPOConfig, GRPOTrainer

    (example,) = re.findall(
        r"^  ```python\n((?:(?!```).)*GRPOTrainer.*?)^  ```",
        RECIPE.read_text(),
        re.MULTILINE | re.DOTALL,
    )
    given = {
        "/shards": str(tmp_path),
        "ep_size=8": f"ep_size={EP_SIZE}",
        "every=10": f"every={EVERY}",
    }
    for word, mine in given.items():
        assert word in example
        example = example.replace(word, mine)
    model = peft_model()
    lora_config = model.peft_config["default"]
    args = GRPOConfig(**settings(tmp_path, num_generations=2, max_completion_length=4))
    names = {
        "GRPOTrainer": GRPOTrainer, "model": model.unload(), "lora_config": lora_config, "args": args,
        "prompts": texts("prompt"), "tokenizer": tokenizer(),
        "reward": lambda completions, **_: [float(len(set(text))) for text in completions],
    }  # fmt: skip
    exec(compile(textwrap.dedent(example), str(RECIPE), "exec"), names)
    assert sorted(path.name for path in tmp_path.glob("mine-v*")) == ["mine-v00002", "mine-v00004"]
    trainer = names["trainer"]
    trainer.model.save_pretrained(tmp_path / "last" / "gathered")
    trainer.model.base_model.model.config.save_pretrained(tmp_path / "last" / "base")
    (tmp_path / "mine-v00004").rename(tmp_path / "last" / "sharded")
    assert files_of(tmp_path / "last" / "sharded") == split_of_saved(tmp_path / "last")
