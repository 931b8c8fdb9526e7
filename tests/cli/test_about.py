"""`env`: what a bug report needs, and no secrets."""

from __future__ import annotations

import json
from pathlib import Path

from lorashard.cli.about import _find_gpus, describe_environment
from lorashard.version import __version__
from tests.tiny import run_cli


def test_env_names_versions_and_settings() -> None:
    done = run_cli("env", LORASHARD_THREADS="4")
    assert done.returncode == 0
    facts = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert facts["lorashard"] == __version__
    assert facts["LORASHARD_THREADS"] == "4"
    assert {"python", "platform", "gpus", "torch", "vllm", "safetensors", "peft"} <= set(facts)


def test_env_as_json_has_the_same_facts() -> None:
    found = json.loads(run_cli("env", "--json").stdout)
    assert set(found) == {
        "lorashard", "documentation", "python", "platform", "cores", "gpus", "packages", "variables",
    }  # fmt: skip


def test_no_secret_is_shown() -> None:
    shown = describe_environment({
        "HF_TOKEN": "secret", "VLLM_API_KEY": "secret", "AWS_SECRET_ACCESS_KEY": "secret",
        "HTTPS_PROXY": "http://me:secret@proxy:3128", "LORASHARD_AT": "https://host/a?sig=secret",
        "PRIVATE": "secret", "HF_HOME": "/cache",
    })["variables"]  # fmt: skip
    assert "secret" not in json.dumps(shown)
    assert shown == {
        "HF_TOKEN": "(set; not shown)", "VLLM_API_KEY": "(set; not shown)", "HF_HOME": "/cache",
        "HTTPS_PROXY": "http://...@proxy:3128", "LORASHARD_AT": "https://host/a?...",
    }  # fmt: skip


def test_gpus_are_counted_by_model(tmp_path: Path) -> None:
    assert _find_gpus(tmp_path) == []
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "information").write_text("Model: \t NVIDIA H100\nIRQ: 1\n")
    assert _find_gpus(tmp_path) == ["2 x NVIDIA H100"]
