"""When an adapter that is to go may go. With a whole engine: patches/test_unloading.py."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorashard.vllm_plugin.engine import adapter_uses
from lorashard.vllm_plugin.engine.adapter_uses import AdapterUses
from lorashard.vllm_plugin.engine.prefix_versions import PrefixVersions


@dataclass
class Lora:
    lora_int_id: int
    lora_path: str = "/nowhere"
    load_inplace: bool = False

    @property
    def lora_name(self) -> str:
        return f"a{self.lora_int_id}"


@dataclass
class Request:
    request_id: str
    lora_request: Lora | None
    ended: bool = False

    def is_finished(self) -> bool:
        return self.ended


@dataclass
class Engine:
    """Stand-in for the scheduler and the workers."""

    loaded: set[int] = field(default_factory=lambda: {1, 2})
    requests: dict[str, Request] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.prefixes = PrefixVersions()
        self.uses = AdapterUses(self.requests, self.prefixes)

    def unload(self, number: int) -> bool:
        return self.uses.remove(number, self.take_out)

    def take_out(self, number: int) -> bool:
        there = number in self.loaded
        self.loaded.discard(number)
        return there

    def send(self, name: str, lora: Lora | None) -> None:
        self.requests[name] = Request(name, lora)
        self.uses.request_came(self.requests[name])

    def end(self, name: str) -> None:
        request = self.requests.pop(name)
        request.ended = True
        self.uses.request_ended(request)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("send"), st.integers(0, 2)),
        st.tuples(st.just("end"), st.integers(0, 20)),
        st.tuples(st.just("remove"), st.integers(1, 2)),
    ),
    max_size=40,
)


@given(STEPS)
def test_an_adapter_is_there_while_requests_use_it_and_goes_with_the_last(
    steps: list[tuple[str, int]],
) -> None:
    engine, asked = Engine(), set[int]()
    for count, (what, number) in enumerate(steps):
        if what == "send":
            engine.send(str(count), Lora(number) if number else None)
            if number not in asked:
                engine.loaded |= {number} - {0}  # the workers load it at its next step
        elif what == "remove":
            was_there = number in engine.loaded
            assert engine.unload(number) == was_there
            asked.add(number)
        elif engine.requests:
            engine.end(list(engine.requests)[number % len(engine.requests)])
        used = {r.lora_request.lora_int_id for r in engine.requests.values() if r.lora_request}
        for gone in asked - used:
            assert gone not in engine.loaded
        asked &= used
        assert used <= engine.loaded


def test_a_path_that_is_still_there_is_read_again_for_a_request_that_comes_late(
    tmp_path: Path,
) -> None:
    engine = Engine()
    engine.send("first", Lora(1, str(tmp_path)))
    assert engine.unload(1)
    engine.send("late", Lora(1, str(tmp_path)))
    assert engine.loaded == {2}
    engine.loaded.add(1)  # as the next step does
    engine.end("first")
    assert engine.loaded == {1, 2}
    engine.end("late")
    assert engine.loaded == {2}


@pytest.mark.parametrize("in_place", [False, True])
def test_a_load_takes_the_place_of_one_that_was_to_go(in_place: bool) -> None:
    engine = Engine()
    engine.send("first", Lora(1))
    engine.unload(1)
    engine.uses.before_load(Lora(1, load_inplace=in_place))
    assert (1 in engine.loaded) == in_place  # in place, the workers replace it
    engine.loaded.add(1)
    engine.end("first")
    assert engine.loaded == {1, 2}


def test_a_failure_to_remove_does_not_reach_the_engines_step(
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = Engine()
    engine.send("first", Lora(1))
    engine.unload(1)
    engine.uses._take_out = lambda _: 1 / 0  # type: ignore[assignment, return-value]
    engine.end("first")
    assert "adapter 1 could not be unloaded" in caplog.text
    engine.send("second", Lora(1))
    engine.end("second")


def test_a_failure_that_is_known_later_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    engine, later = Engine(), Future[bool]()
    engine.send("first", Lora(1))
    engine.unload(1)
    engine.uses._take_out = lambda _: later
    engine.end("first")
    assert caplog.text == ""
    later.set_exception(OSError("a worker has ended"))
    assert "adapter 1 could not be unloaded" in caplog.text
    assert "a worker has ended" in caplog.text


def test_a_prefix_is_renewed_with_what_replaces_its_adapter_and_only_then() -> None:
    engine = Engine()
    engine.send("one", Lora(1))
    engine.end("one")
    engine.uses.before_load(Lora(1))
    engine.unload(2)  # has served no request
    assert [engine.prefixes.version(name) for name in ("a1", "a2")] == ["", ""]
    engine.uses.before_load(Lora(1, load_inplace=True))
    in_place = engine.prefixes.version("a1")
    engine.send("two", Lora(1))
    engine.unload(1)
    assert "" != in_place != engine.prefixes.version("a1")
    assert engine.prefixes.version("a2") == ""


def test_more_adapters_than_are_kept_renew_all_prefixes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_uses, "MAX_NAMES", 3)
    engine = Engine()
    for number in range(1, 9):
        engine.send(str(number), Lora(number))
    assert len(engine.uses._names) <= 3
    assert engine.prefixes.version("a1") != ""
