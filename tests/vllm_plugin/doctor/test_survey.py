"""What this Python has; with a real vLLM: tests/cli/test_doctor.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lorashard.version import __version__
from lorashard.vllm_plugin.engine import guards
from lorashard.vllm_plugin.patches.table import PATCHES
from tests.tiny import REPO

SCRIPT = """
import dataclasses, json, sys
from lorashard.vllm_plugin.doctor.survey import has_vllm, survey
known = has_vllm()
installation, patches = survey()
print("OUT", json.dumps([known, dataclasses.asdict(installation), list(map(dataclasses.asdict, patches))]))
"""


def look(folder: Path, **env: str) -> tuple[bool, dict[str, Any], list[dict[str, Any]], str]:
    """`survey` in a fresh process: (has_vllm, installation, patches, all of its stdout)."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("LORASHARD_", "VLLM_"))}
    path = os.pathsep.join(map(str, (REPO, folder)))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=clean | {"PYTHONPATH": path} | env,
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    before, _, out = done.stdout.partition("OUT ")
    known, installation, patches = json.loads(out)
    return known, installation, patches, before


def package(folder: Path, source: str) -> Path:
    (folder / "vllm").mkdir(parents=True)
    (folder / "vllm" / "__init__.py").write_text(source)
    return folder


def test_a_python_without_vllm_checks_no_patch(tmp_path: Path) -> None:
    known, installation, patches, _ = look(tmp_path)
    assert (known, installation["vllm"]) == (False, None)
    assert (installation["lorashard"], installation["executable"]) == (__version__, sys.executable)
    assert [patch["target"] for patch in patches] == [patch.target for patch in PATCHES]
    assert {patch["state"] for patch in patches} == {"not checked"}
    assert {patch["reason"] for patch in patches} == {"vLLM is not installed"}


def test_a_folder_of_the_name_is_not_vllm(tmp_path: Path) -> None:
    (tmp_path / "vllm").mkdir()
    assert look(tmp_path)[0] is False


@pytest.mark.parametrize(("source", "release"), [("__version__ = '0.99.0'", "0.99.0"), ("", "?")])
def test_the_release_is_that_of_the_module_that_is_imported(
    tmp_path: Path, source: str, release: str
) -> None:
    _, installation, patches, _ = look(package(tmp_path, source))
    assert installation["vllm"] == release
    for patch in patches:
        if patch["until"] is None:
            assert patch["state"] == ("unsupported" if patch["only_for"] else "broken")
            assert "cannot be imported: ModuleNotFoundError" in patch["reason"]
        else:
            assert (patch["state"], patch["reason"]) == (
                "not needed", "this release has no such module",
            )  # fmt: skip


def test_what_vllm_prints_stays_off_stdout_whatever_it_prints_with(tmp_path: Path) -> None:
    source = "import os\nprint('print')\nos.write(1, b'write')\nos.system('echo system')"
    assert look(package(tmp_path, source))[3] == ""


def test_variables_are_sorted_into_set_switched_on_unknown_and_faulty(tmp_path: Path) -> None:
    _, installation, _, _ = look(
        tmp_path, LORASHARD_STRICT="0", LORASHARD_DISABLE="yes", LORASHARD_STRIKT="1",
        LORASHARD_THREADS="many", LORASHARD_DEBUG="1", **{guards.VARIABLES[0]: "1"},
    )  # fmt: skip
    assert installation["variables"]["LORASHARD_STRICT"] == "0"
    assert list(installation["variables"]) == sorted(installation["variables"])
    assert set(installation["switched_on"]) == {
        "LORASHARD_DEBUG", "LORASHARD_DISABLE", "LORASHARD_STRIKT", "LORASHARD_THREADS",
        guards.VARIABLES[0],
    }  # fmt: skip
    assert installation["unknown"] == ["LORASHARD_STRIKT"]
    assert installation["faults"] == ["LORASHARD_THREADS='many': must be an integer >= 1."]


@pytest.mark.parametrize(
    ("plugins", "allowed"),
    [(None, True), ("lorashard", True), ("a,lorashard", True), ("", False), ("lorashardx", False)],
)
def test_vllm_plugins_is_read_as_vllm_reads_it(
    tmp_path: Path, plugins: str | None, allowed: bool
) -> None:
    env = {} if plugins is None else {"VLLM_PLUGINS": plugins}
    assert look(tmp_path, **env)[1]["allowed"] is allowed
