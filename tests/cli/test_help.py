"""Help, version and completion."""

from __future__ import annotations

import shlex

import pytest
from typer.main import get_command

from lorashard.cli.app import app
from lorashard.cli.groups import EXAMPLES, GROUPS
from lorashard.version import __version__
from tests.tiny import REPO, run_cli

PLACING = ("--ep-size", "--placement", "--expert-map", "--dtype")
READING = ("--model", "--num-experts", "--lora-b-layout", "--orientation", "--allow-pickle")
ENGINE = (
    "-tp", "--tensor-parallel-size", "--data-parallel-size", "--enable-expert-parallel",
    "--enable-eplb", "--fully-sharded-loras", "--expert-placement-strategy",
)  # fmt: skip
OPTIONS = {
    "split": (*PLACING, *READING, "--output", "-o", "--force", "--dry-run", "--json", "--quiet"),
    "verify": ("--against", "--allow-pickle", "--json", "--quiet"),
    "inspect": (*READING, "--html", "--json"),
    "plan": (*PLACING, *READING, "--max-loras", "--max-lora-rank", "--html", "--json"),
    "merge": ("--output", "-o", "--force", "--json", "--quiet"),
    "doctor": (*ENGINE, "--max-lora-rank", "--max-loras", "--model", "--json"),
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


def test_every_command_is_in_a_group_and_has_its_whole_summary() -> None:
    shown = " ".join(run_cli("-h").stdout.split())
    for title in GROUPS:
        assert f"{title}:" in shown
    registered = [info.name for info in app.registered_commands]
    assert sorted(registered) == sorted(name for names in GROUPS.values() for name in names)
    assert "..." not in shown.partition("Make shards:")[2]


@pytest.mark.parametrize("command", [name for name in EXAMPLES if EXAMPLES[name]])
def test_short_help_is_the_help_and_ends_with_examples(command: str) -> None:
    short, long = run_cli(command, "-h"), run_cli(command, "--help")
    assert (short.returncode, short.stdout) == (0, long.stdout)
    assert run_cli("help", command).stdout == long.stdout
    ending = "\n".join(f"    {example}" for example in EXAMPLES[command])
    examples, _, more = short.stdout.rpartition("\n\n")
    assert examples.endswith(f"Examples:\n{ending}")
    assert more == f"  More: {REPO / 'docs' / 'cli.md'}\n"


def test_every_example_is_a_valid_command_line() -> None:
    """Words that the parser refuses end with 2; other faults come later."""
    for line in (line for lines in EXAMPLES.values() for line in lines):
        parsed = get_command(app)
        context = parsed.make_context("lorashard", shlex.split(line)[1:])
        name, command, rest = parsed.resolve_command(context, context._protected_args)  # type: ignore[attr-defined]
        command.make_context(name, rest + context.args)


@pytest.mark.parametrize(("columns", "widest"), [("60", 60), ("110", 110), ("200", 120)])
def test_help_is_as_wide_as_the_terminal_up_to_a_limit(columns: str, widest: int) -> None:
    lines = run_cli("split", "-h", COLUMNS=columns).stdout.splitlines()
    assert widest - 25 < max(map(len, lines)) <= max(widest, 70)


def test_no_command_is_a_usage_error_with_help() -> None:
    done = run_cli()
    assert done.returncode == 2
    assert "Usage" in done.stdout + done.stderr


def test_help_without_a_command_is_that_of_all_and_with_an_unknown_one_a_usage_error() -> None:
    assert run_cli("help").stdout == run_cli("--help").stdout
    done = run_cli("help", "slpit")
    assert (done.returncode, done.stdout) == (2, "")
    assert "Did you mean 'split'?" in done.stderr


def test_the_version_is_printed() -> None:
    assert run_cli("version").stdout == run_cli("--version").stdout
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
