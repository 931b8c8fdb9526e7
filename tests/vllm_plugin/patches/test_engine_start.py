"""What stops an engine's start and what is prepared for its loads."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest

from lorashard.version import __version__
from lorashard.vllm_plugin.patches.engine_start import (
    wrap_create_engine_config,
    wrap_create_lora_manager,
)
from tests.vllm_plugin.patched_answers import answers
from tests.vllm_release import PLUGIN_RELEASES

EPLB = "LORASHARD_RISK_WRONG_EXPERTS_AFTER_EPLB_REBALANCE"

every_release = pytest.mark.parametrize("release", PLUGIN_RELEASES)


def config(*, lora: bool = True, ep: bool = True, eplb: str = "") -> Any:
    """A VllmConfig as far as the checks look at it. eplb: EPLB's communicator, if it is on."""
    parallel = SimpleNamespace(
        enable_expert_parallel=ep, tensor_parallel_size=2, data_parallel_size=1,
        enable_eplb=bool(eplb), eplb_config=SimpleNamespace(communicator=eplb),
    )  # fmt: skip
    model = SimpleNamespace(get_num_experts=lambda: 8)
    return SimpleNamespace(
        lora_config=object() if lora else None, parallel_config=parallel, model_config=model
    )


def created(made: Any) -> Any:
    """The result of the replaced create_engine_config where vLLM's own makes this."""
    return wrap_create_engine_config(lambda _self, *_args, **_kwargs: made)(object(), "usage", x=1)


@pytest.mark.parametrize(
    "made",
    [
        config(),
        config(eplb="torch_gloo"),
        config(lora=False, eplb="nixl"),
        config(ep=False, eplb="nixl"),
    ],
)
def test_a_configuration_that_is_right_or_has_no_lora_on_split_experts_passes(made: Any) -> None:
    assert created(made) is made


def test_a_configuration_that_is_wrong_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    made = config(eplb="nixl")
    with pytest.raises(ValueError, match=EPLB):
        created(made)
    monkeypatch.setenv(EPLB, "1")
    assert created(made) is made


def test_what_the_configuration_shows_is_refused_before_vllm_makes_its_manager() -> None:
    def original(*_args: Any) -> None:
        raise AssertionError("vLLM's own method was called")

    with pytest.raises(ValueError, match=EPLB):
        wrap_create_lora_manager(original)(object(), object(), config(eplb="nixl"))


@every_release
def test_as_many_buffers_are_prepared_as_the_variable_says(release: str) -> None:
    found = answers(release)["buffers_at_start"]
    assert (found["0"], found["2"]) == (0, 2)


@every_release
def test_an_engine_that_cannot_prepare_buffers_says_so_and_loads(release: str) -> None:
    outcome, warnings = answers(release)["buffers_at_start"]["no meminfo"]
    assert outcome == "loaded"
    assert len(warnings) == 1
    assert "lorashard: cannot prepare buffers of" in warnings[0]


@every_release
def test_without_expert_parallelism_nothing_is_prepared(release: str) -> None:
    assert answers(release)["buffers_at_start"]["without ep"] is False
    assert answers(release)["buffers_at_start"]["log without ep"] == []


@every_release
def test_the_log_has_one_line_of_the_first_rank_that_says_what_is_on(release: str) -> None:
    (line,) = answers(release)["buffers_at_start"]["log"]
    assert re.fullmatch(
        rf"lorashard {re.escape(__version__)} is on \(vLLM {release}, [1-9]\d* patches applied\): "
        r"LoRA of experts in [1-9]\d* layers on 2 ranks, each with its own",
        line,
    )
