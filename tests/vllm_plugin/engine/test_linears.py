"""Which sizes of dense factors are refused: by vLLM's real layers, and by what they say of theirs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lorashard.vllm_plugin.engine.linears import LinearSizes, read_linears
from lorashard.vllm_plugin.engine.names import read_model_names
from tests.vllm_plugin.patched_answers import answers
from tests.vllm_release import PLUGIN_RELEASES

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj")
ROW = ("self_attn.o_proj", "mlp.shared_experts.down_proj")
REPLICATED = "mlp.shared_expert_gate"
SIZES = {
    **dict(zip(QKV, ((16, 16), (16, 8), (16, 8)), strict=True)),
    **dict.fromkeys(GATE_UP, (16, 12)),
    **dict(zip(ROW, ((16, 16), (12, 16)), strict=True)),
    REPLICATED: (16, 3),
}
# A factor that is too small there may be right, as some models pad these sides of their layers.
MAY_BE_PADDED = {
    *((module, "lora_B") for module in (*QKV, *GATE_UP, REPLICATED)),
    *((module, "lora_A") for module in ROW),
}


def refusal(module: str, matrix: str, by: int) -> str:
    """What is said of the factor that is larger by so much than the layer."""
    layer = f"model.layers.0.{module}"
    if module in QKV:
        layer = "model.layers.0.self_attn.qkv_proj"
    elif module in GATE_UP:
        layer = "model.layers.0.mlp.shared_experts.gate_up_proj"
    size = SIZES[module][matrix == "lora_B"]
    return (
        f"ValueError: LoRA adapter 'a1': base_model.model.model.layers.0.{module}.{matrix}.weight "
        f"has {size + by} features, but {layer} has {size}.\n  Is the adapter for this model?"
    )


@pytest.mark.parametrize("release", PLUGIN_RELEASES)
@pytest.mark.parametrize("engine", ["tp 1", "tp 2", "tp 4", "tp 2, fully sharded"])
def test_dense_factors_of_another_size_are_refused_and_not_kept(release: str, engine: str) -> None:
    found = answers(release)["dense_sizes"][engine]
    forms = ("plain", "shards") if engine == "tp 1" else ("shards",)
    assert len(found) == (1 + 8 * 2 * 2) * len(forms)
    for form in forms:
        assert found[f"  0 {form}"] == ["loaded", [1]], "the right sizes"
        for module in SIZES:
            for matrix in ("lora_A", "lora_B"):
                for by in (1, -1):
                    is_fine = by < 0 and (module, matrix) in MAY_BE_PADDED
                    expected = ["loaded", [1]] if is_fine else [refusal(module, matrix, by), []]
                    assert found[f"{module} {matrix} {by} {form}"] == expected


class ColumnParallelLinear(SimpleNamespace):
    pass


class MergedColumnParallelLinear(SimpleNamespace):
    pass


class QKVParallelLinear(SimpleNamespace):
    pass


class SomethingElse(MergedColumnParallelLinear):
    pass


# Two ranks, four heads of 4 for queries and one for keys and values, which both ranks have.
HEADS = QKVParallelLinear(
    input_size=16, output_size=32, output_sizes=[16, 8, 8], total_num_heads=4,
    total_num_kv_heads=1, head_size=4, v_head_size=4,
)  # fmt: skip


def manager(layers: dict[str, Any], packed: dict[str, list[str]], **fields: Any) -> Any:
    return SimpleNamespace(
        modules={name: SimpleNamespace(base_layer=layer) for name, layer in layers.items()},
        packed_modules=packed, model=SimpleNamespace(named_modules=list, config=None),
        lora_config=SimpleNamespace(), **fields,
    )  # fmt: skip


def rows(layer: Any, *parts: str) -> dict[str, int | None]:
    found = read_linears(manager({"m": layer}, {"m": list(parts)} if parts else {}))
    return {part: sizes.out_features for part, sizes in found.items()}


def test_heads_that_several_ranks_have_are_counted_once() -> None:
    assert rows(HEADS, "q", "k", "v") == {"q": 16, "k": 4, "v": 4}
    assert rows(HEADS) == {"m": 24}


def test_a_packed_layer_that_is_one_module_of_the_adapter_has_the_rows_of_all_parts() -> None:
    merged = MergedColumnParallelLinear(input_size=16, output_size=30, output_sizes=[10, 20])
    assert rows(merged, "gate_up") == {"gate_up": 30}
    assert rows(merged, "gate", "up") == {"gate": 10, "up": 20}


def test_parts_that_are_not_the_layer_s_own_have_no_known_rows() -> None:
    merged = MergedColumnParallelLinear(input_size=16, output_size=30, output_sizes=[10, 5, 15])
    found = read_linears(manager({"m": merged}, {"m": ["qkv", "z"]}))
    assert set(found) == {"qkv", "z"}
    for sizes in found.values():
        assert (sizes.refuses("lora_A", 17), sizes.refuses("lora_B", 17)) == (16, None)


def test_of_a_class_that_is_not_known_nothing_is_said() -> None:
    other = SomethingElse(input_size=16, output_size=30, output_sizes=[10, 20])
    assert rows(other, "gate", "up") == rows(None) == {}


def test_of_a_layer_that_does_not_say_its_sizes_nothing_is_said() -> None:
    assert rows(QKVParallelLinear(input_size=16, output_size=32), "q", "k", "v") == {}
    assert rows(ColumnParallelLinear(output_size=32)) == {}


def test_a_layer_s_sizes_are_known_by_every_name_that_it_goes_by() -> None:
    long = "language_model.model.layers.0.mlp.up"
    layer = ColumnParallelLinear(input_size=16, output_size=30)
    sizes = LinearSizes(long, 16, 30, exact_in=True, exact_out=False)

    def short_names(name: str) -> list[str]:
        return [name.removeprefix("language_model.")]

    found = read_model_names(manager({long: layer}, {}, _get_text_lora_names=short_names))
    assert found.linears == {long: sizes, "model.layers.0.mlp.up": sizes}
    pooling = read_model_names(manager({"model.up": layer}, {}, is_pooling_model=True))
    assert set(pooling.linears) == {"model.up", "up"}
