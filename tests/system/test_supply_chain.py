"""What is installed, at both ends of its bounds; nothing calls anywhere; two builds are the same bytes.

`.venv/bare` has the newest versions that pip finds, `.venv/lowest` (`make .venv/.lowest`) the lowest
that pyproject.toml allows. The other tests run with the newest.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from lorashard import SplitRequest, split_adapter
from tests.system.test_core_install import require
from tests.tiny import REPO, contents, save_adapter, save_fused
from tests.vllm_release import run_in_release

LOWEST = REPO / ".venv" / "lowest" / "bin" / "python"
# From here on a socket is an error, whoever opens it, and so is looking up a name.
NO_NETWORK = """
import socket, sys
def refuse(event, args):
    if event in ("socket.__new__", "socket.getaddrinfo", "socket.gethostbyname", "socket.connect"):
        raise SystemExit(f"{event} {args}")
sys.addaudithook(refuse)
"""


@pytest.mark.parametrize("save", [save_adapter, save_fused])
def test_the_lowest_versions_that_are_allowed_do_all_that_needs_no_torch(
    tmp_path: Path, save
) -> None:
    require(LOWEST.exists(), f"{LOWEST} is missing: make .venv/.lowest")
    adapter, shards = save(tmp_path / "adapter"), tmp_path / "shards"

    def run(*args: object) -> str:
        return subprocess.run(
            [LOWEST, "-m", "lorashard", *map(str, args)],
            env=os.environ | {"PYTHONPATH": str(REPO)},
            cwd=tmp_path, capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip

    run("split", adapter, "--ep-size", 2, "-o", shards)
    split_adapter(adapter, tmp_path / "same", SplitRequest(2))
    assert contents(shards) == contents(tmp_path / "same")
    run("verify", shards, "--against", adapter)
    run("reshard", shards, "--ep-size", 3, "-o", tmp_path / "three")
    run("merge", tmp_path / "three", "-o", tmp_path / "merged")
    assert contents(tmp_path / "merged") == contents(adapter)
    run("convert", shards, "--layout", "fused", "-o", tmp_path / "converted")
    assert json.loads(run("inspect", shards, "--json"))["num_experts"] == 4
    run("push", shards, (tmp_path / "there").as_uri())
    run("pull", (tmp_path / "there").as_uri(), "--ep-rank", "1", "-o", tmp_path / "pulled")
    assert "--ep-size" in run("split", "--help")


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="numpy 1.26 has no wheel for this Python")
def test_the_lowest_versions_are_those_of_pyproject() -> None:
    require(LOWEST.exists(), f"{LOWEST} is missing: make .venv/.lowest")
    script = "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    text = (REPO / "pyproject.toml").read_text()
    (listed,) = re.findall(r"^dependencies = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    bounds = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', listed))
    assert len(bounds) == listed.count("\n")
    asked = [LOWEST, "-c", script, *bounds]
    found = json.loads(subprocess.run(asked, check=True, capture_output=True, text=True).stdout)
    for name, bound in bounds.items():  # 0.6 may be 0.6.1, the first of its releases
        assert f"{found[name]}.".startswith(f"{bound}."), name


def run_without_network(script: str, **env: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", NO_NETWORK + script],
        env=os.environ | {"PYTHONPATH": str(REPO)} | env,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_socket_would_be_noticed() -> None:
    with pytest.raises(AssertionError, match="socket"):
        run_without_network("import socket; socket.create_connection(('127.0.0.1', 9))")


def test_no_module_opens_a_socket_as_it_is_imported() -> None:
    run_without_network("""
import importlib, pkgutil, lorashard
for module in pkgutil.walk_packages(lorashard.__path__, "lorashard."):
    if module.name != "lorashard.__main__":
        importlib.import_module(module.name)
""")


def test_no_verb_opens_a_socket_for_what_is_on_this_machine(tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter", base_model_name_or_path="Qwen/Qwen3-30B-A3B")
    run_without_network(f"""
import os; os.chdir({str(tmp_path)!r})
import lorashard
lorashard.split_adapter("adapter", "shards", 2)
assert lorashard.verify_shards("shards", against="adapter") == ()
lorashard.reshard_shards("shards", "three", 3)
lorashard.merge_shards("three", "merged")
lorashard.convert_shards("shards", "converted", "fused")
from lorashard.cli.app import app
app(["inspect", "shards", "--json"], standalone_mode=False)
app(["plan", "adapter", "--ep-size", "4"], standalone_mode=False)
""")


LOAD = f"""
import sys; sys.path.insert(0, {str(REPO)!r})
from tests.vllm_plugin import loading
engine = loading.harness.make_engine(**loading.SIZES, module_names=loading.modules())
path = loading.on_disk("L1", 8, True, "own shards", 2, "linear")
{NO_NETWORK}
for lora_id, folder in enumerate((path, loading.on_disk("L1", 8, True, "plain", 2, "linear")), 1):
    engine.add_adapter(loading.harness.request(engine, folder, str(lora_id), lora_id))
answer(sorted(engine.list_adapters()))
"""


def test_no_load_in_a_server_opens_a_socket() -> None:
    assert run_in_release("0.33.0", LOAD) == [1, 2]


def test_two_builds_of_the_wheel_are_the_same_bytes(tmp_path: Path) -> None:
    require(find_spec("hatchling") is not None, "hatchling is not installed: make .venv/.test")
    built = []
    for name, changed_at in (("one", 1_000_000_000), ("two", 1_700_000_000)):
        copy = tmp_path / name / "checkout"
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=REPO, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if listed.returncode:
            pytest.skip("not a git checkout")
        for path in filter(None, listed.stdout.split("\0")):
            source, target = REPO / path, copy / path
            if source.is_file() and not source.is_symlink():
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(source.read_bytes())
                os.utime(target, (changed_at, changed_at))
        build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", "out"]
        subprocess.run(build, cwd=copy, check=True, capture_output=True)
        (wheel,) = (copy / "out").glob("*.whl")
        built.append(wheel.read_bytes())
        with zipfile.ZipFile(wheel) as archive:
            assert "lorashard/header.py" in archive.namelist()
    assert built[0] == built[1]
