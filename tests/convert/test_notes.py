"""Each note names the reader that will not read the result right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorashard import convert_shards
from tests.adapters import Spec, build
from tests.conversions import Work

NOTES = [
    (Spec("L1", experts=(0,)), "per_expert", "qwen3_moe", "written as zeros"),
    (Spec("L1", rslora=True), "per_expert", "qwen3_moe", "rsLoRA"),
    (Spec("L2b"), "per_expert", "qwen3_moe", "that have their own"),
    (Spec("L2"), "per_expert", "gpt_oss", "silently leave them out"),
    (Spec("L2", extras=True), "per_expert", "mixtral", "gate.lora_A.weight keeps its name"),
    (Spec("L4-down"), "fused", "qwen3_moe", "trains down_proj only"),
]


@pytest.mark.parametrize(("spec", "layout", "model_type", "told"), NOTES)
def test_a_note_says_who_does_not_read_it_right(
    tmp_path: Path, spec: Spec, layout: Any, model_type: str, told: str
) -> None:
    work = Work(tmp_path, build(spec), model_type).split()
    prepared = convert_shards(work.shards, work.out, layout, model=work.model)
    assert sum(told in note for note in prepared.conversion.notes) == 1
