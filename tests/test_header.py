"""Each fault of a safetensors header is found, and what is built is what safetensors writes."""

from __future__ import annotations

import contextlib
import json
import struct
import time
import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.torch import save

from lorashard.dtypes import ELEMENT_BITS, ELEMENT_SIZE
from lorashard.errors import HeaderError
from lorashard.header import MAX_HEADER_BYTES, Header, build_header, header_length, parse_header

PATH = "a.safetensors"
ONE = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
TWO = (
    b'{"b":{"dtype":"U8","shape":[3],"data_offsets":[4,7]},'
    b'"a":{"dtype":"F16","shape":[1,2],"data_offsets":[0,4]}}'
)
TORCH_NAMES = {
    "F64": "float64", "I64": "int64", "F32": "float32", "I32": "int32", "F16": "float16",
    "BF16": "bfloat16", "I16": "int16", "U8": "uint8", "I8": "int8", "BOOL": "bool",
}  # fmt: skip


def parse(raw: bytes, data_bytes: int) -> Header:
    return parse_header(raw, 8 + len(raw) + data_bytes, PATH)


def refusal(raw: bytes, data_bytes: int) -> str:
    with pytest.raises(HeaderError) as caught:
        parse(raw, data_bytes)
    return caught.value.reason


def one(**changes: object) -> bytes:
    info = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes
    return json.dumps({"a": info}).encode()


def test_a_tensor_gets_its_place_in_the_file():
    (entry,) = parse(ONE, 8).tensors
    assert (entry.name, entry.dtype, entry.shape) == ("a", "F32", (2,))
    assert (entry.begin, entry.end, entry.size_bytes) == (8 + len(ONE), 16 + len(ONE), 8)


def test_tensors_are_in_file_order_whatever_the_order_of_the_keys():
    assert [entry.name for entry in parse(TWO, 7).tensors] == ["a", "b"]


def test_spaces_after_the_json_belong_to_the_header():
    assert parse(ONE + b"   ", 8).data_begin == 8 + len(ONE) + 3


def test_metadata_is_kept():
    raw = b'{"__metadata__":{"format":"pt"},' + ONE[1:]
    assert parse(raw, 8).metadata == {"format": "pt"}


def test_a_header_without_tensors_is_valid():
    assert parse(b"{}", 0).tensors == ()


def test_an_empty_tensor_needs_no_bytes():
    (entry,) = parse(one(shape=[0, 4], data_offsets=[0, 0]), 0).tensors
    assert entry.size_bytes == 0


def test_a_scalar_has_one_element():
    (entry,) = parse(one(shape=[], data_offsets=[0, 4]), 4).tensors
    assert entry.shape == ()


@pytest.mark.parametrize("dtype", ELEMENT_BITS)
def test_every_known_dtype_has_the_size_of_its_name(dtype: str):
    bits = 8 if dtype == "BOOL" else int("".join(filter(str.isdigit, dtype.partition("_")[0])))
    assert ELEMENT_BITS[dtype] == bits
    assert ELEMENT_SIZE.get(dtype, bits / 8) * 8 == bits
    (entry,) = parse(one(dtype=dtype, shape=[2, 4], data_offsets=[0, bits]), bits).tensors
    assert (entry.dtype, entry.shape, entry.size_bytes) == (dtype, (2, 4), bits)


@pytest.mark.parametrize(("dtype", "length"), [("F4", 3), ("F6_E2M3", 5), ("F6_E3M2", 2)])
def test_elements_that_end_within_a_byte_are_refused_as_by_the_reference(dtype: str, length: int):
    size = (length * ELEMENT_BITS[dtype] + 7) // 8
    raw = one(dtype=dtype, shape=[length], data_offsets=[0, size])
    assert refusal(raw, size) == f"a: {dtype} [{length}] does not end with a whole byte"


def test_the_length_is_little_endian():
    assert header_length(struct.pack("<Q", 300), 308, PATH) == 300


def test_a_file_shorter_than_the_length_field_is_refused():
    with pytest.raises(HeaderError, match="7 bytes are too few"):
        header_length(bytes(7), 7, PATH)


def test_a_length_past_the_end_is_refused():
    with pytest.raises(HeaderError, match="past the end"):
        header_length(struct.pack("<Q", 301), 308, PATH)


def test_a_length_over_the_limit_is_refused_in_a_large_file_too():
    with pytest.raises(HeaderError, match="is over"):
        header_length(struct.pack("<Q", MAX_HEADER_BYTES + 1), 2 * MAX_HEADER_BYTES, PATH)


