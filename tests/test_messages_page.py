"""docs/messages.md has the messages that real input leads to, with what to do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lorashard import SplitRequest, split_adapter
from lorashard.errors import LorashardError
from lorashard.parameters import with_flags
from tests.messages_page import Message, make_page, messages
from tests.tiny import REPO, per_expert_tensors, save_adapter, save_config, save_header

FOUND = tuple(set(messages(REPO / "lorashard")))


def no_weights(folder: Path) -> None:
    save_config(folder)


def damaged_header(folder: Path) -> None:
    save_header(folder, b"not json")


def half_a_pair(folder: Path) -> None:
    tensors = per_expert_tensors()
    del tensors["base_model.model.model.layers.0.mlp.experts.1.up_proj.lora_B.weight"]
    save_adapter(folder, tensors)


def several(folder: Path) -> None:
    save_adapter(folder / "a")
    save_adapter(folder / "b")


@pytest.mark.parametrize("write", [no_weights, damaged_header, half_a_pair, several])
def test_a_message_of_real_input_is_listed_with_its_hint(tmp_path: Path, write) -> None:
    write(tmp_path / "adapter")
    with pytest.raises(LorashardError) as caught:
        split_adapter(tmp_path / "adapter", tmp_path / "out", SplitRequest(2))
    message, hint = with_flags(caught.value.message), with_flags(caught.value.hint or "")
    assert [m for m in FOUND if fits(m.text, message) and fits(m.hint, hint)], caught.value


def fits(listed: str, text: str) -> bool:
    """Whether the text is the listed one with something in place of each …."""
    return re.fullmatch(".+".join(map(re.escape, listed.split("…"))), text) is not None


def test_there_are_hundreds_and_most_say_what_to_do() -> None:
    assert len(FOUND) > 200
    assert sum(bool(message.hint) for message in FOUND) > len(FOUND) / 2


def test_marks_of_markdown_are_shown_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "adapter.py").write_text(
        "raise AdapterError(f'{x} has *lora_A* | <b> [r, in].', hint='Do `this`.')\n"
        "raise PlacementError('short')\nraise ValueError('not one of ours, of course')\n"
        "raise AdapterError(text)\n"
    )
    assert list(messages(tmp_path)) == [
        Message("adapter", "… has *lora_A* | <b> [r, in].", "Do `this`.")
    ]
    page = make_page("", tmp_path)
    assert "| … has \\*lora\\_A\\* \\| \\<b> \\[r, in]. | Do `this`. |\n" in page
