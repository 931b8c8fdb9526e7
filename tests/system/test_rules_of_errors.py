"""What refuses because of a rule names it: each rule of the table, in a command and in a load."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from lorashard import LayoutOptions, SplitRequest, inspect_path, split_adapter, verify_shards
from lorashard.adapter.layout import detect_layout
from lorashard.errors import LorashardError
from lorashard.rules import RULES, with_rule
from lorashard.split.pipeline import prepared_split, write_shards
from lorashard.vllm_plugin.doctor.adapter_outcome import judge_adapter
from lorashard.vllm_plugin.doctor.adapter_survey import survey_adapter
from lorashard.vllm_plugin.doctor.flags import EngineFlags
from lorashard.vllm_plugin.doctor.live_layers import NamesOfAdapter
from lorashard.vllm_plugin.load.agreement import Outcome, raise_failure
from lorashard.vllm_plugin.load.matching import match_layers
from lorashard.vllm_plugin.load.plain_source import open_with_experts
from lorashard.vllm_plugin.load.shard_source import open_shard_directory
from lorashard.vllm_plugin.patches.explanations import for_a_server
from tests.tiny import (
    RANK_FILES,
    E,
    H,
    R,
    per_expert_tensors,
    run_cli,
    save_adapter,
    save_fused,
)

Change = Callable[[Path], object]
ATTENTION = "base_model.model.model.layers.0.self_attn.q_proj"
EXPERTS = "base_model.model.model.layers.0.mlp.experts"


def without_peft_version(adapter: Path) -> None:
    path = save_fused(adapter) / "adapter_config.json"
    config = json.loads(path.read_text())
    del config["peft_version"]
    path.write_text(json.dumps(config))


def same_size_both_ways(adapter: Path) -> None:
    tensors = {
        f"{ATTENTION}.lora_A.weight": torch.ones(R, H),
        f"{ATTENTION}.lora_B.weight": torch.ones(H, R),
        f"{EXPERTS}.lora_A.weight": torch.ones(E * R, H),
        f"{EXPERTS}.lora_B.weight": torch.ones(H, E * R),
    }
    save_adapter(adapter, tensors)


def truncated(adapter: Path) -> None:
    weights = save_adapter(adapter) / "adapter_model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1)


# Adapters that are refused: the id of the rule -> what writes one.
ADAPTERS: dict[str, Change] = {
    "rank-and-alpha-patterns": lambda path: save_adapter(path, rank_pattern={"(?=q)q_proj": R}),
    "order-of-fused-columns": without_peft_version,
    "orientation-of-fused-factors": same_size_both_ways,
    "base-weights-changed": lambda path: save_adapter(path, init_lora_weights="pissa_niter_16"),
    "unsupported-variants": lambda path: save_adapter(path, use_dora=True),
    "damaged-bytes": truncated,
}


def split(adapter: Path) -> None:
    split_adapter(adapter, adapter.with_name("out"), SplitRequest(2))


def load(adapter: Path) -> None:
    """As far as a load in a server gets with these adapters."""
    with ExitStack() as stack:
        source = open_with_experts(adapter, stack)
        assert source is not None
        detect_layout(source.index, LayoutOptions(), str(adapter))


def made_shards(folder: Path) -> Path:
    split_adapter(save_adapter(folder / "adapter"), folder / "shards", SplitRequest(2))
    return folder / "shards"


def split_what_is_cut_short(folder: Path) -> None:
    adapter, request = save_adapter(folder / "adapter"), SplitRequest(2)
    with prepared_split(adapter, request) as prepared:
        os.truncate(adapter / "adapter_model.safetensors", len(prepared.source.header) + 8)
        write_shards(prepared, folder / "out", request, force=False, progress=lambda _: None)


def split_with_a_cast(folder: Path) -> None:
    tensors = {name: tensor * 1e9 for name, tensor in per_expert_tensors().items()}
    request = SplitRequest(2, dtype="float16")
    split_adapter(save_adapter(folder / "adapter", tensors), folder / "out", request)


def verify_half_a_manifest(folder: Path) -> None:
    shards = made_shards(folder)
    manifest = shards / "lorashard.json"
    os.truncate(manifest, manifest.stat().st_size // 2)
    verify_shards(shards)


def load_swapped_files(folder: Path) -> None:
    shards = made_shards(folder)
    first, second = (shards / name for name in RANK_FILES)
    first.rename(folder / "away")
    second.rename(first)
    with ExitStack() as stack:
        open_shard_directory(shards, stack).sources.source_of(0)


def load_what_is_written_to(folder: Path) -> None:
    shards = made_shards(folder)
    with ExitStack() as stack:
        open_shard_directory(shards, stack).sources.source_of(0)
        os.truncate(shards / RANK_FILES[0], 8)


def load_into_another_model(folder: Path) -> None:
    with ExitStack() as stack:
        contents = open_shard_directory(made_shards(folder), stack)
        match_layers(contents, {}, NamesOfAdapter())


def load_strictly_on_four_ranks(folder: Path) -> str | None:
    shards = survey_adapter(made_shards(folder), LayoutOptions(), expert_parallel=True)
    flags = EngineFlags(tensor_parallel_size=4, enable_expert_parallel=True)
    return judge_adapter(shards, flags, "linear", None, strict=True).refusal


def on_each(seen: str, do: Change, rules: tuple[str, ...]) -> dict[tuple[str, str], Change]:
    def refuses(write: Change) -> Change:
        def write_and_do(folder: Path) -> object:
            write(folder / "adapter")
            return do(folder / "adapter")

        return write_and_do

    return {(rule, seen): refuses(ADAPTERS[rule]) for rule in rules}


READ = ("base-weights-changed", "unsupported-variants", "damaged-bytes")
CASES: dict[tuple[str, str], Change] = {
    **on_each("split", split, tuple(ADAPTERS)),
    **on_each("inspect", inspect_path, READ),
    **on_each("load", load, tuple(ADAPTERS)[:-1]),
    ("replaced-while-read", "split"): split_what_is_cut_short,
    ("lost-in-a-cast", "split"): split_with_a_cast,
    ("damaged-bytes", "verify"): verify_half_a_manifest,
    ("damaged-bytes", "load"): load_swapped_files,
    ("replaced-while-read", "load"): load_what_is_written_to,
    ("unknown-module-names", "load"): load_into_another_model,
    ("other-placement", "load"): load_strictly_on_four_ranks,
    ("ranks-differ", "load"): lambda _: raise_failure((Outcome(), Outcome("OSError: gone"))),
}
# Where nothing is refused: it is made right, or said.
MENDED = {
    ("uneven-experts", "inspect"), ("uneven-experts", "load"), ("fp8-activations", "load"),
    ("local-expert-ids", "load"), ("earlier-adapters-deltas", "load"),
    ("unloaded-by-name-only", "load"), ("stale-prefix-cache", "load"),
    ("untrained-experts", "inspect"), ("untrained-experts", "load"),
    ("experts-of-another-r", "inspect"), ("experts-of-another-r", "split"),
    ("experts-of-another-r", "load"), ("answers-left-behind", "load"), ("versions-of-a-name", "load"),
}  # fmt: skip


def refusal_of(do: Change, folder: Path) -> str | None:
    """What a server answers, or `doctor` says."""
    try:
        said = do(folder)
    except LorashardError as err:
        return for_a_server(err)
    except ValueError as err:
        return str(err)
    return said if isinstance(said, str) else None


def test_each_rule_is_refused_or_mended_wherever_it_is_seen() -> None:
    seen = {(rule.id, where) for rule in RULES for where in rule.seen}
    assert set(CASES) | MENDED == {(rule, where) for rule, where in seen
                                   if where in ("split", "verify", "inspect", "load")}  # fmt: skip
    assert not set(CASES) & MENDED


@pytest.mark.parametrize(("rule", "where"), CASES)
def test_what_refuses_because_of_a_rule_names_it_once(
    tmp_path: Path, rule: str, where: str
) -> None:
    said = refusal_of(CASES[rule, where], tmp_path)
    assert said is not None, "it was not refused"
    assert re.findall(r"\(rule ([a-z0-9-]+)\)", said) == [rule]
    assert f"(rule {rule})" in said.partition("\n")[0]


def test_a_command_says_it_once_in_the_terminal_and_in_a_field_of_json(tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", use_dora=True)
    done = run_cli("split", adapter, "--ep-size", 2, "-o", tmp_path / "out", "--json")
    first, *_ = done.stderr.splitlines()
    assert first == (
        f"error: {adapter}/adapter_config.json: DoRA (use_dora) is not supported "
        "(rule unsupported-variants)."
    )
    document = json.loads(done.stdout)
    assert document["rule"] == "unsupported-variants"
    assert "(rule" not in done.stdout


def test_several_adapters_each_have_their_own(tmp_path: Path) -> None:
    save_adapter(tmp_path / "dora", use_dora=True)
    save_adapter(tmp_path / "pissa", init_lora_weights="pissa")
    done = run_cli("split", tmp_path / "*", "--ep-size", 2, "-o", tmp_path / "out", "--json")
    rules = [document["rule"] for document in json.loads(done.stdout)]
    assert rules == ["unsupported-variants", "base-weights-changed"]
    assert [done.stderr.count(f"(rule {rule})") for rule in rules] == [1, 1]


def test_an_error_that_is_no_rules_names_none(tmp_path: Path) -> None:
    with pytest.raises(LorashardError) as caught:
        inspect_path(tmp_path / "nowhere")
    assert caught.value.rule is None
    assert caught.value.first_line == caught.value.message


@pytest.mark.parametrize(
    ("text", "shown"),
    [("No such thing.", "No such thing (rule a-b)."), ("first: x", "first: x (rule a-b)")],
)
def test_the_id_stands_before_the_full_stop(text: str, shown: str) -> None:
    assert with_rule(text, "a-b") == shown
