"""A model that Megatron-Core shards: the shards that `split` writes of what Megatron-Bridge exports."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorashard import SplitRequest, save_megatron, split_adapter, verify_shards
from lorashard.errors import UnsupportedAdapterError
from tests.publish.megatron_run import EXPERTS, LAYERS, Case
from tests.publish.ranks import run_ranks
from tests.tiny import REPO

RUN = REPO / "tests" / "publish" / "megatron_run.py"
INSTALLED = Path(os.environ.get("LORASHARD_MEGATRON") or REPO / ".venv" / "megatron")
OWN = {"share_expert_adapters": False}
OUTER = {"experts_shared_outer_loras": True}
CASES = {
    2: {
        "experts": Case(ep=2, settings=OWN),
        "one-for-all-experts": Case(ep=2),
        "tensors": Case(tp=2, settings=OWN),
        "tensors-and-experts": Case(tp=2, ep=2, settings=OWN),
        "layers": Case(pp=2, settings=OWN),
        "copies": Case(settings=OWN),
        "q-k-v-gate-up-apart": Case(
            tp=2,
            lora="CanonicalLoRA",
            settings={"target_modules": ["linear_q", "linear_k", "linear_v", "linear_fc2"]},
        ),
        "sequences": Case(cp=2, settings=OWN),
        "router": Case(tp=2, ep=2, settings={"target_modules": ["router", "linear_fc2"], **OWN}),
        "smaller-r-of-experts": Case(ep=2, settings={"normalize_moe_lora": True, **OWN}),
        "sequential-copies": Case(experts="sequential"),
        "sequential": Case(ep=2, experts="sequential"),
        "shared-outer": Case(ep=2, exports=False, settings=OUTER),
        "one-tensor-for-all-experts": Case(ep=2, names="packed", settings=OWN),
        "q-k-v-as-one": Case(tp=2, names="fused", settings=OWN),
        "too-many-tp-ranks": Case(tp=2, etp=2, settings=OWN),
    },
    4: {
        "experts": Case(ep=4, settings=OWN),
        "experts-and-copies": Case(ep=2, settings=OWN),
        "layers-and-experts": Case(pp=2, ep=2, settings=OWN),
        "layers-and-sequential": Case(pp=2, ep=2, experts="sequential"),
        "tensors-and-layers": Case(tp=2, pp=2, ep=2, settings=OWN),
        "sequences-and-experts": Case(cp=2, ep=2, settings=OWN),
        "layers-in-turn": Case(pp=2, vp=2, ep=2, settings=OWN),
        "too-few-query-groups": Case(tp=4, settings=OWN),
    },
}
# Megatron-Bridge 0.6.2 gives the experts of each rank the numbers of the first (model_bridge.py:317),
# and cannot save what experts share in part: its dense tensors are those of a case that it can save.
BY_HAND = {(2, "sequential"), (4, "layers-and-sequential"), (2, "shared-outer")}
REFUSED = {
    (2, "one-tensor-for-all-experts"): "experts.gate_up_proj, one tensor for all experts, is not",
    (2, "q-k-v-as-one"): "a layer with a ConcatenatedQKVMapping on 2 TP ranks is not supported",
    (2, "too-many-tp-ranks"): "expert tensor parallelism 2 is not supported",
    (4, "too-few-query-groups"): "q, k and v of 2 query groups, for this model, on 4 TP ranks",
}
ALL = [(world, name) for world, cases in CASES.items() for name in cases]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The folder of each world, in which all of its cases have run."""
    if not (INSTALLED / "megatron" / "bridge").is_dir():
        if os.environ.get("LORASHARD_REQUIRE_ALL", "") not in ("", "0"):
            pytest.fail(f"Megatron-Bridge is not in {INSTALLED}")
        pytest.skip("make .venv/.megatron")
    folders = {}
    for world, cases in CASES.items():
        folder = folders[world] = tmp_path_factory.mktemp(f"world{world}")
        told = json.dumps({name: asdict(case) for name, case in cases.items()})
        run_ranks(RUN, world, folder, told, packages=INSTALLED, timeout_s=280)
    return folders


