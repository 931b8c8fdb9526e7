"""Measure lorashard against plain tools.

    python -m tests.bench --scale 0.05            seconds, for a first look
    python -m tests.bench --work /data/bench      minutes and about 20 GB of disk
    python -m tests.bench --growth                whether twice the bytes cost twice the time

A missed target is marked, but nothing fails: a benchmark is not a test.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from compileall import compile_dir
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lorashard
from tests.bench.chart import draw_chart
from tests.bench.growth import bench_growth
from tests.bench.machine import describe_disk, describe_machine
from tests.bench.models import FORMS, MODELS
from tests.bench.pull import NETWORKS, PART, bench_pull
from tests.bench.rows import Row
from tests.bench.suite import Settings, bench_form, bench_help
from tests.bench.table import print_table

Document = dict[str, Any]


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", choices=sorted(MODELS), default="glm-4.5-air")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="fraction of the model's layers (default: 1.0)"
    )
    parser.add_argument("--form", choices=FORMS, help="measure only this form (default: both)")
    parser.add_argument(
        "--only-pull", action="store_true", help="measure only pull; keep the rest of --json's FILE"
    )
    parser.add_argument(
        "--growth",
        action="store_true",
        help="measure only how the cost of split grows with bytes, tensors and ranks",
    )
    parser.add_argument("--ep-size", type=int, default=8, help="default: 8")
    parser.add_argument("--repeat", type=int, default=3, help="rounds (default: 3)")
    parser.add_argument(
        "--work",
        type=Path,
        help="directory on the disk to measure; adapters are kept there for the next run"
        " (default: a temporary directory)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all runs")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="draw the ratios as an SVG")
    return parser.parse_args()


def _measure(args: argparse.Namespace, settings: Settings) -> list[Row]:
    rows: list[Row] = []
    for form in [args.form] if args.form else FORMS:
        rows += bench_form(settings, form)
    rows += bench_help()
    return rows


def _to_json(args: argparse.Namespace, rows: Sequence[Row], machine: dict[str, str]) -> Document:
    return {
        "model": args.model,
        "scale": args.scale,
        "ep_size": args.ep_size,
        "machine": machine,
        "rows": [
            {
                **asdict(row),
                "cpu_seconds": row.cpu_seconds,
                "spread": row.spread,
                "is_target_met": row.is_target_met,
            }
            for row in rows
        ],
    }


def _write_json(file: Path, document: Document, pulls: Document) -> None:
    if not document and file.exists():
        document = json.loads(file.read_text(encoding="utf-8"))
    pulls = {**pulls, "layers_of_scale": PART, "networks": [asdict(each) for each in NETWORKS]}
    text = json.dumps({**document, "pull": pulls}, indent=2) + "\n"
    file.write_text(text, encoding="utf-8")


@contextmanager
def _work_directory(named: Path | None) -> Iterator[Path]:
    if named is not None:
        named.mkdir(parents=True, exist_ok=True)
        yield named
        return
    with tempfile.TemporaryDirectory(prefix="lorashard-bench-") as made:
        yield Path(made)


def main() -> None:
    args = _parse_arguments()
    compile_dir(lorashard.__path__[0], quiet=1)  # as an installed package is
    with _work_directory(args.work) as work:
        machine = describe_machine() | describe_disk(work)
        settings = Settings(args.model, args.scale, args.ep_size, args.repeat, work)
        if args.growth:
            print_table("how the cost grows (medians)", list(bench_growth(settings)), machine)
            return
        rows = [] if args.only_pull else _measure(args, settings)
        pulls = list(bench_pull(settings))

    if rows:
        print_table("lorashard against plain tools (medians)", rows, machine)
    print_table("pull of one rank, from a Hub on loopback (medians)", pulls, machine)
    if args.json:
        document = _to_json(args, rows, machine) if rows else {}
        _write_json(args.json, document, _to_json(args, pulls, machine))
    if args.chart and rows:
        sizes = {row.form: row.size_bytes for row in rows if row.what == "cp"}
        subtitle = f"{args.model}, EP {args.ep_size}: " + ", ".join(
            f"{form} {(size_bytes or 0) / 1e9:.1f} GB" for form, size_bytes in sizes.items()
        )
        subtitle += f". {machine['cpu']}, {machine['cores']} cores."
        args.chart.write_text(draw_chart(rows, subtitle), encoding="utf-8")


if __name__ == "__main__":
    main()
