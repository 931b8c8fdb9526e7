"""The documentation says what the code does: generated pages, examples, links."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lorashard.shards.placement import explicit_placement
from tests.adapters import Spec, build
from tests.generate_docs import commands, pages, parameters

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")))

_RUNNABLE = re.compile(r"<!-- runnable -->\n```python\n(.*?)```", re.DOTALL)
_FENCED = re.compile(r"^ *```.*?^ *```", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.fixture
def adapter_here(tmp_path, monkeypatch):
    """A tiny adapter in ./adapter, of 4 experts, fused and with attention factors."""
    monkeypatch.chdir(tmp_path)
    adapter = build(Spec("L2", extras=True))
    adapter.write(tmp_path / "adapter")
    return adapter


def run_examples(page: Path) -> dict[str, object]:
    examples = _RUNNABLE.findall(page.read_text())
    assert examples
    names: dict[str, object] = {}
    for example in examples:
        exec(compile(example, str(page), "exec"), names)
    return names


@pytest.mark.parametrize(
    "name",
    [
        "architecture.md",
        "cli.md",
        "errors.md",
        "gpu.md",
        "releases.md",
        "answers.svg",
        "loads.svg",
        "messages.md",
        "rules.md",
        "expert-map.svg",
    ],
)
def test_generated_page_is_fresh(name):
    assert (ROOT / "docs" / name).read_text() == pages()[name], "run `make docs`"


def test_pre_commit_runs_all_of_make_check_but_the_tests():
    (checks,) = re.findall(r"^check: (.*?) ##", (ROOT / "Makefile").read_text(), re.MULTILINE)
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    hooks = [hook["entry"] for hook in repo["hooks"]]
    assert [*hooks, "make test"] == [f"make {target}" for target in checks.split()]


@pytest.mark.parametrize("command", commands())
def test_cli_page_and_help_name_the_same_options(command):
    environment = os.environ | {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    finished = subprocess.run(
        [sys.executable, "-m", "lorashard", command, "--help"],
        capture_output=True, text=True, check=True, cwd=ROOT, env=environment,
    )  # fmt: skip
    # Options stand at the left; what their help mentions, further right.
    shown = set(re.findall(r"^[ │*]{1,6}(?:-\w+,? +)?(--[a-z-]+)", finished.stdout, re.MULTILINE))
    documented = {
        name
        for parameter in parameters(commands()[command])
        for name in parameter.names
        if name.startswith("--")
    }
    assert shown - {"--help"} == documented


@pytest.mark.parametrize("command", commands())
def test_readme_has_a_row_for_every_command(command):
    assert re.search(rf"^\| `lorashard {command}[ `]", README.read_text(), re.MULTILINE)


def test_readme_example_runs(adapter_here):
    names = run_examples(README)
    assert names["shards"].placement.num_experts == adapter_here.spec.num_experts
    for file in Path("adapter").iterdir():
        assert (Path("restored") / file.name).read_bytes() == file.read_bytes()


def test_format_example_gives_the_weight_change_of_the_source(adapter_here):
    import torch

    import lorashard

    request = lorashard.SplitRequest(ep_size=2)
    lorashard.split_adapter(Path("adapter"), Path("adapter-ep2"), request)
    names = run_examples(ROOT / "docs" / "format.md")
    lora_a, lora_b = adapter_here.factors[names["module"], names["expert"], names["projection"]]
    config = adapter_here.config
    expected = config["lora_alpha"] / config["r"] * lora_b @ lora_a
    assert torch.equal(names["delta"], expected)


def test_forms_of_an_expert_map_in_format_page_are_accepted():
    page = (ROOT / "docs" / "format.md").read_text()
    block = re.search(r"### Explicit expert maps.*?```json\n(.*?)```", page, re.DOTALL)
    assert block is not None
    forms = [json.loads(line) for line in block[1].splitlines()]
    placements = [explicit_placement(form, num_experts=4, ep_size=2) for form in forms]
    assert [p.ranks for p in placements[:4]] == [((0, 2), (3, 1))] * 4
    assert set(placements[4].layers) == {"5", "model.layers.7.mlp.experts"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_page_resolve(page):
    for link in _LINK.findall(_FENCED.sub("", page.read_text())):
        if re.match("https?:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in _anchors(target), link


def _anchors(page: Path) -> set[str]:
    """GitHub's anchors of a page's headings, and those that it names itself."""
    text = _FENCED.sub("", page.read_text())
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    named = set(re.findall(r'<a id="([^"]+)"></a>', text))
    return named | {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings
    }
