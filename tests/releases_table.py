"""docs/releases.md: what was run with each minor release of vLLM, from the recorded results.

docs/gpu/*.json come from `python -m tests.gpu --out`, docs/compat/*.json from `make compat`.
`python -m tests.generate_docs` writes the page.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.glance_tables import kinds_table, modes_table
from tests.gpu.cases import CASES, release_key

DOCS = Path(__file__).resolve().parents[1] / "docs"
Result = Mapping[str, Any]

# What a release does with LoRA and expert parallelism on its own: (first that does so, what). Measured
# in 0.20.2, 0.21.0, 0.22.1, 0.26.0 and 0.33.0 (docs/gpu.md); FP8 of 0.22 and 0.23: vLLM issue 42007.
ALONE = (
    ("0.16.0", "refuses to start"),
    ("0.20.2", "refuses to start; FP8 wrong"),
    ("0.21.0", "even linear placement only; FP8 wrong"),
    ("0.24.0", "even linear placement only"),
)

INTRO = """# vLLM releases

What was run with lorashard in each minor release of vLLM, and what came out. `make docs` writes this page from the recorded
results.

On two GPUs, with lorashard and `-tp 2 --enable-expert-parallel` (data parallel: `-dp 2`). "right": every
answer is, by the measure of [gpu.md](gpu.md); "refused": vLLM does not start, and the message says why; "–": not run. "Experts that
move" is `--enable-eplb`.

{modes}

Kinds of experts, in the releases in which any was run. Rows below Nemotron-H are GLM-4-MoE with its experts' weights in that form.

{kinds}

## In detail

**On the CPU** (`make compat`): the release's own LoRA manager, layer classes and adapter loading, around MoE layers without
weights. Every adapter layout is loaded three ways: as a plain adapter, as its own shards, and as shards split for another number of
ranks. Covered are every rank of 1, 2, 3 and 8; linear and round-robin placement; even and uneven expert counts; ranks without experts;
the 2-D and the 3-D class; and experts without a gate. Each loaded factor is compared, expert by expert. The other checks: which kernel a
layer keeps, the warm-up, what LoRA is given to read, what is asked of the CUDA op that sorts tokens, and what is refused.

**On two H200 GPUs** (`make gpu-test`): real engines, `-tp 2`, tiny models. The figure is the mean absolute difference of prompt
log-probabilities from a float32 reference with the adapter merged: first for the base model alone, then over all adapters.
[gpu.md](gpu.md) has every single answer, and what vLLM gives without lorashard. "–" means not run on GPUs.
"""

NOTES = """
What was not run:

- **0.16.0 to 0.19.1 with their own kernels**, which need torch 2.9 and 2.10. On the GPUs, their Python code ran over the kernels of
  0.20.2. That covers everything written in Python or Triton: which kernel is chosen, buffers, placement, the Triton kernels of LoRA and of
  the experts, FP8, CUDA graphs from 0.17.1 on, and the CUDA op that sorts tokens in 0.20.2's build (same schema; 576 calls in each
  release, none wrong). It does not cover their own compiled ops, CUDA graphs on 0.16.0 (0.20.2's FlashAttention needs a larger buffer than
  0.16.0 has), or a server.
- **The releases with "–"** on GPUs: their row rests on the CPU run alone.
- Patch releases other than the ones named. A patch looks at the code it finds, not at the version.
- More than two ranks on GPUs, several nodes, pipeline parallelism, the Ray executor, ROCm, MXFP4 gpt-oss.
- FP8 without expert parallelism together with `--fully-sharded-loras`.
- Some GPU cases of 0.22.1, 0.26.0 and 0.33.0 with the present code: they ran with earlier code; [gpu.md](gpu.md) names them. The two
  checks of 0.33.0's server that failed are messages that lacked a file's name. That is fixed, and later server runs show it.
"""


def _load(folder: str) -> dict[str, Any]:
    return {
        path.stem: json.loads(path.read_text()) for path in sorted((DOCS / folder).glob("*.json"))
    }


def minor_releases() -> list[str]:
    """The releases of the CPU runs, one of each minor."""
    names = (name for name in _load("compat") if name.endswith("-loading"))
    return sorted((name.removesuffix("-loading") for name in names), key=release_key)


def _alone(release: str) -> str:
    return [text for first, text in ALONE if release_key(first) <= release_key(release)][-1]


def _cpu(release: str, compat: Mapping[str, Any]) -> str:
    layouts = compat[f"{release}-loading"]["all_layouts"].values()
    checked = sum(kind["checked"] for kind in layouts)
    wrong = sum(len(kind["wrong"]) for kind in layouts)
    largest = max(kind["largest_difference"] for kind in layouts)
    others = [
        found
        for part in ("loading", "layers")
        for name, found in compat[f"{release}-{part}"].items()
        if isinstance(found, list)
    ]
    failed = sum(bool(found) for found in others)
    return (
        f"{checked:,} loads, {wrong} wrong, largest difference {largest:g}; "
        f"{len(others) - failed} of {len(others)} other checks"
    )


def _span(values: Sequence[float]) -> str:
    low, high = f"{min(values):.3f}", f"{max(values):.3f}"
    return low if low == high else f"{low} to {high}"


def _gpu(documents: Iterable[Result], fp8: bool) -> str:
    """Base and adapter errors over all cases of a kind, and how many answers are right."""
    kinds = {case.name: case for case in CASES}
    base: list[float] = []
    errors: list[float] = []
    right = total = 0
    modes: set[str] = set()
    for case in (case for document in documents for case in document["cases"]):
        known = kinds.get(case["case"])
        if known is None or known.refused or known.fp8 != fp8:
            continue
        lines = [line for line in case["results"] if "adapter" in line]
        if not lines:
            continue
        modes.add("graphs" if known.graphs else "eager")
        base += [x["error"] for x in case["results"] if x.get("base") and not x.get("after")]
        errors += [line["error"] for line in lines if "error" in line]
        right += sum(bool(line["right"]) for line in lines)
        total += len(lines)
    if not total:
        return "–"
    return (
        f"{right} of {total} answers right ({', '.join(sorted(modes))}); base {_span(base)}, "
        f"adapters {_span(errors)}"
    )


def _server(documents: Iterable[Result]) -> str:
    checks = [c for d in documents for c in d.get("http", {}).get("checks", ())]
    return f"{sum(bool(c['right']) for c in checks)} of {len(checks)} checks" if checks else "–"


def make_page() -> str:
    """The page as text."""
    compat, gpu = _load("compat"), _load("gpu")
    rows = [
        ["vLLM", "alone, with EP", "with lorashard, on the CPU", "two H200 GPUs, bf16", "two H200 GPUs, FP8",
         "`vllm serve`", "kernels on the GPU"],
        ["---"] * 7,
    ]  # fmt: skip
    for release in minor_releases():
        runs = [d for d in gpu.values() if d["release"] == release and not d["stock"]]
        ran = any(d["cases"] for d in runs)
        kernels = next((d["kernels"] for d in runs if d.get("kernels")), "its own")
        rows.append([
            release, _alone(release), _cpu(release, compat), _gpu(runs, False), _gpu(runs, True),
            _server(runs), kernels if ran else "–",
        ])  # fmt: skip
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    documents = list(gpu.values())
    intro = INTRO.format(
        modes=modes_table(documents, minor_releases()), kinds=kinds_table(documents)
    )
    return f"{intro.strip()}\n\n{table}\n{NOTES}"
