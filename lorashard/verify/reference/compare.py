"""Prove the shards against the source adapter, without any code that wrote them.

`projections` gives the source tensors their meaning; here every value of every expert is
compared bit for bit with the slots where the manifest places it. Torch does the reshaping, so a
mistake in our own byte arithmetic shows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorashard.errors import AdapterError
from lorashard.verify.reference.files import PickledTensors, SafetensorsFile, load_source
from lorashard.verify.reference.patterns import Patterns
from lorashard.verify.reference.pieces import Facts, plain_key, unpack
from lorashard.verify.reference.projections import Factor, Projection, SourceReading, read_source

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_REPLICATED = "replicated.safetensors"
_CONFIG = "adapter_config.json"
_MAX_FINDINGS_PER_TENSOR = 20
# What `split --dtype` casts: not integers, and no floats that only scales or other chips have.
_TORCH_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip


def compare_with_source(
    shard_dir: Path,
    adapter_dir: Path,
    manifest: Mapping[str, Any],
    progress: Callable[[int], None],
    *,
    allow_pickle: bool = False,
) -> Iterator[str]:
    """Yield one sentence for every place where the shards differ from the source.

    Nothing yielded = proven. `progress` gets the size in bytes of each source tensor, once.
    Raises AdapterError if the source cannot be opened, UnsupportedAdapterError for a pickle.
    manifest: lorashard.json as plain JSON values; checked for its form by the caller.
    """
    source = load_source(adapter_dir, allow_pickle=allow_pickle)
    config_bytes = (adapter_dir / _CONFIG).read_bytes()
    copied_config = shard_dir / _CONFIG
    if not copied_config.is_file() or copied_config.read_bytes() != config_bytes:
        yield f"{_CONFIG}: not the same bytes as in the source."
    config = json.loads(config_bytes)
    options = manifest["options"]
    if {"rank_major", "grouped_by_expert"} <= {_layout(config), options["lora_b_layout"]}:
        yield (
            f"{_CONFIG}: lora_B_layout is {_layout(config)}, but the shards were written with "
            f"{options['lora_b_layout']}."
        )
    reading = read_source(source.shapes, _facts(config, manifest))
    yield from reading.problems
    yield from _compare_modules(reading, manifest)

    ep_size = manifest["placement"]["ep_size"]
    rank_names = [f"ep-{rank:05d}-of-{ep_size:05d}.safetensors" for rank in range(ep_size)]
    files = {name: _open_or_none(shard_dir / name) for name in (_REPLICATED, *rank_names)}
    for name, file in files.items():
        if file is None:
            yield f"{name}: missing, or not a safetensors file."
    comparison = _Comparison(source, manifest, progress, set())
    if replicated := files[_REPLICATED]:
        yield from comparison.replicated(reading, replicated)
    yield from comparison.experts(reading, replicated, [files[name] for name in rank_names])
    sliced = {name for name, factor in _factors(reading) if not factor.shared}
    for name in rank_names:
        if file := files[name]:
            for extra in sorted(file.shapes.keys() - sliced):
                yield f"{name}: {extra} is not an expert tensor of the source."


def _layout(config: Mapping[str, Any]) -> str | None:
    layout: str | None = config.get("lora_B_layout")
    return layout


def _facts(config: Mapping[str, Any], manifest: Mapping[str, Any]) -> Facts:
    options = manifest["options"]
    return Facts(
        config=config,
        lora_ranks=Patterns("rank_pattern", config.get("rank_pattern") or {}),
        alphas=Patterns("alpha_pattern", config.get("alpha_pattern") or {}),
        num_experts=manifest["placement"]["num_experts"],
        hidden_size=options["hidden_size"],
        intermediate_size=options["intermediate_size"],
        orientation=options["orientation"],
        grouped_by_expert=(options["lora_b_layout"] or _layout(config)) == "grouped_by_expert",
    )


def _open_or_none(path: Path) -> SafetensorsFile | None:
    try:
        return SafetensorsFile(path)
    except AdapterError:
        return None


def _factors(reading: SourceReading) -> Iterator[tuple[str, Factor]]:
    for module, projections in reading.modules.items():
        for name, projection in projections.items():
            yield f"{module}.{name}.lora_A", projection.lora_a
            yield f"{module}.{name}.lora_B", projection.lora_b


def _compare_modules(reading: SourceReading, manifest: Mapping[str, Any]) -> Iterator[str]:
    """Manifest `modules` and `placement` against the source: names, r, scaling, who is trained."""
    placement, described = manifest["placement"], manifest["modules"]
    for module in sorted(described.keys() - reading.modules.keys()):
        yield f"lorashard.json: module {module} is not in the source."
    for module, projections in reading.modules.items():
        where = f"lorashard.json: module {module}"
        if module not in described:
            yield f"{where} is missing."
            continue
        info = described[module]
        lora_rank = max(max(projection.lora_ranks) for projection in projections.values())
        absent = [
            expert
            for expert in range(placement["num_experts"])
            if not any(projection.lora_ranks[expert] for projection in projections.values())
        ]
        for field, expected in (("lora_rank", lora_rank), ("absent_experts", absent)):
            if info[field] != expected:
                yield f"{where}: {field} is {info[field]}, in the source {expected}."
        if info["scaling"].keys() != projections.keys():
            yield f"{where}: scaling names {sorted(info['scaling'])}, not {sorted(projections)}."
        odd_ranks = info.get("expert_lora_ranks", {})
        for name in sorted(odd_ranks.keys() - projections.keys()):
            yield f"{where}: expert_lora_ranks names {name}, which is not in the source."
        for name, projection in projections.items():
            odd = {int(expert): lora_rank for expert, lora_rank in odd_ranks.get(name, {}).items()}
            odd.update(dict.fromkeys(absent, 0))
            scaling = info["scaling"].get(name, list(projection.scaling))  # missing: said above
            yield from _capped(f"{where}: {name}", _compare_projection(projection, odd, scaling))


def _compare_projection(
    projection: Projection, odd_ranks: Mapping[int, int], scaling: Any
) -> Iterator[str]:
    stack_rank = max(projection.lora_ranks)
    per_expert = isinstance(scaling, list)
    if per_expert and len(scaling) != len(projection.lora_ranks):
        yield f"scaling is for {len(scaling)} experts, not {len(projection.lora_ranks)}."
        return
    for expert, expected_rank in enumerate(projection.lora_ranks):
        lora_rank = odd_ranks.get(expert, stack_rank)
        if lora_rank != expected_rank:
            yield f"expert {expert} has r {lora_rank}, in the source {expected_rank}."
        found = scaling[expert] if per_expert else scaling
        expected = projection.scaling[expert]
        if expected_rank == 0 and not per_expert:
            continue  # one number for the trained experts; zeros need no scaling
        is_number = isinstance(found, (int, float))
        if not is_number or not math.isclose(found, expected, rel_tol=1e-12):
            yield f"scaling of expert {expert} is {found}, from the source {expected}."


@dataclass(frozen=True, slots=True)
class _Stack:
    """A tensor of a shard file. `experts`: which expert each slot holds, None = all of them."""

    file: SafetensorsFile | None
    name: str
    experts: tuple[int | None, ...]
    matrix_shape: tuple[int, int]


@dataclass(frozen=True, slots=True)
class _Comparison:
    """Values of shard files against values of the source. `seen`: source tensors counted."""

    source: SafetensorsFile | PickledTensors
    manifest: Mapping[str, Any]
    progress: Callable[[int], None]
    seen: set[str]

    def replicated(self, reading: SourceReading, shard: SafetensorsFile) -> Iterator[str]:
        """Compare the tensors that every rank needs, and find what should not be among them."""
        for name in reading.replicated:
            expected = self._read(name)
            key = plain_key(name)
            if key not in shard.shapes:
                yield f"{shard.name}: {key} is missing."
            elif difference := _difference(expected, shard.get(key)):
                yield f"{shard.name}: {key}: {difference}"
        shared = {name for name, factor in _factors(reading) if factor.shared}
        empty = {name for name in map(plain_key, reading.empty) if 0 in shard.shapes.get(name, ())}
        known = shared.union(map(plain_key, reading.replicated), empty)
        for name in sorted(shard.shapes.keys() - known):
            yield f"{shard.name}: {name} is not a replicated tensor of the source."

    def experts(
        self,
        reading: SourceReading,
        replicated: SafetensorsFile | None,
        ranks: list[SafetensorsFile | None],
    ) -> Iterator[str]:
        """Compare every expert's factors wherever the placement puts them."""
        placement = self.manifest["placement"]
        for module, projections in reading.modules.items():
            placed: list[list[int]] = placement.get("layers", {}).get(module, placement["ranks"])
            everyone = set(range(placement["num_experts"]))
            if len(placed) != len(ranks) or {e for experts in placed for e in experts} != everyone:
                yield f"lorashard.json: the placement of {module} does not hold every expert."
                continue
            for name, projection in projections.items():
                lora_rank = max(projection.lora_ranks)
                for matrix, factor, shape in (
                    ("lora_A", projection.lora_a, (lora_rank, projection.in_features)),
                    ("lora_B", projection.lora_b, (projection.out_features, lora_rank)),
                ):
                    tensor = f"{module}.{name}.{matrix}"
                    if factor.shared:
                        stacks = [_Stack(replicated, tensor, (None,), shape)]
                    else:
                        stacks = [
                            _Stack(file, tensor, tuple(experts), shape)
                            for file, experts in zip(ranks, placed, strict=True)
                        ]
                    yield from self._compare(factor, stacks)

    def _compare(self, factor: Factor, stacks: Iterable[_Stack]) -> Iterator[str]:
        whole = None
        if factor.whole is not None:
            num_experts = self.manifest["placement"]["num_experts"]
            whole = unpack(self._read(factor.whole.name), factor.whole, num_experts)

        def read_expert(expert: int | None) -> Tensor | None:
            if whole is not None:
                return whole[expert or 0]
            piece = None if expert is None else factor.per_expert.get(expert)
            return None if piece is None else self._read(piece.name)

        for stack in stacks:
            if stack.file is not None:
                where = f"{stack.file.name}: {stack.name}"
                yield from _capped(where, _compare_stack(stack.file, stack, read_expert))

    def _read(self, name: str) -> Tensor:
        """Read a source tensor, cast if the shards were."""
        import torch

        tensor = self.source.get(name)
        if name not in self.seen:
            self.seen.add(name)
            self.progress(tensor.nbytes)
        dtype = self.manifest["options"]["dtype"]
        if dtype is None or str(tensor.dtype).removeprefix("torch.") not in _TORCH_DTYPES.values():
            return tensor
        return tensor.to(getattr(torch, _TORCH_DTYPES[dtype]))