def test_the_largest_length_is_refused_before_memory_is_taken():
    with pytest.raises(HeaderError, match="is over"):
        header_length(b"\xff" * 8, 2**62, PATH)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "does not start with"),
        (b" {}", "does not start with"),
        (b"[1]", "does not start with"),
        (b"\xef\xbb\xbf{}", "does not start with"),
        (b"{", "not JSON"),
        (b"{}{}", "not JSON"),
        (b"{}\0", "not JSON"),
        (b'{"\xff":1}', "not JSON"),
        (b'{"a":' + b"[" * 200_000, "not JSON"),
        (b'{"a":' + b'{"a":' * 200_000, "not JSON"),
        (b'{"a":' + b"1" * 5000 + b"}", "not JSON"),
        (b'{"__metadata__":{"a":1}}', "not a map of strings"),
        (b'{"__metadata__":"a"}', "not a map of strings"),
        (b'{"__metadata__":null}', "not a map of strings"),
    ],
    ids=[
        "empty", "space-first", "array", "byte-order-mark", "cut-short", "two-values", "zero-byte",
        "not-utf-8", "deep-arrays", "deep-objects", "endless-number", "metadata-number",
        "metadata-string", "metadata-null",
    ],
)  # fmt: skip
def test_damaged_json_is_refused(raw: bytes, reason: str):
    assert reason in refusal(raw, 0)


@pytest.mark.parametrize(
    "info", [b"1", b"null", b'"F32"', b"[]", b"{}", b'{"dtype":"F32","shape":[2]}']
)
def test_a_tensor_without_its_three_fields_is_refused(info: bytes):
    assert refusal(b'{"a":' + info + b"}", 8)


@pytest.mark.parametrize("value", ["[]", "NaN", '"\\ud800"', "[" * 200 + "]" * 200], ids=len)
def test_a_field_beside_the_three_is_refused(value: str):
    # The reference implementation passes over it, but not over all that Python takes for JSON.
    raw = ONE.replace(b'"shape"', b'"x":' + value.encode() + b',"shape"')
    assert "a field beside" in refusal(raw, 8)


@pytest.mark.parametrize("field", [b'"shape":[-0]', b'"data_offsets":[-0,0]'])
def test_minus_zero_is_refused_as_by_the_reference(field: bytes):
    raw = ONE.replace(b"[2]", b"[0]").replace(b"[0,8]", b"[0,0]")
    name = field.partition(b":")[0]
    old = next(part for part in (b'"shape":[0]', b'"data_offsets":[0,0]') if part.startswith(name))
    assert "not -0" in refusal(raw.replace(old, field), 0)
    with pytest.raises(SafetensorError):
        deserialize(struct.pack("<Q", len(raw) + 1) + raw.replace(old, field))


def test_a_name_may_have_a_minus_and_a_zero():
    assert parse(ONE.replace(b'"a"', b'"a,-0"'), 8).tensors[0].name == "a,-0"


def test_a_tensor_named_twice_is_refused():
    assert "twice" in refusal(ONE[:-1] + b"," + ONE[1:], 8)


@pytest.mark.parametrize("value", [b"null", b"5", b'"F32"', b"[]", b"{}"])
@pytest.mark.parametrize("name", [b'"a"', b'"__metadata__"'])
def test_a_name_given_first_with_another_value_is_refused(name: bytes, value: bytes):
    raw = b"{" + name + b":" + value + b',"__metadata__":{"format":"pt"},' + ONE[1:]
    assert "twice" in refusal(raw, 8)


@pytest.mark.parametrize("metadata", [{}, {"format": "pt"}], ids=str)
def test_a_usual_header_is_parsed_once(monkeypatch: pytest.MonkeyPatch, metadata: dict[str, str]):
    raw, _ = build_header([("a", "F32", (2,)), ("b", "U8", (3,))], metadata)
    calls, loads = [], json.loads
    monkeypatch.setattr(json, "loads", lambda *args, **kw: calls.append(kw) or loads(*args, **kw))
    parse(raw[8:], 11)
    assert calls == [{}]


def test_a_field_given_twice_is_refused():
    assert "twice" in refusal(ONE.replace(b'"shape"', b'"dtype":"F32","shape"'), 8)


@pytest.mark.parametrize("metadata", [{"dtype": "bf16"}, {"trained": "dtype"}], ids=str)
def test_metadata_may_say_anything(metadata: dict[str, str]):
    raw = json.dumps({"__metadata__": metadata}).encode()[:-1] + b"," + ONE[1:]
    assert parse(raw, 8).metadata == metadata


def test_a_tensor_may_be_called_like_a_field():
    assert parse(ONE.replace(b'"a"', b'"shape"'), 8).tensors[0].name == "shape"


def test_a_field_given_twice_in_other_spelling_is_refused():
    escaped = b'"\\u0064type":"I32","shape"'
    assert "twice" in refusal(ONE.replace(b'"shape"', escaped), 8)


