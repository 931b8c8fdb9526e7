"""Prometheus metrics of the loads, in the registry that vLLM's /metrics collects from.

Workers are separate processes. Their counts reach /metrics if prometheus_client keeps values in
files, that is, if PROMETHEUS_MULTIPROC_DIR is set before the start (vLLM sets it itself for several
API servers); otherwise they stay in the worker. Whatever prometheus_client raises, such as
FileNotFoundError for a missing directory, is for the caller to handle.
"""

from __future__ import annotations

from functools import cache
from typing import Any

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


@cache
def _metrics() -> tuple[Any, Any, Any]:
    from prometheus_client import Counter, Histogram

    labels = ["ep_rank", "kind"]
    return (
        Histogram(
            "lorashard_adapter_load_seconds",
            "Time to read one rank's share of an adapter into pinned memory.",
            labels,
            buckets=_SECONDS,
        ),
        Counter("lorashard_adapter_load_bytes", "Bytes read from adapter files.", labels),
        Counter(
            "lorashard_adapter_load_failures", "Adapters that could not be loaded.", ["ep_rank"]
        ),
    )


def record_load(ep_rank: int, kind: str, seconds: float, num_bytes: int) -> None:
    """Count one load. kind: as in LoadReport."""
    histogram, size, _ = _metrics()
    histogram.labels(ep_rank, kind).observe(seconds)
    size.labels(ep_rank, kind).inc(num_bytes)


def record_failure(ep_rank: int) -> None:
    """Count one load that failed on this rank."""
    _metrics()[2].labels(ep_rank).inc()
