"""The tables that are read first: a cell says right, how many are wrong, refused, or not run."""

from __future__ import annotations

from typing import Any

from tests.glance_tables import kinds_table, modes_table
from tests.gpu.kinds_cases import ALL


def run(case: str, *right: bool, **more: Any) -> dict[str, Any]:
    lines = [{"adapter": f"e{i}", "right": is_right} for i, is_right in enumerate(right)]
    return {"case": case, "as_expected": True, "results": [{"base": True}, *lines], **more}


def document(*cases: dict[str, Any], release: str = "0.33.0", **more: Any) -> dict[str, Any]:
    return {"release": release, "stock": False, "cases": list(cases), **more}


def cells(table: str) -> dict[str, dict[str, str]]:
    head, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()
    )
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}


def test_an_engine_counts_wherever_it_shows_something() -> None:
    found = document(run("glm16", True, True), run("glm15-fp8", True, False))
    assert cells(modes_table([found], ["0.33.0", "0.32.0"])) == {
        "0.33.0": {
            "bf16": "right", "FP8": "**1 of 2 wrong**", "CUDA graphs": "–", "fully sharded": "–",
            "uneven": "**1 of 2 wrong**", "round-robin": "–", "speculative": "–", "Ray": "–",
            "`vllm serve`": "–", "experts that move": "–", "data parallel": "–",
        },
        "0.32.0": dict.fromkeys(
            ("bf16", "FP8", "CUDA graphs", "fully sharded", "uneven", "round-robin", "speculative", "Ray",
             "`vllm serve`", "experts that move", "data parallel"), "–",
        ),
    }  # fmt: skip


def test_what_was_run_without_the_plugin_is_not_in_it() -> None:
    found = document(run("glm16", False)) | {"stock": True}
    assert cells(modes_table([found], ["0.33.0"]))["0.33.0"]["bf16"] == "–"


def test_what_is_optional_cannot_be_wrong() -> None:
    case = run("glm16", True)
    case["results"].append({"adapter": "e9", "right": False, "optional": True})
    assert cells(modes_table([document(case)], ["0.33.0"]))["0.33.0"]["bf16"] == "right"


def test_servers_rebalancing_and_data_parallel() -> None:
    checks = {"checks": [{"check": "chat", "right": True}]}
    ends = {"cases": [run("eplb-sync", True), {"case": "eplb_server", **checks}]}
    wrong = {"cases": [{"case": "dp", "results": [{"check": "mixed", "right": False}]}]}
    found = document(http=checks, eplb=ends, dp=wrong)
    row = cells(modes_table([found], ["0.33.0", "0.23.0"]))
    assert row["0.33.0"]["`vllm serve`"] == row["0.33.0"]["experts that move"] == "right"
    assert row["0.33.0"]["data parallel"] == "**1 of 1 wrong**"
    assert row["0.23.0"]["experts that move"] == row["0.23.0"]["data parallel"] == "refused"


def test_kinds_by_release() -> None:
    table = cells(
        kinds_table(
            [
                document(run("glm16-awq", True), run("llama4"), release="0.33.0"),
                document(run("glm16", True), run("llama4", as_expected=False), release="0.26.0"),
            ]
        )
    )
    assert table["AWQ"] == {"0.26.0": "–", "0.33.0": "right"}
    assert table["GLM-4-MoE"] == {"0.26.0": "right", "0.33.0": "–"}
    assert table["Llama 4"] == {"0.26.0": "**not refused**", "0.33.0": "refused"}


def test_every_case_is_of_one_kind() -> None:
    table = kinds_table([document(*(run(case.name, False) for case in ALL))])
    assert all(next(iter(row.values())) != "–" for row in cells(table).values())