@pytest.mark.parametrize("shape", ["", {}], ids=repr)
def test_a_shape_that_is_no_list_is_refused(shape: object):
    assert refusal(one(shape=shape, data_offsets=[0, 4]), 4)


def test_a_name_that_is_no_unicode_is_refused():
    assert "not valid Unicode" in refusal(ONE.replace(b'"a"', b'"\\ud800"'), 8)


@pytest.mark.parametrize("dtype", ["F33", "f32", "", None, 4, ["F32"]])
def test_an_unknown_dtype_is_refused(dtype: object):
    assert "is not known" in refusal(one(dtype=dtype), 8)


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": [-2], "data_offsets": [0, 8]},
        {"shape": [-1, -2]},
        {"shape": [2.0]},
        {"shape": [True, 2]},
        {"shape": ["2"]},
        {"data_offsets": [-8, 0]},
        {"data_offsets": [0.0, 8.0]},
        {"data_offsets": [False, 8]},
    ],
    ids=str,
)
def test_numbers_that_are_no_counts_are_refused(changes: dict[str, object]):
    assert "must be integers >= 0" in refusal(one(**changes), 8)


@pytest.mark.parametrize("offsets", [[0], [0, 4, 8], None, 8, []], ids=str)
def test_offsets_that_are_no_pair_are_refused(offsets: object):
    assert "missing" in refusal(one(data_offsets=offsets), 8)


@pytest.mark.parametrize(
    "changes",
    [{"shape": [3]}, {"dtype": "F64"}, {"shape": [2**31, 2**31]}, {"data_offsets": [8, 0]}],
    ids=str,
)
def test_a_size_that_is_not_the_shape_s_is_refused(changes: dict[str, object]):
    assert "bytes" in refusal(one(**changes), 8)


def test_a_hole_before_the_first_tensor_is_refused():
    assert "leaves a hole" in refusal(one(data_offsets=[8, 16]), 16)


def test_a_hole_between_tensors_is_refused():
    assert "b leaves a hole" in refusal(TWO.replace(b"[4,7]", b"[5,8]"), 8)


def test_tensors_that_overlap_are_refused():
    assert "b overlaps" in refusal(TWO.replace(b"[4,7]", b"[3,6]"), 6)


def test_tensors_that_share_their_bytes_are_refused():
    both = ONE[:-1] + b"," + ONE[1:].replace(b'"a"', b'"b"')
    assert "overlaps" in refusal(both, 8)


def test_trailing_bytes_are_refused():
    assert "the file at" in refusal(ONE, 9)


def test_missing_bytes_are_refused():
    assert "the file at" in refusal(ONE, 7)


@given(raw=st.binary(max_size=60).map(lambda tail: b"{" + tail))
def test_no_bytes_raise_anything_but_a_header_error(raw: bytes):
    with contextlib.suppress(HeaderError):
        parse(raw, 8)


def test_built_tensors_tile_the_file_behind_the_header():
    raw, entries = build_header([("a", "F32", (2, 3)), ("b", "U8", (5,)), ("c", "F64", ())], {})
    assert entries[0].begin == len(raw)
    assert [e.end for e in entries[:-1]] == [e.begin for e in entries[1:]]


def test_what_is_built_can_be_parsed():
    raw, entries = build_header([("a", "BF16", (2, 3)), ("ä\n", "U8", (0,))], {"x": "ü"})
    parsed = parse(raw[8:], 12)
    assert (parsed.tensors, parsed.metadata) == (entries, {"x": "ü"})


def test_data_begins_at_a_multiple_of_eight_bytes():
    for length in range(1, 20):
        raw, _ = build_header([("n" * length, "U8", (1,))], {})
        assert len(raw) % 8 == 0


@given(
    tensors=st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
            lambda name: name != "__metadata__"
        ),
        st.tuples(st.sampled_from(sorted(TORCH_NAMES)), st.lists(st.integers(0, 3), max_size=3)),
        max_size=8,
    )
)
@settings(deadline=None)
def test_built_headers_are_those_of_the_reference_writer(tensors):
    ours, _ = build_header(
        [(name, dtype, tuple(shape)) for name, (dtype, shape) in tensors.items()], {"format": "pt"}
    )
    theirs = save(
        {
            name: torch.zeros(shape, dtype=getattr(torch, TORCH_NAMES[dtype]))
            for name, (dtype, shape) in tensors.items()
        },
        {"format": "pt"},
    )
    assert ours == theirs[: len(ours)]


def entry(shape: str, offsets: str, name: str = "a") -> bytes:
    return f'{{"{name}":{{"dtype":"F8_E4M3","shape":{shape},"data_offsets":{offsets}}}}}'.encode()


NINES = "9" * 4300


