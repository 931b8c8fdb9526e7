"""What one rank does in each round of a commit.

In: its tensors, the directory that all ranks write, and what the others have said. Out: its bytes in
the files, the digests of some of them, and in the end the manifest, which every rank can make.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from blake3 import blake3

from lorashard.adapter.config import CONFIG_NAME, WEIGHTS_NAME
from lorashard.errors import AdapterError
from lorashard.publish.exchange import OWN_PREFIX
from lorashard.publish.files import choose_files, name_files
from lorashard.publish.gathered import GatheredAdapter, Serving
from lorashard.publish.own_data import OwnTensor, write_own
from lorashard.publish.parts import Part
from lorashard.publish.planned import KeptCommits, PlannedCommit, plan_commit
from lorashard.shards.describe import make_manifest
from lorashard.shards.directory import write_manifest, write_notice
from lorashard.shards.manifest import FileDigest, Manifest, SourceInfo
from lorashard.storage.digests import digest_file
from lorashard.storage.local import (
    LocalFile,
    SharedWriter,
    Writer,
    opened_to_write,
    sync_all,
    write_all,
    write_new,
)
from lorashard.storage.mapped import MappedWriter, has_all_pages
from lorashard.storage.syscalls import available_cpus
from lorashard.writing.restore import restore_source

_MANY_CPUS, _MOST_THREADS = 8, 16
_kept = KeptCommits()


class OwnShare:
    """One rank's share of the work on one adapter.

    config: adapter_config.json. own: the tensors that this rank has.
    """

    def __init__(
        self,
        directory: Path,
        rank: int,
        world_size: int,
        config: bytes,
        serving: Serving,
        own: Sequence[OwnTensor],
        *,
        sync: bool,
    ) -> None:
        self._directory = directory
        self._rank, self._world_size = rank, world_size
        self._config, self._serving = config, serving
        self._own = own
        self._sync = sync
        self._planned: PlannedCommit | None = None
        self._made: Manifest | None = None
        self._files: tuple[Path, ...] = ()

    @property
    def manifest(self) -> Manifest:
        """What the last round has made."""
        assert self._made is not None, "all rounds are done"
        return self._made

    @property
    def _commit(self) -> PlannedCommit:
        assert self._planned is not None, "the round before has planned it"
        return self._planned

    @property
    def _adapter(self) -> GatheredAdapter:
        return self._commit.adapter

    def describe(self) -> dict[str, str]:
        """Round 1: what this rank has. Said to the others: the digests of that and of the config."""
        parts = [part for tensor in self._own for part in tensor.parts]
        table = json.dumps(
            [[p.name, p.dtype, p.shape, p.axis, p.begin, p.end, p.is_copy] for p in parts]
        ).encode()
        write_new(self._directory / _table_name(self._rank), table, sync=False)
        return {"config": blake3(self._config).hexdigest(), "parts": blake3(table).hexdigest()}

    def write(self, said: Sequence[Any]) -> None:
        """Round 2: plan, and write this rank's bytes.

        said: the descriptions of all ranks. Raises LayoutError for what several ranks have, or none.
        """
        if any(one["config"] != said[0]["config"] for one in said):
            raise AdapterError(
                "The ranks have different LoRA configurations.",
                hint="Give every rank's writer the same one.",
            )
        # The representation of a frozen dataclass says all that is in it.
        form = (self._config, repr(self._serving), *(one["parts"] for one in said))
        self._planned = _kept.find(form, self._plan)
        self._files = choose_files(self._directory, self._adapter.plan, self._commit.gaps)
        with ExitStack() as stack:
            fds = [stack.enter_context(opened_to_write(path, shared=True)) for path in self._files]
            if self._rank == 0:
                for fd, file in zip(fds, self._adapter.plan.files):
                    os.truncate(fd, file.size_bytes)  # what nobody fills of a new file is zero
                    write_all(fd, memoryview(file.header), 0)
            writers = [
                stack.enter_context(_writer(fd, file.size_bytes))
                for fd, file in zip(fds, self._adapter.plan.files)
            ]
            write_own(
                self._own, self._commit.places, self._writes, writers,
                available_cpus() // self._world_size,
            )  # fmt: skip
            if self._sync:
                sync_all(fds)

    def digest(self) -> dict[str, str]:
        """Round 3, said to the others: the digests of this rank's share of the files, by name."""
        found = {}
        if self._rank == 0:
            found[WEIGHTS_NAME] = self._source_digest()
        for i in _digested_by(self._rank, self._world_size, len(self._files)):
            found[self._files[i].name] = digest_file(self._files[i], self._digest_threads())
        return found

    def describe_all(self, said: Sequence[Mapping[str, str]]) -> None:
        """Round 4: make the manifest. said: the digests of all ranks."""
        digests = {name: digest for one in said for name, digest in one.items()}
        adapter = self._adapter
        files = {
            CONFIG_NAME: FileDigest(len(self._config), blake3(self._config).hexdigest()),
            WEIGHTS_NAME: FileDigest(adapter.index.file_size, digests[WEIGHTS_NAME]),
        }
        self._made = make_manifest(
            SourceInfo(None, None, files, adapter.header),
            adapter.options,
            adapter.layout,
            adapter.placement,
            adapter.plan,
            [digests[file.name] for file in adapter.plan.files],
            dtype=None,
        )

    def finish(self, manifest: Manifest) -> None:
        """What rank 0 adds at the end."""
        name_files(self._directory, self._files)
        write_new(self._directory / CONFIG_NAME, self._config, sync=self._sync)
        write_notice(self._directory, sync=self._sync)
        write_manifest(self._directory, manifest, sync=self._sync)

    def _writes(self, part: Part) -> bool:
        return self._commit.writers.get(part.name, self._rank) == self._rank

    def _plan(self) -> PlannedCommit:
        tables = [self._directory / _table_name(rank) for rank in range(self._world_size)]
        parts = [list(map(_part, json.loads(table.read_bytes()))) for table in tables]
        return plan_commit(self._config, self._serving, parts)

    def _source_digest(self) -> str:
        adapter = self._adapter
        with ExitStack() as stack:
            files = [stack.enter_context(closing(LocalFile(path))) for path in self._files]
            return restore_source(
                adapter.plan, adapter.header, files, len, lambda _: None,
                threads=self._digest_threads(),
            )  # fmt: skip

    def _digest_threads(self) -> int:
        """Rank 0 has as much to digest as all others, and they do it at the same time."""
        num_cpus = available_cpus()
        if num_cpus < _MANY_CPUS:
            return 1
        num_others = min(self._world_size - 1, len(self._files))
        if num_others == 0:
            return min(_MOST_THREADS, num_cpus)
        return min(_MOST_THREADS, max(1, num_cpus // 2 // (num_others if self._rank else 1)))


@contextmanager
def _writer(fd: int, size_bytes: int) -> Iterator[Writer]:
    """How this rank writes to a file. With few processors, mapping it takes longer than it saves."""
    if available_cpus() < _MANY_CPUS or not has_all_pages(fd, size_bytes):
        yield SharedWriter(fd)
        return
    with closing(MappedWriter(fd)) as mapped:
        yield mapped


def _digested_by(rank: int, world_size: int, num_files: int) -> range:
    """Which files a rank digests. Rank 0 has the source, which is as large as all of them."""
    if world_size == 1:
        return range(num_files)
    return range(rank - 1, num_files, world_size - 1) if rank else range(0)


def _table_name(rank: int) -> str:
    return f"{OWN_PREFIX}{rank}-table.json"


def _part(values: Sequence[Any]) -> Part:
    name, dtype, shape, *rest = values
    return Part(name, dtype, tuple(shape), *rest)
