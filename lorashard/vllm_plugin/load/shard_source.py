"""A shard directory -> AdapterContents. Rank files are opened at their first use.

The directory itself is opened once, so all that is read belongs to one version of it, even if
another one takes its place during the load.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from blake3 import blake3

from lorashard.adapter.config import CONFIG_NAME, parse_config
from lorashard.adapter.keys import Matrix
from lorashard.errors import AdapterError, HeaderError, ManifestError, ShardError
from lorashard.rules import DAMAGED_BYTES, REPLACED_WHILE_READ
from lorashard.shards.directory import MAX_MANIFEST_BYTES, check_header, read_manifest
from lorashard.shards.manifest import Manifest, ShardFile
from lorashard.shards.manifest_parser import parse_manifest
from lorashard.shards.names import MANIFEST_NAME, REPLICATED_NAME, rank_file_name
from lorashard.shards.replan import find_contradictions, is_own_config
from lorashard.shards.seal import CHANGED, is_seal_broken
from lorashard.storage.held_directory import HeldDirectory
from lorashard.storage.local import read_at
from lorashard.storage.safetensors_file import read_header
from lorashard.storage.small_files import read_small_file
from lorashard.vllm_plugin.load.assembly import ShardStack
from lorashard.vllm_plugin.load.contents import REPLICATED, AdapterContents, ModuleContents
from lorashard.vllm_plugin.load.rests import rest_if_due
from lorashard.vllm_plugin.settings import verifies_fully


def open_shard_directory(path: Path, stack: ExitStack) -> AdapterContents:
    """Read the manifest and the configuration. What is opened later is closed with `stack`.

    Raises ManifestError, ShardError or AdapterError. `stack` raises ShardError as it closes a file
    that has changed since it was opened.
    """
    try:
        held = HeldDirectory(path)
        stack.callback(held.close)
        raw = held.read(MANIFEST_NAME, MAX_MANIFEST_BYTES)
    except (AdapterError, OSError):
        read_manifest(path)  # raises, and says what is there instead
        raise
    manifest = parse_manifest(raw, str(path / MANIFEST_NAME))
    rest_if_due()
    try:
        config_bytes = held.read(CONFIG_NAME)
    except (AdapterError, OSError):
        _check_not_replaced(held)
        read_small_file(path, CONFIG_NAME)  # raises, and says why
        raise
    if not is_own_config(manifest, config_bytes):
        raise ManifestError(
            path / CONFIG_NAME,
            "not the file that the shards were made from",
            hint=_COPY_AGAIN,
            rule=DAMAGED_BYTES,
        )
    contradiction = next(find_contradictions(manifest, None), None)
    if contradiction is not None:
        raise ManifestError(
            path / MANIFEST_NAME, contradiction, hint=_COPY_AGAIN, rule=DAMAGED_BYTES
        )
    if is_seal_broken(raw):
        raise ManifestError(path / MANIFEST_NAME, CHANGED, hint=_COPY_AGAIN, rule=DAMAGED_BYTES)
    rest_if_due()
    files = stack.enter_context(_checked_files(held, manifest))
    shared = _stacks_in(manifest.files[REPLICATED_NAME], manifest, shared=True)
    # The rank files' tensors differ in dimension 0 alone, so the first file describes them all.
    ranked = _stacks_in(manifest.files[rank_file_name(0, manifest.placement.ep_size)], manifest)
    modules = tuple(
        ModuleContents(
            name, info.gate_up, info.scaling,
            (*ranked.get(name, ()), *shared.get(name, ())), manifest.placement.ranks_of(name),
        )
        for name, info in manifest.modules.items()
    )  # fmt: skip
    of_experts = {stack.name for stacks in shared.values() for stack in stacks}
    dense = tuple(e for e in manifest.files[REPLICATED_NAME].tensors if e.name not in of_experts)
    return AdapterContents(
        parse_config(config_bytes, str(path / CONFIG_NAME)),
        manifest.placement.num_experts,
        manifest.gate_up_known,
        modules,
        dense,
        files,
        version=blake3(raw).hexdigest(),
    )


_COPY_AGAIN = "Copy the whole directory again: its files belong together."


@contextmanager
def _checked_files(held: HeldDirectory, manifest: Manifest) -> Iterator[ShardFiles]:
    files = ShardFiles(held, manifest)
    try:
        yield files
        files.check_unchanged()
    finally:
        files.close()


def _check_not_replaced(held: HeldDirectory) -> None:
    """Raise ShardError if another directory has taken this one's place, or none is there."""
    if held.was_replaced():
        raise ShardError(
            f"{held.path.name}: the directory was replaced while it was being loaded.",
            hint="Load the adapter again.",
            rule=REPLACED_WHILE_READ,
        )


