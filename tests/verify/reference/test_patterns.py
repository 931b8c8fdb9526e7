import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorashard.errors import AdapterError
from lorashard.verify.reference.patterns import Patterns

KEY = st.lists(
    st.sampled_from(["a", "b", "_", ".", r"\.", r"\-", "1", r"\d", "[ab]", "a+", ".*", "(?:a|b)", "$", "^"]),
    min_size=1, max_size=6,
).map("".join)  # fmt: skip


@given(st.lists(KEY, max_size=5, unique=True), st.text("ab_.-1", min_size=1, max_size=8))
def test_the_first_key_that_matches_wins_as_in_peft(keys: list[str], name: str):
    try:
        matching = [key for key in keys if re.match(rf"(.*\.)?({key})$", name)]
        found = Patterns("rank_pattern", dict(zip(keys, keys))).find(name, "none")
    except (re.error, AdapterError):
        return
    assert found == next(iter(matching), name if name in keys else "none")


@pytest.mark.parametrize("key", [r"([\w.]+)+!", r"(a|a)*b"])
def test_a_pattern_that_re_never_finishes_takes_no_time(key: str):
    assert Patterns("rank_pattern", {key: 1}).find("mlp." + "a" * 2000, 0) == 0


@pytest.mark.parametrize(
    ("key", "name"),
    [
        (r"a\\1", "x.a\\1"),
        (r"\[a\[", "[a["),
        (r"a\{,3}", "a{,3}"),
        (r"\(?i", "i"),
        ("é-1", "x.é-1"),
    ],
)
def test_what_only_looks_like_a_special_form_is_matched(key: str, name: str):
    assert Patterns("rank_pattern", {key: 1}).find(name, 0) == 1
    assert Patterns("rank_pattern", {key: 1}).find(name + "x", 0) == 0


@pytest.mark.parametrize("key", [r"(a)\1", r"(?=a)a", "[[:alpha:]]", "a{,2}", r"a\Z"])
def test_a_key_that_needs_backtracking_is_refused_by_name(key: str):
    with pytest.raises(AdapterError) as error:
        Patterns("rank_pattern", {key: 1})
    assert ascii(key) in str(error.value)
