"""Who reads what `convert` writes: the real PEFT, new and old, and vLLM without the plugin."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.adapters import Adapter, Spec, build
from tests.conversions import PEFT_LAYOUTS, Work, deltas
from tests.tiny import REPO
from tests.vllm_release import run_in_release

LEGACY = Path(os.environ.get("LORASHARD_LEGACY", REPO / ".venv" / "legacy"))

# A tiny GLM-4-MoE with attention, router and shared experts.
GLM = {
    "model_type": "glm4_moe", "architectures": ["Glm4MoeForCausalLM"], "vocab_size": 128,
    "hidden_size": 64, "intermediate_size": 48, "moe_intermediate_size": 48, "head_dim": 16,
    "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2,
    "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 0, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
ONE_SCALING = {"alpha_pattern": {r"experts\.1\.\w+": 6}}  # for r=3 the same as 4 for r=2
FOR_PEFT = {
    "L1": Spec("L1"),
    "L1-rslora": Spec("L1", rslora=True, lora_rank=3),
    "L1-some": Spec("L1", experts=(0, 2), config={"init_lora_weights": False}),
    "L1-ranks": Spec("L1", lora_ranks={1: 3}, config=ONE_SCALING),
    "L1-down": Spec("L1", projections=("down_proj",)),
    "L2": Spec("L2"), "L2b": Spec("L2b"), "L3": Spec("L3"), "L6": Spec("L6"), "L8": Spec("L8"),
    "L10": Spec("L10"), "L11": Spec("L11"), "L13": Spec("L13"),
}  # fmt: skip


def glm_adapter(spec: Spec) -> Adapter:
    """With factors for all that GLM-4-MoE has beside its experts."""
    adapter = build(replace(
        spec, hidden=64, intermediate=48, num_layers=2, fill="random", extras=True
    ))  # fmt: skip
    tensors = {}
    for name, tensor in adapter.tensors.items():
        rows = (
            torch.randn(48, tensor.shape[1]) if "shared_expert.up_proj.lora_B" in name else tensor
        )
        tensors[name.replace("shared_expert.", "shared_experts.")] = rows
    # As PEFT would have it; another writer's would be made anew.
    config = adapter.config | {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}
    config["target_parameters"] = [*(config["target_parameters"] or ()), "gate.weight"]
    if spec.layout == "L1":
        config["target_modules"] += [f"experts.{e}.{p}" for _, e, p in adapter.factors]
        config["target_modules"] += ["shared_experts.up_proj"]
    else:
        config["target_parameters"] += ["shared_experts.up_proj.weight"]
    return replace(adapter, tensors=tensors, config=config)


@pytest.fixture(scope="module", params=PEFT_LAYOUTS)
def loaded(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, Work]]:
    """Each adapter converted, and loaded by the PEFT that reads this layout."""
    environment = dict(os.environ)
    if request.param == "per_expert":
        if not LEGACY.is_dir():
            assert "LORASHARD_REQUIRE_ALL" not in os.environ, f"{LEGACY} is missing"
            pytest.skip(f"{LEGACY} is missing; `make test` makes it")
        environment["PYTHONPATH"] = str(LEGACY)
    else:
        pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp(request.param)
    works = {name: Work(folder / name, glm_adapter(spec)) for name, spec in FOR_PEFT.items()}
    for work in works.values():
        model = Path(f"{work.out}.model")
        model.mkdir()
        (model / "config.json").write_text(json.dumps(GLM))
        work.split().convert(request.param, model=model)
    script = REPO / "tests" / "families" / "load_adapters.py"
    done = subprocess.run(
        [sys.executable, str(script), *(str(work.out) for work in works.values())],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return request.param, works


@pytest.mark.parametrize("name", FOR_PEFT)
def test_peft_computes_the_weight_changes_of_the_shards(
    loaded: tuple[str, dict[str, Work]], name: str
) -> None:
    work = loaded[1][name]
    computed = load_file(f"{work.out}.deltas.safetensors")
    experts = {key: delta for key, delta in computed.items() if key.startswith("experts|")}
    wanted = deltas(work.shards)
    for key in wanted.keys() | experts.keys():
        if key not in wanted or key not in experts:  # the other half of a pair, for example
            assert not (wanted.get(key, experts.get(key))).any(), key  # type: ignore[union-attr]
        else:
            torch.testing.assert_close(experts[key], wanted[key].float(), rtol=1e-5, atol=1e-5)
    scaling = work.adapter.config["lora_alpha"] / (
        work.adapter.spec.lora_rank ** (0.5 if work.adapter.spec.rslora else 1)
    )
    others = {
        module: scaling * work.adapter.tensors[f"{module}.lora_B.weight"] @ a
        for module, a in (
            (tensor_name.removesuffix(".lora_A.weight"), tensor)
            for tensor_name, tensor in work.adapter.tensors.items()
        )
        if ".experts" not in module and f"{module}.lora_A.weight" in work.adapter.tensors
    }
    assert len(others) == 6
    for module, delta in others.items():
        key = f"module|{module.removeprefix('base_model.model.')}"
        found = computed.get(key, computed.get(f"{key}.weight"))
        assert found is not None, key
        torch.testing.assert_close(found, delta, rtol=1e-5, atol=1e-5)
    assert len(computed) - len(experts) == 6


@pytest.mark.parametrize("name", FOR_PEFT)
def test_peft_misses_nothing(loaded: tuple[str, dict[str, Work]], name: str) -> None:
    said = json.loads(Path(f"{loaded[1][name].out}.json").read_text())
    # PEFT 0.21 looks for patterns of parameters among modules, says that they are ignored, and
    # follows them; of a router that is no nn.Linear it says that of any adapter.
    allowed = ("keys did not match any targeted module", "Unsupported layer type", "deprecated")
    assert [text for text in said if not any(part in text for part in allowed)] == []


LOAD_IN_VLLM = f"""
import sys
sys.path[:0] = [{str(REPO)!r}, {str(REPO / "tests" / "vllm_plugin")!r}]
from pathlib import Path
from tests.vllm_plugin import harness_selfcheck as check
from lorashard import SplitRequest, convert_shards, split_adapter

problems = {{}}
for layout in ("L1", "L2", "L3", "L6", "L8", "L10", "L13"):
    adapter = check.adapter_of(layout)
    work = check.write(adapter).parent / layout
    split_adapter(adapter.write(work / "source"), work / "shards", SplitRequest(3))
    model = work / "config.json"
    model.write_text('{{"model_type": "qwen3_moe", "num_experts": %d}}' % check.EXPERTS)
    convert_shards(work / "shards", work / "out", "per_expert", model=model)
    problems[layout] = []
    for ep_rank in (0, 1):
        engine = check.harness.make_engine(
            **check.SIZES, ep_size=2, ep_rank=ep_rank, module_names=check.modules()
        )
        assert engine.add_adapter(check.harness.request(engine, work / "out"))
        slot, expected = check.harness.slot_of(engine, 1), check.expected_deltas(adapter)
        problems[layout] += check.mismatches(engine, slot, expected)
        problems[layout] += check.wrong_attention(engine, slot, adapter)
answer(problems)
"""


def test_vllm_alone_reads_the_per_expert_layout() -> None:
    problems = run_in_release("0.33.0", LOAD_IN_VLLM)
    assert len(problems) == 7
    assert [problem for found in problems.values() for problem in found] == []
