"""What is printed: sizes and ids in short, tables, JSON, and nothing that a name smuggles in."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from lorashard.cli import render
from tests.terminal import run_on_terminal
from tests.tiny import REPO


@pytest.mark.parametrize(
    ("num_bytes", "shown"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1_234_567, "1.2 MB"), (2**40, "1099.51 GB")],
)
def test_sizes_are_decimal(num_bytes: int, shown: str) -> None:
    assert render.size(num_bytes) == shown


@pytest.mark.parametrize(
    ("numbers", "shown"),
    [
        ([], "none"),
        ([5], "5"),
        (range(64), "0-63"),
        ([0, 2, 4, 6, 8, 10], "0, 2, 4, 6, 8, 10"),
        (range(0, 128, 2), "0, 2, 4, 6, … (64)"),
        ([1, 0], "1, 0"),
    ],
)
def test_ids_are_shown_in_short(numbers: list[int], shown: str) -> None:
    assert render.ids(numbers) == shown


def test_control_characters_are_shown_and_not_sent(capsys: pytest.CaptureFixture[str]) -> None:
    render.print_line("a\x1b[31mb\tc\nd")
    assert capsys.readouterr().out == "a\\x1b[31mb\\x09c\\x0ad\n"


@pytest.mark.parametrize(
    ("character", "shown"),
    [("\x1b", "\\x1b"), ("\x7f", "\\x7f"), ("\x9b", "\\x9b"), ("\n", "\\x0a"), ("\r", "\\x0d"),
     ("\u2028", "\\u2028"), ("\u202e", "\\u202e"), ("\u2066", "\\u2066"), ("é", "é")],
)  # fmt: skip
def test_whatever_prints_a_name_shows_it_on_one_line(
    capsys: pytest.CaptureFixture[str], character: str, shown: str
) -> None:
    name = f"a{character}b"
    render.print_line(name)
    render.print_facts({"name": name})
    render.print_table("Files", ("", "size"), [(name, "1 B")])
    render.say(name)
    render.say_error(name, name, None)
    out, err = capsys.readouterr()
    assert out.split("\n")[:3] == [f"a{shown}b", f"name  a{shown}b", "Files"]
    assert out.split("\n")[4:] == [f"a{shown}b   1 B", ""]
    assert err == f"a{shown}b\nerror: a{shown}b\n  a{shown}b\n"


TABLE = """
import sys
sys.stdout = sys.stderr
from lorashard.cli import render
render.print_table("Files", ("", "size"), [("\\x1b]0;pwned\\x07", "1 B"), ("é\\u202e", "2 B")])
"""


def test_a_table_on_a_terminal_sends_no_escape_sequence_of_a_name() -> None:
    shown = run_on_terminal(TABLE)
    assert "\\x1b]0;pwned\\x07" in shown
    assert "é\\u202e" in shown
    for sent in ("\x1b]", "\x07", "\u202e"):
        assert sent not in shown


@pytest.mark.parametrize("columns", ["0", "1"])
def test_a_table_on_a_terminal_without_a_width_is_whole(columns: str) -> None:
    shown = run_on_terminal(TABLE, COLUMNS=columns)
    assert "pwned" in shown
    assert "1 B" in shown
    assert "2 B" in shown


def test_a_table_without_a_terminal_is_aligned_text(capsys: pytest.CaptureFixture[str]) -> None:
    render.print_table("Files", ("", "size"), [("a", "10 B"), ("bcd", "9 B")])
    assert capsys.readouterr().out == "Files\n     size\na    10 B\nbcd   9 B\n"


def test_facts_are_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    render.print_facts({"a": "1", "long": "2"})
    assert capsys.readouterr().out == "a     1\nlong  2\n"


@pytest.mark.parametrize(
    ("as_json", "quiet", "printed"),
    [(True, True, '{\n  "out": "ä"\n}\n'), (False, False, "place\n"), (False, True, "")],
)
def test_a_result_is_json_or_its_place_or_nothing(
    capsys: pytest.CaptureFixture[str], as_json: bool, quiet: bool, printed: str
) -> None:
    render.print_result({"out": "ä"}, "place", as_json=as_json, quiet=quiet)
    assert capsys.readouterr().out == printed
    assert not printed.startswith("{") or json.loads(printed) == {"out": "ä"}


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_json_is_json_in_every_encoding(encoding: str) -> None:
    code = "from lorashard.cli import render; render.settle_streams(); "
    code += "render.print_json({'out': '\\xe9\\U0001f600'})"
    environment = os.environ | {"PYTHONPATH": str(REPO), "PYTHONIOENCODING": encoding}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, check=True
    )
    assert json.loads(done.stdout.decode(encoding)) == {"out": "é\U0001f600"}


def test_talk_goes_to_stderr_unless_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    render.say("one")
    render.say("two", quiet=True)
    assert capsys.readouterr() == ("", "one\n")


def test_json_has_nothing_in_it_that_a_terminal_obeys(capsys: pytest.CaptureFixture[str]) -> None:
    name = "a\x1b[2J\x7f\x9b2J\u202eb\u2028ä"
    render.print_json({name: [name]})
    printed = capsys.readouterr().out
    assert json.loads(printed) == {name: [name]}
    assert not [char for char in printed if not char.isprintable() and char != "\n"]
    assert "ä" in printed
