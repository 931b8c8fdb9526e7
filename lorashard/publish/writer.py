"""AdapterWriter: each rank of a trainer writes what it has; together that is a shard directory.

`commit` goes in rounds, with a barrier after each: the ranks say what they have, each plans the same
directory and writes its bytes into it, they digest the files, and rank 0 adds the manifest and
renames. Nobody sees another rank's tensors. In memory they write to the files of a version that was
removed before, if a `Publisher` has left some.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lorashard.adapter.base_model import ModelFacts, parse_model_config
from lorashard.adapter.options import LayoutOptions
from lorashard.adapter.read import read_model_facts
from lorashard.errors import LayoutError, ShardError
from lorashard.publish.exchange import Exchange, Round
from lorashard.publish.files import fetch_spare_files
from lorashard.publish.gathered import Serving, dense_names, expert_names, format_config
from lorashard.publish.own_data import OwnTensor, dtype_of
from lorashard.publish.parts import Part
from lorashard.publish.rounds import OwnShare
from lorashard.shards.directory import holds_only_shards, manifest_bytes
from lorashard.shards.expert_map import ExpertMap, read_expert_map
from lorashard.shards.manifest import Manifest, format_manifest
from lorashard.shards.names import MANIFEST_NAME
from lorashard.storage.local import write_new
from lorashard.storage.remote import locate
from lorashard.storage.staging import staged_directory, staging_path
from lorashard.storage.targets import explained_write_errors, resolve_target
from lorashard.vllm_options import Strategy

_SESSION = ".session"
_ROUNDS = ("describe", "write", "digest", "manifest")
_FULL_DISK = "Nothing was published. Free some space, and commit the version again."
_DEFAULT_OPTIONS = LayoutOptions()


class AdapterWriter:
    """Writes one version of an adapter as a shard directory. Every rank makes one, with the same arguments.

    Nothing is written before `commit`; the tensors are referred to until then, and must not change.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        config: Mapping[str, Any] | Any,
        *,
        ep_size: int,
        strategy: Strategy = "linear",
        expert_map: ExpertMap | None = None,
        model: str | os.PathLike[str] | Mapping[str, Any] | None = None,
        options: LayoutOptions = _DEFAULT_OPTIONS,
        rank: int = 0,
        world_size: int = 1,
        force: bool = False,
        sync: bool = True,
    ) -> None:
        """config: PEFT's LoraConfig, or what its adapter_config.json says.

        ep_size, strategy, expert_map, model, options, force, sync: as for `split`; model may be what
        the base model's config.json says, as well.
        rank, world_size: of the trainer's processes that write together.
        Raises AdapterError if the model's or the map's file cannot be read.
        """
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size}")
        self._out = Path(out)
        settings = config if isinstance(config, Mapping) else config.to_dict()
        self._config = format_config(settings)
        self._serving = Serving(
            ep_size,
            strategy,
            read_expert_map(expert_map),
            options,
            _facts(model),
        )
        self._rank, self._world_size = rank, world_size
        self._force, self._sync = force, sync
        self._own: list[OwnTensor] = []
        self._seconds: dict[str, float] = {}

    @property
    def seconds(self) -> Mapping[str, float]:
        """What this rank's part of the commit took: describe, write, digest, manifest, finish; in all.

        "total" is all of it, so the rest of that is waiting for other ranks.
        """
        return self._seconds

    def experts(
        self, module: str, ids: Sequence[int], factors: Mapping[str, tuple[Any, Any]]
    ) -> None:
        """Experts that this rank has, of one MoE layer.

        module: for example "model.layers.3.mlp.experts". ids: their global numbers.
        factors: lora_A [len(ids), r, in] and lora_B [len(ids), out, r] by projection: gate_proj,
        up_proj and down_proj, or the model's own names for them.
        Raises LayoutError for tensors of another size.
        """
        for projection, pair in factors.items():
            names = [expert_names(module, int(expert), projection) for expert in ids]
            for values, own in zip(pair, zip(*names)):
                if values.dim() != 3 or len(values) != len(ids):
                    raise LayoutError(
                        f"{module}: {projection} is {list(values.shape)} for {len(ids)} experts.",
                        hint="Give lora_A as [experts, r, in] and lora_B as [experts, out, r].",
                    )
                shape = tuple(values.shape[1:])
                dtype = dtype_of(values, f"{module}: {projection}")
                parts = tuple(Part(name, dtype, shape, 0, 0, shape[0]) for name in own)
                self._own.append(OwnTensor(parts, values))

    def dense(self, module: str, lora_a: Any, lora_b: Any) -> None:
        """A linear layer that every serving rank needs whole, such as "model.layers.3.self_attn.q_proj".

        lora_a: [r, in]. lora_b: [out, r]. To be given on one rank.
        """
        for name, values in zip(dense_names(module), (lora_a, lora_b)):
            self.tensor(name, values)

    def tensor(
        self,
        name: str,
        values: Any,
        *,
        axis: int = 0,
        begin: int = 0,
        size: int | None = None,
        is_copy: bool = False,
    ) -> None:
        """A tensor by the name that PEFT saves it under, or what this rank has of it.

        begin, size: it is the indices [begin, begin + len) along `axis` of a tensor that has `size`
        of them. is_copy: other ranks have the same; it is written once.
        """
        shape = list(values.shape)
        end = begin + (shape[axis] if shape else 1)
        if size is not None:
            shape[axis] = size
        part = Part(name, dtype_of(values, name), tuple(shape), axis, begin, end, is_copy)
        self._own.append(OwnTensor((part,), values.unsqueeze(0)))

    def commit(self, barrier: Callable[[], object] = lambda: None) -> Manifest:
        """Write the directory, together with the other ranks. It appears whole or not at all.

        barrier: returns once every rank has called it; with several ranks, for example
        `torch.distributed.barrier`. Each rank passes it seven times, also if one of them fails.
        Raises LorashardError: this rank's, or ShardError with another one's.
        """
        began = time.perf_counter()
        target = resolve_target(self._out)
        session = staging_path(target) / _SESSION
        before = _identity(session)  # of a run that was killed
        barrier()
        try:
            with explained_write_errors(target, full_disk=_FULL_DISK), ExitStack() as stack:
                failed = self._begin(stack, target) if self._rank == 0 else None
                barrier()
                if self._rank != 0 and _identity(session) in (None, before):
                    failed = ShardError(
                        f"{target}: rank 0 has not begun to write it.",
                        hint="See rank 0's own error. All ranks must see this directory.",
                    )
                manifest = self._write(session.parent, barrier, failed)
                expected = format_manifest(manifest) if self._rank != 0 else b""
        finally:
            barrier()
        if self._rank != 0 and manifest_bytes(target) != expected:
            raise ShardError(
                f"{target}: rank 0 has not finished it.", hint="See rank 0's own error."
            )
        self._seconds["total"] = time.perf_counter() - began
        return manifest

    def _begin(self, stack: ExitStack, target: Path) -> Exception | None:
        """What keeps rank 0 from beginning. It is raised once the others know."""
        try:
            staging = stack.enter_context(
                staged_directory(
                    target,
                    last=MANIFEST_NAME,
                    force=self._force,
                    replaceable=holds_only_shards,
                    sync=self._sync,
                )
            )
            fetch_spare_files(staging, target)
            write_new(staging / _SESSION, b"", sync=False)
        except Exception as err:  # noqa: BLE001 - see above
            return err
        return None

    def _write(
        self, staging: Path, barrier: Callable[[], object], failed: Exception | None
    ) -> Manifest:
        share = OwnShare(
            staging,
            self._rank,
            self._world_size,
            self._config,
            self._serving,
            self._own,
            sync=self._sync,
        )
        exchange = Exchange(staging, self._rank, self._world_size, barrier)
        works = (
            lambda _: share.describe(), share.write, lambda _: share.digest(), share.describe_all,
        )  # fmt: skip
        exchange.run(list(map(Round, _ROUNDS, works)), failed)
        self._seconds = exchange.seconds
        manifest = share.manifest
        began = time.perf_counter()
        if self._rank == 0:
            exchange.clear()
            (staging / _SESSION).unlink()
            share.finish(manifest)
        self._seconds["finish"] = time.perf_counter() - began
        return manifest


