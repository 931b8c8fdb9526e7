"""What rl_swaps.py reports of a server: its memory, whether that grows, its prefix cache."""

import contextlib
import shutil
import statistics
import subprocess
import urllib.request
from pathlib import Path

SETTLE, WINDOW = 20, 20  # steps before memory is judged, and steps whose median is taken


def memory_of_tree(pid):
    """MB of a process and all below it: resident, and proportional where the kernel tells that."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    tree, total = [pid], {"rss_mb": 0, "pss_mb": 0}
    for process in tree:
        tree += [child for child, parent in parents.items() if parent == process]
        total["rss_mb"] += _kilobytes(f"/proc/{process}/status", "VmRSS:")
        total["pss_mb"] += _kilobytes(f"/proc/{process}/smaps_rollup", "Pss:")
    return {name: round(size / 1024, 2) for name, size in total.items() if size}


def _kilobytes(path, field):
    with contextlib.suppress(OSError):
        for line in Path(path).read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1])
    return 0


def gpu_memory():
    """MB used on all GPUs that nvidia-smi sees."""
    if not shutil.which("nvidia-smi"):
        return {}
    ask = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    values = subprocess.run(ask, capture_output=True, text=True, check=False).stdout.split()
    known = values and all(value.isdigit() for value in values)
    return {"gpu_mb": sum(map(int, values))} if known else {}


def flatness(rows, tolerance):
    """Growth from the median of steps 20 to 39 to that of the last 20 steps, in MB a step."""
    verdict = {"tolerance_mb_per_step": tolerance, "flat": None}
    resident = "pss_mb" if all("pss_mb" in row for row in rows) else "rss_mb"
    for name in ("rss_mb", "pss_mb", "gpu_mb"):
        pairs = [(row["step"], row[name]) for row in rows if name in row]
        first = [pair for pair in pairs if SETTLE <= pair[0] < SETTLE + WINDOW]
        last = [pair for pair in pairs if pair[0] >= max(len(rows) - WINDOW, SETTLE + WINDOW)]
        if not first or not last:
            continue  # not known, or too few steps to say
        (x0, y0), (x1, y1) = (map(statistics.median, zip(*part)) for part in (first, last))
        slope = (y1 - y0) / (x1 - x0)
        verdict[name] = {"begin": y0, "end": y1, "per_step": round(slope, 4)}
        if name in (resident, "gpu_mb"):
            verdict["flat"] = verdict["flat"] is not False and slope <= tolerance
    return verdict


def columns(rows):
    """The least, the median and the most of what every step has."""
    values = {
        name: [row[name] for row in rows if name in row]
        for name in (rows[-1] if rows else ())
        if name.endswith("_s") or name.startswith("gap")
    }
    return {
        name: {"min": min(v), "median": statistics.median(v), "max": max(v)}
        for name, v in values.items()
    }


def cache_hits(server):
    """Tokens that vLLM took from its prefix cache so far; 0 where it does not say."""
    with contextlib.suppress(OSError):
        with urllib.request.urlopen(server.rstrip("/") + "/metrics", timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        hits = [line for line in lines if line.startswith("vllm:prefix_cache_hits_total")]
        return sum(float(line.rsplit(" ", 1)[1]) for line in hits)
    return 0.0
