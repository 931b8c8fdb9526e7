"""What an upload does to what is at its place: replace, remove, leave alone, or refuse."""

from __future__ import annotations

import pytest

from lorashard.errors import OutputExistsError
from lorashard.uploading.contents import AdapterContent, ShardsContent, UploadPlan
from tests.tiny import RANK_FILES

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
MANIFEST = "lorashard.json"
ADAPTER = AdapterContent()


def test_an_adapter_is_complete_with_its_config() -> None:
    assert ADAPTER.plan("x", (), None) == UploadPlan((WEIGHTS, CONFIG), (), False, False)
    assert ADAPTER.plan("x", (), "# Mine\n").keeps_card
    assert ADAPTER.last == CONFIG


@pytest.mark.parametrize("there", [(CONFIG, WEIGHTS), (CONFIG,), (WEIGHTS,), (CONFIG, PICKLE)])
def test_an_adapter_that_is_there_even_in_part_would_be_replaced(there: tuple[str, ...]) -> None:
    plan = ADAPTER.plan("x", (*there, "tokenizer.json"), None)
    assert plan.replaces
    assert plan.removed == tuple(name for name in there if name == PICKLE)


@pytest.mark.parametrize("there", [(MANIFEST,), RANK_FILES[:1]])
def test_an_adapter_does_not_go_among_shards(there: tuple[str, ...]) -> None:
    with pytest.raises(OutputExistsError, match="already holds shards") as raised:
        ADAPTER.plan("s3://b/x", there, None)
    assert "s3://b/x/adapter" in str(raised.value)


@pytest.mark.parametrize("there", [WEIGHTS, PICKLE])
def test_shards_do_not_go_to_an_adapter(there: str) -> None:
    with pytest.raises(OutputExistsError, match="already holds an adapter"):
        ShardsContent(2).plan("x", (there,), None)


def test_shards_of_another_placement_are_replaced_and_their_files_removed() -> None:
    plan = ShardsContent(4).plan("x", (MANIFEST, *RANK_FILES, "notes.txt"), None)
    assert (plan.replaces, plan.removed, plan.names[-1]) == (True, RANK_FILES, MANIFEST)
