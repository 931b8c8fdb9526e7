"""The other end of verl's transfer: processes that hold an adapter on their GPU and send it.

verl has one trainer process for each rank of the engine, on the same GPU; each sends to its own
worker only. The sender is verl's.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

# verl's default is 2048 MB; these adapters of 2 MB are to come in several buckets, as large ones do.
BUCKET_MB = 1
START_LIMIT_S, SEND_LIMIT_S = 120.0, 60.0


@dataclass(frozen=True, slots=True)
class Sending:
    """One update. experts: those to send, where each has tensors of its own; None: all."""

    adapter: Path
    use_shm: bool
    experts: tuple[int, ...] | None = None


def socket_of(rank: int) -> str:
    """The name on which verl's worker of that rank listens, by the variables that verl sets."""
    job, replica = os.environ["VERL_RAY_JOB_ID"], os.environ["VERL_REPLICA_RANK"]
    return f"ipc:///tmp/rl-colocate-zmq-{job}-replica-{replica}-rank-{rank}.sock"


def serve(rank: int, orders: Connection) -> None:
    """Send what is asked for, until the other end is closed."""
    from tests.gpu.verl_files import transfer_module

    torch.cuda.set_device(rank)
    transfer = transfer_module()
    orders.send("ready")
    while (sending := _received(orders)) is not None:
        file = sending.adapter / "adapter_model.safetensors"
        tensors = load_file(file, device=f"cuda:{rank}")
        sender = transfer.BucketedWeightSender(
            zmq_handle=socket_of(rank), bucket_size_mb=BUCKET_MB, use_shm=sending.use_shm
        )
        asyncio.run(sender.async_send_weights(_chosen(tensors, sending.experts)))
        orders.send("sent")


def _received(orders: Connection) -> Sending | None:
    try:
        sending: Sending = orders.recv()
    except EOFError:
        return None
    return sending


def _chosen(
    tensors: dict[str, Tensor], experts: tuple[int, ...] | None
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors.items():
        parts = name.split(".")
        number = parts[parts.index("experts") + 1] if "experts" in parts else ""
        if experts is None or not number.isdecimal() or int(number) in experts:
            yield name, tensor


class Trainers:
    """One process for each rank."""

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._running: list[tuple[BaseProcess, Connection]] = []

    def send(self, sendings: Sequence[Sending]) -> None:
        """Begin to send, one for each rank. Starts the processes if they do not run."""
        if not self._running:
            self._running = [self._started(rank) for rank in range(self._num_ranks)]
            for _, orders in self._running:
                _expect("ready", orders, START_LIMIT_S)
        for (_, orders), sending in zip(self._running, sendings):
            orders.send(sending)

    def wait(self) -> None:
        """Until every rank has taken everything. Raises RuntimeError."""
        for _, orders in self._running:
            _expect("sent", orders, SEND_LIMIT_S)

    def end(self) -> None:
        """After an update that failed, they would wait for the worker for ever."""
        for process, _ in self._running:
            process.kill()
        self._running = []

    def _started(self, rank: int) -> tuple[BaseProcess, Connection]:
        context = multiprocessing.get_context("spawn")
        mine, theirs = context.Pipe()
        process = context.Process(target=serve, args=(rank, theirs), daemon=True)
        process.start()
        theirs.close()
        return process, mine


def _expect(word: str, orders: Connection, limit_s: float) -> None:
    try:
        if not orders.poll(limit_s):
            raise RuntimeError(f"a trainer did not say {word!r} within {limit_s:.0f} s")
        orders.recv()
    except EOFError:
        raise RuntimeError(f"a trainer ended before it said {word!r}") from None
