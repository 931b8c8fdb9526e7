"""Turn results of `python -m tests.gpu --out` into a markdown table.

python -m tests.gpu.report docs/gpu/*.json    # `make docs` writes docs/gpu.md
"""

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.gpu.cases import release_key
from tests.gpu.dp_report import dp_part
from tests.gpu.eplb_report import eplb_part
from tests.gpu.kinds_cases import ALL
from tests.gpu.speed_report import speed_part

Document = Mapping[str, Any]
Result = Mapping[str, Any]


def _cell(case: Result | None) -> str:
    """Base error, then every adapter's, each marked if it is wrong."""
    if case is None:
        return "–"
    lines = case["results"]
    if not any("started" in line for line in lines):
        return f"refused: {_short(case['last_error'])}"
    base = next((line["error"] for line in lines if line.get("base")), None)
    # A check that runs in several rounds counts with its worst.
    worst: dict[tuple[str, str], Result] = {}
    for line in lines:
        if "adapter" in line:
            key = (line["adapter"], line["form"])
            if key not in worst or _badness(line) > _badness(worst[key]):
                worst[key] = line
    if not worst:
        return f"failed: {_short(case['last_error'])}"
    right = sum(bool(line["right"]) for line in worst.values())
    errors = [line["error"] for line in worst.values() if "error" in line]
    span = f"{min(errors):.3f} to {max(errors):.3f}" if errors else "no answer"
    return f"**{right} of {len(worst)} right**, {span} (base {_number(base)})"


def _badness(line: Result) -> float:
    return float(line.get("error", float("inf")))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _short(text: str) -> str:
    clean = " ".join(text.split()).replace("|", "/")
    return clean[:110] + ("…" if len(clean) > 110 else "")


def matrix_tables(documents: Sequence[Document]) -> str:
    """For each release a row for each case: without lorashard, with it."""
    tables = []
    for release in sorted({d["release"] for d in documents}, key=release_key):
        of_release = [d for d in documents if d["release"] == release]
        found = {
            stock: {
                case["case"]: case for d in of_release if d["stock"] == stock for case in d["cases"]
            }
            for stock in (True, False)
        }
        rows = [["case", "flags", "without lorashard", "with lorashard"], ["---"] * 4]
        rows += [
            [case.name, case.flags or "–", *(_cell(found[s].get(case.name)) for s in (True, False))]
            for case in ALL
            if any(case.name in column for column in found.values())
        ]
        if len(rows) == 2:
            continue
        kernels = next((d["kernels"] for d in of_release if d.get("kernels")), "")
        title = f"### {release}" + (f" (kernels: {kernels})" if kernels else "")
        tables.append("\n".join([title, "", *(f"| {' | '.join(row)} |" for row in rows)]))
    return "\n\n".join(tables)


def failures(documents: Iterable[Document]) -> str:
    """Every single answer of lorashard's that is not right, as a list."""
    items = [
        f"- {document['release']}{' stock' if document['stock'] else ''} {case['case']}: {problem}"
        for document in documents
        if not document["stock"]
        for case in document["cases"]
        for problem in case["problems"]
    ]
    return "\n".join(items)


def align_table(documents: Iterable[Document]) -> str:
    """The calls of the CUDA op that sorts tokens by adapter and expert (tests/gpu/align.py)."""
    rows = ["| release | calls | wrong | patched by lorashard |", "|---|---|---|---|"]
    for document in documents:
        if found := document.get("align"):
            patched = "yes" if found["patched"] else "no, vLLM's own is right"
            release = document["release"] + (
                f" over {document['kernels']}" if document.get("kernels") else ""
            )
            rows.append(f"| {release} | {found['calls']} | {found['wrong_calls']} | {patched} |")
    return "\n".join(rows) if len(rows) > 2 else ""


def http_table(documents: Iterable[Document]) -> str:
    """The checks of the server."""
    rows = ["| release | check | right | |", "|---|---|---|---|"]
    for document in documents:
        for check in document.get("http", {}).get("checks", ()):
            detail = check.get("error", check.get("status", ""))
            verdict = "yes" if check["right"] else "**no**"
            rows.append(f"| {document['release']} | {check['check']} | {verdict} | {detail} |")
    return "\n".join(rows) if len(rows) > 2 else ""


