"""lorashard.json is read back as it was written, and anything else is refused."""

from __future__ import annotations

import base64
import json
import tracemalloc
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorashard.adapter.options import LayoutOptions
from lorashard.errors import ManifestError
from lorashard.header import TensorEntry
from lorashard.shards.manifest import (
    FileDigest,
    Manifest,
    ModuleInfo,
    ShardFile,
    SourceInfo,
    format_manifest,
)
from lorashard.shards.manifest_parser import parse_manifest
from lorashard.shards.names import shard_file_names
from lorashard.shards.placement import linear_placement, round_robin_placement

PATH = "out/lorashard.json"
MODULE = "model.layers.0.mlp.experts"
Document = dict[str, Any]


def example(ep_size: int = 2, num_experts: int = 3) -> Manifest:
    names = shard_file_names(ep_size)
    entry = TensorEntry(f"{MODULE}.up_proj.lora_A", "BF16", (2, 2, 6), 96, 144)
    digests = {name: FileDigest(144, f"{i:064x}") for i, name in enumerate(names)}
    return Manifest(
        lorashard_version="0.0.0",
        source=SourceInfo("me/adapter", None,
                          {"adapter_config.json": FileDigest(7, "a" * 64),
                           "adapter_model.safetensors": FileDigest(240, "b" * 64)},
                          b"\x10" + bytes(7) + b'{"a":"\xc3\xa4"}   '),
        options=LayoutOptions(num_experts=num_experts, gate_up="interleaved"),
        dtype=None,
        gate_up_known=True,
        placement=linear_placement(num_experts, ep_size),
        modules={
            MODULE: ModuleInfo(
                layout="per_expert",
                source_layout="stacked",
                gate_up="split",
                lora_rank=2,
                scaling={"up_proj": 2.0, "down_proj": tuple([0.0] * num_experts)},
                absent_experts=(1,),
                expert_lora_ranks={"up_proj": {1: 0}},
            )
        },
        files={name: ShardFile(digests[name], (entry,)) for name in names},
    )  # fmt: skip


def document() -> Document:
    parsed: Document = json.loads(format_manifest(example()))
    return parsed


def refusal(raw: bytes) -> ManifestError:
    with pytest.raises(ManifestError) as caught:
        parse_manifest(raw, PATH)
    return caught.value


def change(where: str, value: Any) -> bytes:
    """The example with one value replaced; `where` is a path with slashes."""
    changed = document()
    place: Any = changed
    *parents, last = where.split("/")
    for key in parents:
        place = place[key]
    place[last] = value
    return json.dumps(changed).encode()


def test_a_manifest_is_read_back():
    assert parse_manifest(format_manifest(example()), PATH) == example()


@given(
    ep_size=st.integers(1, 12),
    num_experts=st.integers(1, 12),
    scaling=st.floats(-1e12, 1e12, exclude_min=True, exclude_max=True),
    name=st.text(st.characters(exclude_categories=["Cs"])),
    header=st.binary(max_size=200),
)
@settings(deadline=None)
def test_any_manifest_is_read_back(ep_size, num_experts, scaling, name, header):
    manifest = example(ep_size, num_experts)
    info = replace(manifest.modules[MODULE], scaling={"up_proj": scaling})
    manifest = replace(
        manifest,
        modules={name: info},
        dtype="F16",
        placement=round_robin_placement(num_experts, ep_size),
        source=replace(manifest.source, repo=name, header=header),
    )
    assert parse_manifest(format_manifest(manifest), PATH) == manifest


@pytest.mark.parametrize("num_experts", [1, 21, 64, 512])
def test_any_number_of_experts_with_an_r_of_their_own_is_read_back(num_experts: int):
    odd = {expert: expert % 3 for expert in range(num_experts)}
    info = replace(example().modules[MODULE], expert_lora_ranks={"up_proj": odd, "down_proj": odd})
    manifest = replace(example(), modules={MODULE: info})
    assert parse_manifest(format_manifest(manifest), PATH) == manifest