def _compare_stack(
    file: SafetensorsFile, stack: _Stack, read_expert: Callable[[int | None], Tensor | None]
) -> Iterator[str]:
    if stack.name not in file.shapes:
        yield "is missing."
        return
    shape = (len(stack.experts), *stack.matrix_shape)
    if file.shapes[stack.name] != shape:
        yield f"has shape {list(file.shapes[stack.name])}, not {list(shape)}."
        return
    values = file.get(stack.name)
    for slot, expert in enumerate(stack.experts):
        who = "shared by all experts" if expert is None else f"expert {expert} (slot {slot})"
        expected = read_expert(expert)
        if expected is None:
            expected, who = values.new_zeros(stack.matrix_shape), f"{who}, not trained"
        elif expected.shape != stack.matrix_shape:
            padded = expected.new_zeros(stack.matrix_shape)
            padded[: expected.shape[0], : expected.shape[1]] = expected
            expected, who = padded, f"{who}, padded with zeros"
        if difference := _difference(expected, values[slot]):
            yield f"{who}: {difference}"


def _difference(expected: Tensor, actual: Tensor) -> str | None:
    """Say where `actual` first differs from `expected`, bit for bit."""
    import numpy as np  # noqa: PLC0415 - only --against needs it

    for what in ("dtype", "shape"):
        if getattr(expected, what) != getattr(actual, what):
            return f"{what} is {getattr(actual, what)}, in the source {getattr(expected, what)}."
    expected_bits, actual_bits = _bits(expected), _bits(actual)
    # Of matrices as small as an expert's, torch.equal spends most of its time on its threads.
    if np.array_equal(expected_bits.numpy(), actual_bits.numpy()):
        return None
    place = tuple((expected_bits != actual_bits).nonzero()[0].tolist())
    source, shard = (_show(bits[place], actual.dtype) for bits in (expected_bits, actual_bits))
    return f"{list(place)} is {shard}, from the source {source}."


def _bits(tensor: Tensor) -> Tensor:
    """View values as integers, so that NaN equals itself and -0.0 is not 0.0."""
    import torch

    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(integers[tensor.element_size()])


def _show(bits: Tensor, dtype: torch.dtype) -> str:
    size = bits.element_size()
    pattern = int(bits) & (256**size - 1)
    return f"{bits.view(dtype).item()} (0x{pattern:0{2 * size}x})"


def _capped(where: str, findings: Iterator[str]) -> Iterator[str]:
    """Prefix findings with their place; past the limit, only count them."""
    for finding in islice(findings, _MAX_FINDINGS_PER_TENSOR):
        yield f"{where}: {finding}"
    rest = sum(1 for _ in findings)
    if rest:
        yield f"{where}: {rest} more differences of this kind."