def load_table(documents: Iterable[Document]) -> str:
    """Stock beside the plugin: seconds and gigabytes."""
    rows = [
        "| release | adapter | first load | later loads | swap into a slot | memory growth |",
        "|---|---|---|---|---|---|",
    ]
    for document in documents:
        summary = document.get("load", {}).get("summary")
        for form in ("per_expert", "fused") if summary else ():
            figures = summary[form]
            cells = [
                _pair(figures[key], unit)
                for key, unit in (
                    ("first_load_s", "s"),
                    ("later_load_s", "s"),
                    ("swap_s", "s"),
                    ("memory_growth_gb", "GB"),
                )
            ]
            rows.append(f"| {document['release']} | {form} | {' | '.join(cells)} |")
        if summary:
            pair = _pair(summary["without_lora_s"], "s")
            rows.append(f"| {document['release']} | none: 64 requests | {pair} | | | |")
    return "\n".join(rows) if len(rows) > 2 else ""


def _pair(values: Sequence[float], unit: str) -> str:
    stock, plugin = values
    ratio = f", {stock / plugin:.1f}×" if plugin > 0 else ""
    return f"{stock:.3f} → {plugin:.3f} {unit}{ratio}"


def verl_table(documents: Iterable[Document]) -> str:
    """verl's updates of adapters in memory (tests/gpu/beside_verl.py): an engine and way a row."""
    rows = [
        "| release | engine | tensors | right | error (base) | least correlation |",
        "|---|---|---|---|---|---|",
    ]
    machines: set[str] = set()
    for document in documents:
        for engine in document.get("beside_verl", {}).get("engines", ()):
            lines = engine["results"]
            machines |= {f"{line['gpu']}" for line in lines if "gpu" in line}
            base = next((line["error"] for line in lines if line.get("base")), None)
            updates = [line for line in lines if "adapter" in line]
            name = engine["engine"] + (", without lorashard" if engine["stock"] else "")
            rows += [
                f"| {document['release']} | {name} | {form} | "
                f"{_verl_cells([line for line in updates if line['form'] == form], base)} |"
                for form in dict.fromkeys(line["form"] for line in updates)
            ]
    if len(rows) == 2:
        return ""
    return "\n\n".join([VERL.format(gpu=", ".join(sorted(machines))).strip(), "\n".join(rows)])


def _verl_cells(lines: Sequence[Result], base: float | None) -> str:
    right = sum(bool(line["right"]) for line in lines)
    judged = [line for line in lines if "error" in line]
    if not judged:
        return f"{right} of {len(lines)} | no answer | –"
    errors = [line["error"] for line in judged]
    correlation = min(line["correlation"] for line in judged)
    failed = f", {len(lines) - len(judged)} failed" if len(judged) < len(lines) else ""
    return (
        f"{right} of {len(lines)} | {min(errors):.3f} to {max(errors):.3f} ({_number(base)}){failed}"
        f" | {correlation:.3f}"
    )


# Before the table of verl's updates.
VERL = """
Two {gpu} in one host. verl 0.9.1's own code runs: its extension of vLLM's workers (`vLLMColocateWorkerExtension`, which patches `_load_adapter`),
and its transfer of tensors from a trainer process on each GPU, in buckets of 1 MB. As verl does it, each update removes the adapter and adds it
again under the same name and id, with `--max-loras 1`. The model is a GLM-4-MoE of 15 experts on two ranks (8 + 7; round-robin: even and odd).
Each way has ten updates of one form with other values, judged as above. After them comes an adapter of every second expert's down_proj alone, except
through shared memory, and a fused one through CUDA IPC and on the CPU. Tensors that come through CUDA IPC or shared memory are on the GPU when vLLM
gets them. "Own experts only": each trainer sends its rank's; with the partial adapter and round-robin, one rank is sent nothing. The rows without
lorashard are from an earlier run, and the two updates that failed there are the last.

Two earlier runs of these engines found two faults of the plugin, which are fixed. Its threads could read tensors before the GPU had made them: two
of 584 answers were wrong (0.24.0, round-robin; one was NaN). `python -m tests.gpu.tensor_order` shows it: without the wait each of 1,048,576 bytes is
read too early, with it none. And a rank that was sent nothing refused the adapter.
"""

