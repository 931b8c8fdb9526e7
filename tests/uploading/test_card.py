"""The model card: true, harmless whatever the adapter says, and never written over someone's own."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from typing import Any

import pytest
import yaml

from lorashard import SplitRequest, split_adapter
from lorashard.adapter.config import LoraConfig, parse_config
from lorashard.shards.directory import read_manifest
from lorashard.shards.manifest import Manifest
from lorashard.uploading.card import format_card, is_untouched
from tests.tiny import CONFIG, save_adapter

PLACE = "hf://owner/mine-ep2@main"


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("card")
    split_adapter(save_adapter(folder / "adapter"), folder / "out", SplitRequest(ep_size=2))
    return read_manifest(folder / "out")


def config_with(**changes: Any) -> LoraConfig:
    return parse_config(json.dumps(CONFIG | changes).encode(), "adapter_config.json")


def metadata(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def test_a_card_is_known_as_untouched_until_a_character_changes(manifest: Manifest) -> None:
    card = format_card(manifest, config_with(), PLACE)
    assert is_untouched(card)
    assert not is_untouched(card.replace("A LoRA adapter", "My LoRA adapter"))
    assert not is_untouched(card + "\nMore.\n")
    assert not is_untouched("# My model\n")
    assert not is_untouched("")


def test_a_card_for_another_place_is_untouched_as_well(manifest: Manifest) -> None:
    assert is_untouched(format_card(manifest, config_with(), "s3://bucket/mine"))


def test_the_base_model_is_in_the_metadata_if_it_is_a_hub_id(manifest: Manifest) -> None:
    assert metadata(format_card(manifest, config_with(), PLACE))["base_model"] == "some/qwen3-moe"


@pytest.mark.parametrize(
    "base", ["/data/models/qwen", "", None, "qwen", "a/b/c", "a/b\nlicense: mit"]
)
def test_a_base_model_that_the_hub_would_refuse_is_not(
    manifest: Manifest, base: str | None
) -> None:
    card = format_card(manifest, config_with(base_model_name_or_path=base), PLACE)
    assert "base_model" not in metadata(card)
    assert "license" not in metadata(card)


def test_what_an_adapter_says_cannot_break_the_table_or_the_command(manifest: Manifest) -> None:
    hostile = "x`|<b>\n---\n$(reboot) ; rm -rf /"
    card = format_card(manifest, config_with(base_model_name_or_path=hostile), PLACE)
    (row,) = [line for line in card.splitlines() if line.startswith("| base model |")]
    assert row.count("|") == 3
    assert re.search(r"^vllm serve MODEL ", card, re.MULTILINE)
    assert "reboot" not in card.split("## Serve it")[1]


@pytest.mark.parametrize("place", ["s3://bucket/it's mine", "s3://bucket/$(reboot)"])
def test_a_place_is_quoted_for_the_shell(manifest: Manifest, place: str) -> None:
    card = format_card(manifest, config_with(), place)
    pull = card.split("```\n")[1].splitlines()[0]
    assert shlex.split(pull)[:3] == ["lorashard", "pull", place]


def test_the_command_names_a_rank_that_vllm_takes(manifest: Manifest) -> None:
    assert "--max-lora-rank 8 " in format_card(manifest, config_with(), PLACE)
    dense = config_with(rank_pattern={"q_proj": 12})
    assert "--max-lora-rank 16 " in format_card(manifest, dense, PLACE)


def test_the_command_fits_the_placement(manifest: Manifest) -> None:
    linear = format_card(manifest, config_with(), PLACE)
    assert "--node-ranks 0-1 -o mine-ep2\n" in linear
    assert "-tp 2 --enable-expert-parallel --enable-lora" in linear
    assert "--lora-modules mine=./mine-ep2" in linear
    placement = replace(manifest.placement, strategy="round_robin")
    card = format_card(replace(manifest, placement=placement), config_with(), PLACE)
    assert "--expert-placement-strategy round_robin" in card


def test_every_file_is_listed_with_its_experts_and_size(manifest: Manifest) -> None:
    card = format_card(manifest, config_with(), PLACE)
    rows = re.findall(r"^\| `(\S+\.safetensors)` \| (\w+) \| ([\d,]+) \|$", card, re.MULTILINE)
    assert [(name, count) for name, count, _ in rows] == [
        ("replicated.safetensors", "none"),
        ("ep-00000-of-00002.safetensors", "2"),
        ("ep-00001-of-00002.safetensors", "2"),
    ]
    sizes = [file.digest.size_bytes for file in manifest.files.values()]
    assert [int(size.replace(",", "")) for _, _, size in rows] == sizes


def test_values_that_were_cast_are_called_so(manifest: Manifest) -> None:
    assert "bit for bit" in format_card(manifest, config_with(), PLACE)
    card = format_card(replace(manifest, dtype="F16"), config_with(), PLACE)
    assert "cast to F16" in card
    assert "bit for bit" not in card
    assert "not possible here" in card


def test_the_source_is_named_by_its_commit(manifest: Manifest) -> None:
    assert "not on the Hub" in format_card(manifest, config_with(), PLACE)
    source = replace(manifest.source, repo="owner/source", revision="abc123")
    card = format_card(replace(manifest, source=source), config_with(), PLACE)
    assert "`owner/source` at `abc123`" in card
