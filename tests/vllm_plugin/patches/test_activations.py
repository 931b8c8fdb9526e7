"""LoRA on FP8 experts gets the layer's input; the real kernels and layers: layers.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lorashard.vllm_plugin.patches.activations import wrap_apply_w13_lora, wrap_modular_apply
from tests.vllm_plugin.patched_answers import answers, number
from tests.vllm_release import PLUGIN_RELEASES

FIELD = "original_hidden_states"
X = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.bfloat16)
WEIGHTS = torch.tensor([[0.5], [2.0]])
CODES = X.to(torch.float8_e4m3fn)


def method_of(context: Any, quant_dtype: Any = torch.float8_e4m3fn) -> Any:
    """A FusedMoEModularMethod as far as the patch looks at it."""
    return SimpleNamespace(
        moe_kernel=SimpleNamespace(fused_experts=SimpleNamespace(_lora_context=context)),
        moe_quant_config=SimpleNamespace(quant_dtype=quant_dtype),
    )


def during_apply(method: Any, *, weighted: bool = False, fails: bool = False) -> Any:
    """What the context has while vLLM's own method runs; after it, it must have nothing."""
    context = method.moe_kernel.fused_experts._lora_context
    seen = []

    def original(self: Any, layer: Any, x: Any, *args: Any, **kwargs: Any) -> str:
        assert x is X
        seen.append(getattr(context, FIELD, None))
        if fails:
            raise RuntimeError("out of memory")
        return "output"

    layer = SimpleNamespace(apply_router_weight_on_input=weighted)
    assert wrap_modular_apply(original)(method, layer, X, WEIGHTS, None, extra=1) == "output"
    assert not hasattr(context, FIELD)
    return seen[0]


def test_the_input_is_in_the_context_while_the_experts_run() -> None:
    assert during_apply(method_of(SimpleNamespace())) is X


def test_it_is_weighted_where_the_kernel_weights_it() -> None:
    found = during_apply(method_of(SimpleNamespace()), weighted=True)
    assert torch.equal(found, torch.tensor([[0.5, 1.0], [6.0, 8.0]], dtype=torch.bfloat16))


def test_experts_that_are_not_quantised_are_left_alone() -> None:
    assert during_apply(method_of(SimpleNamespace(), quant_dtype=None)) is None


def test_a_layer_without_lora_is_left_alone() -> None:
    assert during_apply(method_of(None)) is None


def test_the_input_does_not_stay_in_the_context_when_the_experts_fail() -> None:
    context = SimpleNamespace()
    with pytest.raises(RuntimeError, match="out of memory"):
        during_apply(method_of(context), fails=True)
    assert not hasattr(context, FIELD)


@pytest.mark.parametrize(
    ("context", "x", "expected"),
    [
        (SimpleNamespace(original_hidden_states=X), CODES, X),
        (SimpleNamespace(original_hidden_states=X), X * 2, X * 2),
        (SimpleNamespace(original_hidden_states=X), CODES[:1], CODES[:1]),
        (SimpleNamespace(), CODES, CODES),
    ],
    ids=["codes", "activations", "other rows", "no input in the context"],
)
def test_lora_reads_the_input_in_place_of_its_codes_only(
    context: Any, x: torch.Tensor, expected: torch.Tensor
) -> None:
    def original(self: Any, lora_context: Any, *, x: torch.Tensor, y: str) -> torch.Tensor:
        assert (lora_context, y) == (context, "output")
        return x

    found = wrap_apply_w13_lora(original)(object(), context, x=x, y="output")
    assert found.dtype == expected.dtype
    assert torch.equal(found.float(), expected.float())


@pytest.mark.parametrize("release", PLUGIN_RELEASES)
def test_releases_from_0_20_to_0_23_need_it(release: str) -> None:
    needed = (0, 20) <= number(release) < (0, 24)
    assert answers(release)["needed"]["activations"] == needed