INTRO = """# vLLM with lorashard, on GPUs

Two H200 GPUs in one host, tensor parallel size 2, tiny models with random weights. Each figure is the mean absolute difference of 188
prompt log-probabilities from a float32 reference: transformers, with the adapter merged into the weights. "Base" is the same without an
adapter, and shows the noise of bf16 or FP8. An answer is **right** if its error is at most the base model's + 0.035 (or × 1.35, if that is
more), and if what the adapter changes correlates above 0.9 with what it should change. An adapter's noise is not the base model's:
transformers itself, in bf16 on the CPU, is 0.020 to 0.047 from its float32 self for the adapters of glm16, and 0.14 to 0.19 with activations
in FP8, the base model 0.020 and 0.14. Answers while experts move are judged by that noise + 0.035, where it allows for more. With half of the
experts wrong, the error is 0.14 or more.

`tests/gpu/cases.py` defines the cases: plain adapters and shard directories, one tensor per expert and fused, half of the experts, rsLoRA
with an alpha pattern, directories split for another number of ranks or another placement, more adapters than slots. glm is a GLM-4-MoE (15
means 8 + 7 experts; g2 means expert groups, so that round-robin placement takes effect), gpt_oss has the 3-D LoRA class, and nemotron_h has
experts without a gate. `tests/gpu/kinds_cases.py` has models of more families, and routed experts in other kinds of weights. "Without
lorashard" is the same engine with `LORASHARD_DISABLE=1` and plain adapters.

To repeat, for each release (results go to `docs/gpu/`; `python -m tests.gpu.stages` runs several of these on one host, side by side and in
turn); the last line writes this page:

    python -m tests.gpu --work W --out docs/gpu/RELEASE.json --http --load    # make gpu-test
    python -m tests.gpu --work W --stock --out docs/gpu/RELEASE-stock.json
    python -m tests.gpu --work W --kinds --out docs/gpu/RELEASE-kinds.json
    python -m tests.gpu --work W --no-matrix --start-line --out docs/gpu/RELEASE-start-line.json
    python -m tests.gpu.eplb --work W --out docs/gpu/RELEASE-eplb.json [--stock]
    python -m tests.gpu.dp --work W --out docs/gpu/RELEASE-dp.json [--stock]
    python -m tests.gpu.dp_speed --work W --out docs/gpu/RELEASE-dp-speed.json
    python -m tests.gpu.tp_speed --work W --out docs/gpu/RELEASE-tp-speed.json
    python -m tests.gpu.publishing --work W --out docs/gpu/RELEASE-publishing.json
    python -m tests.gpu.load --work W --out docs/gpu/RELEASE-load.json --release RELEASE
    python -m tests.gpu.beside_verl --work W --out docs/gpu/RELEASE-verl.json    # with verl's files on PYTHONPATH
    make docs

Notes on these runs:

- **0.16.0 to 0.19.1** are their Python code over the kernels of 0.20.2, because their own were built for releases of torch older than the
  host's. The schemas of the ops that they call on this path were compared and are the same; FP8's `cutlass_scaled_mm` has moved to another of
  0.20.2's libraries and is loaded from there. FlashAttention's scheduler metadata is larger than 0.16.0's buffer for it, so 0.16.0 could not be
  run with CUDA graphs. No server was run on these releases.
- Cases whose lines in `docs/gpu` have no `leak` ran with the plugin as it was before it supported older releases: 0.26.0, eleven bf16 cases of
  0.22.1 and five of 0.33.0. The same goes for the servers and the load times of these three. In 0.33.0's server run, the messages for a truncated
  and a missing rank file were right but lacked the file's name, which vLLM cuts out of paths; that was fixed before the other servers ran.
- The servers of 0.24.0 and 0.33.0 ran on two H100s; in 0.33.0's row of load times the cards are still H200s. `publishing` ran with CUDA graphs.
  By the server's log the engine waited for 2.2 to 2.8 ms for each adapter; the rest of a gap is steps that take longer while threads of the same
  processes read the adapter and copy it to the GPU.
- `leak` is how far the base model's answer to a request of two tokens moves when an adapter is used in between. Without lorashard, 0.20.2
  without expert parallelism gives 0.030, 0.113 and 0.258 in bf16 (vLLM issue 42008); that is what is wrong in its row glm16-no-ep.
- FP8 does not repeat exactly, with or without lorashard: the base model's answers differ by up to 0.036 between two requests. After the last
  adapter, the base model may therefore differ by 0.35 of its error.
- The first run of 0.21.0's qwen1 failed in LoRA's kernel, which cannot run on a rank without experts. That was fixed, and the runs here are from
  after the fix. qwen1 is a model of one expert on two ranks; vLLM's own model class refuses it, and `tests/gpu/one_expert.py` lifts that.
"""


