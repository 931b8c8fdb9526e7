"""The environment variables: switches, numbers and words."""

from __future__ import annotations

import re

import pytest

from lorashard.vllm_plugin import settings

NUMBERS = {settings.WARM_BUFFERS: settings.warm_buffers, settings.THREADS: settings.reader_threads}


@pytest.mark.parametrize("value", ["", " ", "0", "false", "False", "OFF", "no", " 0 "])
def test_a_switch_is_off_for_every_word_that_says_so(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv(settings.STRICT, value)
    assert not settings.is_set(settings.STRICT)


@pytest.mark.parametrize("value", ["1", "true", "on", "yes", "2", "x"])
def test_a_switch_is_on_for_anything_else(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(settings.STRICT, value)
    assert settings.is_set(settings.STRICT)


def test_nothing_is_on_that_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in settings.VARIABLES:
        monkeypatch.delenv(variable, raising=False)
        assert not settings.is_set(variable)
    assert not settings.verifies_fully()
    assert settings.warm_buffers() == 3
    assert 1 <= settings.reader_threads() <= 16
    assert settings.reader_threads(1000) == 1  # workers on this host
    assert settings.expert_map_directory() is None


@pytest.mark.parametrize(
    ("value", "full"), [("full", True), (" Full ", True), ("header", False), ("", False)]
)
def test_digests_are_checked_if_the_word_is_full(
    monkeypatch: pytest.MonkeyPatch, value: str, full: bool
) -> None:
    monkeypatch.setenv(settings.VERIFY, value)
    assert settings.verifies_fully() is full


@pytest.mark.parametrize("value", ["1", "ful", "all", "0"])
def test_an_unknown_word_is_refused_with_those_that_are_known(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv(settings.VERIFY, value)
    told = rf"{settings.VERIFY}='{value}'.*'header'.*'full'"
    with pytest.raises(ValueError, match=told):
        settings.verifies_fully()


@pytest.mark.parametrize("variable", NUMBERS)
def test_a_number_is_read(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, " 12 ")
    assert NUMBERS[variable]() == 12


@pytest.mark.parametrize("value", ["-1", "1.5", "three", "1e3", "0x10", "1_0", "²"])
@pytest.mark.parametrize("variable", NUMBERS)
def test_a_number_that_is_none_is_refused_with_the_variable_s_name(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=f"{variable}='{re.escape(value)}': must be an integer >="):
        NUMBERS[variable]()


def test_no_buffers_may_be_wished_but_not_no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(settings.WARM_BUFFERS, "0")
    assert settings.warm_buffers() == 0
    monkeypatch.setenv(settings.THREADS, "0")
    with pytest.raises(ValueError, match=f"{settings.THREADS}='0': must be an integer >= 1"):
        settings.reader_threads()


def test_every_variable_is_one_of_the_project_s_and_told_of() -> None:
    assert len(set(settings.VARIABLES)) == len(settings.VARIABLES)
    for variable in settings.VARIABLES:
        assert variable.startswith("LORASHARD_")
        assert f"\n{variable}=" in (settings.__doc__ or "")
