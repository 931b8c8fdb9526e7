"""Prove the shards against the source adapter, without any code that wrote them.

`projections` gives the source tensors their meaning; here what the manifest says of them is
compared, and `stacks` compares every value of every expert bit for bit with the slots where the
manifest places it. numpy does the reshaping, so a mistake in our own byte arithmetic shows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

from lorashard.errors import AdapterError
from lorashard.verify.reference.files import SafetensorsFile, load_source, read_file
from lorashard.verify.reference.patterns import Patterns
from lorashard.verify.reference.pieces import Facts, plain_key
from lorashard.verify.reference.projections import Factor, Projection, SourceReading, read_source
from lorashard.verify.reference.sides import Source, Stack
from lorashard.verify.reference.stacks import (
    capped,
    compare_replicated,
    compare_stacks,
)
from lorashard.verify.reference.values import CASTABLE

_REPLICATED = "replicated.safetensors"
_CONFIG = "adapter_config.json"


def compare_with_source(
    shard_dir: Path,
    adapter_dir: Path,
    manifest: Mapping[str, Any],
    progress: Callable[[int], None],
    *,
    allow_pickle: bool = False,
) -> Iterator[Iterator[str]]:
    """Yield comparisons, each of which yields one sentence for every place that differs.

    No sentence = proven. They are for any thread, several at a time, and the order of findings is
    theirs. `progress` gets the size in bytes of each source tensor, once.
    Raises AdapterError if the source cannot be opened, UnsupportedAdapterError for a pickle.
    manifest: lorashard.json as plain JSON values; checked for its form by the caller.
    """
    tensors = load_source(adapter_dir, allow_pickle=allow_pickle)
    config_bytes = read_file(adapter_dir / _CONFIG)
    config = json.loads(config_bytes)
    yield _compare_configs(shard_dir / _CONFIG, config_bytes, config, manifest)
    reading = read_source(tensors.shapes, _facts(config, manifest))
    yield iter(reading.problems)
    yield _compare_modules(reading, manifest)

    ep_size = manifest["placement"]["ep_size"]
    rank_names = [f"ep-{rank:05d}-of-{ep_size:05d}.safetensors" for rank in range(ep_size)]
    files = {name: _open_or_none(shard_dir / name) for name in (_REPLICATED, *rank_names)}
    yield (
        f"{name}: missing, or not a safetensors file."
        for name, file in files.items()
        if file is None
    )
    cast = manifest["options"]["dtype"]
    source = Source(
        tensors,
        manifest["placement"]["num_experts"],
        cast if cast is None else CASTABLE[cast],
        progress,
    )
    if replicated := files[_REPLICATED]:
        for name in reading.replicated:
            yield compare_replicated(source, name, replicated)
        yield _extra_replicated(reading, replicated)
    yield from _compare_experts(
        source, reading, manifest, replicated, [files[name] for name in rank_names]
    )
    sliced = {name for name, factor in _factors(reading) if not factor.shared}
    for name in rank_names:
        if file := files[name]:
            yield _extra_experts(file, sliced)


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


def _compare_configs(
    copied: Path, config_bytes: bytes, config: Mapping[str, Any], manifest: Mapping[str, Any]
) -> Iterator[str]:
    if not copied.is_file() or read_file(copied) != config_bytes:
        yield f"{_CONFIG}: not the same bytes as in the source."
    options = manifest["options"]
    if {"rank_major", "grouped_by_expert"} <= {_layout(config), options["lora_b_layout"]}:
        yield (
            f"{_CONFIG}: lora_B_layout is {_layout(config)}, but the shards were written with "
            f"{options['lora_b_layout']}."
        )


def _extra_replicated(reading: SourceReading, shard: SafetensorsFile) -> Iterator[str]:
    shared = {name for name, factor in _factors(reading) if factor.shared}
    empty = {name for name in map(plain_key, reading.empty) if 0 in shard.shapes.get(name, ())}
    known = shared.union(map(plain_key, reading.replicated), empty)
    for name in sorted(shard.shapes.keys() - known):
        yield f"{shard.name}: {name} is not a replicated tensor of the source."


def _extra_experts(shard: SafetensorsFile, sliced: AbstractSet[str]) -> Iterator[str]:
    for name in sorted(shard.shapes.keys() - sliced):
        yield f"{shard.name}: {name} is not an expert tensor of the source."


def _compare_experts(
    source: Source,
    reading: SourceReading,
    manifest: Mapping[str, Any],
    replicated: SafetensorsFile | None,
    ranks: Sequence[SafetensorsFile | None],
) -> Iterator[Iterator[str]]:
    """Compare every expert's factors wherever the placement puts them."""
    placement = manifest["placement"]
    everyone = set(range(placement["num_experts"]))
    for module, projections in reading.modules.items():
        placed: list[list[int]] = placement.get("layers", {}).get(module, placement["ranks"])
        if len(placed) != len(ranks) or {e for experts in placed for e in experts} != everyone:
            yield iter([f"lorashard.json: the placement of {module} does not hold every expert."])
            continue
        for name, projection in projections.items():
            lora_rank = max(projection.lora_ranks)
            for matrix, factor, shape in (
                ("lora_A", projection.lora_a, (lora_rank, projection.in_features)),
                ("lora_B", projection.lora_b, (projection.out_features, lora_rank)),
            ):
                holders = [(replicated, [None])] if factor.shared else zip(ranks, placed)
                stacks = [
                    Stack(file, f"{module}.{name}.{matrix}", tuple(experts), shape)
                    for file, experts in holders
                    if file is not None
                ]
                yield compare_stacks(source, factor, stacks)


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
            yield from capped(f"{where}: {name}", _compare_projection(projection, odd, scaling))


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