def publishing_table(documents: Iterable[Document]) -> str:
    """From a trainer's ranks to a server's answers (tests/gpu/publishing.py): stock -> lorashard."""
    rows = [
        "| release | | stock vLLM, gathered and saved | lorashard |",
        "|---|---|---|---|",
    ]
    for document in documents:
        if not (found := document.get("publishing")):
            continue
        sides = [found["stock"], found["plugin"]]
        gaps = [side["while requests run"] for side in sides]
        texts = {
            "an ordinary step of 32 requests": [f"{gap['step_ms']:.0f} ms" for gap in gaps],
            "the longest gap between tokens without a load": [
                f"{gap['longest_ordinary_gap_ms']:.0f} ms" for gap in gaps
            ],
            "the longest gap during each of four loads": [
                ", ".join(f"{ms:.0f}" for ms in gap["longest_gap_at_each_load_ms"]) + " ms"
                for gap in gaps
            ],
            "its median, in steps": [str(gap["in_steps"]) for gap in gaps],
        }
        if all("steps" in gap for gap in gaps):
            texts["the longest time between two steps of a worker, in steps"] = [
                str(gap["steps"]["in_steps"]) for gap in gaps
            ]
        for name in (name for name in sides[0] if name.endswith("trainer ranks")):
            parts = [side[name] for side in sides]
            texts[f"a version, from {name} to its first token"] = [
                f"{part['total_s']:.2f} s (write {part['write_s']:.2f}, load {part['load_s']:.2f})"
                for part in parts
            ]
        rows += [
            f"| {document['release']} | {what} | {' | '.join(cells)} |"
            for what, cells in texts.items()
        ]
    return "\n".join(rows) if len(rows) > 2 else ""


def cycles_table(documents: Iterable[Document]) -> str:
    """Loads, unloads and swaps on a live server, with bad adapters among them (tests/gpu/load.py)."""
    rows = [
        "| release | cycles | requests in flight | answers | a load | bad adapters | growth of memory, GPU, pinned |",
        "|---|---|---|---|---|---|---|",
    ]
    for document in documents:
        if not (found := document.get("load_cycles")):
            continue
        right = found["answers"].get("right", 0)
        wrong = sum(found["answers"].values()) - right
        wrong -= found["answers"].get("unloaded before it came", 0)
        tried = sum(row["tried"] for row in found["bad"].values())
        slowest = max(row["slowest_s"] for row in found["bad"].values())
        memory = found["memory"]
        grown = [memory.get(name) for name in ("pss_mb", "gpu_mb", "pinned_mb")]
        growth = ", ".join(f"{one['end'] - one['begin']:+.0f} MB" if one else "–" for one in grown)
        rows.append(
            f"| {document['release']} | {found['cycles']:,} | {found['requests_in_flight']} | "
            f"{right:,} right, {wrong} wrong | {found['load_s']['median']:.3f} s, at most "
            f"{found['load_s']['max']:.2f} s | {tried}, each answered within {slowest:.1f} s | {growth} |"
        )
    return "\n".join(rows) if len(rows) > 2 else ""


def make_report(documents: Sequence[Document]) -> str:
    """All of it; a part without results is left out."""
    parts = [
        ("Answers", matrix_tables(documents) if any(d["cases"] for d in documents) else ""),
        ("Not right", failures(documents)),
        ("Sorting tokens by adapter and local expert", align_table(documents)),
        ("Over HTTP", http_table(documents)),
        ("While experts move (EPLB)", eplb_part(documents)),
        ("Different adapters on data-parallel engines", dp_part(documents)),
        ("Beside verl, adapters in memory", verl_table(documents)),
        ("Load times, stock → lorashard", load_table(documents)),
        ("The time of a step", speed_part(documents)),
        (
            "From a trainer to answers, and what running requests notice",
            publishing_table(documents),
        ),
        ("A thousand loads on a live server, bad adapters among them", cycles_table(documents)),
    ]
    return "\n\n".join([INTRO.strip(), *(f"## {t}\n\n{text}" for t, text in parts if text)]) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.report", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    print(make_report([json.loads(file.read_text()) for file in parser.parse_args().files]), end="")
