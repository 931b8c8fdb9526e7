"""How far a command is: bytes, speed and what is left, of one adapter and of many."""

from __future__ import annotations

import pytest

from lorashard.cli import bars
from lorashard.cli.bars import BatchCount
from tests.terminal import run_on_terminal


def test_without_a_terminal_bars_count_silently(capsys: pytest.CaptureFixture[str]) -> None:
    with bars.progress_bar("split", 10, quiet=False) as bar:
        bar.restart(20)
        bar.advance(5)
    with bars.batch_bar("split", 2, quiet=False) as bar:
        bar.start("a", 10)
        bar.advance("a", 5)
        bar.finish("a")
    assert capsys.readouterr() == ("", "")


def test_without_a_terminal_a_line_says_now_and_then_how_far_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with bars.progress_bar("pull x", quiet=False) as bar:
        bar.restart(40_000_000)
        for now[0] in (4.0, 10.0, 14.0, 20.0):
            bar.advance(10_000_000)
    with bars.progress_bar("pull x", 10, quiet=True) as bar:
        now[0] = 40.0
        bar.advance(5)
    with bars.batch_bar("split", 3, quiet=False) as batch:
        batch.start("a", 40_000_000)
        now[0] = 50.0
        batch.advance("a", 20_000_000)
        batch.start("b", 20_000_000)
        now[0] = 60.0
        batch.finish("a")
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        "pull x: 20.0 MB of 40.0 MB, 2.0 MB/s\npull x: 40.0 MB of 40.0 MB, 2.0 MB/s\n"
        "split: 0 of 3, 20.0 MB of about 120.0 MB, 2.0 MB/s, 0:00:50 left\n"
        "split: 1 of 3, 40.0 MB of about 90.0 MB, 2.0 MB/s, 0:00:25 left\n"
    )


BAR = """
from lorashard.cli import bars
bars.SHOW_PROGRESS_AFTER_S = {after}
with bars.progress_bar("reading", quiet=False) as bar:
    for total in (1_000_000, 2_000_000):
        bar.restart(total)
        bar.advance(total // 2)
"""


@pytest.mark.parametrize(("after", "is_shown"), [(-1, True), (3600, False)])
def test_on_a_terminal_a_bar_shows_each_pass_once_it_takes_long(after: int, is_shown: bool) -> None:
    shown = run_on_terminal(BAR.format(after=after))
    assert ("reading" in shown) == is_shown
    assert ("1.0/2.0 MB" in shown) == is_shown, "the second pass counts from zero"


def test_the_bytes_of_a_batch_are_estimated_from_those_that_have_begun() -> None:
    count = BatchCount(4)
    assert (count.done_bytes, count.total_bytes, count.is_estimate) == (0, 0, True)
    count.start("a", 100)
    count.advance("a", 30)
    assert (count.done_bytes, count.total_bytes) == (30, 400)
    count.start("a", 100)  # a second pass counts from zero
    count.start("b", 300)
    assert (count.done_bytes, count.total_bytes) == (0, 800)
    count.finish("b")  # it has failed, so no more of it will come
    count.finish("c")  # before anything was read
    assert (count.num_finished, count.done_bytes, count.total_bytes) == (2, 300, 600)
    count.start("d", 200)
    assert (count.total_bytes, count.is_estimate) == (600, False)


BATCH = """
from lorashard.cli import bars
with bars.batch_bar("split", 15, quiet=False) as bar:
    bar.start("a", 1_000_000)
    bar.advance("a", 500_000)
    bar.finish("a")
"""


def test_on_a_terminal_a_batch_shows_adapters_and_bytes() -> None:
    shown = run_on_terminal(BATCH)
    assert "split 1/15" in shown
    assert "1.0/15.0 MB" in shown
