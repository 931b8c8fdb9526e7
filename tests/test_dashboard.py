"""docs/recipes/grafana.json asks Prometheus for what the plugin counts: all of it, by labels that exist."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest

from tests.tiny import REPO

if os.environ.get("LORASHARD_REQUIRE_ALL", "") in ("", "0"):
    pytest.importorskip("prometheus_client")

DASHBOARD: dict[str, Any] = json.loads((REPO / "docs" / "recipes" / "grafana.json").read_text())
# The samples of one load and one failure, as /metrics serves them; a registry is a process's own.
SAMPLES = """
import json
from prometheus_client import REGISTRY
from lorashard.vllm_plugin.metrics import record_failure, record_load
record_load(0, "shards", 0.2, 1000)
record_failure(0)
print(json.dumps([
    (family.name, sample.name, sorted(sample.labels))
    for family in REGISTRY.collect() if family.name.startswith("lorashard_")
    for sample in family.samples if not sample.name.endswith("_created")
]))
"""
# What Prometheus adds to whatever it scrapes.
SCRAPED = {"job", "instance"}


@pytest.fixture(scope="module")
def samples() -> list[tuple[str, str, list[str]]]:
    """(metric, its sample's name, the labels that the plugin gives it) of everything that is counted."""
    done = subprocess.run(
        [sys.executable, "-c", SAMPLES], env={"PYTHONPATH": str(REPO), "PATH": ""},
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [(metric, name, labels) for metric, name, labels in json.loads(done.stdout)]


def queries() -> list[tuple[str, str]]:
    """(panel, PromQL) of every query."""
    found = [(p["title"], t["expr"]) for p in DASHBOARD["panels"] for t in p["targets"]]
    assert len(found) > len(DASHBOARD["panels"])
    return found


def asked(query: str) -> set[str]:
    return set(re.findall(r"\blorashard_\w+", query))


def test_every_query_is_for_samples_that_the_plugin_has(
    samples: list[tuple[str, str, list[str]]],
) -> None:
    known = {name for _, name, _ in samples}
    unknown = [(panel, asked(query) - known) for panel, query in queries() if asked(query) - known]
    assert unknown == []
    assert all(asked(query) for _, query in queries())


def test_no_metric_of_the_plugin_is_left_out(samples: list[tuple[str, str, list[str]]]) -> None:
    shown = {name for _, query in queries() for name in asked(query)}
    assert len({metric for metric, _, _ in samples}) == 3
    missing = {metric for metric, _, _ in samples} - {
        metric for metric, name, _ in samples if name in shown
    }
    assert missing == set()


def test_queries_group_and_legends_name_labels_that_exist(
    samples: list[tuple[str, str, list[str]]],
) -> None:
    labels_of = {name: set(labels) | SCRAPED for _, name, labels in samples}
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            lists = re.findall(r"\bby \(([^)]*)\)", target["expr"])
            kept = {label.strip() for labels in lists for label in labels.split(",")}
            for name in asked(target["expr"]):
                assert kept <= labels_of[name], (panel["title"], name)
            legend = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            assert legend <= kept, panel["title"]
            assert "le" not in legend
            if "histogram_quantile" in target["expr"]:
                assert "le" in kept, panel["title"]


def test_variables_are_declared_and_used() -> None:
    variables = DASHBOARD["templating"]["list"]
    text = json.dumps([DASHBOARD["panels"], variables])
    used = set(re.findall(r"\$\{?(\w+)", text)) - {"__all"}
    assert used == {variable["name"] for variable in variables}


def test_everything_comes_from_the_chosen_data_source() -> None:
    targets = [target for panel in DASHBOARD["panels"] for target in panel["targets"]]
    asking = [v for v in DASHBOARD["templating"]["list"] if v["type"] == "query"]
    assert asking
    for one in [*DASHBOARD["panels"], *targets, *asking]:
        assert one["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_panels_have_numbers_of_their_own_and_do_not_overlap() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for panel in panels
        for at in [panel["gridPos"]]
        for x in range(at["x"], at["x"] + at["w"])
        for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24  # Grafana's columns
