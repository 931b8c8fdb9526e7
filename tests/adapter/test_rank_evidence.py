"""An r that only adapter_config.json states is believed as far as the file does not speak against it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lorashard.adapter.layout import AdapterLayout
from lorashard.errors import LayoutError, UnclearLayoutError
from tests.adapters import Adapter, Spec
from tests.layouts import EXPERTS
from tests.strategies import layout_of

# Qwen3-30B-A3B. Only shapes count here, so the tensors have no data.
E, H, I, R = 128, 2048, 768, 32  # noqa: E741 - experts, hidden and intermediate size, lora_rank
LAYER = "base_model.model.model.layers.0"


def zeros(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def pair(name: str, lora_rank: int, inside: int, out: int) -> dict[str, Tensor]:
    shapes = {"lora_A": (lora_rank, inside), "lora_B": (out, lora_rank)}
    return zeros(**{f"{name}.{matrix}.weight": shape for matrix, shape in shapes.items()})


def fused(rows: int = E * R) -> dict[str, Tensor]:
    return pair(f"{EXPERTS}.base_layer", rows, H, 2 * I) | pair(EXPERTS, rows, I, H)


def attention(lora_rank: int = R) -> dict[str, Tensor]:
    return pair(f"{LAYER}.self_attn.q_proj", lora_rank, H, 4096)


def router(num_experts: int, lora_rank: int = R) -> dict[str, Tensor]:
    return pair(f"{LAYER}.mlp.gate", lora_rank, H, num_experts)


def read(tensors: dict[str, Tensor], config: dict[str, Any], **options: Any) -> AdapterLayout:
    """config: the fields beside those that any adapter of PEFT has."""
    written = {"peft_version": "0.21.2", "r": R, "lora_alpha": 2 * R, **config}
    return layout_of(Adapter(Spec(), tensors, written, {}, {}), **options)


def refused(tensors: dict[str, Tensor], config: dict[str, Any], **options: Any) -> LayoutError:
    with pytest.raises(LayoutError) as caught:
        read(tensors, config, **options)
    return caught.value


@pytest.mark.parametrize(
    ("tensors", "options", "counted"),
    [
        (fused(), {}, True),
        (fused() | attention(), {}, True),
        (fused(), {"num_experts": E}, False),
        (fused() | router(E), {}, False),
        (fused() | zeros(**{
            f"{LAYER.replace('0', '1')}.mlp.experts.down_proj.lora_A": (E, R, I),
            f"{LAYER.replace('0', '1')}.mlp.experts.down_proj.lora_B": (E, H, R),
        }), {}, False),
    ],
    ids=["experts alone", "attention", "told", "router", "stacked layer"],
)  # fmt: skip
def test_a_count_that_only_r_gives_is_known(
    tensors: dict[str, Tensor], options: dict[str, Any], counted: bool
) -> None:
    layout = read(tensors, {}, **options)
    assert (layout.num_experts, layout.counted_from_r) == (E, counted)


@pytest.mark.parametrize(("lora_rank", "experts"), [(H, "2 experts"), (I, "experts")])
def test_an_r_that_is_a_side_of_the_tensors_is_not_believed(lora_rank: int, experts: str) -> None:
    """What verl's model merger writes: the smaller side of the last tensor."""
    rows = 2 * lora_rank
    error = refused(fused(rows), {"r": lora_rank, "lora_alpha": 2 * lora_rank})
    assert isinstance(error, UnclearLayoutError)
    assert f"by the r={lora_rank} of adapter_config.json" in error.message
    assert experts in error.message
    assert "That r and the file do not seem to fit" in error.message
    assert "take r and lora_alpha from the training run" in (error.hint or "")


def test_an_r_of_all_rows_is_not_believed() -> None:
    rows = 8 * 16
    error = refused(fused(rows), {"r": rows})
    assert "hold 1 expert. That r and the file do not seem to fit" in error.message


def test_the_model_s_count_refuses_a_wrong_r() -> None:
    message = refused(fused(), {"r": H}, num_experts=E).message
    assert "holds 2 experts, the model 128" in message


def test_a_large_r_is_believed_if_other_tensors_have_it_or_the_count_is_told() -> None:
    assert read(fused(8 * I) | attention(I), {"r": I}).num_experts == 8
    assert read(fused(8 * I), {"r": I}, num_experts=8).num_experts == 8
    assert read(fused(128) | attention(128), {"r": 128}).num_experts == 1


@pytest.mark.parametrize("experts_r", [16, 64])
def test_a_router_of_another_number_refuses_a_wrong_r(experts_r: int) -> None:
    pattern = {"rank_pattern": {r"experts\..*": experts_r}}
    message = refused(fused() | router(E), pattern).message
    assert f"{E * R // experts_r} experts" in message
    assert f"its router chooses from {E}" in message


def test_dense_tensors_of_another_r_refuse_the_config() -> None:
    error = refused(fused() | attention(4), {"r": R})
    assert "has r=4, adapter_config.json says 32" in error.message
    assert "the config does not belong to this file" in (error.hint or "")