def _stacks_in(
    file: ShardFile, manifest: Manifest, *, shared: bool = False
) -> dict[str, list[ShardStack]]:
    """The expert stacks of one shard file, by module. shared: whether the file is the replicated one."""
    by_module: dict[str, list[ShardStack]] = {}
    entries = {entry.name: entry for entry in file.tensors}
    matrices: tuple[Matrix, ...] = ("lora_A", "lora_B")
    for module, info in manifest.modules.items():
        for projection in info.scaling:
            for matrix in matrices:
                entry = entries.get(f"{module}.{projection}.{matrix}")
                if entry is None:
                    continue
                if len(entry.shape) != 3:
                    raise ShardError(
                        f"{entry.name} has {len(entry.shape)} dimensions, not 3.",
                        rule=DAMAGED_BYTES,
                    )
                by_module.setdefault(module, []).append(
                    ShardStack(
                        entry.name, projection, matrix, entry.dtype, *entry.shape[1:], shared
                    )
                )
    return by_module


class ShardFiles:
    """The RankSources of a shard directory. Offsets are the manifest's."""

    def __init__(self, directory: HeldDirectory, manifest: Manifest) -> None:
        self._directory = directory
        self._manifest = manifest
        self._offsets: dict[int, dict[str, int]] = {}
        self._opened: dict[int, RankFile] = {}

    def offset_of(self, ep_rank: int, name: str) -> int:
        """First byte of a tensor. Raises ShardError if the file has no such tensor."""
        file_name, recorded = self._recorded(ep_rank)
        if ep_rank not in self._offsets:
            self._offsets[ep_rank] = {entry.name: entry.begin for entry in recorded.tensors}
        if name not in self._offsets[ep_rank]:
            raise ShardError(
                f"rank file {file_name}: no tensor {name}.", hint=_COPY_AGAIN, rule=DAMAGED_BYTES
            )
        return self._offsets[ep_rank][name]

    def source_of(self, ep_rank: int) -> RankFile:
        """The checked file of a rank. Raises ShardError."""
        if ep_rank not in self._opened:
            name, recorded = self._recorded(ep_rank)
            self._opened[ep_rank] = RankFile(self._directory, name, recorded)
        return self._opened[ep_rank]

    def check_unchanged(self) -> None:
        """Raise ShardError if a file that was opened has changed since."""
        for file in self._opened.values():
            file.check_unchanged()

    def close(self) -> None:
        """Close what was opened."""
        for file in self._opened.values():
            file.close()

    def _recorded(self, ep_rank: int) -> tuple[str, ShardFile]:
        ep_size = self._manifest.placement.ep_size
        name = REPLICATED_NAME if ep_rank == REPLICATED else rank_file_name(ep_rank, ep_size)
        return name, self._manifest.files[name]


class RankFile:
    """A ByteSource over one shard file whose size and header are those in the manifest.

    With LORASHARD_VERIFY=full its bytes are, too. Raises ShardError.
    """

    def __init__(self, directory: HeldDirectory, name: str, recorded: ShardFile) -> None:
        self._directory = directory
        self._path = directory.path / name
        try:
            self._file = directory.file(name)
        except HeaderError as err:
            _check_not_replaced(directory)
            raise ShardError(
                f"rank file {name}: {err.path}: {err.reason}.", hint=_COPY_AGAIN, rule=err.rule
            ) from err
        try:
            self._check(recorded)
        except BaseException:
            self.close()
            raise

    def _check(self, recorded: ShardFile) -> None:
        name, path = self._path.name, self._path
        try:
            check_header(path, read_header(self._file)[1], recorded)
        except HeaderError as err:
            raise ShardError(
                f"rank file {name}: {err.path}: {err.reason}.",
                hint="Copy the file again.",
                rule=err.rule,
            ) from err
        except ShardError as err:
            # The name again, without the path: vLLM's server hides paths in its answers.
            raise ShardError(
                f"rank file {name}: {err.message}", hint=err.hint, rule=err.rule
            ) from err
        if verifies_fully():
            opened = f"/proc/self/fd/{self._file.fileno()}"
            digest = blake3(max_threads=blake3.AUTO).update_mmap(opened).hexdigest()
            if digest != recorded.digest.blake3:
                raise ShardError(
                    f"rank file {name}: {path}: its bytes are not those that were written.",
                    hint=_COPY_AGAIN,
                    rule=DAMAGED_BYTES,
                )

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` from byte `offset`; several threads may do so at once."""
        done = read_at(self._file.fileno(), buffer, offset)
        if done < len(buffer):
            raise ShardError(
                f"rank file {self._path.name}: it ended at byte {offset + done} while being read.",
                hint=_COPY_AGAIN,
                rule=REPLACED_WHILE_READ,
            )

    def check_unchanged(self) -> None:
        """Raise ShardError if it was written to, or may have been, since it was opened."""
        if not self._directory.has_kept(self._file):
            raise ShardError(
                f"rank file {self._path.name}: it changed while it was being loaded.",
                hint="Load the adapter again when nobody writes there.",
                rule=REPLACED_WHILE_READ,
            )

    def close(self) -> None:
        """Close the file."""
        self._file.close()
