"""Many adapters split, several at once. A failure is recorded; the others continue.

In: adapters, as `selection` finds them. Out: an `AdapterOutcome` for each, in their order.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

from lorashard.adapter.options import LoraBLayout, Orientation
from lorashard.errors import AdapterError, LorashardError
from lorashard.progress import Progress
from lorashard.shards.directory import claims_to_be_shards
from lorashard.shards.expert_map import ExpertMap
from lorashard.split.parts import Part
from lorashard.split.pipeline import SplitRequest, request_of
from lorashard.split.run import SplitResult, SplitStatus, run_split
from lorashard.split.selection import (
    SplitJob,
    check_names_are_fixed,
    find_adapters,
    plan_jobs,
)
from lorashard.storage.parallel import Outcome, run_concurrently
from lorashard.storage.remote import locate
from lorashard.vllm_options import Strategy

# "ignored": a shard directory among the adapters, as `runs/*` finds it the second time.
BatchStatus = Literal[SplitStatus, "ignored", "failed"]


@dataclass(frozen=True, slots=True)
class AdapterOutcome:
    """What became of one adapter of a batch.

    adapter: as it was named. target: the directory for its shards, or their URL.
    result: if it was split, or found to be split already. error: if it failed.
    """

    adapter: str
    target: Path | str
    status: BatchStatus
    result: SplitResult | None = None
    error: LorashardError | None = None


class Splitter(Protocol):
    """How the adapter of a job gets to its target."""

    def __call__(
        self,
        job: SplitJob,
        request: SplitRequest,
        *,
        force: bool,
        resume: bool,
        dry_run: bool,
        started: Callable[[int, int], None],
        progress: Progress,
    ) -> SplitResult:
        """As `run_split`. started: called with the bytes of all passes, and how many of them are done."""


def split_here(
    job: SplitJob,
    request: SplitRequest,
    *,
    force: bool,
    resume: bool,
    dry_run: bool,
    started: Callable[[int, int], None],
    progress: Progress,
) -> SplitResult:
    """Split to a local directory."""
    return run_split(
        job.adapter, Path(job.target), request, force=force, resume=resume, dry_run=dry_run,
        started=lambda size_bytes: started(size_bytes, 0), progress=progress,
    )  # fmt: skip


def split_adapters(
    adapters: Iterable[str | os.PathLike[str]],
    out: str | os.PathLike[str] | None,
    ep_size: int | SplitRequest,
    *,
    strategy: Strategy = "linear",
    expert_map: ExpertMap | None = None,
    model: str | os.PathLike[str] | None = None,
    num_experts: int | None = None,
    lora_b_layout: LoraBLayout | None = None,
    orientation: Orientation | None = None,
    dtype: str | None = None,
    allow_pickle: bool = False,
    sync: bool = True,
    workers: int = 2,
    force: bool = False,
    resume: bool = False,
    part: Part | None = None,
    progress: Progress = lambda _: None,
    finished: Callable[[AdapterOutcome], None] = lambda _: None,
) -> tuple[AdapterOutcome, ...]:
    """Split many adapters, `workers` at once; the outcome of each, in the order of the adapters.

    adapters: directories, hf://owner/name[@revision], other URLs, patterns such as "runs/*", or Hub
    collections, hf://collections/owner/name. Shard directories among them are ignored.
    ep_size ... sync, force, resume: as `split_adapter` takes them.
    out: the directory for all of them, each as OUT/NAME-epN (OUT/epN-of-checkpoint-130);
    None: each beside its adapter.
    part: only this part of the adapters, on a machine of several that are given the same ones; then they
    must be named, not found by patterns.
    progress: called in any thread with the bytes of all of them that were done since the last call.
    finished: called in this thread as each ends.
    Raises AdapterError or ShardError if the adapters cannot be found or would get the same target;
    what goes wrong with one of them is in its outcome.
    """
    request = request_of(
        ep_size,
        strategy=strategy,
        expert_map=expert_map,
        model=model,
        num_experts=num_experts,
        lora_b_layout=lora_b_layout,
        orientation=orientation,
        dtype=dtype,
        allow_pickle=allow_pickle,
        sync=sync,
    )
    names = [os.fspath(adapter) for adapter in adapters]
    if part is not None:
        check_names_are_fixed(names)
    found = find_adapters(names)
    if not found:
        raise AdapterError("No adapter is named.", hint="Name one or more adapters.")
    jobs = plan_jobs(found, None if out is None else Path(out), request.ep_size, batch=True)
    jobs = jobs if part is None else part.of(jobs)
    return split_jobs(
        jobs,
        request,
        workers=workers,
        force=force,
        resume=resume,
        progress=lambda _, size_bytes: progress(size_bytes),
        finished=finished,
    )


def split_jobs(
    jobs: Sequence[SplitJob],
    request: SplitRequest,
    *,
    workers: int,
    force: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    split: Splitter = split_here,
    started: Callable[[str, int, int], None] = lambda *_: None,
    progress: Callable[[str, int], None] = lambda *_: None,
    finished: Callable[[AdapterOutcome], None] = lambda _: None,
) -> tuple[AdapterOutcome, ...]:
    """Split the adapters of `jobs`.

    started: called in any thread with an adapter, the bytes of all passes over it that are to come, and
    how many of them are done.
    progress: called in any thread with an adapter and its bytes that were done since the last call.
    """

    def work(job: SplitJob, check_cancelled: Progress) -> SplitResult | None:
        if claims_to_be_shards(locate(job.adapter)):
            return None

        def advance(size_bytes: int) -> None:
            check_cancelled(size_bytes)
            progress(job.adapter, size_bytes)

        result = split(
            job, request, force=force, resume=resume, dry_run=dry_run,
            started=lambda *sizes: started(job.adapter, *sizes), progress=advance,
        )  # fmt: skip
        return replace(result, manifest=None)

    outcomes = run_concurrently(
        jobs, work, workers=workers, finished=lambda outcome: finished(_describe(outcome))
    )
    return tuple(map(_describe, outcomes))


def _describe(outcome: Outcome[SplitJob, SplitResult | None]) -> AdapterOutcome:
    job, result, error = outcome.job, outcome.result, outcome.error
    if error is not None:
        return AdapterOutcome(job.adapter, job.target, "failed", error=error)
    if result is None:
        return AdapterOutcome(job.adapter, job.target, "ignored")
    return AdapterOutcome(job.adapter, job.target, result.status, result)
