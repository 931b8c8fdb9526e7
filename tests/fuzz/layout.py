"""Target: an adapter's tensors and config -> layout, plan and manifest, and the plan made again.

The second reading, that of `verify --against`, must understand what is accepted, and as the first does.

The input is one JSON document: the config, the tensors (name, dtype, shape), what the user says, and
the placement. The header's own form is the matter of the target `header`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any, get_args

from lorashard.adapter.config import CONFIG_NAME, WEIGHTS_NAME, AdapterIndex, parse_config
from lorashard.adapter.layout import detect_layout
from lorashard.adapter.options import GateUp, LayoutOptions, LoraBLayout, Orientation
from lorashard.dtypes import CAST_DTYPES, ELEMENT_BITS
from lorashard.errors import HeaderError
from lorashard.header import LENGTH_BYTES, build_header, parse_header
from lorashard.shards.describe import make_manifest
from lorashard.shards.manifest import FileDigest, Manifest, SourceInfo, format_manifest
from lorashard.shards.manifest_parser import parse_manifest
from lorashard.shards.placement import place_experts
from lorashard.shards.plan import ShardPlan, build_plan
from lorashard.shards.replan import find_contradictions, rebuild_plan
from lorashard.verify.reference.compare import _compare_modules, _facts
from lorashard.verify.reference.projections import read_source
from tests.adapters import LAYOUTS, NON_GATED_LAYOUTS, Adapter, Spec, build
from tests.fuzz.mutators import mutate_json
from tests.fuzz.target import Target, check
from tests.plans import destinations
from tests.strategies import DTYPE_NAMES

_MOST_TENSORS = 300
_DIGEST = "0" * 64


def index_of(document: dict[str, Any]) -> tuple[bytes, bytes, AdapterIndex]:
    """The source's header, its config and both as read. Raises HeaderError."""
    rows = document.get("tensors")
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for row in rows if isinstance(rows, list) else ():
        if isinstance(row, list) and len(row) == 3 and isinstance(row[0], str):
            name, dtype, shape = row
            known = isinstance(dtype, str) and dtype in ELEMENT_BITS and isinstance(shape, list)
            if known and all(type(n) is int and n >= 0 for n in shape):
                tensors[name] = (dtype, tuple(shape))
    if len(tensors) > _MOST_TENSORS or "__metadata__" in tensors:
        raise HeaderError("x", "not of this target")
    try:
        raw, entries = build_header([(n, *rest) for n, rest in tensors.items()], {"format": "pt"})
    except (UnicodeEncodeError, ValueError) as err:  # a name or a number that no header can have
        raise HeaderError("x", "not of this target") from err
    size = entries[-1].end if entries else len(raw)
    header = parse_header(raw[LENGTH_BYTES:], size, "x")
    config_bytes = json.dumps(document.get("config")).encode()
    config = parse_config(config_bytes, "x")
    return raw, config_bytes, AdapterIndex(config, header.tensors, header.data_begin, size)


def options_of(document: dict[str, Any]) -> LayoutOptions:
    """What the user says; what no option takes is left out."""
    told = document.get("options")
    told = told if isinstance(told, dict) else {}

    def count(name: str) -> int | None:
        value = told.get(name)
        return value if type(value) is int and 0 < value < 10**6 else None

    def word(name: str, words: tuple[str, ...]) -> Any:
        value = told.get(name)
        return value if isinstance(value, str) and value in words else None

    return LayoutOptions(
        num_experts=count("num_experts"),
        hidden_size=count("hidden_size"),
        intermediate_size=count("intermediate_size"),
        gate_up=word("gate_up", get_args(GateUp)),
        lora_b_layout=word("lora_b_layout", get_args(LoraBLayout)),
        orientation=word("orientation", get_args(Orientation)),
    )


def _run(data: bytes) -> bool:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return False
    if not isinstance(document, dict):
        return False
    raw, config_bytes, index = index_of(document)
    options = options_of(document)
    layout = detect_layout(index, options, "x")
    ep_size = document.get("ep_size")
    ep_size = ep_size if type(ep_size) is int and ep_size < 64 else 2
    strategy = "round_robin" if document.get("strategy") == "round_robin" else "linear"
    expert_map = document.get("expert_map")
    placement = place_experts(layout, ep_size, strategy, expert_map)  # type: ignore[arg-type]
    cast = document.get("dtype")
    dtype = cast if isinstance(cast, str) and cast in CAST_DTYPES.values() else None
    plan = build_plan(layout, placement, dtype)
    _check_plan(plan, index)

    source = SourceInfo(
        None,
        None,
        {
            CONFIG_NAME: FileDigest(len(config_bytes), _DIGEST),
            WEIGHTS_NAME: FileDigest(index.file_size, _DIGEST),
        },
        raw,
    )
    told = replace(options, num_experts=layout.num_experts)
    digests = [_DIGEST] * len(plan.files)
    manifest = make_manifest(source, told, layout, placement, plan, digests, dtype=dtype)
    check(parse_manifest(format_manifest(manifest), "x") == manifest, "the manifest read again")
    rebuilt = rebuild_plan(manifest, config_bytes, Path("x"))
    check(rebuilt.plan == plan, "the plan made again is another one")
    contradiction = next(find_contradictions(manifest, rebuilt), None)
    check(contradiction is None, f"our own manifest contradicts itself: {contradiction}")
    _check_second_reading(index, config_bytes, manifest)
    return True


