"""`doctor`: what it finds, what it would refuse, what it would do. Mostly without vLLM."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from lorashard import SplitRequest, split_adapter
from lorashard.vllm_plugin.patches.table import PATCHES
from tests.adapters import Spec, build
from tests.goldens import check_golden
from tests.hub_server import HubServer
from tests.tiny import (
    CONFIG,
    MODULE,
    REPO,
    E,
    H,
    I,
    R,
    change_version,
    edit_json,
    per_expert_tensors,
    run_cli,
    save_adapter,
    save_config,
    save_fused,
    save_header,
)
from tests.vllm_release import require_release

EP = "--enable-expert-parallel"
DP_RISK = "LORASHARD_RISK_WRONG_ADAPTERS_WITH_DATA_PARALLEL"
ENTRY_POINT = "[vllm.general_plugins]\nlorashard = lorashard.vllm_plugin:register\n"


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("LORASHARD_", "VLLM_")):
            monkeypatch.delenv(name)


@pytest.fixture
def python_path(tmp_path: Path) -> str:
    """Where lorashard is installed as pip does it, whatever this test run does."""
    return installed(tmp_path, ENTRY_POINT)


def installed(folder: Path, entry_points: str) -> str:
    """A PYTHONPATH on which lorashard has these entry points."""
    site = folder / "site"
    info = site / "lorashard-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lorashard\nVersion: 0\n")
    (info / "entry_points.txt").write_text(entry_points)
    return f"{REPO}{os.pathsep}{site}"


def examine(*args: object, code: int = 5, **env: str) -> dict[str, Any]:
    """What `doctor --json` says. Without vLLM, that it is missing is always a problem."""
    done = run_cli("doctor", "--json", *args, **env)
    assert done.returncode == code, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def problems(found: dict[str, Any], about: str) -> list[str]:
    return [problem["text"] for problem in found["problems"] if problem["about"] == about]


def save_model(folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"model_type": "qwen3_moe", "num_experts": E} | changes)
    )
    return folder


def check_report(name: str, found: dict[str, Any], folder: Path) -> None:
    found["installation"] |= dict.fromkeys(("python", "executable", "torch"), "<here>")
    for problem in found["problems"]:
        if problem["about"] == "vllm":
            problem["text"] = problem["text"].partition(" (")[0]
    check_golden(name, json.dumps(found, indent=2, ensure_ascii=False) + "\n", folder)


def test_json_without_vllm_is_an_interface(python_path: str, tmp_path: Path) -> None:
    check_report("doctor", examine(PYTHONPATH=python_path), tmp_path)


def test_json_of_shards_and_flags_is_an_interface(
    shards: Path, python_path: str, tmp_path: Path
) -> None:
    found = examine(shards, "-tp", 2, EP, "--fully-sharded-loras", PYTHONPATH=python_path)
    del found["patches"]
    check_report("doctor_shards", found, tmp_path)


def test_the_missing_vllm_is_a_problem_and_each_patch_says_so(python_path: str) -> None:
    done = run_cli("doctor", "-v", PYTHONPATH=python_path)
    assert done.returncode == 5
    assert done.stderr == "error: 1 problem found.\n"
    assert "problem: vLLM is not installed in this Python" in done.stdout
    assert "_load_adapter: not checked: vLLM is not installed\n" in done.stdout
    assert "why       Every rank parses" in done.stdout


def test_plain_output_names_versions_flags_and_adapter(shards: Path, python_path: str) -> None:
    done = run_cli("doctor", shards, "-tp", 2, EP, "-v", PYTHONPATH=python_path)
    for shown in (
        "vLLM       not installed", "plugin     found by vLLM", "2 expert-parallel ranks",
        "Known only once a model is loaded", f"{shards}, shards, 4 experts, r=2, linear on 2 ranks",
        "each rank reads its own file", "problem: vLLM is not installed",
    ):  # fmt: skip
        assert shown in done.stdout


DATA_PARALLEL = (EP, "-tp", 2, "--data-parallel-size", 2)  # which vLLM itself refuses


def test_a_refusal_has_its_way_out_and_variable() -> None:
    found = examine(*DATA_PARALLEL)
    (refusal,) = found["refusals"]
    assert refusal["variable"] == DP_RISK
    assert refusal["way_out"].startswith("Use tensor parallelism alone")
    (text,) = problems(found, "flags")
    assert f"{DP_RISK}=1" in text


def test_a_refusal_that_is_overridden_is_no_problem() -> None:
    found = examine(*DATA_PARALLEL, **{DP_RISK: "1"})
    assert [refusal["overridden"] for refusal in found["refusals"]] == [True]
    assert problems(found, "flags") == []
    assert any(DP_RISK in note for note in found["notes"])


def test_eplb_is_a_note_on_its_communicator() -> None:
    found = examine("-tp", 4, EP, "--enable-eplb")
    assert (found["refusals"], problems(found, "flags")) == ([], [])
    assert ["torch_gloo" in note for note in found["notes"]] == [True]


def test_data_parallel_is_refused_with_expert_and_tensor_parallel_or_too_few_slots() -> None:
    assert "--data-parallel-size 2" in problems(examine(*DATA_PARALLEL), "flags")[0]
    assert problems(examine(*DATA_PARALLEL[1:]), "flags") == []
    engines = (EP, "--data-parallel-size", 2)
    assert "--max-loras of at least" in problems(examine(*engines), "flags")[0]
    assert problems(examine(*engines, "--max-loras", 2), "flags") == []


def test_eplb_on_one_rank_is_what_vllm_refuses() -> None:
    assert "vLLM itself" in problems(examine("-tp", 4, "--enable-eplb"), "flags")[0]


def test_what_a_loaded_model_decides_is_said_with_expert_parallel_only() -> None:
    assert any("FlashInfer" in fact for fact in examine("-tp", 2, EP)["known_once_loaded"])
    assert examine("-tp", 2)["known_once_loaded"] == []


def test_a_plugin_that_vllm_does_not_find_is_a_problem(tmp_path: Path) -> None:
    found = examine(PYTHONPATH=installed(tmp_path, ""))
    assert found["installation"]["entry_point"] is False
    assert "would not find the plugin" in problems(found, "plugin")[0]


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("VLLM_PLUGINS", "other", "VLLM_PLUGINS leaves the plugin out"),
        ("VLLM_PLUGINS", "", "VLLM_PLUGINS leaves the plugin out"),
        ("LORASHARD_DISABLE", "1", "the plugin does nothing"),
        ("LORASHARD_THREADS", "many", "LORASHARD_THREADS='many'"),
        ("LORASHARD_VERIFY", "fully", "LORASHARD_VERIFY='fully'"),
    ],
)
def test_a_setting_that_keeps_the_plugin_from_work_is_a_problem(
    python_path: str, variable: str, value: str, said: str
) -> None:
    found = examine(PYTHONPATH=python_path, **{variable: value})
    (text,) = problems(found, "plugin")
    assert said in text


def test_settings_are_shown_and_unknown_ones_flagged(python_path: str) -> None:
    found = examine(
        PYTHONPATH=python_path, VLLM_PLUGINS="other,lorashard", LORASHARD_STRIKT="1",
        LORASHARD_THREADS="4", LORASHARD_DEBUG="1",
    )  # fmt: skip
    assert found["installation"]["variables"] == {
        "LORASHARD_DEBUG": "1", "LORASHARD_STRIKT": "1", "LORASHARD_THREADS": "4",
    }  # fmt: skip
    assert found["installation"]["unknown"] == ["LORASHARD_STRIKT"]
    assert found["notes"] == ["LORASHARD_STRIKT is set, but nothing reads it."]
    assert problems(found, "plugin") == []


def test_shards_as_the_engine_places_them_are_read_file_by_file(shards: Path) -> None:
    found = examine(shards, "-tp", 2, EP)
    assert found["as_placed"] is True
    assert found["outcome"].startswith("each rank reads its own file, ")
    assert problems(found, "adapter") == []


@pytest.mark.parametrize("flags", [("-tp", 4, EP), ("-tp", 2), ("--data-parallel-size", 4, EP)])
def test_shards_for_another_placement_load_with_the_plugins_warning(
    shards: Path, flags: tuple[object, ...]
) -> None:
    found = examine(shards, *flags)
    assert found["as_placed"] is False
    assert found["outcome"].startswith(
        "loads, and warns: split for 2 ranks, with a different placement from this engine's "
    )
    assert f"--ep-size {found['ep_size']}" in found["outcome"]
    assert problems(found, "adapter") == []


def test_strict_makes_another_placement_a_problem(shards: Path) -> None:
    found = examine(shards, "-tp", 4, EP, LORASHARD_STRICT="1")
    (text,) = problems(found, "adapter")
    assert text.startswith(f"{shards}: split for 2 ranks, ")
    assert text.endswith("LORASHARD_STRICT makes this an error.")
    assert (found["outcome"], found["as_placed"]) == (None, False)


def test_an_adapter_of_a_larger_rank_than_the_engine_takes_is_a_problem(shards: Path) -> None:
    (text,) = problems(examine(shards, "-tp", 2, EP, "--max-lora-rank", 1), "adapter")
    assert f"r={R}, the engine has room for 1. Start vLLM with --max-lora-rank 8." in text


def test_a_model_whose_class_joins_gate_and_up_needs_both_ranks(adapter: Path) -> None:
    found = examine(adapter, "-tp", 2, EP, "--max-lora-rank", R)
    assert problems(found, "adapter") == []
    assert any("needs --max-lora-rank 8 for it" in note for note in found["notes"])


@pytest.mark.parametrize(
    ("groups", "placed"), [(2, "round_robin"), (1, "linear"), (None, "linear")]
)
def test_round_robin_counts_for_models_with_expert_groups(
    shards: Path, tmp_path: Path, groups: int | None, placed: str
) -> None:
    model = save_model(tmp_path / "model", n_group=groups)
    asked = ("-tp", 2, EP, "--expert-placement-strategy", "round_robin")
    found = examine(shards, *asked, "--model", model)
    assert found["placement"] == placed
    assert found["as_placed"] is (placed == "linear")
    assert any("no expert groups" in note for note in found["notes"]) is (placed == "linear")
    assert any("--model tells" in note for note in examine(shards, *asked)["notes"])


def test_another_model_is_a_problem(shards: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", num_experts=8)
    found = examine(shards, "-tp", 2, EP, "--model", model)
    (text,) = problems(found, "adapter")
    assert text.startswith(f"{shards}: {MODULE}: the adapter has 4 experts, {MODULE} has 8.\n")
    assert (found["outcome"], found["as_placed"]) == (None, None)


def test_a_model_of_other_sizes_is_a_problem_in_the_loaders_words(
    shards: Path, tmp_path: Path
) -> None:
    model = save_model(tmp_path / "model", hidden_size=2 * H, moe_intermediate_size=I)
    (text,) = problems(examine(shards, "-tp", 2, EP, "--model", model), "adapter")
    assert f"gate_proj lora_A has {H} features, but {MODULE} has {2 * H}." in text


def test_the_adapters_own_model_is_none(shards: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", hidden_size=H, moe_intermediate_size=I)
    found = examine(shards, "-tp", 2, EP, "--model", model)
    assert problems(found, "adapter") == []
    assert found["as_placed"] is True


def test_shards_that_cannot_be_believed_are_a_problem(shards: Path) -> None:
    rank_0 = shards / "ep-00000-of-00002.safetensors"
    os.truncate(rank_0, rank_0.stat().st_size - 10)
    found = examine(shards, "-tp", 2, EP)
    assert str(rank_0) in problems(found, "adapter")[0]
    assert found["outcome"] is None


@pytest.mark.parametrize("save", [save_adapter, save_fused])
def test_a_plain_adapter_is_sliced_in_memory(tmp_path: Path, save: Any) -> None:
    found = examine(save(tmp_path / "plain"), "-tp", 2, EP)
    assert found["outcome"].startswith("sliced in memory by each rank")
    assert (found["as_placed"], found["adapter"]["num_experts"]) == (None, E)
    assert problems(found, "adapter") == []


def test_without_expert_parallel_vllms_own_loader_is_used(adapter: Path) -> None:
    assert examine(adapter, "-tp", 2)["outcome"].startswith("vLLM's own loader")


@pytest.mark.parametrize("module", ["base_model.model.model.layers.0.self_attn.q_proj", "odd"])
@pytest.mark.parametrize("lora_alpha", [1, "not a number"])
def test_an_adapter_without_experts_is_left_to_vllm_whatever_is_wrong_with_it(
    tmp_path: Path, module: str, lora_alpha: object
) -> None:
    header = {
        f"{module}.lora_{matrix}.weight": {"dtype": "F32", "shape": [1, 1],
                                           "data_offsets": [at, at + 4]}
        for matrix, at in (("A", 0), ("B", 4))
    }  # fmt: skip
    plain = save_header(tmp_path / "dense", header, bytes(8), r=1, lora_alpha=lora_alpha)
    found = examine(plain, "-tp", 2, EP)
    assert found["outcome"] == "vLLM's own loader, since no expert is trained"
    assert problems(found, "adapter") == []


def test_an_adapter_that_needs_a_model_to_be_read_is_no_problem_until_one_is_named(
    tmp_path: Path,
) -> None:
    some = {n: t for n, t in per_expert_tensors().items() if ".experts.0." not in n}
    plain = save_adapter(tmp_path / "some experts", some)
    found = examine(plain, "-tp", 2, EP)
    assert (found["outcome"], problems(found, "adapter")) == (None, [])
    (note,) = (note for note in found["notes"] if "without its model (--model)" in note)
    assert "does not say how many there are" in note
    named = examine(plain, "-tp", 2, EP, "--model", save_model(tmp_path / "model"))
    assert named["outcome"].startswith("sliced in memory by each rank")
    other = save_model(tmp_path / "other", num_experts=2)
    assert "expert 2, but the model has 2" in problems(
        examine(plain, "-tp", 2, EP, "--model", other), "adapter"
    )[0]  # fmt: skip


def test_an_adapter_that_cannot_be_read_is_a_problem(adapter: Path, tmp_path: Path) -> None:
    edit_json(adapter / "adapter_config.json", **CONFIG | {"r": 0})
    assert "adapter_config.json" in problems(examine(adapter, "-tp", 2, EP), "adapter")[0]
    save_config(tmp_path / "empty")
    assert "no adapter_model.safetensors" in problems(examine(tmp_path / "empty"), "adapter")[0]
    assert "does not exist" in problems(examine(tmp_path / "nowhere"), "adapter")[0]


def test_a_folder_called_vllm_is_not_vllm(tmp_path: Path) -> None:
    (tmp_path / "path" / "vllm").mkdir(parents=True)
    path = f"{REPO}{os.pathsep}{tmp_path / 'path'}"
    assert examine(PYTHONPATH=path)["installation"]["vllm"] is None


def test_a_vllm_that_cannot_be_imported_is_reported_and_keeps_stdout_clean(
    python_path: str, tmp_path: Path
) -> None:
    package = tmp_path / "path" / "vllm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "import os\n__version__ = '0.99.0'\nprint('print')\nos.write(1, b'write')\n"
    )
    path = f"{python_path}{os.pathsep}{package.parent}"
    found = examine(PYTHONPATH=path)
    assert (found["installation"]["vllm"], found["vllm_known"]) == ("0.99.0", False)
    assert "lorashard is not tested with vLLM 0.99.0, only with 0.16.0 to 0.33.0." in found["notes"]
    assert all("cannot be imported: ModuleNotFoundError" in p for p in problems(found, "patches"))
    lasting = [p for p in PATCHES if p.until is None and not p.only_for]
    assert len(problems(found, "patches")) == len(lasting)


def test_a_vllm_older_than_the_first_known_is_a_problem(tmp_path: Path) -> None:
    package = tmp_path / "path" / "vllm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("__version__ = '0.15.1'\n")
    found = examine(PYTHONPATH=f"{REPO}{os.pathsep}{package.parent}")
    assert problems(found, "vllm") == ["vLLM 0.15.1 is too old for lorashard (0.16.0 to 0.33.0)."]


def test_all_patches_apply_to_the_last_known_release(shards: Path, python_path: str) -> None:
    path = f"{python_path}{os.pathsep}{require_release('0.33.0')}"
    found = examine(shards, "-tp", 2, EP, code=0, PYTHONPATH=path)
    assert found["ok"] is True
    assert (found["installation"]["vllm"], found["vllm_known"]) == ("0.33.0", True)
    assert [patch["target"] for patch in found["patches"] if patch["state"] != "applied"] == [
        patch.target for patch in PATCHES if patch.until is not None
    ]
    assert {patch["state"] for patch in found["patches"]} == {"applied", "not needed"}
    assert found["problems"] == []
    assert not any("FlashInfer" in fact for fact in found["known_once_loaded"])


def test_what_vllm_refuses_before_it_calls_a_loader_is_a_problem_with_a_way_out(
    tmp_path: Path, python_path: str
) -> None:
    spec = Spec("L1", lora_ranks={3: 0})
    adapter, shards = build(spec).write(tmp_path / "adapter"), tmp_path / "shards"
    split_adapter(adapter, shards, SplitRequest(ep_size=2))
    said = "in `rank_pattern` must be a positive integer, got 0."
    path = f"{python_path}{os.pathsep}{require_release('0.33.0')}"
    for named, command in ((adapter, "`lorashard split`, then "), (shards, "")):
        (text,) = problems(examine(named, "-tp", 2, EP, PYTHONPATH=path), "adapter")
        assert text.startswith(f"{named}: vLLM refuses its adapter_config.json: LoRA rank for ")
        assert said in text
        assert f"Run {command}`lorashard convert`" in text
    older = f"{python_path}{os.pathsep}{require_release('0.22.1')}"
    found = examine(shards, "-tp", 2, EP, code=0, PYTHONPATH=older)
    assert found["as_placed"] is True


def test_a_configuration_that_is_nested_without_end_is_a_problem_with_vllm_too(
    adapter: Path, python_path: str
) -> None:
    (adapter / "adapter_config.json").write_text("[" * 100_000 + "]" * 100_000)
    path = f"{python_path}{os.pathsep}{require_release('0.33.0')}"
    (text,) = problems(examine(adapter, "-tp", 2, EP, PYTHONPATH=path), "adapter")
    assert "adapter_config.json: not " in text


def test_a_newline_in_a_name_adds_no_line(tmp_path: Path) -> None:
    name = "base_model.model.model.layers.0.mlp.experts.0.x\nok: nothing is broken"
    tensors = per_expert_tensors() | {name: torch.zeros(2, 2)}
    done = run_cli(
        "doctor", save_adapter(tmp_path / "adapter", tensors), "-tp", 2, "--enable-expert-parallel"
    )
    assert done.returncode == 5
    assert "x\\nok: nothing is broken" in done.stdout
    assert not [line for line in done.stdout.splitlines() if line.startswith("ok: nothing")]


OTHER_PLUGIN = """
def register():
    from vllm.lora.model_manager import LoRAModelManager
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

    def load_in_memory(self, lora_request):
        raise NotImplementedError

    def add_somehow(self, lora):
        raise NotImplementedError

    LRUCacheWorkerLoRAManager._load_adapter = load_in_memory
    if REPLACES_MORE:
        LoRAModelManager._add_adapter = add_somehow
