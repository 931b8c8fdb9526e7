"""Target: lorashard.json of a real shard directory, read by `verify`.

The first byte says of which directory. A manifest that `verify` finds nothing wrong with says the same
as the one that was written, but for what is told to people.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from random import Random

from lorashard import LayoutOptions, SplitRequest, split_adapter, verify_shards
from lorashard.shards.manifest import Manifest
from lorashard.shards.manifest_parser import parse_manifest
from tests.adapters import Spec, build
from tests.fuzz.mutators import json_mutator
from tests.fuzz.target import Target, check

_MANIFEST = "lorashard.json"
_REDUNDANT = {"ranks": [[0, 2, 1], [3, 1]], "layers": {"0": [[3, 2, 1], [1, 0]]}}

_QWEN = {"base_model_name_or_path": "Qwen/Qwen3-30B-A3B"}  # which tells the order of rows


@cache
def _directories() -> tuple[tuple[Path, Manifest, bytes], ...]:
    """Shard directories in memory; their manifests, and these as bytes."""
    place = Path(tempfile.mkdtemp(dir="/dev/shm"))
    cases: tuple[tuple[Spec, SplitRequest], ...] = (
        (Spec("L1", num_layers=2, extras=True), SplitRequest(2, expert_map=_REDUNDANT)),
        (Spec("L2", config=_QWEN), SplitRequest(3, "round_robin")),
        (Spec("L1", experts=(0, 2), lora_ranks={0: 1}), SplitRequest(2)),
        (Spec("L9"), SplitRequest(2, dtype="bfloat16")),
        (Spec("L5", extras=True), SplitRequest(1)),
    )
    found = []
    for number, (spec, request) in enumerate(cases):
        adapter = build(spec)
        source = adapter.write(place / f"adapter{number}")
        shards = place / f"shards{number}"
        split_adapter(source, shards, replace(request, options=LayoutOptions(**adapter.options)))
        shutil.rmtree(source)
        raw = (shards / _MANIFEST).read_bytes()
        found.append((shards, parse_manifest(raw, "x"), raw))
    return tuple(found)


def _run(data: bytes) -> bool:
    directories = _directories()
    shards, written, _ = directories[data[0] % len(directories) if data else 0]
    (shards / _MANIFEST).write_bytes(data[1:])
    if verify_shards(shards):
        return False
    read = parse_manifest(data[1:], "x")
    known = written.gate_up_known
    same = _meaning(read, tells_order=known) == _meaning(written, tells_order=known)
    check(same, "verify says ok, and the manifest says another thing")
    return True


def _meaning(manifest: Manifest, *, tells_order: bool) -> Manifest:
    """The manifest without what is told to people, and what makes no difference.

    That is options that lead to the same layout; the source's digest where values were cast, as nothing
    proves it there; and the order of gate and up rows where nothing tells it.
    """
    source = replace(manifest.source, repo=None, revision=None)
    if manifest.dtype is not None:
        source = replace(source, files={})
    else:
        names = ("adapter_config.json", "adapter_model.safetensors")
        source = replace(source, files={name: source.files[name] for name in names})
    modules = {
        name: replace(info, source_layout="", gate_up=info.gate_up if tells_order else "split")
        for name, info in manifest.modules.items()
    }
    options = LayoutOptions(num_experts=manifest.options.num_experts)
    return replace(
        manifest,
        lorashard_version="",
        source=source,
        modules=modules,
        options=options,
        gate_up_known=manifest.gate_up_known if tells_order else True,
    )


def _seeds() -> Iterator[bytes]:
    for number, (_, _, raw) in enumerate(_directories()):
        yield bytes([number]) + raw
        document = json.loads(raw)
        del document["blake3"]  # the digest of itself, which would tell of every change
        yield bytes([number]) + json.dumps(document).encode()


_mutate_json = json_mutator(
    [[0, 1, 2], [3]], [[3, 2, 1, 0], []], "linear", "round_robin", "explicit", "interleaved",
    "concatenated", "split", "none", "fused", "per_expert", "F16", "0" * 64, {"gate_proj": {"0": 1}},
)  # fmt: skip


def _mutate(data: bytes, max_bytes: int, chance: Random) -> bytes | None:
    made = _mutate_json(data[1:], max_bytes - 1, chance)
    return None if made is None else data[:1] + made


TARGETS = (
    Target(
        "manifest",
        "`lorashard.json` of a shard directory, with `verify`: what it accepts says what was written",
        _run,
        _seeds,
        _mutate,
        max_bytes=16_384,
    ),
)