def test_a_layer_s_own_placement_is_read_back():
    placement = replace(example().placement, strategy="explicit", layers={MODULE: ((2,), (1, 0))})
    manifest = replace(example(), placement=placement)
    assert parse_manifest(format_manifest(manifest), PATH) == manifest


def test_what_is_read_is_written_with_the_same_bytes():
    raw = format_manifest(example())
    assert format_manifest(parse_manifest(raw, PATH)) == raw


def test_fields_that_are_not_known_are_ignored():
    for where in ("more", "options/more", "source/more", f"modules/{MODULE}/more"):
        assert parse_manifest(change(where, {"a": 1}), PATH) == example()


def test_files_are_in_plan_order_whatever_the_order_in_the_json():
    reordered = document()
    reordered["files"] = dict(sorted(reordered["files"].items(), reverse=True))
    parsed = parse_manifest(json.dumps(reordered).encode(), PATH)
    assert tuple(parsed.files) == shard_file_names(2)


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff", b"[]", b"null", b'"lorashard"', b"{}"])
def test_what_is_no_manifest_is_refused(raw: bytes):
    assert refusal(raw)


@pytest.mark.parametrize("cut", [1, 40, 400, 900, -3])
def test_a_truncated_manifest_is_refused(cut: int):
    assert "damaged" in refusal(format_manifest(example())[:cut]).message


def test_endless_nesting_is_refused():
    assert "damaged" in refusal(b'{"format":' + b"[" * 200_000).message


@pytest.mark.parametrize("name", ["safetensors", "", None, 1, ["lorashard"]])
def test_another_format_is_refused(name: object):
    assert "not a lorashard manifest" in refusal(change("format", name)).message


@pytest.mark.parametrize("version", [0, 2, "1", None, 99])
def test_another_version_says_what_to_install(version: object):
    assert "Install the lorashard that wrote it" in str(refusal(change("format_version", version)))


@pytest.mark.parametrize(
    "field",
    [k for k in json.loads(format_manifest(example())) if k[:6] != "format" and k != "blake3"],
)
def test_every_field_is_needed(field: str):
    lacking = document()
    del lacking[field]
    assert "damaged" in refusal(json.dumps(lacking).encode()).message


@pytest.mark.parametrize(
    "name",
    ["../ep-00000-of-00002.safetensors", "/etc/passwd", "ep-00000-of-00003.safetensors", "", "."],
)
@pytest.mark.parametrize("instead", [True, False])
def test_a_file_name_that_does_not_follow_from_ep_size_is_refused(name: str, instead: bool):
    files = document()["files"]
    files[name] = files["replicated.safetensors"]
    if instead:
        del files["replicated.safetensors"]
    assert "files are not" in refusal(change("files", files)).message


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("files/replicated.safetensors/size", -1),
        ("files/replicated.safetensors/size", 1.0),
        ("files/replicated.safetensors/size", True),
        ("files/replicated.safetensors/size", "144"),
        (f"files/replicated.safetensors/tensors/{MODULE}.up_proj.lora_A/offset", -8),
        (f"files/replicated.safetensors/tensors/{MODULE}.up_proj.lora_A/size", -8),
        (f"files/replicated.safetensors/tensors/{MODULE}.up_proj.lora_A/shape", [2, -2]),
        (f"files/replicated.safetensors/tensors/{MODULE}.up_proj.lora_A/shape", 4),
        (f"files/replicated.safetensors/tensors/{MODULE}.up_proj.lora_A/shape", [2.5]),
        ("files/replicated.safetensors/tensors", []),
        ("files/replicated.safetensors/tensors", None),
        ("files/replicated.safetensors/blake3", "A" * 64),
        ("files/replicated.safetensors/blake3", "a" * 63),
        ("files/replicated.safetensors/blake3", "a" * 64 + "\n"),
        ("files/replicated.safetensors/blake3", None),
        ("files/replicated.safetensors", None),
        ("source/files", []),
        ("source/files/adapter_config.json", {}),
        ("source/header", None),
        ("source/header", "not base 64"),
        ("placement/ranks", [[0, 1], [1]]),
        ("placement/ranks", [[0, 1], [2], []]),
        ("placement/ranks", [[0, 1], [2, 3]]),
        ("placement/ranks", [[0, 1], [2, -1]]),
        ("placement/ranks", [[0, 1], [2.0]]),
        ("placement/ranks", [[0, 1], "2"]),
        ("placement/ranks", None),
        ("placement/ep_size", 3),
        ("placement/num_experts", 4),
        ("placement/num_experts", "3"),
        ("placement/strategy", "random"),
        ("placement/strategy", None),
        ("placement/layers", {MODULE: [[0], [1]]}),
        ("placement/layers", [1]),
        ("options", None),
        ("options", {"dtype": None}),
        ("modules", []),
        (f"modules/{MODULE}", {}),
        (f"modules/{MODULE}/scaling", None),
        (f"modules/{MODULE}/expert_lora_ranks", {"up_proj": {"a": 1}}),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_damaged_field_is_refused(where: str, value: Any):
    assert refusal(change(where, value)).path == PATH


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_source_without_one_of_its_files_is_refused(name: str):
    files = document()["source"]["files"]
    del files[name]
    assert "source names no" in refusal(change("source/files", files)).message


