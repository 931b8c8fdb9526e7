"""What is logged and counted of a load. Reporting never raises.

A load is reported after the ranks have agreed on it. An error on one rank would take the adapter
away from that rank alone; and an error while a failure is counted would hide the failure.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from lorashard.vllm_plugin.load.report import LoadReport
from lorashard.vllm_plugin.metrics import record_failure, record_load

logger = logging.getLogger("vllm.lorashard")


def report_load(report: LoadReport, name: str, number: int) -> None:
    """Log what was loaded, how fast and what would be faster, and count it.

    name, number: of the adapter, as vLLM knows it.
    """
    with _errors_logged():
        logger.info(
            "lorashard: adapter %r (id %d) from %s: experts of ep rank %d of %d (%d of %d in each "
            "of %d layers), %.3f GB in %.3f s, %.1f GB/s%s",
            name, number, report.kind, report.ep_rank, report.ep_size, report.num_local_experts,
            report.num_experts, report.num_layers,
            report.num_bytes / 1e9, report.seconds,
            report.num_bytes / 1e9 / max(report.seconds, 1e-9), _told(report.stages),
        )  # fmt: skip
        if report.num_left_to_mtp:
            logger.info(
                "lorashard: adapter %r: %d modules for multi-token prediction are left out, as vLLM "
                "serves the draft model without LoRA",
                name, report.num_left_to_mtp,
            )  # fmt: skip
        if report.advice:
            logger.warning("lorashard: %s: %s", report.path, report.advice)
    with _errors_logged():
        record_load(report.ep_rank, report.kind, report.seconds, report.num_bytes)


def _told(stages: Mapping[str, float]) -> str:
    """In ms."""
    told = ", ".join(f"{name} {1e3 * seconds:.0f}" for name, seconds in stages.items())
    return f" (ms: {told})" if told else ""


def report_adding(name: str, number: int, seconds: float, waited: Sequence[float]) -> None:
    """Log for how long an adapter kept the engine from its steps.

    seconds: of all of it. waited: of it, for the other ranks, each time that they agreed.
    """
    with _errors_logged():
        logger.info(
            "lorashard: adapter %r (id %d): the engine waited %.2f ms: %.2f for the other ranks to "
            "have it, %.2f for their end, %.2f for what this rank did",
            name, number, 1e3 * seconds, *(1e3 * wait for wait in waited),
            1e3 * (seconds - sum(waited)),
        )  # fmt: skip


def report_failure(ep_rank: int) -> None:
    """Count a load that failed on this rank."""
    with _errors_logged():
        record_failure(ep_rank)


@contextmanager
def _errors_logged() -> Iterator[None]:
    """Whatever goes wrong inside becomes a warning, or nothing if logging is what goes wrong."""
    try:
        yield
    except Exception as err:  # noqa: BLE001 - see the module's docstring
        with suppress(Exception):
            logger.warning(
                "lorashard: the load was not reported (%s: %s). Does PROMETHEUS_MULTIPROC_DIR, if "
                "set, name a directory that can be written?",
                type(err).__name__,
                err,
            )