def make_and_commit(
    make: Callable[[], AdapterWriter],
    out: str | os.PathLike[str],
    rank: int,
    world_size: int,
    barrier: Callable[[], object],
) -> Manifest:
    """Make a rank's writer for `out`, give it what the rank has, and commit.

    If `make` fails, the others are not left at their barriers, and are told why. Raises what `make` does.
    """
    try:
        writer = make()
    except Exception as err:
        if world_size > 1:
            _attend_commit(resolve_target(Path(out)), rank, world_size, barrier, err)
        raise
    return writer.commit(barrier)


def _attend_commit(
    target: Path, rank: int, world_size: int, barrier: Callable[[], object], error: Exception
) -> None:
    """Come to the barriers of the other ranks' `commit`, and tell them what this one has met."""
    session = staging_path(target) / _SESSION
    before = _identity(session)
    barrier()
    barrier()  # rank 0 has begun, unless it is this one
    exchange = Exchange(session.parent, rank, world_size, barrier)
    if rank != 0 and _identity(session) not in (None, before):
        exchange.tell_failure(_ROUNDS[0], error)
    for _ in _ROUNDS:
        barrier()
    barrier()


def _facts(model: str | os.PathLike[str] | Mapping[str, Any] | None) -> ModelFacts | None:
    if isinstance(model, Mapping):
        return parse_model_config(dict(model), "the base model's config")
    return read_model_facts(locate(model)) if model else None


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns
