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


def named(lora_rank: int) -> dict[str, Tensor]:
    """Pairs under the parameters' own names, as unsloth-zoo #1250 has the factors of all experts."""
    return pair(f"{EXPERTS}.gate_up_proj", lora_rank, H, 2 * I) | pair(
        f"{EXPERTS}.down_proj", lora_rank, I, H
    )


PATTERN = {"rank_pattern": {"gate_up_proj": E * R, "down_proj": E * R}}


@pytest.mark.parametrize(
    ("tensors", "config"),
    [
        (named(E * R) | attention(), PATTERN),
        (named(E * R), PATTERN),
        (named(E * R), {"r": E * R}),
        (named(E * R) | attention(), {"r": E * R, "rank_pattern": {"q_proj": R}}),
    ],
    ids=["pattern beside attention", "pattern", "r", "r and a pattern for attention"],
)
def test_a_pair_of_all_experts_rows_is_not_taken_for_one_that_they_share(
    tensors: dict[str, Tensor], config: dict[str, Any]
) -> None:
    error = refused(tensors, config, num_experts=E)
    assert f"may be one factor of r={E * R} that all experts share" in error.message
    assert f"or hold {E} experts of r={R}" in error.message


def test_another_layer_s_experts_show_that_a_pair_may_be_all_experts() -> None:
    other = fused() | {
        name.replace("layers.0", "layers.1"): tensor for name, tensor in named(E * R).items()
    }
    pattern = {"rank_pattern": {r"layers\.1\.mlp\.experts\.\w+": E * R}}
    assert f"or hold {E} experts of r={R}" in refused(other, pattern).message


@pytest.mark.parametrize(
    ("tensors", "lora_rank"),
    [
        (named(E) | attention(E), E),
        (named(R), R),
        (
            zeros(**{
                f"{EXPERTS}.down_proj.lora_A": (1, E, I), f"{EXPERTS}.down_proj.lora_B": (1, H, E),
            }),
            E,
        ),
    ],
    ids=["attention has its r", "r below the number of experts", "an axis of 1"],
)  # fmt: skip
def test_a_pair_that_all_experts_share_is_read_where_that_is_shown(
    tensors: dict[str, Tensor], lora_rank: int
) -> None:
    (module,) = read(tensors, {"r": lora_rank}, num_experts=E).modules
    assert module.lora_rank == lora_rank
    assert all(stack.shared for stack in module.stacks)


def test_moe_rank_scaling_leaves_the_r_of_fused_experts_to_rank_pattern() -> None:
    """NeMo AutoModel: experts of r // num_experts_per_tok beside dense modules of r."""
    scaled = fused(E * 4) | attention()
    assert read(scaled, {}).num_experts == E // 8, "which is wrong, and only that word tells"
    error = refused(scaled, {"moe_rank_scaling": True}, num_experts=E)
    assert "moe_rank_scaling, so r=32 is not the r of experts" in error.message
    assert '"experts.gate_up_proj"' in (error.hint or "")
    stated = {"experts.gate_up_proj": 4, "experts.down_proj": 4}
    layout = read(scaled, {"moe_rank_scaling": True, "rank_pattern": stated}, num_experts=E)
    (module,) = layout.modules
    assert (layout.num_experts, module.lora_rank) == (E, 4)
    assert set(module.scaling.values()) == {2 * R / 4}


def test_moe_rank_scaling_makes_a_dense_r_no_proof_of_a_shared_pair() -> None:
    tensors = named(R) | attention()
    assert read(tensors, {}, num_experts=8).num_experts == 8
    message = refused(tensors, {"moe_rank_scaling": True}, num_experts=8).message
    assert "or hold 8 experts of r=4" in message
