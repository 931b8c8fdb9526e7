"""What is printed: sizes and ids in short, tables, JSON, and nothing that a name smuggles in."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import threading

import pytest

from lorashard.cli import render
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
    render.say_error(name, name)
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


def test_without_a_terminal_bars_count_silently(capsys: pytest.CaptureFixture[str]) -> None:
    with render.progress_bar("split", 10, quiet=False) as bar:
        bar.restart(20)
        bar.advance(5)
    with render.count_bar("split", 2, quiet=False) as advance:
        advance(1)
    assert capsys.readouterr() == ("", "")


def test_without_a_terminal_a_line_says_now_and_then_how_far_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with render.progress_bar("pull x", quiet=False) as bar:
        bar.restart(40_000_000)
        for now[0] in (4.0, 10.0, 14.0, 20.0):
            bar.advance(10_000_000)
    with render.progress_bar("pull x", 10, quiet=True) as bar:
        now[0] = 40.0
        bar.advance(5)
    with render.count_bar("split", 2, quiet=False) as advance:
        now[0] = 60.0
        advance(1)
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        "pull x: 20.0 MB of 40.0 MB, 2.0 MB/s\npull x: 40.0 MB of 40.0 MB, 2.0 MB/s\n"
        "split: 1 of 2\n"
    )


BAR = """
from lorashard.cli import render
render.SHOW_PROGRESS_AFTER_S = {after}
with render.progress_bar("reading", quiet=False) as bar:
    for total in (1_000_000, 2_000_000):
        bar.restart(total)
        bar.advance(total // 2)
"""


@pytest.mark.parametrize(("after", "is_shown"), [(-1, True), (3600, False)])
def test_on_a_terminal_a_bar_shows_each_pass_once_it_takes_long(after: int, is_shown: bool) -> None:
    shown = run_on_terminal(BAR.format(after=after))
    assert ("reading" in shown) == is_shown
    assert ("1.0/2.0 MB" in shown) == is_shown, "the second pass counts from zero"


def run_on_terminal(code: str, **env: str) -> str:
    """What a program writes to a stderr that is a terminal."""
    ours, theirs = pty.openpty()
    chunks: list[bytes] = []

    def read() -> None:
        while True:
            try:
                chunk = os.read(ours, 4096)
            except OSError:  # EIO: the other end is closed
                return
            if not chunk:
                return
            chunks.append(chunk)

    reader = threading.Thread(target=read)
    reader.start()
    environment = os.environ | {"PYTHONPATH": str(REPO), "TERM": "xterm", "COLUMNS": "100"} | env
    subprocess.run([sys.executable, "-c", code], stderr=theirs, env=environment, check=True)
    os.close(theirs)
    reader.join()
    os.close(ours)
    return b"".join(chunks).decode()


def test_json_has_nothing_in_it_that_a_terminal_obeys(capsys: pytest.CaptureFixture[str]) -> None:
    name = "a\x1b[2J\x7f\x9b2J\u202eb\u2028ä"
    render.print_json({name: [name]})
    printed = capsys.readouterr().out
    assert json.loads(printed) == {name: [name]}
    assert not [char for char in printed if not char.isprintable() and char != "\n"]
    assert "ä" in printed
