"""Split a list of adapters as tasks of a Ray cluster: each task one part of the list.

    python ray_batch.py LIST --ep-size 8 --out /shared/shards --parts 64

LIST, the adapters and OUT are where every node sees them, the adapters also at URLs. A node that is lost takes
its tasks with it; Ray runs them again, and what was finished is kept. An adapter that cannot be split is
reported, as `lorashard split` does, and not tried again. The summary is the one of `lorashard split --json`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import ray

import lorashard
from lorashard.errors import AdapterError


@ray.remote(max_retries=3)  # for a worker or a node that dies; errors of adapters are results
def split_part(names: list[str], out: str, ep_size: int, part: lorashard.Part):
    request = lorashard.SplitRequest(ep_size=ep_size)
    return lorashard.split_adapters(names, out, request, part=part, resume=True)


def split_on_ray(names: list[str], out: str, ep_size: int, parts: int) -> list:
    """What became of each adapter; a part whose workers died again and again raises Ray's error."""
    waiting = [
        split_part.remote(names, out, ep_size, lorashard.Part(index, parts))
        for index in range(parts)
    ]
    outcomes = []
    while waiting:
        (finished,), waiting = ray.wait(waiting)
        for outcome in ray.get(finished):
            outcomes.append(outcome)
            text = str(outcome.error) if outcome.error else str(outcome.target)
            print(f"{len(outcomes)} of {len(names)}: {outcome.status}: {text}", file=sys.stderr)
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("list", type=Path)
    parser.add_argument("--ep-size", type=int, required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--parts", type=int, default=16)
    args = parser.parse_args()
    lines = (line.strip() for line in args.list.read_text().splitlines())
    names = list(dict.fromkeys(line for line in lines if line and not line.startswith("#")))
    if not names:
        raise AdapterError(f"{args.list}: no adapter is named.")
    ray.init()
    outcomes = split_on_ray(names, args.out, args.ep_size, args.parts)
    summary = [
        {
            "adapter": outcome.adapter,
            "status": outcome.status,
            "out": str(outcome.target),
            "error": outcome.error and outcome.error.message,
            "hint": outcome.error and outcome.error.hint,
        }
        for outcome in sorted(outcomes, key=lambda outcome: names.index(outcome.adapter))
    ]
    print(json.dumps(summary, indent=2))
    print(dict(Counter(outcome.status for outcome in outcomes)), file=sys.stderr)
    failed = [outcome.error for outcome in outcomes if outcome.error]
    return failed[0].exit_code if failed else 0


if __name__ == "__main__":
    sys.exit(main())
