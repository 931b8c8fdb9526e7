"""Messages name parameters in Python, and options on the command line and in a server's answer."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import lorashard
from lorashard import LayoutOptions, SplitRequest, split_adapter
from lorashard.errors import LorashardError, UnclearLayoutError
from lorashard.parameters import FLAGS, with_flags
from lorashard.vllm_plugin.patches.explanations import for_a_server
from tests.generate_docs import commands, parameters
from tests.tiny import REPO, per_expert_tensors, run_cli, save_adapter

CORE = [
    path
    for path in sorted((REPO / "lorashard").rglob("*.py"))
    if path.relative_to(REPO / "lorashard").parts[0] not in ("cli", "vllm_plugin", "parameters.py")
]
# Commands that a text spells out, here and in model cards, keep their options.
COMMANDS = re.compile(r"lorashard (?:pull|push|split|reshard|verify|convert)\b[^`\n]*")
CARD = "uploading/card.py"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Give `model=MODEL_DIR`, or `orientation`.", "Give --model MODEL_DIR, or --orientation."),
        ("`force=True` replaces it, with `out`.", "--force replaces it, with -o."),
        ("Leave out `ep_ranks`.", "Leave out --ep-rank and --node-ranks."),
        ("`lorashard verify` and `other` stay, model too.", "`lorashard verify` and `other` stay, model too."),
        ("`strategy=round_robin`", "--placement round_robin"),
    ],
)  # fmt: skip
def test_parameters_become_options(text: str, shown: str) -> None:
    assert with_flags(text) == shown


def test_each_parameter_is_one_of_python_and_each_option_one_of_a_command() -> None:
    functions = [getattr(lorashard, name) for name in lorashard.__all__ if name.islower()]
    known = {name for f in functions if callable(f) for name in inspect.signature(f).parameters}
    known |= set(inspect.signature(SplitRequest).parameters)
    known |= set(inspect.signature(LayoutOptions).parameters)
    assert set(FLAGS) <= known
    options = {n for c in commands().values() for p in parameters(c) for n in p.names}
    assert {word for flag in FLAGS.values() for word in flag.split() if word != "and"} <= options


@pytest.mark.parametrize("path", CORE, ids=lambda path: str(path.relative_to(REPO / "lorashard")))
def test_no_message_of_the_core_names_an_option(path: Path) -> None:
    if str(path).endswith(CARD):
        return
    ours = {word for flag in FLAGS.values() for word in flag.split() if word != "and"}
    for text in texts(path):
        named = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", COMMANDS.sub("", text)))
        assert named & ours == set(), text


def texts(path: Path) -> Iterator[str]:
    """All strings of a module but its docstrings."""
    tree = ast.parse(path.read_text())
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if is_text and id(node) not in docstrings:
            yield node.value


def test_one_error_in_python_on_the_command_line_and_in_a_server(tmp_path: Path) -> None:
    tensors = {n: t for n, t in per_expert_tensors().items() if ".experts.0." not in n}
    adapter = save_adapter(tmp_path / "adapter", tensors)
    with pytest.raises(UnclearLayoutError) as caught:
        split_adapter(adapter, tmp_path / "out", SplitRequest(2))
    assert caught.value.hint == "Give `model=MODEL_DIR` or `num_experts=N`."
    shown = "Give --model MODEL_DIR or --num-experts N."
    done = run_cli("split", adapter, "--ep-size", 2, "-o", tmp_path / "out", "--json")
    assert f"  {shown}\n" in done.stderr
    assert f'"hint": "{shown}"' in done.stdout
    error: LorashardError = caught.value
    assert shown in for_a_server(error)
    assert "an option of `lorashard split`" in for_a_server(error)
