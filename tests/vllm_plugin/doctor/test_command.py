"""What a vLLM command line says, in the ways in which it can be written."""

from __future__ import annotations

import shlex

import pytest

from lorashard.errors import PlacementError
from lorashard.vllm_plugin.doctor.command import VllmCommand, parse_command, starts_command
from lorashard.vllm_plugin.doctor.flags import EngineFlags


def parse(line: str) -> VllmCommand:
    return parse_command(shlex.split(line), EngineFlags())


@pytest.mark.parametrize(
    "line",
    [
        "vllm serve M -tp 2 -dp 4 -ep",
        "vllm serve M --tensor-parallel-size=2 --data_parallel_size 4 --enable_expert_parallel",
        "/opt/venv/bin/vllm serve M -tp=2 -dp=4 --enable-expert-parallel",
        "vllm serve -tp 2 -dp 4 -ep M",
        "vllm serve --model M -tp 2 -dp 4 -ep",
        "python -m vllm.entrypoints.openai.api_server --model M -tp 2 -dp 4 -ep",
        "python3.12 -u -m vllm.entrypoints.cli.main serve M -tp 2 -dp 4 -ep",
        "VLLM_USE_V1=1 vllm serve M -tp 8 -tp 2 -dp 4 -ep",
    ],
)
def test_every_way_to_write_the_same_command_is_understood(line: str) -> None:
    command = parse(line)
    assert (command.model, command.ignored) == ("M", ())
    assert command.flags == EngineFlags(2, 4, enable_expert_parallel=True)


def test_the_last_word_on_a_switch_counts() -> None:
    assert not parse("vllm serve M --enable-eplb --no-enable-eplb").flags.enable_eplb
    assert not parse("vllm serve M --enable-lora --no-enable-lora").enable_lora
    assert parse("vllm serve M --fully-sharded-loras").flags.fully_sharded_loras


def test_flags_that_are_not_named_are_the_defaults() -> None:
    command = parse_command(["vllm", "serve", "M"], EngineFlags(4, max_lora_rank=64))
    assert command.flags == EngineFlags(4, max_lora_rank=64)


def test_json_values_and_values_that_look_like_paths_are_left_alone() -> None:
    command = parse(
        """vllm serve M --eplb-config '{"window_size": 1}' --compilation-config.level 3 -cc.mode=0
        --hf-overrides '{"tensor-parallel-size": 9}' --seed -1 -tp 2 --trust-remote-code"""
    )
    assert command.flags.tensor_parallel_size == 2
    assert command.ignored == (
        '--eplb-config {"window_size": 1}', "--compilation-config.level 3", "-cc.mode=0",
        '--hf-overrides {"tensor-parallel-size": 9}', "--seed -1", "--trust-remote-code",
    )  # fmt: skip


def test_a_word_after_an_unknown_option_is_its_value_and_not_the_model() -> None:
    assert parse("vllm serve --port 8000 -tp 2 M").model == "M"
    assert parse("vllm serve --port 8000").model is None


def test_adapters_are_named_in_both_forms() -> None:
    command = parse("""vllm serve M --lora-modules a=/x '{"name": "b", "path": "/y"}' -tp 2""")
    assert command.adapters == ("/x", "/y")


def test_a_config_file_is_noted_since_it_is_not_read() -> None:
    (note,) = parse("vllm serve M --config serve.yaml").notes
    assert note.startswith("--config: its file is not read")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("vllm bench serve", "'vllm bench serve' does not start a vLLM server."),
        ("python serve.py -tp 2", "does not start a vLLM server"),
        ("A=1", "does not start a vLLM server"),
        ("vllm serve M -tp two", "--tensor-parallel-size needs a number above 0, got 'two'."),
        ("vllm serve M -tp", "--tensor-parallel-size needs a number above 0, got ''."),
        ("vllm serve M -tp 0", "--tensor-parallel-size needs a number above 0, got '0'."),
        ("vllm serve M -ep=1", "--enable-expert-parallel takes no value, got '1'."),
        ("vllm serve M --expert-placement-strategy odd", "is linear or round_robin, got 'odd'."),
        ("vllm serve M --lora-modules {name:a}", "'{name:a}' is not valid JSON."),
    ],
)
def test_what_vllm_would_not_take_is_refused(line: str, said: str) -> None:
    with pytest.raises(PlacementError) as raised:
        parse(line)
    assert said in raised.value.message


def test_a_path_alone_is_no_command() -> None:
    assert not starts_command(["vllm"])
    assert not starts_command(["adapter", "vllm", "serve"])
    assert starts_command(["vllm", "serve", "M"])
    assert starts_command(["A=1", "vllm", "serve", "M"])