@pytest.mark.parametrize("name", sorted(document()["options"]))
def test_an_option_that_is_missing_is_not_taken_for_null(name: str):
    options = document()["options"]
    del options[name]
    assert f"the field '{name}' is missing" in refusal(change("options", options)).message


def packed(header: bytes) -> str:
    return base64.b64encode(zlib.compress(header, 9)).decode()


@pytest.mark.parametrize("dtype", ["F3", "bfloat16", "", "bf16", 1, None, ["BF16"]])
def test_a_dtype_that_safetensors_does_not_have_is_refused(dtype: object):
    document = json.loads(format_manifest(example()))
    file = next(file for file in document["files"].values() if file["tensors"])
    next(iter(file["tensors"].values()))["dtype"] = dtype
    with pytest.raises(ManifestError, match="is not one of BOOL, F4, F6_E2M3, F6_E3M2, U8"):
        parse_manifest(json.dumps(document).encode(), PATH)


def test_a_source_header_cut_short_is_refused():
    raw = base64.b64encode(zlib.compress(b"{" * 900)[:-6]).decode()
    assert "too large or cut short" in refusal(change("source/header", raw)).message


def test_a_source_header_that_unpacks_without_end_is_refused():
    bomb = packed(bytes(101 * 10**6))
    assert "too large or cut short" in refusal(change("source/header", bomb)).message


@pytest.mark.parametrize("megabytes", [17, 99])
def test_a_source_header_that_packs_as_no_header_does_is_refused(megabytes):
    bomb = packed(b'{"a":[' + b"[]," * (megabytes * 1_000_000 // 3) + b"0]}")
    tracemalloc.start()
    assert "too large or cut short" in refusal(change("source/header", bomb)).message
    assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    tracemalloc.stop()


def test_a_source_header_of_many_tensors_is_read_back():
    names = (f"model.layers.{n}.mlp.experts.{e}.up_proj" for n in range(60) for e in range(2304))
    table = {
        name: {"dtype": "BF16", "shape": [16, 7168], "data_offsets": [i * 229376, -~i * 229376]}
        for i, name in enumerate(names)
    }
    header = json.dumps(table).encode()
    assert len(header) > 16 * 2**20
    assert parse_manifest(change("source/header", packed(header)), "m").source.header == header


def test_a_source_header_that_is_not_packed_is_refused():
    assert refusal(change("source/header", base64.b64encode(b"plain").decode()))


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("options/num_experts", "3"),
        ("options/num_experts", [3]),
        ("options/orientation", "sideways"),
        ("options/lora_b_layout", {}),
        ("options/gate_up", "sideways"),
        ("options/dtype", {}),
        (f"modules/{MODULE}/scaling", {"up_proj": "2"}),
        (f"modules/{MODULE}/lora_rank", "2"),
        ("placement/ranks", [[0, 1, 1], [2]]),
    ],
)
def test_a_value_of_a_wrong_kind_is_refused(where: str, value: Any):
    assert refusal(change(where, value))


