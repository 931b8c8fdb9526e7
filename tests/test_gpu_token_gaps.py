"""The gaps between tokens or steps: what is ordinary, and the longest while something happens."""

from __future__ import annotations

from tests.gpu.token_gaps import gaps_at, pairs_within


def ticks(begin: float, end: float, step: float) -> list[float]:
    return [begin + number * step for number in range(round((end - begin) / step))]


def test_a_pair_counts_if_one_of_its_ends_is_within() -> None:
    series = [[0.0, 1.0, 2.0, 3.0], [0.5]]
    assert pairs_within(series, 1.2, 1.8) == [(1.0, 2.0)]
    assert pairs_within(series, 0.5, 2.5) == [(0.0, 1.0), (1.0, 2.0), (2.0, 3.0)]


def test_the_longest_of_each_window_beside_the_second_before_it() -> None:
    # Every 10 ms; one request stops for 50 ms in the first window, and for 90 ms long before it.
    stopping = [*ticks(7.0, 8.0, 0.01), *ticks(8.09, 10.0, 0.01), *ticks(10.05, 14.0, 0.01)]
    found = gaps_at([ticks(7.0, 14.0, 0.01), stopping], [(9.95, 10.2), (12.0, 12.1)])
    assert found["step_ms"] == 10.0
    assert found["longest_ordinary_gap_ms"] == 10.0
    assert found["longest_gap_at_each_load_ms"] == [60.0, 10.0]
    assert found["longest_gap_from_and_to_s"][0] == [0.04, 0.1]
    assert found["in_steps"] == 3.5


def test_a_gap_that_begins_right_before_a_window_is_no_ordinary_one() -> None:
    steps = [*ticks(7.0, 10.0, 0.01), *ticks(10.5, 11.0, 0.01)]
    found = gaps_at([steps], [(9.995, 10.5)])
    assert found["longest_ordinary_gap_ms"] == 10.0
    assert found["longest_gap_at_each_load_ms"] == [510.0]
