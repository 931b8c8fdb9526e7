"""A plain PEFT adapter, files or tensors -> AdapterContents, sliced by the plan of `lorashard split`.

What the plan would write to `replicated.safetensors` and to this rank's file is read when it is
asked for. Other ranks' experts are not read where each has tensors of its own, but for a sample that
tells versions of an adapter apart. The plan of an adapter is kept for the next one of the same form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from blake3 import blake3

from lorashard.adapter.config import WEIGHTS_NAME, AdapterIndex, LoraConfig, parse_config
from lorashard.adapter.keys import ExpertKey, LoraKey, is_unsloth_alias, parse_key
from lorashard.adapter.layout import detect_layout
from lorashard.adapter.options import LayoutOptions
from lorashard.adapter.read import AdapterSource, LocalAdapter, opened_files
from lorashard.adapter.tensor_file import TensorFile
from lorashard.errors import AdapterError
from lorashard.header import TensorEntry
from lorashard.storage.local import ByteSource
from lorashard.storage.safetensors_file import parse_raw_header, read_header
from lorashard.vllm_plugin.load.contents import REPLICATED, WEIGHTS, AdapterContents
from lorashard.vllm_plugin.load.kept_plans import AdapterForm, KeptPlans, form_of
from lorashard.vllm_plugin.load.plain_plan import LocalExperts, PlainPlan, plan_plain
from lorashard.vllm_plugin.load.planned_file import FileMap, PlannedFile

Read = TypeVar("Read")

# Of an adapter's values, for its version: what a network disk reads in some milliseconds.
_NUM_SAMPLES, _SAMPLE_BYTES = 16, 4096


def open_plain_adapter(
    path: Path,
    options: LayoutOptions,
    local_experts: LocalExperts,
    stack: ExitStack,
    plans: KeptPlans,
) -> AdapterContents | None:
    """Read what this rank needs of a PEFT adapter; None if it has no expert weights.

    options: what the model says about its experts. plans: those of earlier loads.
    Raises AdapterError.
    """
    files = _unless_without_experts(path, lambda: _open(path, stack))
    if files is None:
        return None

    def read_index() -> AdapterIndex | None:
        source = _unless_without_experts(path, files.parsed)
        return None if source is None else source.index

    form = form_of(files.config_bytes, files.header, files.weights.size_bytes, options)
    plan = _plan(form, read_index, local_experts, plans, str(path))
    if plan is None:
        return None
    weights = stack.enter_context(files.opened())
    return _contents(files.parsed_config(), plan, weights, _version(files))


def _version(files: LocalAdapter) -> str:
    """Differs for any two adapters with other values, in practice: the next one of a training, too.

    It is of the config, the header and a sample of the values, the same on every rank and host.
    """
    digest = blake3(files.config_bytes).update(files.header)
    begin, end = len(files.header), files.weights.size_bytes
    step = max(_SAMPLE_BYTES, (end - begin) // _NUM_SAMPLES)
    for offset in range(begin, end, step):
        piece = bytearray(min(_SAMPLE_BYTES, end - offset))
        files.weights.read_into(memoryview(piece), offset)
        digest.update(piece)
    return digest.hexdigest()


def open_plain_tensors(
    weights: TensorFile,
    config_bytes: bytes,
    options: LayoutOptions,
    local_experts: LocalExperts,
    plans: KeptPlans,
) -> AdapterContents | None:
    """The same for an adapter that is in memory, whole or with the experts of this rank alone.

    config_bytes: as in adapter_config.json. The contents have no version, since each rank may have
    been given other tensors.
    """
    config = parse_config(config_bytes, weights.name)

    def read_index() -> AdapterIndex:
        header = parse_raw_header(weights.header, weights)
        return AdapterIndex(config, header.tensors, header.data_begin, header.file_size)

    form = form_of(config_bytes, weights.header, weights.size_bytes, options)
    plan = _plan(form, read_index, local_experts, plans, weights.name)
    return None if plan is None else _contents(config, plan, weights, "")


def _plan(
    form: AdapterForm,
    read_index: Callable[[], AdapterIndex | None],
    local_experts: LocalExperts,
    plans: KeptPlans,
    where: str,
) -> PlainPlan | None:
    """The plan of an adapter, kept or new; None if it has no expert weights."""
    plan = plans.find(form, local_experts)
    if plan is None:
        index = read_index()
        if index is None or not has_experts(index.tensors):
            return None
        plan = plan_plain(detect_layout(index, form.options, where), local_experts)
        plans.keep(form, plan)
    return plan


def _contents(
    config: LoraConfig, plan: PlainPlan, weights: ByteSource, version: str
) -> AdapterContents:
    return AdapterContents(
        config,
        plan.num_experts,
        gate_up_known=True,
        modules=plan.modules,
        dense=plan.dense,
        sources=_PlainSources(plan, weights),
        version=version,
        rearrangements=plan.rearrangements,
        rearranged=plan.rearranged,
    )


def open_with_experts(path: Path, stack: ExitStack) -> AdapterSource | None:
    """Read an adapter's config and header; None if no tensor is an expert's.

    vLLM itself loads, or refuses, an adapter without experts, whatever may be wrong with it.
    Raises AdapterError.
    """
    source = _unless_without_experts(path, lambda: _open(path, stack).parsed())
    return source if source is not None and has_experts(source.index.tensors) else None


def _open(path: Path, stack: ExitStack) -> LocalAdapter:
    # vLLM accepts adapter_model.bin (with weights_only=True), so pickles are allowed here too.
    return stack.enter_context(opened_files(path, allow_pickle=True))


def _unless_without_experts(path: Path, read: Callable[[], Read]) -> Read | None:
    """What is read of the adapter; None if it is faulty and has no experts."""
    try:
        return read()
    except AdapterError:
        weights_path = path / WEIGHTS_NAME
        if weights_path.is_file() and not has_experts(read_header(weights_path)[1].tensors):
            return None
        raise


def has_experts(tensors: Sequence[TensorEntry]) -> bool:
    """Whether any tensor is an expert's, or at least has a name that says so."""
    return any(names_experts(entry.name, len(entry.shape)) for entry in tensors)


def names_experts(name: str, num_dims: int) -> bool:
    """The same for one tensor."""
    if "experts" in name.split("."):
        return True
    key = parse_key(name, num_dims)
    return isinstance(key, ExpertKey) or (isinstance(key, LoraKey) and is_unsloth_alias(key.module))


@dataclass(frozen=True, slots=True)
class _PlainSources:
    """The RankSources of a plain adapter: this rank's experts are those of rank 0."""

    plan: PlainPlan
    weights: ByteSource

    def offset_of(self, ep_rank: int, name: str) -> int:
        return self._map_of(ep_rank).offsets[name]

    def source_of(self, ep_rank: int) -> ByteSource:
        if ep_rank == WEIGHTS:
            return self.weights
        return PlannedFile(self._map_of(ep_rank), self.weights)

    def _map_of(self, ep_rank: int) -> FileMap:
        return {REPLICATED: self.plan.replicated, 0: self.plan.own}[ep_rank]
