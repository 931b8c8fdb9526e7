"""torch is given where it is installed, and missed in words where it is not."""

from __future__ import annotations

import sys

import pytest
import torch

from lorashard.errors import AdapterError
from lorashard.storage.torch_import import import_torch


def test_torch_is_the_module_itself() -> None:
    assert import_torch("anything") is torch


def test_a_missing_torch_says_what_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(
        AdapterError, match="torch is not installed, and --dtype needs it"
    ) as caught:
        import_torch("--dtype")
    assert caught.value.hint == "pip install torch"