@pytest.mark.parametrize(
    "raw",
    [
        entry("[1]", f"[{NINES},-{NINES}]"),
        entry("[1]", f"[0,{NINES}]"),
        entry(f"[{NINES}]", "[0,1]"),
        entry(f"[{','.join([NINES] * 300)}]", "[0,1]"),
        entry("[1]", f"[0,{2**63}]"),
        entry("[1]", "[0,1]", name="a" * 4097),
        entry(f"[{','.join('1' * 65)}]", "[0,1]"),
    ],
    ids=["digits", "end", "shape", "product", "2**63", "name", "dimensions"],
)
def test_numbers_and_names_that_no_file_has_are_refused(raw: bytes):
    with pytest.raises(HeaderError) as caught:
        parse_header(raw, 8 + len(raw) + 1, "a")
    assert len(caught.value.message) < 5000


def test_a_product_that_overflows_before_its_zero_is_refused_as_by_safetensors():
    raw = entry(f"[{2**62},4,0]", "[0,0]")
    with pytest.raises(HeaderError, match="no tensor has this shape"):
        parse_header(raw, 8 + len(raw), "a")
    with pytest.raises(SafetensorError, match="overflow"):
        deserialize(struct.pack("<Q", len(raw)) + raw)


def test_a_zero_before_large_numbers_is_read_as_by_safetensors():
    raw = entry(f"[0,{2**62},4]", "[0,0]")
    assert parse_header(raw, 8 + len(raw), "a").tensors[0].size_bytes == 0
    assert dict(deserialize(struct.pack("<Q", len(raw)) + raw))["a"]["shape"] == [0, 2**62, 4]


def test_a_name_of_4096_characters_is_read():
    raw = entry("[1]", "[0,1]", name="a" * 4096)
    assert len(parse_header(raw, 8 + len(raw) + 1, "a").tensors[0].name) == 4096


def test_no_depth_of_nesting_ends_in_a_recursion_error():
    for depth in range(800, 1100):
        nested = "[" * depth + "]" * depth
        raw = f'{{"__metadata__":{{"x":"y"}},"a":{nested}}}'.encode()
        with pytest.raises(HeaderError):
            parse_header(raw, 8 + len(raw), "a")


@pytest.mark.parametrize("unit", [b"[],", b"{},", b'"x",[],'])
def test_lists_and_objects_without_end_are_refused_before_they_take_memory(unit: bytes):
    raw = b'{"a":[' + unit * (4 * 2**20 // len(unit)) + b"0]}"
    tracemalloc.start()
    reason = refusal(raw, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert reason == "the header is not a table of tensors"
    assert peak < len(raw)


@pytest.mark.parametrize(
    "raw",
    [
        entry(f"[{'999,' * 2**18}1]", "[0,4]"),
        entry("[1]", "[0,4]", name='b":1,"' * 2**18 + "a"),
        b'{"__metadata__":{"a":""' + b',"a":""' * 2**18 + b"}}",
        b'{"a":1' + b',"a":1' * 2**18 + b"}",
        b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,4]' + b',"a":1' * 2**18 + b"}}",
    ],
    ids=["shape", "numbers", "metadata", "names", "fields"],
)
def test_values_without_end_are_refused_before_they_take_memory(raw: bytes):
    tracemalloc.start()
    reason = refusal(raw, 4)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert reason == "the header is not a table of tensors"
    assert peak < len(raw)


def test_a_text_of_escapes_that_does_not_end_is_refused_in_linear_time():
    raw = b'{[[[[{{{{"' + b'\\"' * 2**20
    started = time.process_time()
    assert refusal(raw, 0) == "the header is not a table of tensors"
    assert time.process_time() - started < 5  # it was hours


def test_a_header_of_many_tensors_and_much_metadata_is_read():
    tensors = [(f"layers.{n}.weight", "F32", (2, 1, 1)) for n in range(139_216)]
    metadata = {f"key {n}, with a comma": "a, b, c, " * 9_000 for n in range(500)}
    raw, entries = build_header(tensors, metadata)
    header = parse(raw[8:], 8 * len(tensors))
    assert header.tensors == entries
    assert header.metadata == metadata


@pytest.mark.parametrize("bracket", ["[", "{", '"[]{', "\\", ","])
def test_brackets_in_many_names_and_in_the_metadata_do_no_harm(bracket: str):
    names = [f"layers.{bracket}{n}.weight" for n in range(20_000)]
    metadata = {"recipe": json.dumps([{"a": []}] * 100)}
    raw, entries = build_header([(name, "F32", (2,)) for name in names], metadata)
    assert len(raw) > 2**20
    header = parse(raw[8:], 8 * len(names))
    assert header.tensors == entries
    assert header.metadata == metadata
