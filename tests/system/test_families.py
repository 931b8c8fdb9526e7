"""Adapters that the real PEFT and transformers write, for each MoE family they have.

`families/make_families.py` makes them on tiny models and saves PEFT's own deltas beside them; the
deltas of the shards must be those, expert by expert. Two environments: transformers 5 (fused
experts), and transformers 4 (one tensor per expert) from the directory `.venv/legacy`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorashard import LorashardError, SplitRequest, merge_shards, split_adapter, verify_shards
from tests.deltas import compare_deltas
from tests.tiny import REPO

LEGACY = Path(os.environ.get("LORASHARD_LEGACY", REPO / ".venv" / "legacy"))

# What adapters of a family cannot be, and what the refusal must speak of.
KNOWN_REFUSALS = {
    "longcat_flash": "holds",  # more experts in gate_up than in down
    "jetmoe": "in a layout that lorashard does not know",  # experts under an ordinary module's name
    "aria_text": "fc1",  # 4.57: experts.fc1 and fc2
}
REFUSALS = {
    "bias": "bias",
    "dora": "DoRA",
    "lora_bias": "lora_bias",
    "modules_to_save": "modules_to_save",
    "trainable_token_indices": "tokens",
    "experts": "no expert weights",
    "init_lora_weights": "changes the base weights",
}


@pytest.fixture(scope="session", params=["transformers 5", "transformers 4"])
def families(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    environment = dict(os.environ)
    if request.param == "transformers 4":
        if not LEGACY.is_dir():
            assert "LORASHARD_REQUIRE_ALL" not in os.environ, f"{LEGACY} is missing"
            pytest.skip(f"{LEGACY} is missing; `make test` makes it")
        environment["PYTHONPATH"] = str(LEGACY)
    else:
        transformers = pytest.importorskip("transformers")
        assert transformers.__version__.startswith("5.")
        pytest.importorskip("peft")
    out = tmp_path_factory.mktemp("families")
    script = REPO / "tests" / "families" / "make_families.py"
    made = subprocess.run(
        [sys.executable, str(script), str(out)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr[-2000:]
    return out


def cases(families: Path) -> Iterator[tuple[Path, dict[str, object]]]:
    for directory in sorted(families.iterdir()):
        if (directory / "case.json").is_file():
            yield directory, json.loads((directory / "case.json").read_text())


def request_for(directory: Path, ep_size: int, strategy: str) -> SplitRequest:
    return SplitRequest(ep_size, strategy, model=directory / "model")  # type: ignore[arg-type]


def test_every_expert_keeps_the_delta_that_peft_computes(families: Path, tmp_path: Path) -> None:
    wrong: dict[str, object] = {}
    compared = 0
    for number, (directory, case) in enumerate(cases(families)):
        if "refuse" in case:
            continue
        ep_size, strategy = (2, 3, 5)[number % 3], ("linear", "round_robin")[number % 2]
        out = tmp_path / directory.name
        try:
            split_adapter(directory, out, request_for(directory, ep_size, strategy))
        except LorashardError as err:
            expected = KNOWN_REFUSALS.get(str(case["family"]))
            if expected is None or expected not in str(err):
                wrong[directory.name] = err
            continue
        compared_here, worst = compare_deltas(out, directory / "expected_delta.safetensors")
        compared += compared_here
        # PEFT computes some deltas in bfloat16; the factors themselves are compared bit for bit
        # by verify.
        if worst > (4e-3 if "bf16" in directory.name else 1e-6):
            wrong[directory.name] = f"relative error {worst}"
        elif findings := verify_shards(out, against=directory):
            wrong[directory.name] = findings[:3]
    assert wrong == {}
    assert compared > 1000


def test_merge_gives_every_adapter_back_bit_for_bit(families: Path, tmp_path: Path) -> None:
    different = []
    for directory, case in cases(families):
        out, back = tmp_path / f"{directory.name}-ep3", tmp_path / directory.name
        try:
            split_adapter(directory, out, request_for(directory, 3, "round_robin"))
        except LorashardError:
            continue
        merge_shards(out, back)
        source = directory / str(case.get("adapter_name", ""))
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            if (back / name).read_bytes() != (source / name).read_bytes():
                different.append(f"{directory.name}/{name}")
    assert different == []


def test_what_cannot_be_served_is_refused_with_its_reason(families: Path, tmp_path: Path) -> None:
    accepted = []
    for directory, case in cases(families):
        if "refuse" not in case:
            continue
        try:
            split_adapter(directory, tmp_path / "out", request_for(directory, 2, "linear"))
            accepted.append(directory.name)
        except LorashardError as err:
            if REFUSALS[str(case["refuse"])] not in str(err):
                accepted.append(f"{directory.name}: {err}")
        assert not (tmp_path / "out").exists()
    assert accepted == []
