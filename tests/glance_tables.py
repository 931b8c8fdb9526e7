"""Two tables for docs/releases.md: how vLLM serves, and kinds of experts, by release; from docs/gpu.

A cell says that every answer was right, how many were not, that such a start is refused, or "–": not run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tests.gpu.cases import Case, release_key
from tests.gpu.kinds_cases import ALL

Result = Mapping[str, Any]
Lines = Iterable[Result]  # each with "right"

_NOT_RUN = "–"
_UNEVEN = ("glm15", "qwen1")  # models whose experts do not divide by two ranks
_ROUND_ROBIN = {"expert_placement_strategy": "round_robin"}
# Before it, expert rebalancing and data parallelism with LoRA are refused.
_FIRST_WITH_EPLB = "0.24.0"


def _is_plain(case: Case) -> bool:
    special = case.fp8 or case.quantised or case.fully_sharded or case.graphs or case.engine
    return not special and case.model not in _UNEVEN


# How vLLM serves -> the engines of the matrix that show it.
_MODES: Mapping[str, Callable[[Case], bool]] = {
    "bf16": _is_plain,
    "FP8": lambda case: case.fp8,
    "CUDA graphs": lambda case: case.graphs,
    "fully sharded": lambda case: case.fully_sharded,
    "uneven": lambda case: case.model in _UNEVEN,
    "round-robin": lambda case: case.engine == _ROUND_ROBIN,
    "speculative": lambda case: "speculative_config" in case.engine,
    "Ray": lambda case: case.engine.get("distributed_executor_backend") == "ray",
}

# Experts -> what the names of their cases begin with.
_KINDS: Mapping[str, tuple[str, ...]] = {
    "GLM-4-MoE": ("glm15", "glm16", "glm16g2"),
    "its shared experts": ("glm16-shared",),
    "Qwen3-MoE": ("qwen1", "qwen3_moe"),
    "Qwen3-VL-MoE": ("qwen3_vl_moe",),
    "Qwen3-Next": ("qwen3_next",),
    "DeepSeek-V3": ("deepseek_v3",),
    "MiniMax-M2": ("minimax_m2",),
    "Llama 4": ("llama4",),
    "ERNIE 4.5": ("ernie4_5_moe",),
    "Hunyuan": ("hunyuan",),
    "Granite": ("granite", "granite_shared"),
    "gpt-oss": ("gpt_oss",),
    "Nemotron-H": ("nemotron_h",),
    "block FP8": ("glm16-fp8_block",),
    "NVFP4": ("glm16-nvfp4",),
    "MXFP4": ("glm16-mxfp4",),
    "int4 (compressed-tensors)": ("glm16-int4",),
    "GPTQ": ("glm16-gptq",),
    "AWQ": ("glm16-awq",),
    "int4 in vLLM's Triton kernel": ("glm16-int4-triton", "glm16-awq-moe_wna16"),
}


def modes_table(documents: Sequence[Result], releases: Sequence[str]) -> str:
    """A row for each release. documents: all runs, those without the plugin included."""
    rows = [["vLLM", *_MODES, "`vllm serve`", "experts that move", "data parallel"]]
    for release in releases:
        own = [d for d in documents if d["release"] == release and not d["stock"]]
        ran = _ran(own)
        cells = [_cell(ran, [c for c in ALL if c.ep and shows(c)]) for shows in _MODES.values()]
        cells.append(_verdict(c for d in own for c in d.get("http", {}).get("checks", ())))
        for part in ("eplb", "dp"):
            cell = _verdict(
                line
                for d in own
                for case in d.get(part, {}).get("cases", ())
                for line in _lines(case)
            )
            is_refused = release_key(release) < release_key(_FIRST_WITH_EPLB)
            cells.append("refused" if is_refused else cell)
        rows.append([release, *cells])
    return _markdown(rows)


def kinds_table(documents: Sequence[Result]) -> str:
    """A row for each kind of experts, a column for each release in which any was run."""
    by_release: dict[str, Mapping[str, Result]] = {}
    for release in sorted({d["release"] for d in documents}, key=release_key):
        ran = _ran([d for d in documents if d["release"] == release and not d["stock"]])
        if ran:
            by_release[release] = ran
    rows = [["experts", *by_release]]
    for label, names in _KINDS.items():
        cases = [case for case in ALL if _kind_of(case) == label]
        assert cases, names
        rows.append([label, *(_cell(ran, cases) for ran in by_release.values())])
    return _markdown(rows)


def _kind_of(case: Case) -> str:
    """The kind whose name is the longest that the case's begins with."""
    fits = [
        (len(name), label)
        for label, names in _KINDS.items()
        for name in names
        if case.name == name or case.name.startswith(f"{name}-")
    ]
    return max(fits)[1]


def _ran(documents: Iterable[Result]) -> dict[str, Result]:
    """The runs of a release's matrix by the case's name; the last counts."""
    return {case["case"]: case for d in documents for case in d["cases"]}


def _cell(ran: Mapping[str, Result], cases: Iterable[Case]) -> str:
    known = [(case, ran[case.name]) for case in cases if case.name in ran]
    served = [run for case, run in known if not case.refused]
    if not served and any(case.refused for case, _ in known):
        as_expected = all(run["as_expected"] for _, run in known)
        return "refused" if as_expected else "**not refused**"
    return _verdict(line for run in served for line in _lines(run))


def _lines(run: Result) -> Lines:
    """A run's answers, but for what nobody has promised."""
    lines = [*run.get("results", ()), *run.get("checks", ())]
    answers = [line for line in lines if "adapter" in line or "check" in line]
    return [line for line in answers if not line.get("optional")]


def _verdict(lines: Lines) -> str:
    judged = [bool(line["right"]) for line in lines]
    if not judged:
        return _NOT_RUN
    wrong = judged.count(False)
    return f"**{wrong} of {len(judged)} wrong**" if wrong else "right"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body))
