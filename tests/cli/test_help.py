"""Help, version and completion."""

from __future__ import annotations

import pytest

from lorashard.version import __version__
from tests.tiny import run_cli

PLACING = ("--ep-size", "--placement", "--expert-map", "--dtype")
READING = ("--model", "--num-experts", "--lora-b-layout", "--orientation", "--allow-pickle")
ENGINE = (
    "-tp", "--tensor-parallel-size", "--data-parallel-size", "--enable-expert-parallel",
    "--enable-eplb", "--fully-sharded-loras", "--expert-placement-strategy",
)  # fmt: skip
OPTIONS = {
    "split": (*PLACING, *READING, "--output", "-o", "--force", "--dry-run", "--json", "--quiet"),
    "verify": ("--against", "--allow-pickle", "--json", "--quiet"),
    "inspect": (*READING, "--json"),
    "plan": (*PLACING, *READING, "--max-loras", "--max-lora-rank", "--json"),
    "merge": ("--output", "-o", "--force", "--json", "--quiet"),
    "doctor": (*ENGINE, "--max-lora-rank", "--model", "--json"),
}


def test_help_lists_every_command_and_the_exit_codes() -> None:
    done = run_cli("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert all(command in done.stdout for command in OPTIONS)
    assert "3 adapter, 4 placement, 5 shard" in " ".join(done.stdout.split())


@pytest.mark.parametrize("command", OPTIONS)
def test_help_of_a_command_lists_its_options(command: str) -> None:
    done = run_cli(command, "--help", COLUMNS="200")
    assert done.returncode == 0
    assert [option for option in OPTIONS[command] if option not in done.stdout] == []


def test_no_command_is_a_usage_error_with_help() -> None:
    done = run_cli()
    assert done.returncode == 2
    assert "Usage" in done.stdout + done.stderr


def test_the_version_is_printed() -> None:
    done = run_cli("--version")
    assert (done.returncode, done.stdout) == (0, f"lorashard {__version__}\n")


@pytest.mark.parametrize("arguments", [["frobnicate"], ["split", "--frobnicate"], ["merge", "x"]])
def test_a_wrong_command_line_is_a_usage_error(arguments: list[str]) -> None:
    done = run_cli(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_shown_for_a_shell(shell: str) -> None:
    disabled = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    done = run_cli("--show-completion", shell, **disabled)
    assert done.returncode == 0
    assert "complete" in done.stdout.lower()