def _check_second_reading(index: AdapterIndex, config_bytes: bytes, manifest: Manifest) -> None:
    """What `verify --against` makes of the tensors' names and shapes; `readings` compares the values."""
    document = json.loads(format_manifest(manifest))
    shapes = {entry.name: entry.shape for entry in index.tensors}
    reading = read_source(shapes, _facts(json.loads(config_bytes), document))
    found = [*reading.problems, *_compare_modules(reading, document)]
    check(not found, f"the second reading differs: {found[:3]}")


def _check_plan(plan: ShardPlan, index: AdapterIndex) -> None:
    for file, regions in zip(plan.files, destinations(plan), strict=True):
        edges = [(0, len(file.header)), *filter(_is_some, regions), (file.size_bytes,) * 2]
        check(all(a[1] == b[0] for a, b in pairwise(edges)), "the regions of a file do not tile it")
    reads = [(op.begin, op.end) for op in plan.reads if op.begin != op.end]
    edges = [(index.data_begin,) * 2, *reads, (index.file_size,) * 2]
    check(all(a[1] == b[0] for a, b in pairwise(edges)), "a source byte is not read once")


def _is_some(region: tuple[int, int]) -> bool:
    return region[0] != region[1]


def _seeds() -> Iterator[bytes]:
    maps = {"ranks": [[0, 2, 1], [3, 1]], "layers": {"0": [[3, 2], [1, 0]]}}
    for layout in LAYOUTS:
        for number, fields in enumerate(({}, {"extras": True}, {"rslora": True, "num_layers": 2})):
            gated = number != 1 or layout not in NON_GATED_LAYOUTS
            adapter = build(Spec(layout, gated=gated, **fields))
            document = document_of(adapter) | {
                "strategy": ("linear", "round_robin")[number % 2],
                "expert_map": maps if number == 2 else None,
                "dtype": (None, "F16", None)[number],
            }
            yield json.dumps(document).encode()


def document_of(adapter: Adapter) -> dict[str, Any]:
    """An adapter as an input, for two ranks."""
    tensors = [[n, DTYPE_NAMES[t.dtype], list(t.shape)] for n, t in adapter.tensors.items()]
    config, options = adapter.config, adapter.options
    return {"config": config, "tensors": tensors, "options": options, "ep_size": 2}


_EXTRA = (
    "standard", "transposed", "rank_major", "grouped_by_expert", "concatenated", "interleaved",
    "split", "none", "round_robin", "BF16", "F16", [[0, 1], [2, 3]], [2, 6], [8, 6], [4, 2, 6],
    "base_model.model.model.layers.0.mlp.experts.gate_proj.lora_A.weight",
    "base_model.model.model.layers.0.mlp.experts.1.gate_proj.lora_B.weight", {r"experts\.1\.": 3},
)  # fmt: skip


def mutate_layout(data: bytes, max_bytes: int, chance: Random) -> bytes | None:
    """Changes of one value, or of the same word or number in all tensors."""
    try:
        document = json.loads(data)
        tensors = document["tensors"]
        if not isinstance(tensors, list) or chance.random() < 0.5:
            made = mutate_json(document, chance, _EXTRA)
        else:
            made = document | {"tensors": _change_all(tensors, chance)}
            made = mutate_json(made, chance, _EXTRA) if chance.random() < 0.3 else made
        text = json.dumps(made).encode()
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None
    return text if len(text) <= max_bytes else None


def _change_all(tensors: list[Any], chance: Random) -> list[Any]:
    name, _, shape = chance.choice(tensors)
    what = chance.randrange(5)
    if what == 0:  # a part of the names
        old = chance.choice(name.split("."))
        new = chance.choice((*name.split("."), "w1", "w2", "w3", "experts", "base_layer", "7", "x"))
        return [[n.replace(old, new), d, s] for n, d, s in tensors]
    if what == 1 and shape:  # a size
        old_size = chance.choice(shape)
        new_size = chance.choice((0, 1, 2, 3, 4, 8, old_size + 1, old_size * 2))
        return [[n, d, [new_size if k == old_size else k for k in s]] for n, d, s in tensors]
    if what == 2:  # a subset
        word = chance.choice(name.split("."))
        return [row for row in tensors if word not in row[0].split(".")]
    if what == 3:  # the same again under another name
        old, new = chance.choice(
            (("layers.0", "layers.1"), ("experts.0.", "experts.9."), ("gate", "up"))
        )
        return tensors + [[n.replace(old, new), d, s] for n, d, s in tensors if old in n]
    dtype = chance.choice(("F32", "BF16", "F16", "F8_E4M3", "I8", "F4"))
    return [[n, dtype if chance.random() < 0.7 else d, s] for n, d, s in tensors]


TARGETS = (
    Target(
        "layout",
        "tensors and config -> layout, placement, plan, manifest; and the plan made again from that",
        _run,
        _seeds,
        mutate_layout,
        max_bytes=16_384,
    ),
)
