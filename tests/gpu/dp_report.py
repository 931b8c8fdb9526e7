"""The part of docs/gpu.md about data-parallel engines: results of `tests.gpu.dp` and `dp_speed`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tests.gpu.dp_cases import CASES
from tests.gpu.speed_report import MEASURED, gpu_names, speed_table

Result = Mapping[str, Any]

DP = """
`vllm serve -dp 2 -tp 1 --enable-expert-parallel`, two {gpu} in one host, glm16 and three adapters, each asked for on either engine: the other
one idle, busy with the base model, or busy with another adapter; then mixed requests of one prompt each, for any model on any engine, 12 at a
time. A check is right by the same measure as above; the mixed requests are one check, which is right if each model's mean error on each engine
is, and if no single answer is nearer to another model's reference. With lorashard also: what is generated beside others has the
log-probabilities that it has in a prompt, and an adapter is loaded, used on both engines and unloaded while both are busy.
"""
SPEED = """
The time of a step on two {gpu}, with GLM-4.5-Air's shapes with 8 MoE layers in bf16, r = 32, CUDA graphs: 32 requests together that decode, and 64
of prefill, half of them on each engine with `-dp 2`, where tokens are those of one engine. Stock is right only where both engines have the same
adapter in the same slot. {measured}
"""
SERVERS = {
    "dp-stock": "-dp 2 without lorashard",
    "dp": "-dp 2 with lorashard",
    "tp": "-tp 2 with lorashard",
}


def dp_part(documents: Iterable[Mapping[str, Any]]) -> str:
    """All of it; empty without results."""
    documents = list(documents)
    found = [(str(d["release"]), d["dp"]) for d in documents if "dp" in d]
    speeds = [(str(d["release"]), d["dp_speed"]) for d in documents if "dp_speed" in d]
    parts = []
    if found:
        gpus = ", ".join(sorted({str(of_run.get("gpu", "GPUs")) for _, of_run in found}))
        parts += [DP.format(gpu=gpus).strip(), _answers(found)]
    if speeds:
        text = SPEED.format(gpu=gpu_names(speeds), measured=MEASURED)
        parts += [text.strip(), speed_table(speeds, SERVERS)]
    return "\n\n".join(parts)


def _answers(found: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    rows = [
        "| release | server | | checks right | errors (base) | mixed requests: mean errors, nearer to another |",
        "|---|---|---|---|---|---|",
    ]
    order = {case.name: number for number, case in enumerate(CASES)}
    for release, of_run in found:
        who = "without lorashard" if of_run["stock"] else "with lorashard"
        servers = [case for case in of_run["cases"] if case["case"] in order]
        for server in sorted(servers, key=lambda case: order[case["case"]]):
            rows.append(f"| {release} | {server['flags']} | {who} | {_cells(server)} |")
    return "\n".join(rows)


def _cells(server: Result) -> str:
    lines = server["results"]
    checks = [line for line in lines if "check" in line]
    right = sum(bool(line["right"]) for line in checks)
    errors = [line["error"] for line in checks if "error" in line]
    base = [line["error"] for line in lines if line.get("base")]
    span = f"{min(errors):.3f} to {max(errors):.3f}" if errors else "no answer"
    shown_base = f"{max(base):.3f}" if base else "–"
    mixed = next((line for line in checks if "mean_max_count" in line), None)
    cell = "–"
    if mixed is not None:
        means = [mean for mean, _, _ in mixed["mean_max_count"].values()] or [0.0]
        cell = (
            f"{mixed['answered']} answers, {min(means):.3f} to {max(means):.3f}, "
            f"{mixed['nearer_to_another']}"
        )
    return f"{right} of {len(checks)} | {span} ({shown_base}) | {cell}"
