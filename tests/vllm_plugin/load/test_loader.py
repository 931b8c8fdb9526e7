"""What the loader opens, reports and leaves to vLLM, in one real release on the CPU.

That the right values land in the LoRA buffers is test_loading_conformance.py's.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from tests.tiny import REPO
from tests.vllm_release import run_in_release

# 0.22.1: before vLLM itself reads rank_pattern (0.32).
RELEASE = "0.22.1"
SCRIPT = f"""
import sys; sys.path.insert(0, {str(REPO)!r})
import dataclasses, os, tempfile
from pathlib import Path
from lorashard.vllm_plugin import register
register()
import torch
from vllm.lora.peft_helper import PEFTHelper
from lorashard import SplitRequest, split_adapter
from lorashard.vllm_plugin.load import fill
from tests.vllm_plugin import harness
from tests.vllm_plugin.harness_selfcheck import SIZES, adapter_of, modules

folder = Path(tempfile.mkdtemp())
built = adapter_of("L1")
plain = built.write(folder / "plain")
for ranks in (2, 4):
    split_adapter(plain, folder / f"ep{{ranks}}", SplitRequest(ranks))

def load(path, ep_rank=0):
    engine = harness.make_engine(**SIZES, ep_rank=ep_rank, module_names=modules())
    engine.add_adapter(harness.request(engine, path))
    return engine

def report(path, ep_rank=0):
    return dataclasses.asdict(load(path, ep_rank)._lorashard_loader.last_report)

found = {{
    "plain": report(plain),
    "own": [report(folder / "ep2", ep_rank) for ep_rank in (0, 1)],
    "foreign": [report(folder / "ep4", ep_rank) for ep_rank in (0, 1)],
}}

engine = load(folder / "ep2")
loader = engine._lorashard_loader
missing = folder / "ep2" / "ep-00000-of-00002.safetensors"
missing.rename(folder / "away")
try:
    engine.add_adapter(harness.request(engine, folder / "ep2", "again", 2))
except ValueError as err:
    found["failed"] = [str(err), loader.last_report is None]
(folder / "away").rename(missing)

run = fill.Filler.run
def read_while_another_writes(*arguments):
    done = run(*arguments)
    with missing.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    return done
fill.Filler.run = read_while_another_writes
try:
    engine.add_adapter(harness.request(engine, folder / "ep2", "changed", 6))
except ValueError as err:
    found["changed"] = [str(err), loader.last_report is None, 6 in engine.list_adapters()]
fill.Filler.run = run

dense = {{name: t for name, t in built.tensors.items() if "self_attn" in name}}
without = type(built)(built.spec, dense, built.config, {{}}, {{}}).write(folder / "dense")
engine.add_adapter(harness.request(engine, without, "dense", 3))
found["without experts"] = loader.last_report is None

# o_proj has r=4 and alpha=12 by patterns, the rest the adapter's own r=2 and alpha=4.
config = built.config | {{"rank_pattern": {{"o_proj": 4}}, "alpha_pattern": {{"o_proj": 12}}}}
tensors = dict(built.tensors)
for name, tensor in built.tensors.items():
    if ".q_proj." in name:
        shape = (4, tensor.shape[1]) if ".lora_A." in name else (tensor.shape[0], 4)
        tensors[name.replace("q_proj", "o_proj")] = torch.ones(shape, dtype=tensor.dtype)
patterned = type(built)(built.spec, tensors, config, {{}}, {{}}).write(folder / "patterned")
engine.add_adapter(harness.request(engine, patterned, "patterned", 4))
in_memory = engine._lora_model_cls.from_lora_tensors(
    5, tensors=tensors, peft_helper=PEFTHelper.from_dict(config), device="cpu",
    dtype=torch.float32,
)
engine._adapter_manager._add_adapter(in_memory)
for how, number in (("patterns", 4), ("patterns in memory", 5)):
    (o_proj,) = (
        weights for name, weights in engine._adapter_manager.list_adapters()[number].loras.items()
        if name.endswith("layers.0.self_attn.o_proj")
    )
    found[how] = [o_proj.rank, o_proj.lora_b.unique().tolist()]  # vLLM has scaled lora_b
engine.remove_adapter(5)

# vLLM before 0.32 looks at the adapter's own r alone.
tensors = dict(built.tensors)
for name, tensor in built.tensors.items():
    if ".q_proj." in name:
        shape = (24, tensor.shape[1]) if ".lora_A." in name else (tensor.shape[0], 24)
        tensors[name] = torch.ones(shape, dtype=tensor.dtype)
large = type(built)(
    built.spec, tensors, built.config | {{"rank_pattern": {{"q_proj": 24}}}}, {{}}, {{}}
).write(folder / "large")
try:
    engine.add_adapter(harness.request(engine, large, "large", 5))
except Exception as err:
    found["large"] = [type(err).__name__, str(err)]
found["large"] += [5 in engine.list_adapters()]
engine = harness.make_engine(
    **SIZES, module_names=modules(), target_modules=["o_proj", "experts"]
)
found["excluded"] = engine.add_adapter(harness.request(engine, large, "large", 5))
answer(found)
"""


@cache
def findings() -> dict[str, Any]:
    found: dict[str, Any] = run_in_release(RELEASE, SCRIPT)
    return found


def test_a_report_says_what_was_loaded_on_which_rank() -> None:
    for ep_rank, report in enumerate(findings()["own"]):
        assert (report["kind"], report["ep_rank"], report["ep_size"]) == ("shards", ep_rank, 2)
        assert (report["num_local_experts"], report["num_experts"], report["num_layers"]) == (
            4, 8, 2,
        )  # fmt: skip
        assert report["num_bytes"] > 0
        assert report["advice"] is None
        assert list(report["stages"]) == ["open", "plan", "get memory", "read", "wrap"]
        assert report["seconds"] == pytest.approx(sum(report["stages"].values()))


def test_a_plain_adapter_is_loaded_without_advice() -> None:
    report = findings()["plain"]
    assert (report["kind"], report["num_local_experts"], report["advice"]) == (
        "plain adapter", 4, None,
    )  # fmt: skip


def test_of_the_ranks_that_read_foreign_files_the_first_gives_the_advice() -> None:
    first, second = findings()["foreign"]
    assert first["advice"].startswith("split for 4 ranks, with a different placement ")
    assert second["advice"] is None


def test_a_load_that_fails_leaves_no_report_of_the_one_before() -> None:
    message, is_none = findings()["failed"]
    assert "ep-00000-of-00002.safetensors" in message
    assert is_none


def test_a_file_that_is_written_to_while_it_is_read_is_refused_and_not_kept() -> None:
    message, is_none, is_kept = findings()["changed"]
    assert "ep-00000-of-00002.safetensors: it changed while it was being loaded" in message
    assert (is_none, is_kept) == (True, False)


def test_an_adapter_without_experts_is_left_to_vllm() -> None:
    assert findings()["without experts"] is True


@pytest.mark.parametrize("how", ["patterns", "patterns in memory"])
def test_dense_modules_have_the_r_and_scaling_of_the_patterns(how: str) -> None:
    assert findings()[how] == [4, [3.0]]


def test_a_dense_module_with_a_larger_r_than_the_engine_s_is_refused_and_not_kept() -> None:
    kind, message, is_kept = findings()["large"]
    assert (kind, is_kept) == ("ValueError", False)
    assert "q_proj.lora_A.weight: r=24, but the engine has room for 8." in message
    assert "--max-lora-rank 32" in message


def test_the_r_of_a_module_that_the_engine_leaves_out_does_not_matter() -> None:
    assert findings()["excluded"] is True
