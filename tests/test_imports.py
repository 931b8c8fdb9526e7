"""Imports point one way, deciding touches no disk, and what is heavy is imported when needed."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tiny import REPO, save_adapter

PACKAGE = REPO / "lorashard"

# Every module imports only what stands before it. Pure modules turn values into values.
PURE = (
    "header", "options", "adapter", "keys", "fused", "factors", "experts", "layout", "placement",
    "plan", "moves", "emit", "fuse", "targets", "conversion", "memory", "blocks", "manifest", "summary",
)  # fmt: skip
REFERENCE = tuple(
    f"reference.{name}" for name in ("pieces", "files", "fused", "projections", "compare")
)
PLUGIN = (
    *(
        f"vllm_plugin.{name}" for name in (
            "settings", "assembly", "rows", "threads", "fill", "live", "names", "contents", "plain",
            "regions", "advice", "loader", "patch", "guards", "facts", "contracts", "agreement",
            "metrics", "host_memory", "seams", "expert_parallel", "warm_up", "punica", "activations",
            "patches", "survey", "diagnosis",
        )
    ),
    "vllm_plugin",  # imports its patches, inside `register`
)  # fmt: skip
PURE_OF_PLUGIN = tuple(
    f"vllm_plugin.{name}" for name in ("assembly", "rows", "guards", "diagnosis")
)
ORDER = (
    "errors", *PURE, "buffers", "writeback", "sources", "rearrange", "digest", "fetch",
    "hub", "remote", "read", "output",
    "execute", "pickled", "pipeline", "gather", "batch", "pull", "shard", "resume", "merge", "reshard",
    "assemble", "convert", "reference", *REFERENCE, "verify", "card", "push",
    *PLUGIN, "cli", "cli.render", "cli.options", "cli.look", "cli.split", "cli.reshard", "cli.convert", "cli.pull", "cli.push", "cli.check", "cli.doctor", "cli.shards",
    "cli.app",
)  # fmt: skip
TOUCHING = frozenset({
    "ctypes", "fcntl", "huggingface_hub", "io", "mmap", "os", "pathlib", "safetensors", "shutil",
    "socket", "subprocess", "tempfile", "threading", "torch", "urllib", "vllm",
})  # fmt: skip


def source_files() -> dict[str, Path]:
    """Every module of the package by its name without `lorashard.`."""
    files = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        files[name.removesuffix(".__init__")] = path
    return {name: path for name, path in files.items() if not name.startswith("__")}


def imports(path: Path) -> Iterator[str]:
    """Full names of all that a file imports anywhere, `from a import b` as a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(path: Path, modules: dict[str, Path]) -> Iterator[str]:
    """The package's own modules among them."""
    for name in imports(path):
        if name.startswith("lorashard."):
            inner = name.removeprefix("lorashard.")
            yield inner if inner in modules else inner.rpartition(".")[0] or "__init__"


def test_every_module_has_a_place_in_the_order() -> None:
    assert set(source_files()) == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_imports_point_left(name: str) -> None:
    modules = source_files()
    allowed = {*ORDER[: ORDER.index(name)], "__init__"}
    assert set(own_imports(modules[name], modules)) - allowed == set()


def test_the_core_does_not_import_the_command_line() -> None:
    modules = source_files()
    for name, path in modules.items():
        if not name.startswith("cli"):
            assert not any(used.startswith("cli") for used in own_imports(path, modules)), name


def test_the_proof_shares_nothing_with_the_writer_but_errors() -> None:
    modules = source_files()
    for name in REFERENCE:
        used = set(own_imports(modules[name], modules))
        assert used <= {"errors", *REFERENCE}, name


@pytest.mark.parametrize("name", [*PURE, *PURE_OF_PLUGIN])
def test_deciding_touches_no_disk(name: str) -> None:
    path = source_files()[name]
    assert {used.partition(".")[0] for used in imports(path)} & TOUCHING == set()
    calls = [n.func for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    assert "open" not in {call.id for call in calls if isinstance(call, ast.Name)}


def imported_by(code: str, *arguments: object) -> set[str]:
    """Top-level modules that are loaded once `code` has run in a fresh Python."""
    tail = "\nimport sys as s; s.stderr.write('|' + ' '.join({m.partition('.')[0] for m in s.modules}))"
    done = subprocess.run(
        [sys.executable, "-c", code + tail, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(REPO)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return set(done.stderr.rpartition("|")[2].split())


RUN = """
import sys
from lorashard.cli.app import app
app(sys.argv[1:], standalone_mode=False)
"""


def test_the_package_imports_next_to_nothing() -> None:
    heavy = {"torch", "rich", "typer", "numpy", "blake3", "safetensors", "huggingface_hub", "vllm"}
    assert imported_by("import lorashard; lorashard.__version__") & heavy == set()


def test_the_command_line_starts_without_what_is_heavy() -> None:
    heavy = {"torch", "numpy", "safetensors", "huggingface_hub", "vllm"}
    if "rich" not in imported_by("import typer"):
        heavy.add("rich")
    assert imported_by("import lorashard.cli.app") & heavy == set()


@pytest.mark.parametrize("command", ["split", "inspect", "plan"])
def test_a_per_expert_adapter_needs_no_torch(tmp_path: Path, command: str) -> None:
    adapter = save_adapter(tmp_path / "adapter")
    size = [] if command == "inspect" else ["--ep-size", 2]
    assert imported_by(RUN, command, adapter, *size) & {"torch", "vllm"} == set()