SPOTS: list[Callable[[Document], Document]] = [
    lambda d: d, lambda d: d["source"], lambda d: d["placement"], lambda d: d["files"],
    lambda d: d["modules"][MODULE], lambda d: d["files"]["replicated.safetensors"],
]  # fmt: skip


@given(
    spot=st.sampled_from(SPOTS),
    pick=st.integers(0, 9),
    value=st.recursive(
        st.none() | st.booleans() | st.integers(-9, 99) | st.floats() | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner),
        max_leaves=4,
    ),
)
@settings(deadline=None)
def test_no_value_in_the_wrong_place_raises_anything_but_a_manifest_error(spot, pick, value):
    changed = document()
    place = spot(changed)
    place[sorted(place)[pick % len(place)]] = value
    try:
        manifest = parse_manifest(json.dumps(changed).encode(), PATH)
    except ManifestError:
        return
    assert manifest.placement.ep_size == 2


@pytest.mark.parametrize(
    ("where", "value", "said"),
    [
        ("placement", [], "a list is not an object"),
        ("placement/ranks", {"a": 1}, "an object is not a list"),
        ("placement/num_experts", True, "True is not an integer >= 0"),
        ("lorashard_version", 3, "3 is not a text"),
        ("options/gate_up_known", "yes", "'yes' is not true or false"),
        ("source/header", "not base 64", "the source header cannot be unpacked"),
        (f"modules/{MODULE}/expert_lora_ranks", {"up_proj": {"1_0": 1}}, "'1_0' is not the number"),
        (f"modules/{MODULE}/expert_lora_ranks", {"up_proj": {"9" * 5000: 1}}, "is not the number"),
        (f"modules/{MODULE}/scaling", {"up_proj": 1e300}, "1e+300 is not a scaling"),
        ("options/dtype", [[[]]], "a list is not one of None"),
    ],
)
def test_a_refusal_says_what_is_wrong(where: str, value: Any, said: str):
    assert said in refusal(change(where, value)).message


def test_a_missing_field_is_named():
    changed = document()
    del changed["placement"]["ep_size"]
    assert "the field 'ep_size' is missing" in refusal(json.dumps(changed).encode()).message


@pytest.mark.parametrize("depth", range(100, 1000, 100))
def test_a_value_that_nests_deeply_does_not_break_the_message(depth: int):
    raw = format_manifest(example()).replace(
        b'"repo": "me/adapter"', b'"repo": ' + b"[" * depth + b"]" * depth
    )
    assert b"[[[" in raw
    assert refusal(raw)


def test_a_bug_of_ours_is_not_taken_for_a_damaged_file(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lorashard.shards.manifest_parser.shard_file_names", None)
    with pytest.raises(TypeError):
        parse_manifest(format_manifest(example()), PATH)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"0.0.0"', b'"\\ud800"'),
        (b'"0.0.0"', b'"\xed\xa0\x80"'),
        (b'"me/adapter"', b'"\\ud800"'),
        (b": 144", b": 1" + b"0" * 400),
    ],
    ids=["version", "raw", "repo", "size"],
)
def test_what_cannot_be_written_again_is_refused(old: bytes, new: bytes) -> None:
    raw = format_manifest(example())
    assert old in raw
    with pytest.raises(ManifestError):
        parse_manifest(raw.replace(old, new), PATH)
