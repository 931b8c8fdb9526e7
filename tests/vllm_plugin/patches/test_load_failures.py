"""Which failures of a load are counted, and what becomes of the error. vLLM is not needed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lorashard.errors import ShardError
from lorashard.vllm_plugin.patches import adapter_loading

REQUEST = SimpleNamespace(lora_name="mine", lora_int_id=3, lora_path="none/such")


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (ShardError("rank file short"), ValueError),
        (OSError("disk gone"), OSError),
        (KeyError("I64"), KeyError),
    ],
)
def test_every_failure_is_counted_once_whatever_its_kind(
    error: Exception, raised: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []
    monkeypatch.setattr(adapter_loading, "report_failure", counted.append)

    def original(_manager: Any, _request: Any) -> Any:
        raise error

    manager = SimpleNamespace(_lora_model_cls="vLLM's")
    with pytest.raises(raised) as caught:
        adapter_loading.wrap_load_adapter(original)(manager, REQUEST)
    assert caught.type is raised
    assert str(error.args[0]) in str(caught.value)
    assert counted == [0]
    assert manager._lora_model_cls == "vLLM's"


@pytest.mark.parametrize(
    ("hint", "is_explained"),
    [
        ("Use --num-experts or --model.", True),
        ("The adapter has --orientation to tell.", True),
        ("Start vLLM with --max-lora-rank 32.", False),
        ("Copy the directory again.", False),
        (None, False),
    ],
)
def test_an_option_of_split_is_called_that_in_a_server_s_answer(
    hint: str | None, is_explained: bool
) -> None:
    def original(_manager: Any, _request: Any) -> Any:
        raise ShardError("what is wrong", hint=hint)

    manager = SimpleNamespace(_lora_model_cls="vLLM's")
    with pytest.raises(ValueError, match="what is wrong") as caught:
        adapter_loading.wrap_load_adapter(original)(manager, REQUEST)
    assert (
        "an option of `lorashard split`, not of `vllm serve`" in str(caught.value)
    ) is is_explained
