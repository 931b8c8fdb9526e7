"""Hostile adapters and manifests: refused with an error of ours, and nothing written elsewhere."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorashard import SplitRequest, merge_shards, split_adapter, verify_shards
from lorashard.cli.inspect import inspect
from lorashard.errors import AdapterError, HeaderError, LorashardError, ManifestError
from tests.tiny import (
    MODULE,
    RANK_FILES,
    REPO,
    contents,
    run_cli,
    save_adapter,
    save_header,
    save_pickled,
)

REQUEST = SplitRequest(ep_size=2)
DEEP = "[" * 100_000
PAIR = {
    "m.experts.0.up_proj.lora_A": {"dtype": "BF16", "shape": [2, 8], "data_offsets": [0, 32]},
    "m.experts.0.up_proj.lora_B": {"dtype": "BF16", "shape": [8, 2], "data_offsets": [32, 64]},
}
DATA = bytes(64)


def with_first(**changes: Any) -> dict[str, Any]:
    name = next(iter(PAIR))
    return PAIR | {name: PAIR[name] | changes}


def named(module: str, expert: str = "0") -> dict[str, Any]:
    return {name.replace("m.experts.0", f"{module}.experts.{expert}"): PAIR[name] for name in PAIR}


def refused(adapter: Path, kind: type[LorashardError] = AdapterError) -> None:
    """Splitting raises `kind` and leaves no trace."""
    before = sorted(os.listdir(adapter.parent))
    with pytest.raises(kind):
        split_adapter(adapter, adapter.parent / "out", REQUEST)
    assert sorted(os.listdir(adapter.parent)) == before


HEADER_LIES = {
    "not JSON": b"{",
    "no object": b"[]",
    "nothing": b"",
    "not UTF-8": b'{"\xff": 1}',
    "null bytes": bytes(100),
    "deep": b'{"a":' + DEEP.encode(),
    "a number too long": b'{"a": ' + b"9" * 10_000 + b"}",
    "twice": json.dumps(PAIR).encode().replace(b".lora_B", b".lora_A"),
    "beyond the file": with_first(data_offsets=[0, 10**18]),
    "negative": with_first(data_offsets=[-32, 0]),
    "backwards": with_first(data_offsets=[32, 0]),
    "overlap": with_first(data_offsets=[32, 64]),
    "huge shape": with_first(shape=[2**63, 2**63]),
    "overflowing shape": with_first(shape=[2**62, 4, 8]),
    "negative shape": with_first(shape=[-2, -8]),
    "fractional shape": with_first(shape=[2.0, 8]),
    "true as a size": with_first(shape=[True, 16]),
    "shape of text": with_first(shape="28"),
    "dtype of no kind": with_first(dtype="F4"),
    "dtype of a list": with_first(dtype=["BF16"]),
    "no dtype": PAIR | {"x": {"shape": [0], "data_offsets": [64, 64]}},
    "tensor of null": PAIR | {"x": None},
    "metadata of numbers": PAIR | {"__metadata__": {"a": 1}},
    "metadata of a list": PAIR | {"__metadata__": []},
}


@pytest.mark.parametrize("lie", HEADER_LIES)
def test_a_header_that_lies_is_refused(tmp_path: Path, lie: str) -> None:
    refused(save_header(tmp_path / "adapter", HEADER_LIES[lie], DATA), HeaderError)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**8, 57])
def test_a_header_length_that_lies_is_refused(tmp_path: Path, length: int) -> None:
    adapter = save_header(tmp_path / "adapter", b"{}")
    content = length.to_bytes(8, "little") + bytes(48)
    (adapter / "adapter_model.safetensors").write_bytes(content)
    refused(adapter, HeaderError)


@pytest.mark.parametrize("metadata", [{"dtype": "bf16"}, {"kept": "shape"}])
def test_metadata_may_use_the_words_of_a_header(tmp_path: Path, metadata: dict[str, str]) -> None:
    adapter = save_header(tmp_path / "adapter", {"__metadata__": metadata, **PAIR}, DATA)
    split_adapter(adapter, tmp_path / "out", REQUEST)


@pytest.mark.parametrize("module", ["../../../etc", "/etc/passwd", "..", "a/../b", "\u202ex"])
def test_a_name_like_a_path_is_only_a_name(tmp_path: Path, module: str) -> None:
    (tmp_path / "here").mkdir()
    adapter = save_header(tmp_path / "here" / "adapter", named(module), DATA)
    split_adapter(adapter, tmp_path / "here" / "out", REQUEST)
    assert verify_shards(tmp_path / "here" / "out", against=adapter) == ()
    assert os.listdir(tmp_path) == ["here"]
    assert sorted(os.listdir(tmp_path / "here")) == ["adapter", "out"]


@pytest.mark.parametrize("module", ["../../x", "x"])
def test_a_replicated_name_like_a_path_is_only_a_name(tmp_path: Path, module: str) -> None:
    extra = {
        f"{module}.lora_A.weight": {"dtype": "F32", "shape": [2, 1], "data_offsets": [64, 72]},
        f"{module}.lora_B.weight": {"dtype": "F32", "shape": [1, 2], "data_offsets": [72, 80]},
    }
    adapter = save_header(tmp_path / "adapter", PAIR | extra, bytes(80))
    split_adapter(adapter, tmp_path / "out", REQUEST)
    assert verify_shards(tmp_path / "out", against=adapter) == ()
    assert sorted(os.listdir(tmp_path)) == ["adapter", "out"]


@pytest.mark.parametrize("module", ["a\0b", "x\0", "a\nb"])
def test_a_name_with_control_characters_is_refused(tmp_path: Path, module: str) -> None:
    refused(save_header(tmp_path / "adapter", named(module), DATA))


def test_half_a_surrogate_in_a_name_is_refused(tmp_path: Path) -> None:
    refused(save_header(tmp_path / "adapter", named("\ud800"), DATA))


@pytest.mark.parametrize("expert", ["9" * 20, "9" * 5000])
def test_an_absurd_expert_number_is_refused(tmp_path: Path, expert: str) -> None:
    refused(save_header(tmp_path / "adapter", named("m", expert), DATA))


def test_a_config_as_deep_as_a_bomb_is_refused(tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter")
    (adapter / "adapter_config.json").write_text(DEEP)
    refused(adapter)


@pytest.mark.parametrize("option", ["model", "expert_map"])
def test_other_json_as_deep_as_a_bomb_is_refused(tmp_path: Path, option: str) -> None:
    adapter = save_adapter(tmp_path / "adapter")
    (tmp_path / "deep.json").write_text(DEEP)
    request = SplitRequest(ep_size=2, **{option: tmp_path / "deep.json"})
    with pytest.raises(LorashardError):
        split_adapter(adapter, tmp_path / "out", request)


CONFIG_JUNK: dict[str, dict[str, Any]] = {
    "r 0": {"r": 0}, "r -1": {"r": -1}, "r of text": {"r": "2"}, "r true": {"r": True},
    "r null": {"r": None}, "r huge": {"r": 10**400},
    "alpha of text": {"lora_alpha": "x"}, "alpha null": {"lora_alpha": None},
    "alpha nan": {"lora_alpha": float("nan")}, "alpha inf": {"lora_alpha": float("inf")},
    "alpha huge": {"lora_alpha": 10**400},
    "ranks of a list": {"rank_pattern": [1]}, "half a pattern": {"rank_pattern": {"(": 2}},
    "rank of text": {"rank_pattern": {"a": "2"}}, "rank -1": {"rank_pattern": {"a": -1}},
    "pattern flags": {"rank_pattern": {"(?i)x": 2}},
    "pattern repeats": {"rank_pattern": {"a{99999999999999999999}": 2}},
    "pattern nests": {"rank_pattern": {"(" * 5000 + ")" * 5000: 2}},
    "alphas nan": {"alpha_pattern": {"gate_proj": float("nan")}},
    "alphas inf": {"alpha_pattern": {"gate_proj": float("inf")}},
    "alphas huge": {"alpha_pattern": {"gate_proj": 10**400}},
    "alphas of a number": {"alpha_pattern": 3},
    "parameters": {"target_parameters": 5}, "modules": {"modules_to_save": 5},
    "layout": {"lora_B_layout": ["rank_major"]}, "type": {"peft_type": ["LORA"]},
    "bias": {"bias": {"all": True}},
}  # fmt: skip


@pytest.mark.parametrize("junk", CONFIG_JUNK)
def test_junk_in_the_config_is_refused(tmp_path: Path, junk: str) -> None:
    refused(save_adapter(tmp_path / "adapter", **CONFIG_JUNK[junk]))


@pytest.mark.parametrize("target", ["/dev/zero", "nowhere", "."])
def test_weights_that_are_a_link_to_something_odd_are_refused(tmp_path: Path, target: str) -> None:
    adapter = save_adapter(tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.safetensors").symlink_to(target)
    refused(adapter)


def test_weights_that_are_a_pipe_are_not_waited_for(tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").unlink()
    os.mkfifo(adapter / "adapter_model.safetensors")
    refused(adapter)


def test_linked_weights_are_read_and_never_written(tmp_path: Path) -> None:
    store = save_adapter(tmp_path / "store")
    adapter = save_adapter(tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.safetensors").symlink_to(store / "adapter_model.safetensors")
    before = contents(store)
    split_adapter(adapter, tmp_path / "out", REQUEST)
    assert contents(store) == before
    assert not (tmp_path / "out" / "replicated.safetensors").is_symlink()


def packed(header: bytes) -> str:
    return base64.b64encode(zlib.compress(header)).decode()


def module_with(**fields: Any) -> Callable[[Any], object]:
    return lambda manifest: manifest["modules"][MODULE].update(fields)


MANIFEST_LIES: dict[str, Callable[[Any], object]] = {
    "files elsewhere": lambda m: m["files"].update({"../../x": {}}),
    "a million ranks": lambda m: m["placement"].update(ep_size=10**6),
    "strategy of a list": lambda m: m["placement"].update(strategy=[]),
    "an expert of text": lambda m: m["placement"].update(ranks=[["0", 1], [2, 3]]),
    "layers of a list": lambda m: m["placement"].update(layers=[]),
    "no zlib": lambda m: m["source"].update(header="YWJj"),
    "no base64": lambda m: m["source"].update(header="?"),
    "bomb": lambda m: m["source"].update(header=packed(bytes(2 * 10**8))),
    "digest of text": lambda m: m["files"]["replicated.safetensors"].update(blake3="x"),
    "negative size": lambda m: m["files"]["replicated.safetensors"].update(size=-1),
    "experts without end": lambda m: m["placement"].update(num_experts=10**6),
    "no source file": lambda m: m["source"]["files"].clear(),
    "options of text": lambda m: m["options"].update(num_experts="x"),
    "scaling of an object": module_with(scaling={"gate_proj": {}}),
    "experts of text": module_with(absent_experts=["x"]),
    "scaling of text": module_with(scaling={"gate_proj": "x"}),
    "rank of text": module_with(lora_rank="x"),
}


@pytest.mark.parametrize("lie", MANIFEST_LIES)
def test_a_manifest_that_lies_is_refused_by_every_reader(tmp_path: Path, lie: str) -> None:
    shards = tmp_path / "out"
    split_adapter(save_adapter(tmp_path / "adapter"), shards, REQUEST)
    document = json.loads((shards / "lorashard.json").read_text())
    MANIFEST_LIES[lie](document)
    (shards / "lorashard.json").write_text(json.dumps(document))
    with pytest.raises(ManifestError):
        verify_shards(shards)
    with pytest.raises(ManifestError):
        merge_shards(shards, tmp_path / "merged")
    with pytest.raises(ManifestError):
        inspect([str(shards)])
    assert sorted(os.listdir(tmp_path)) == ["adapter", "out"]


def test_a_manifest_with_experts_without_end_takes_no_memory(tmp_path: Path) -> None:
    shards = tmp_path / "out"
    split_adapter(save_adapter(tmp_path / "adapter"), shards, REQUEST)
    document = json.loads((shards / "lorashard.json").read_text())
    document["placement"]["num_experts"] = 10**12
    (shards / "lorashard.json").write_text(json.dumps(document))
    command = f"ulimit -v 2000000; exec {sys.executable} -m lorashard inspect {shards}"
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    done = subprocess.run(command, shell=True, check=False, env=environment, capture_output=True)
    assert done.returncode == 5, done.stderr


POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
    b"size 1268776904\n"
)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_git_lfs_pointer_in_an_adapter_is_called_that(tmp_path: Path, name: str) -> None:
    adapter = save_adapter(tmp_path / "adapter")
    (adapter / name).write_bytes(POINTER)
    done = run_cli("split", adapter, "--ep-size", 2, "-o", tmp_path / "out")
    assert done.returncode == 3
    for words in (name, "Git LFS pointer", "git lfs pull", "hf download"):
        assert words in done.stderr


def test_a_git_lfs_pointer_in_the_place_of_a_pickle_is_called_that(tmp_path: Path) -> None:
    adapter = save_pickled(tmp_path / "adapter")
    (adapter / "adapter_model.bin").write_bytes(POINTER)
    done = run_cli("split", adapter, "--ep-size", 2, "--allow-pickle", "-o", tmp_path / "out")
    assert done.returncode == 3
    for words in ("adapter_model.bin", "Git LFS pointer", "git lfs pull", "hf download"):
        assert words in done.stderr


@pytest.mark.parametrize("name", ["lorashard.json", "replicated.safetensors", *RANK_FILES])
@pytest.mark.parametrize("command", ["verify", "merge"])
def test_a_git_lfs_pointer_in_shards_is_called_that(
    tmp_path: Path, name: str, command: str
) -> None:
    adapter, out = save_adapter(tmp_path / "adapter"), tmp_path / "out"
    assert run_cli("split", adapter, "--ep-size", 2, "-o", out).returncode == 0
    (out / name).write_bytes(POINTER)
    done = run_cli(command, out, *(("-o", tmp_path / "merged") if command == "merge" else ()))
    assert done.returncode == 5
    for words in (name, "Git LFS pointer", "git lfs pull", "hf download"):
        assert words in done.stdout + done.stderr


@pytest.mark.parametrize("work", ["pickle", "cast", "against a pickle", "against of a cast"])
def test_a_missing_torch_is_said_where_it_is_needed(tmp_path: Path, work: str) -> None:
    (tmp_path / "without").mkdir()
    missing = "raise ModuleNotFoundError('No module named torch', name='torch')"
    (tmp_path / "without" / "torch.py").write_text(missing)
    without = {"PYTHONPATH": f"{tmp_path / 'without'}{os.pathsep}{REPO}"}
    adapter, out = save_adapter(tmp_path / "adapter"), tmp_path / "out"
    cast = ("--dtype", "float32")
    assert run_cli("split", adapter, "--ep-size", 2, "-o", out, **without).returncode == 0
    assert run_cli("split", adapter, "--ep-size", 2, "-o", tmp_path / "cast", *cast).returncode == 0
    again = ("--ep-size", 2, "-o", tmp_path / "again")
    pickled = save_pickled(tmp_path / "pickled")
    done = {
        "pickle": lambda: run_cli("split", pickled, "--allow-pickle", *again, **without),
        "cast": lambda: run_cli("split", adapter, *cast, *again, **without),
        "against a pickle": lambda: run_cli(
            "verify", out, "--against", pickled, "--allow-pickle", **without
        ),
        "against of a cast": lambda: run_cli(
            "verify", tmp_path / "cast", "--against", adapter, **without
        ),
    }[work]()
    assert done.returncode == 3
    assert "torch is not installed" in done.stderr
    assert "pip install torch" in done.stderr
    assert not (tmp_path / "again").exists()
