"""Data flows one way through the packages, deciding touches no disk, and what is heavy waits."""

from __future__ import annotations

import ast

import pytest

from tests.architecture import read_house
from tests.imports import RUN, imported_by, imports, own_imports, source_files
from tests.tiny import REPO, save_adapter

PACKAGE = REPO / "lorashard"
MODULES = source_files(PACKAGE)
IMPORTS = own_imports(PACKAGE, MODULES)

# A package imports only what stands above its own line. Verbs do not import each other, but that
# `push` proves what it uploads.
GROUND = (
    {"rules"},
    {"version", "installing", "parameters", "errors", "progress", "dtypes", "vllm_options"},
    {"header"},
)
CORE = ({"storage"}, {"adapter"}, {"shards"}, {"writing", "uploading"})
VERBS = {"split", "merge", "reshard", "convert", "verify", "transfer", "inspect", "publish"}
ORDER = (*GROUND, *CORE, {*VERBS, "vllm_plugin"}, {"reports", "to_url"}, {"cli"}, {"", "__main__"})
EXCEPTIONS = {("transfer.push", "verify.verify")}
PLUGIN_ORDER = ({"settings", "metrics"}, {"engine"}, {"load"}, {"patches"}, {"doctor"})

# What turns values into values, and never opens a file.
PURE = (
    "header", "dtypes", "vllm_options", "parameters", "rules",
    "adapter.config", "adapter.keys", "adapter.options", "adapter.base_model", "adapter.fused_pairs",
    "adapter.name_patterns", "adapter.source_layout", "adapter.containers", "adapter.modules",
    "adapter.rank_evidence", "adapter.layout",
    "shards.names", "shards.placement", "shards.plan", "shards.manifest", "shards.manifest_parser",
    "shards.describe",
    "uploading.contents", "writing.blocks", "reshard.moves", "split.cast_notes", "split.parts",
    "convert.target", "convert.peft_tensors", "convert.scaling", "convert.per_expert", "convert.fused",
    "convert.slots", "convert.peft_targets", "convert.peft_patterns", "convert.peft_config", "convert.notes",
    "convert.plan",
    "inspect.summary", "inspect.memory", "inspect.picture", "inspect.findings",
    "cli.page.markup", "cli.page.maps", "cli.page.load_path", "cli.page.document", "cli.page.style",
    "publish.parts", "publish.gathered", "publish.places", "publish.versions",
    "vllm_plugin.engine.agreed_slots", "vllm_plugin.engine.expert_maps", "vllm_plugin.engine.guards", "vllm_plugin.load.assembly", "vllm_plugin.load.reads",
    "vllm_plugin.load.rearrangements", "vllm_plugin.load.plain_plan",
    "vllm_plugin.load.rows", "vllm_plugin.load.advice", "vllm_plugin.load.matching", "vllm_plugin.load.outcome",
    "vllm_plugin.doctor.adapter_outcome", "vllm_plugin.doctor.command", "vllm_plugin.doctor.diagnosis", "vllm_plugin.doctor.findings",
    "vllm_plugin.doctor.flags", "vllm_plugin.doctor.live_layers", "vllm_plugin.doctor.notes",
    "vllm_plugin.doctor.problems", "vllm_plugin.doctor.releases", "vllm_plugin.doctor.verdict",
)  # fmt: skip
TOUCHING = frozenset({
    "ctypes", "fcntl", "huggingface_hub", "io", "mmap", "os", "pathlib", "safetensors", "shutil",
    "socket", "subprocess", "tempfile", "threading", "torch", "urllib", "vllm",
})  # fmt: skip


def wrong_way(order: tuple[set[str], ...], prefix: str = "") -> list[tuple[str, str]]:
    """(module, what it imports) where that is not of a line above the module's own."""
    lines = {f"{prefix}{room}": line for line, rooms in enumerate(order) for room in rooms}
    found = []
    for module, imported in IMPORTS.items():
        if not module.startswith(prefix) or module == prefix.removesuffix("."):
            continue
        room = room_of(module, prefix)
        for name in imported:
            inside = name.startswith(prefix) and name != prefix.removesuffix(".")
            if (
                inside
                and room_of(name, prefix) != room
                and lines[room_of(name, prefix)] >= lines[room]
            ):
                found.append((module, name))
    return [pair for pair in found if pair not in EXCEPTIONS]


def room_of(module: str, prefix: str) -> str:
    return prefix + module.removeprefix(prefix).partition(".")[0]


def test_packages_import_only_what_stands_above_them() -> None:
    assert wrong_way(ORDER) == []


def test_packages_of_the_plugin_import_only_what_stands_above_them() -> None:
    assert wrong_way(PLUGIN_ORDER, "vllm_plugin.") == []


@pytest.mark.parametrize("within", ["", *sorted({m.rpartition(".")[0] for m in MODULES} - {""})])
def test_no_folder_has_a_circle(within: str) -> None:
    assert read_house(PACKAGE, within).circles == ()


def test_the_core_imports_neither_vllm_nor_the_plugin() -> None:
    for module, path in MODULES.items():
        if not module.startswith(("vllm_plugin", "cli", "reports.doctor")):
            assert not {n for n in imports(path) if n.partition(".")[0] == "vllm"}, module
            assert not {n for n in IMPORTS[module] if n.startswith("vllm_plugin")}, module


def test_of_the_command_line_only_doctor_imports_the_plugin() -> None:
    users = {m for m, used in IMPORTS.items() if any(n.startswith("vllm_plugin") for n in used)}
    assert {module for module in users if module.startswith("cli")} == {"cli.doctor"}


def test_the_proof_shares_nothing_with_the_writer_but_errors() -> None:
    for module, imported in IMPORTS.items():
        if module.startswith("verify.reference"):
            assert {n for n in imported if not n.startswith("verify.reference")} <= {"errors"}, (
                module
            )


@pytest.mark.parametrize("module", PURE)
def test_deciding_touches_no_disk(module: str) -> None:
    path = MODULES[module]
    assert {used.partition(".")[0] for used in imports(path)} & TOUCHING == set()
    calls = [n.func for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    assert "open" not in {call.id for call in calls if isinstance(call, ast.Name)}


@pytest.mark.parametrize("folder", [m for m, path in MODULES.items() if path.name == "__init__.py"])
def test_every_package_says_what_it_is(folder: str) -> None:
    assert ast.get_docstring(ast.parse(MODULES[folder].read_text()))


def test_the_package_imports_next_to_nothing() -> None:
    heavy = {
        "torch",
        "rich",
        "typer",
        "numpy",
        "blake3",
        "safetensors",
        "huggingface_hub",
        "vllm",
        "re2",
        "transformers",
        "peft",
    }
    assert imported_by("import lorashard; lorashard.__version__") & heavy == set()


def test_the_command_line_starts_without_what_is_heavy() -> None:
    heavy = {"torch", "numpy", "safetensors", "huggingface_hub", "vllm", "re2"}
    if "rich" not in imported_by("import typer"):
        heavy.add("rich")
    assert imported_by("import lorashard.cli.app") & heavy == set()


@pytest.mark.parametrize("command", ["split", "inspect", "plan"])
def test_a_per_expert_adapter_needs_no_torch(tmp_path, command: str) -> None:
    adapter = save_adapter(tmp_path / "adapter")
    size = [] if command == "inspect" else ["--ep-size", 2]
    assert imported_by(RUN, command, adapter, *size) & {"torch", "vllm"} == set()
