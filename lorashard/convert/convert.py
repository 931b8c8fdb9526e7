"""Shards -> a plain PEFT adapter in the layout of choice, with every expert's weight change exact.

What is converted is what the shards hold, so cast shards will do. The new file is written front to
back, and each tensor is read from wherever its slots are. At the same time every shard file is
digested, and must have the digest in the manifest; and each expert's data must be where the placement
says, or the new file never appears. So the shards are read two or three times.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from lorashard.adapter.base_model import merge_facts
from lorashard.adapter.config import CONFIG_NAME, WEIGHTS_NAME, parse_config
from lorashard.adapter.layout import AdapterLayout
from lorashard.adapter.options import ExpertLayout, Orientation
from lorashard.adapter.read import is_plain_adapter, read_model_facts
from lorashard.convert.peft_tensors import OutputTensor
from lorashard.convert.plan import ConversionPlan, plan_conversion
from lorashard.convert.slots import (
    SlotTable,
    find_slots,
    inputs_that_may_be_equal,
    stack_dtypes_in,
)
from lorashard.convert.target import describe_target
from lorashard.convert.tensor_blocks import read_tensor_blocks
from lorashard.dtypes import ELEMENT_SIZE
from lorashard.errors import AdapterError, VerificationError
from lorashard.progress import Progress
from lorashard.shards.directory import (
    LocatedShards,
    Shards,
    local_shards,
    locate_shards,
    opened_files,
)
from lorashard.shards.manifest import Manifest
from lorashard.shards.plan import ShardPlan, Target
from lorashard.shards.replan import check_shards, describe_wrong_digest
from lorashard.storage.digests import digest_of
from lorashard.storage.local import ByteSource, SequentialWriter, write_new
from lorashard.storage.parallel import cancellable_pool, one_ahead, result_of
from lorashard.storage.remote import Location, RemoteFile, locate
from lorashard.storage.staging import check_target, staged_directory
from lorashard.storage.syscalls import reserve
from lorashard.writing.blocks import BLOCK_BYTES
from lorashard.writing.disk_space import check_disk_space
from lorashard.writing.restore import describe_misplaced, proof_bytes

_CHECKERS = 3  # one proves the placement, the others digest a file each


@dataclass(frozen=True, slots=True)
class PreparedConversion:
    """Everything decided about one shard directory, nothing written."""

    shards: Location
    files: tuple[Path | RemoteFile, ...]
    manifest: Manifest
    plan: ShardPlan
    slots: SlotTable
    conversion: ConversionPlan

    @property
    def progress_bytes(self) -> int:
        """What `write_conversion` reports: shards digested, placement proven, adapter written."""
        shard_bytes = sum(file.size_bytes for file in self.plan.files)
        return shard_bytes + proof_bytes(self.manifest) + self.conversion.size_bytes


def convert_shards(
    shards: Shards,
    out: str | os.PathLike[str],
    layout: ExpertLayout,
    *,
    model: str | os.PathLike[str] | None = None,
    orientation: Orientation | None = None,
    force: bool = False,
    progress: Progress = lambda _: None,
) -> PreparedConversion:
    """Write the PEFT adapter `out` with the experts of `shards`. It appears whole or not at all.

    shards: a directory, or hf://owner/name[@revision] or another URL, which is fetched first.
    layout: "per_expert", a pair for each expert, as PEFT writes with transformers 4; or "fused",
    as PEFT >= 0.19 writes with transformers 5 and target_parameters.
    model: the base model's directory, config.json or id on the Hub, for what the shards do not say
    about it. orientation: which way round the fused parameters are, if nothing else says it.
    progress: called with the bytes digested or written since the last call.
    Raises LayoutError for what the layout cannot express, ShardError if the shards are not what
    `split` wrote.
    """
    target = Path(out)
    check_target(target, force=force, replaceable=is_plain_adapter)
    located = locate_shards(shards)
    with local_shards(located) as directory:
        local = replace(located, place=directory)
        prepared = prepare_conversion(local, layout, model=model, orientation=orientation)
        write_conversion(prepared, target, force=force, progress=progress)
    return prepared


def prepare_conversion(
    shards: LocatedShards,
    layout: ExpertLayout,
    *,
    model: str | os.PathLike[str] | None = None,
    orientation: Orientation | None = None,
) -> PreparedConversion:
    """Decide everything. Reads headers, and the lora_A of gate and up until they differ."""
    if layout not in get_args(ExpertLayout):
        raise AdapterError(f"layout {layout!r} is not one of {', '.join(get_args(ExpertLayout))}.")
    checked = check_shards(shards)
    manifest, source, plan = checked.manifest, checked.layout, checked.plan
    config_bytes = checked.config_bytes
    config = parse_config(config_bytes, f"{checked.place}/{CONFIG_NAME}")
    facts = read_model_facts(locate(model)) if model else None
    merge_facts(manifest.options, facts)  # refuses a model with another number of experts
    slots = find_slots(source, manifest.placement, plan)
    equal_inputs: frozenset[str] = frozenset()
    if layout == "fused":
        with opened_files(checked.files) as files:
            equal_inputs = frozenset(_modules_with_equal_inputs(source, plan, slots, files))
    target = describe_target(
        source,
        config,
        layout,
        options=replace(manifest.options, orientation=orientation),
        facts=facts,
        modules_with_equal_inputs=equal_inputs,
        stack_dtypes=stack_dtypes_in(plan),
    )
    conversion = plan_conversion(source, plan, config, config_bytes, target)
    return PreparedConversion(checked.place, checked.files, manifest, plan, slots, conversion)


def write_conversion(
    prepared: PreparedConversion, out: Path, *, force: bool, progress: Progress
) -> None:
    """Carry out a prepared conversion, and check the shards meanwhile.

    Raises VerificationError if they are not what `split` wrote, ShardError if the disk has no room;
    then `out` does not appear.
    """
    check_disk_space(out, prepared.conversion.size_bytes)
    with staged_directory(
        out, last=CONFIG_NAME, force=force, replaceable=is_plain_adapter
    ) as staging:
        with cancellable_pool(_CHECKERS, progress) as (pool, advance):
            proof = pool.submit(_find_misplaced, prepared, advance)
            digests = [
                pool.submit(_digest_of, prepared, number, advance)
                for number in range(len(prepared.files))
            ]
            _write_weights(prepared, staging / WEIGHTS_NAME, advance)
            findings = tuple(_describe_damage(prepared, map(result_of, digests)))
            findings = findings or result_of(proof)
        if findings:
            raise VerificationError(str(prepared.shards), findings)
        write_new(staging / CONFIG_NAME, prepared.conversion.config)


def _digest_of(prepared: PreparedConversion, number: int, progress: Progress) -> str:
    """BLAKE3 in hex of one shard file."""
    with opened_files([prepared.files[number]]) as (file,):
        return digest_of(file, 0, prepared.plan.files[number].size_bytes, progress)


def _describe_damage(prepared: PreparedConversion, digests: Iterable[str]) -> Iterator[str]:
    for (name, recorded), digest in zip(prepared.manifest.files.items(), digests):
        if digest != recorded.digest.blake3:
            yield describe_wrong_digest(prepared.shards, name)


def _find_misplaced(prepared: PreparedConversion, progress: Progress) -> tuple[str, ...]:
    with opened_files(prepared.files) as files:
        return tuple(describe_misplaced(prepared.manifest, prepared.plan, files, progress))


def _write_weights(prepared: PreparedConversion, path: Path, progress: Progress) -> None:
    conversion = prepared.conversion
    with opened_files(prepared.files) as files, path.open("xb", buffering=0) as out:
        reserve(out.fileno(), conversion.size_bytes)
        writer = SequentialWriter(out.fileno())
        writer.write(memoryview(conversion.header))
        progress(len(conversion.header))
        with closing(one_ahead(_batches(_read_tensors(prepared, files)))) as batches:
            for batch in batches:
                for data in batch:
                    writer.write(data)
                    progress(len(data))
        assert writer.size_bytes == conversion.size_bytes
        os.fsync(out.fileno())


def _read_tensors(
    prepared: PreparedConversion, files: Sequence[ByteSource]
) -> Iterator[memoryview]:
    """The bytes of the new file after its header, front to back."""
    for tensor in prepared.conversion.tensors:
        if isinstance(tensor, OutputTensor):
            yield from read_tensor_blocks(tensor, prepared.slots, files)
            continue
        for begin in range(tensor.begin, tensor.end, BLOCK_BYTES):
            data = memoryview(bytearray(min(BLOCK_BYTES, tensor.end - begin)))
            files[0].read_into(data, begin)
            yield data


def _batches(blocks: Iterator[memoryview]) -> Iterator[list[memoryview]]:
    """Blocks in lists of BLOCK_BYTES or a little more, since one expert's tensors are small."""
    batch: list[memoryview] = []
    size = 0
    for block in blocks:
        batch.append(block)
        size += len(block)
        if size >= BLOCK_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _modules_with_equal_inputs(
    source: AdapterLayout, plan: ShardPlan, slots: SlotTable, files: Sequence[ByteSource]
) -> Iterator[str]:
    """The modules whose gate and up have one lora_A; a module is read up to the first difference."""
    dtypes = stack_dtypes_in(plan)
    buffers = memoryview(bytearray(BLOCK_BYTES)), memoryview(bytearray(BLOCK_BYTES))
    for module, gate, up in inputs_that_may_be_equal(source):
        if dtypes[gate.name] != dtypes[up.name]:
            continue
        size = gate.rows * gate.cols * ELEMENT_SIZE[dtypes[gate.name]]
        pairs = {(slot, slots[up.name][expert]) for expert, slot in slots[gate.name].items()}
        in_file_order = sorted(pairs, key=_file_order)
        if all(_is_equal(pair, size, files, buffers) for pair in in_file_order):
            yield module


def _file_order(pair: tuple[Target, Target]) -> tuple[int, int, int]:
    return pair[0].file, pair[0].offset, pair[1].offset


def _is_equal(
    pair: tuple[Target, Target],
    size_bytes: int,
    files: Sequence[ByteSource],
    buffers: tuple[memoryview, memoryview],
) -> bool:
    for begin in range(0, size_bytes, BLOCK_BYTES):
        length = min(BLOCK_BYTES, size_bytes - begin)
        for slot, buffer in zip(pair, buffers):
            files[slot.file].read_into(buffer[:length], slot.offset + begin)
        if buffers[0][:length] != buffers[1][:length]:
            return False
    return True