def experts_by_hand(folder: Path, case: Case, world: int) -> dict[str, torch.Tensor]:
    """Each expert's tensors, from what Megatron's ranks have, without Megatron-Bridge."""
    found = {}
    num_local, stages = EXPERTS // case.ep, case.pp
    for rank in range(world):
        stage, ep_rank = rank // (world // stages), rank % case.ep
        for name, tensor in load_file(folder / f"{rank}.safetensors").items():
            match = re.fullmatch(
                r"decoder\.layers\.(\d+)\.mlp\.experts\.(?:local_experts\.(\d+)\.)?"
                r"linear_fc([12])\.adapter\.linear_(in|out)\.weight", name
            )  # fmt: skip
            if not match:
                continue
            layer, local, linear, side = match.groups()
            layer = int(layer) + stage * (LAYERS // stages)
            for own in range(num_local) if local is None else [int(local)]:
                values = tensor[own] if tensor.dim() == 3 else tensor
                prefix = (
                    f"base_model.model.model.layers.{layer}.mlp.experts.{ep_rank * num_local + own}"
                )
                parts = {"down_proj": values}
                if linear == "1":
                    halves = values.chunk(2) if side == "out" else (values, values)
                    parts = dict(zip(("gate_proj", "up_proj"), halves))
                for projection, part in parts.items():
                    factor = {"in": "lora_A", "out": "lora_B"}[side]
                    found[f"{prefix}.{projection}.{factor}.weight"] = part.clone()
    return found


def split_of_gathered(folder: Path, tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    """The files that `split` writes of these tensors, under the config of the sharded adapter."""
    gathered = folder / "as-split"
    gathered.mkdir()
    config = (folder / "sharded" / "adapter_config.json").read_bytes()
    (gathered / "adapter_config.json").write_bytes(config)
    save_file(tensors, gathered / "adapter_model.safetensors", metadata={"format": "pt"})
    split_adapter(gathered, folder / "split", SplitRequest(2, model=folder / "base"))
    verify_shards(folder / "sharded", against=gathered)
    return {path.name: path.read_bytes() for path in (folder / "split").iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize(("world", "name"), [case for case in ALL if case not in REFUSED])
def test_a_megatron_model_is_saved_as_if_it_had_been_gathered(
    runs: dict[int, Path], world: int, name: str
) -> None:
    folder, case = runs[world] / name, CASES[world][name]
    told = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]
    assert not [one["error"] for one in told if "error" in one]
    gathered = (folder if case.exports else runs[world] / "one-for-all-experts") / "gathered"
    tensors = load_file(gathered / "adapter_model.safetensors")
    config = json.loads((gathered / "adapter_config.json").read_text())
    assert json.loads((folder / "sharded" / "adapter_config.json").read_text()) == config
    if (world, name) in BY_HAND:
        tensors = {key: value for key, value in tensors.items() if ".experts." not in key}
        tensors |= experts_by_hand(folder, case, world)
    saved = {path.name: path.read_bytes() for path in (folder / "sharded").iterdir()}
    assert saved == split_of_gathered(folder, tensors)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "name"), list(REFUSED))
def test_what_only_a_gathered_export_can_put_together_is_refused_on_every_rank(
    runs: dict[int, Path], world: int, name: str
) -> None:
    for rank in range(world):
        told = json.loads((runs[world] / name / f"{rank}.json").read_text())
        assert told["error"].startswith("UnsupportedAdapterError: decoder.layers.0.")
        assert REFUSED[world, name] in told["error"]
    assert not (runs[world] / name / "sharded").exists()


def test_a_bridge_without_an_export_of_adapters_is_refused(tmp_path: Path) -> None:
    bridge = SimpleNamespace(_model_bridge=object())
    with pytest.raises(UnsupportedAdapterError, match=r"This Megatron-Bridge: .* not supported"):
        save_megatron(bridge, [], None, tmp_path / "out", ep_size=2)
