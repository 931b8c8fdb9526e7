"""What the tests of layouts share: tiny adapters read, and how they are refused."""

from __future__ import annotations

from typing import Any

import pytest

from lorashard.adapter.modules import ExpertModule
from lorashard.errors import LayoutError
from tests.adapters import Adapter, Spec, build
from tests.strategies import layout_of

EXPERTS = "base_model.model.model.layers.0.mlp.experts"
ATTENTION = "base_model.model.model.layers.0.self_attn.q_proj"


def module_of(adapter: Adapter, **options: Any) -> ExpertModule:
    (module,) = layout_of(adapter, **options).modules
    return module


def refusal(adapter: Adapter, **options: Any) -> str:
    with pytest.raises(LayoutError) as caught:
        layout_of(adapter, **options)
    return str(caught.value)


def built(layout: str = "L1", **fields: Any) -> Adapter:
    return build(Spec(layout, **fields))