"""


@pytest.mark.parametrize("replaces_more", [False, True])
def test_another_plugin_s_patches_are_shown(
    tmp_path: Path, python_path: str, replaces_more: bool
) -> None:
    site = tmp_path / "site"
    (site / "other_plugin.py").write_text(f"REPLACES_MORE = {replaces_more}\n{OTHER_PLUGIN}")
    (site / "other-1.dist-info").mkdir()
    (site / "other-1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: other\nVersion: 1\n"
    )
    (site / "other-1.dist-info" / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nother = other_plugin:register\n"
    )
    path = os.pathsep.join((python_path, str(require_release("0.33.0"))))
    found = examine(PYTHONPATH=path, code=5 if replaces_more else 0)
    (loading,) = found["installation"]["foreign_patches"]
    assert "LRUCacheWorkerLoRAManager._load_adapter is " in loading
    assert f"load_in_memory ({site / 'other_plugin.py'}:" in loading
    assert any(loading in note for note in found["notes"])
    if replaces_more:
        (text,) = problems(found, "patches")
        assert "LoRAModelManager._add_adapter is " in text
        assert "add_somehow (" in text


SERVE = ("vllm", "serve", "MODEL", "--enable-lora")


def test_the_verdict_is_the_first_line_and_details_are_for_v(
    shards: Path, python_path: str
) -> None:
    done = run_cli("doctor", shards, "-tp", 2, EP, PYTHONPATH=python_path)
    first, second, *rest = done.stdout.splitlines()
    assert first == "wrong: the plugin would not work here (1 problem)"
    assert second.startswith("problem: vLLM is not installed in this Python")
    assert not any("why   " in line or "Known only" in line for line in rest)
    assert len(rest) < 8


def test_a_right_verdict_says_what_happens_to_the_adapter(shards: Path, python_path: str) -> None:
    path = f"{python_path}{os.pathsep}{require_release('0.33.0')}"
    done = run_cli("doctor", shards, "--", *SERVE, "-tp", 2, "-ep", PYTHONPATH=path)
    assert done.returncode == 0
    assert done.stdout.startswith(
        "right: nothing is broken, and nothing would be refused; the adapter: each rank reads its "
    )


def test_a_refused_verdict_comes_with_its_problem(python_path: str) -> None:
    path = f"{python_path}{os.pathsep}{require_release('0.33.0')}"
    done = run_cli("doctor", "--", *SERVE, "-tp", 2, EP, "-dp", 2, PYTHONPATH=path)
    assert done.returncode == 5
    assert done.stdout.startswith(
        "refused: this engine or this adapter would be refused (1 problem)\nproblem: LoRA with "
    )


def test_a_whole_command_of_vllm_is_read_as_it_is(shards: Path, python_path: str) -> None:
    found = examine(
        "--", "VLLM_PLUGINS=other", *SERVE, "--tensor_parallel_size=2", EP,
        "--compilation-config", '{"level": 3}', "--port", 8000,
        "--lora-modules", f"mine={shards}", "theirs=owner/name",
        PYTHONPATH=python_path,
    )  # fmt: skip
    assert (found["verdict"], found["ep_size"]) == ("wrong", 2)
    assert found["adapter"]["path"] == str(shards)
    assert found["ignored"] == ['--compilation-config {"level": 3}', "--port 8000"]
    assert "VLLM_PLUGINS leaves the plugin out" in problems(found, "plugin")[0]
    assert "owner/name of --lora-modules was not looked at." in found["notes"]
    assert any("The model was not looked at: MODEL" in note for note in found["notes"])


def test_a_command_without_lora_is_a_problem() -> None:
    assert "--enable-lora" in problems(examine("--", "vllm", "serve", "MODEL"), "flags")[0]


def test_a_json_option_of_the_command_is_not_ours() -> None:
    assert run_cli("doctor", "--", *SERVE, "--json").stdout.startswith("wrong: ")


def test_what_is_ignored_is_shown_with_v_only() -> None:
    words = ("--", *SERVE, "--port", 8000)
    assert "--port 8000" not in run_cli("doctor", *words).stdout
    assert "  --port 8000\n" in run_cli("doctor", "-v", *words).stdout


@pytest.mark.parametrize("save", [save_adapter, save_fused])
def test_a_remote_adapter_is_what_it_is_here(tmp_path: Path, save: Any) -> None:
    adapter = save(tmp_path / "adapter")
    split_adapter(adapter, tmp_path / "shards", SplitRequest(ep_size=2))
    for place in (adapter, tmp_path / "shards"):
        for flags in ((), ("-tp", 2, EP), ("-tp", 4, EP), ("-tp", 2, EP, "--max-lora-rank", 1)):
            here, there = examine(place, *flags), examine(place.as_uri(), *flags)
            named = json.loads(json.dumps(there).replace(place.as_uri(), str(place)))
            assert named == here


def test_what_is_wrong_with_a_remote_directory_is_said_by_its_name(
    shards: Path, tmp_path: Path
) -> None:
    (shards / "ep-00001-of-00002.safetensors").unlink()
    (text,) = problems(examine(shards.as_uri(), "-tp", 2, EP), "adapter")
    assert text.startswith(f"{shards.as_uri()}/ep-00001-of-00002.safetensors: No such file")
    done = run_cli("doctor", (tmp_path / "nowhere").as_uri())
    assert done.returncode == 3
    assert "no such folder" in done.stderr


def test_a_manifest_that_was_changed_is_a_problem_here_and_elsewhere(shards: Path) -> None:
    change_version(shards)
    for place, *flags in ((shards,), (shards.as_uri(), "-tp", 2, EP)):
        found = examine(place, *flags)
        (text,) = problems(found, "adapter")
        assert text.startswith(f"{place}/lorashard.json: it was changed since it was written")
        assert text.endswith("Copy the whole directory again: its files belong together.")
        assert found["outcome"] is None


def test_an_adapter_on_the_hub_is_fetched_as_far_as_its_headers(tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", per_expert_tensors(hidden=8192))
    split_adapter(adapter, tmp_path / "shards", SplitRequest(ep_size=2))
    command = ("--", "vllm", "serve", "MODEL", "--enable-lora", "-tp", "2", "-ep", "--lora-modules")
    with HubServer() as hub:
        env = hub.environment(tmp_path / "hf")
        for name in ("adapter", "shards"):
            hub.add_repo(f"owner/{name}", {p.name: p for p in (tmp_path / name).iterdir()})
            found = examine(f"owner/{name}", "-tp", 2, EP, **env)
            assert (found["adapter"]["path"], found["adapter"]["num_experts"]) == (
                f"hf://owner/{name}",
                E,
            )
            assert "--lora-modules" not in " ".join(found["notes"])
            assert examine(*command, f"mine=owner/{name}", **env)["outcome"] == found["outcome"]
        data = sum(p.stat().st_size for p in (tmp_path / "shards").glob("*.safetensors"))
        fetched = sum(hub.sent_bytes(p.name) for p in (tmp_path / "shards").glob("*.safetensors"))
        assert 0 < fetched < data / 4
        missing = examine(*command, "mine=owner/nothing", **env)
        assert any("owner/nothing of --lora-modules was not" in note for note in missing["notes"])


def test_another_command_is_refused_with_an_example(shards: Path) -> None:
    done = run_cli("doctor", shards, "--", "docker", "run", "image")
    assert done.returncode == 4
    assert "'docker run image' does not start a vLLM server." in done.stderr
    assert "lorashard doctor -- vllm serve MODEL" in done.stderr
