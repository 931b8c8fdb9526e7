"""The digest at the end of lorashard.json tells of every changed byte, its own included."""

from __future__ import annotations

import json

import pytest
from blake3 import blake3

from lorashard.shards.seal import is_seal_broken, seal

PLAIN = b'{\n  "a": "x",\n  "files": {"b": 1}\n}\n'


def test_a_sealed_document_has_the_digest_of_what_is_before_it() -> None:
    document = json.loads(seal(PLAIN))
    assert list(document) == ["a", "files", "blake3"]
    assert document["blake3"] == blake3(PLAIN.removesuffix(b"\n}\n")).hexdigest()


def test_what_was_not_changed_is_whole_with_and_without_a_seal() -> None:
    assert not is_seal_broken(seal(PLAIN))
    assert not is_seal_broken(PLAIN)


def test_every_changed_byte_breaks_the_seal_or_the_json() -> None:
    sealed = seal(PLAIN)
    for position in range(len(sealed)):
        for bit in range(8):
            changed = bytearray(sealed)
            changed[position] ^= 1 << bit
            try:
                json.loads(bytes(changed))
            except ValueError:
                continue
            assert is_seal_broken(bytes(changed)), changed


@pytest.mark.parametrize("cut", [b"\n", b"}\n", b'"\n}\n'])
def test_a_document_cut_short_is_broken(cut: bytes) -> None:
    assert is_seal_broken(seal(PLAIN).removesuffix(cut))


def test_a_sealed_document_that_was_written_anew_is_broken() -> None:
    assert is_seal_broken(json.dumps(json.loads(seal(PLAIN))).encode())
