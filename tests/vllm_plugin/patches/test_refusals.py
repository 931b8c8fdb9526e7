"""A refusal stops the engine unless its own variable accepts the risk."""

from __future__ import annotations

import pytest

from lorashard.vllm_plugin.engine.guards import Refusal
from lorashard.vllm_plugin.patches.refusals import enforce

FIRST = Refusal("first-risk", "LORASHARD_RISK_FIRST", "It is wrong.", "Do otherwise.")
SECOND = Refusal("second-risk", "LORASHARD_RISK_SECOND", "That too.", "Do otherwise.")


def test_nothing_to_refuse_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    enforce(())
    assert caplog.messages == []


def test_the_first_refusal_is_raised_with_all_its_text() -> None:
    with pytest.raises(ValueError, match="LORASHARD_RISK_FIRST") as caught:
        enforce((FIRST, SECOND))
    assert str(caught.value) == str(FIRST)


def test_accepting_one_risk_does_not_accept_another(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(FIRST.variable, "1")
    with pytest.raises(ValueError, match="LORASHARD_RISK_SECOND"):
        enforce((FIRST, SECOND))
    assert caplog.messages == [
        "lorashard: not refused because LORASHARD_RISK_FIRST is set: It is wrong."
    ]


@pytest.mark.parametrize("value", ["", "0", "false"])
def test_a_variable_that_is_off_accepts_nothing(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv(FIRST.variable, value)
    with pytest.raises(ValueError, match="LORASHARD_RISK_FIRST"):
        enforce([FIRST])
