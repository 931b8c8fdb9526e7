"""Which failures of a load are counted, and what becomes of the error. vLLM is not needed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lorashard.errors import ShardError
from lorashard.vllm_plugin.patches import adapter_loading

REQUEST = SimpleNamespace(lora_name="mine", lora_int_id=3)


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
