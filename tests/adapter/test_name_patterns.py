import json
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorashard.adapter.config import parse_config
from lorashard.adapter.name_patterns import NamePattern, NamePatterns
from lorashard.errors import UnsupportedAdapterError


def by_peft(patterns: dict[str, int], name: str) -> int:
    """PEFT `get_pattern_key`."""
    keys = (key for key in patterns if re.match(rf"(.*\.)?({key})$", name))
    return patterns.get(next(keys, name), 0)


def patterns_of(values: dict[str, int]) -> NamePatterns[int]:
    return NamePatterns(values, "rank_pattern", "a")


NAMES = st.text("ab_.-1", min_size=1, max_size=8)
PLAIN = st.lists(st.sampled_from(["a", "b", "_", ".", r"\.", "-", r"\-", "1"]), min_size=1).map(
    "".join
)


@given(st.lists(PLAIN, max_size=6, unique=True), NAMES)
def test_plain_keys_mean_what_peft_means(keys: list[str], name: str):
    patterns = {key: number for number, key in enumerate(keys, 1)}
    assert patterns_of(patterns).first_match(name, 0) == by_peft(patterns, name)


PARTS = ("a", "b", "1", ".", r"\.", r"\d", r"\w", r"\W", "[ab]", "[^a.]", "[]a]", "^", "$", r"\b", r"\B",
         "x?", "(?:a|b.)", "(a1)", "(?P<n>b)", "(?i:B)", r"\_", r"\x61", "{", "[a-b]", r"\s", r"\A")  # fmt: skip
ENDS = ("", "", "*", "+", "?", "*?", "{1,2}", "{2}", "{1,}", "|")
REGULAR = st.lists(
    st.tuples(st.sampled_from(PARTS), st.sampled_from(ENDS)).map("".join), min_size=1, max_size=5
).map("".join)


@given(st.lists(st.one_of(REGULAR, PLAIN), max_size=4, unique=True), NAMES)
def test_patterns_mean_what_peft_means(keys: list[str], name: str):
    patterns = {key: number for number, key in enumerate(keys, 1)}
    try:
        expected = by_peft(patterns, name)
        found = patterns_of(patterns).first_match(name, 0)
    except (re.error, UnsupportedAdapterError):
        return
    assert found == expected


@given(REGULAR, NAMES)
def test_targets_mean_what_peft_means(pattern: str, name: str):
    try:
        matches = NamePattern(pattern, "target_modules", "a").matches(name)
    except (re.error, UnsupportedAdapterError):
        return
    assert matches == (re.fullmatch(pattern, name) is not None)


@pytest.mark.parametrize(
    "key",
    [
        r"(a)\1", r"(?=a)a", r"(?!a)b", r"(?<=a)b", r"(?P<n>a)(?P=n)", r"a(?#note)b", r"a\Z",
        r"(a)(a)(a)(a)(a)(a)(a)(a)(a)(a)\10", r"a{,2}", "[[:alpha:]]", "[a&&b]", "[a||b]", "[a[b]",
        r"\071", "é+", "(" + "a{999}" * 9 + "){99}", "a?" * 20_000,
    ],
)  # fmt: skip
def test_what_re_and_re2_read_differently_is_refused_by_name(key: str):
    raw = json.dumps({"r": 2, "lora_alpha": 4, "rank_pattern": {key: 3}}).encode()
    with pytest.raises(UnsupportedAdapterError) as error:
        parse_config(raw, "a")
    assert ascii(key)[:20] in str(error.value)
    assert "rank_pattern" in str(error.value)


def test_names_in_other_scripts_match_plain_keys_only():
    assert patterns_of({"schicht_a": 1}).first_match("ä.schicht_a", 0) == 1
    with pytest.raises(UnsupportedAdapterError):
        patterns_of({r"\w+": 1}).first_match("ä", 0)


@pytest.mark.parametrize("key", [r"([\w.]+)+!", r"([a-z0-9._]+)+!", r"(a|a)*b", r"(.*)*!"])
def test_a_pattern_that_re_never_finishes_takes_no_time(key: str):
    patterns = patterns_of({key: 1})
    assert patterns.first_match("model.layers.1.mlp.experts." + "a" * 2000, 0) == 0


def test_keys_are_looked_up_and_not_tried_one_by_one():
    """Twice the keys and names take about twice as long, not four times."""

    def seconds(count: int) -> float:
        names = [f"model.layers.{n // 64}.mlp.experts.{n % 64}.up_proj" for n in range(count)]
        patterns = patterns_of({name: place for place, name in enumerate(names)})
        begin = time.process_time()
        assert [patterns.first_match(name, -1) for name in names] == list(range(count))
        return time.process_time() - begin

    seconds(500)
    assert seconds(16_000) < 12 * seconds(4_000) + 0.5


def test_too_many_patterns_are_refused():
    with pytest.raises(UnsupportedAdapterError):
        patterns_of({f"a+{n}": 1 for n in range(300)})
    with pytest.raises(UnsupportedAdapterError):
        patterns_of({"a" * n + "." + "a" * (2000 - n): 1 for n in range(2000)})


def test_a_key_that_does_not_match_its_own_name_counts_for_it():
    assert patterns_of({"a+b": 1}).first_match("a+b", 0) == by_peft({"a+b": 1}, "a+b") == 1
