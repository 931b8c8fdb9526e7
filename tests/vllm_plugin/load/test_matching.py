"""Which live layer takes which experts of an adapter, and each reason why none does."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from lorashard.adapter.config import LoraConfig, parse_config
from lorashard.errors import LayoutError, LorashardError, PlacementError
from lorashard.vllm_plugin.engine.live import LiveExperts
from lorashard.vllm_plugin.load.assembly import ShardStack
from lorashard.vllm_plugin.load.contents import AdapterContents, ModuleContents, NoSources
from lorashard.vllm_plugin.load.matching import MatchedLayer, match_layers
from lorashard.vllm_plugin.load.rows import Run

E, H, I, R = 4, 6, 5, 2  # noqa: E741 - experts, hidden and intermediate size, lora_rank
NAME = "model.layers.0.mlp.experts"
CONFIG: LoraConfig = parse_config(
    b'{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "peft_version": "0.18.1"}', "config"
)
LIVE = LiveExperts(
    name=NAME, wrapper="2d", num_experts=E, ep_rank=1, ep_size=2, local_experts=(2, 3), gated=True,
    hidden_size=H, intermediate_size=I, buffer_intermediate=I, max_lora_rank=8, interleaved=False,
    shared_outer=False,
)  # fmt: skip


@dataclass(frozen=True)
class Names:
    """renamed: what the engine calls the adapter's modules. elsewhere: not on this stage."""

    renamed: dict[str, str] = field(default_factory=dict)
    elsewhere: tuple[str, ...] = ()

    def is_elsewhere(self, module: str) -> bool:
        return module in self.elsewhere

    def moe_module(self, module: str, live: Collection[str]) -> str | None:
        name = self.renamed.get(module, module)
        return name if name in live else None


def stacks(*projections: Any, hidden: int = H, lora_rank: int = R) -> tuple[ShardStack, ...]:
    made = []
    for projection in projections:
        inside, out = (I, hidden) if projection == "down_proj" else (hidden, I)
        out *= 2 if projection == "gate_up_proj" else 1
        made += [
            ShardStack(f"{projection}.A", projection, "lora_A", "BF16", lora_rank, inside, False),
            ShardStack(f"{projection}.B", projection, "lora_B", "BF16", out, lora_rank, False),
        ]
    return tuple(made)


def module(
    name: str = NAME, projections: Any = ("gate_proj", "up_proj", "down_proj"), **changes: Any
) -> ModuleContents:
    sizes = {key: changes.pop(key) for key in ("hidden", "lora_rank") if key in changes}
    made = ModuleContents(name, "split", {}, stacks(*projections, **sizes), ((0, 1), (2, 3)))
    return replace(made, **changes)


def contents(*modules: ModuleContents, **changes: Any) -> AdapterContents:
    made = AdapterContents(
        CONFIG, E, gate_up_known=True, modules=modules, dense=(), sources=NoSources()
    )
    return replace(made, **changes)


def match(
    *modules: ModuleContents, live: LiveExperts = LIVE, names: Names | None = None, **changes: Any
) -> tuple[MatchedLayer, ...]:
    return match_layers(contents(*modules, **changes), {live.name: live}, names or Names())


def refusal(*args: Any, kind: type[LorashardError] = LayoutError, **kwargs: Any) -> str:
    with pytest.raises(kind) as caught:
        match(*args, **kwargs)
    return str(caught.value)


def test_a_layer_gets_its_container_and_reads_its_own_file() -> None:
    (layer,) = match(module())
    assert (layer.live, layer.contents) == (LIVE, module())
    assert layer.assembly.lora_rank == R
    assert layer.runs == (Run(1, 0, 0, 2),)


def test_the_order_is_that_of_the_engine() -> None:
    layers = {name: replace(LIVE, name=name) for name in ("c", "a", "b")}
    matched = match_layers(contents(module("a"), module("b"), module("c")), layers, Names())
    assert [layer.live.name for layer in matched] == ["c", "a", "b"]


def test_layers_that_the_adapter_does_not_train_are_left_out() -> None:
    layers = {name: replace(LIVE, name=name) for name in ("a", "b")}
    (layer,) = match_layers(contents(module("b")), layers, Names())
    assert layer.live.name == "b"


def test_containers_of_other_pipeline_stages_are_skipped() -> None:
    other = module("model.layers.9.mlp.experts", hidden=2 * H)
    assert len(match(other, module(), other, names=Names(elsewhere=(other.name,)))) == 1


def test_names_are_the_engines() -> None:
    (layer,) = match(module("other.name"), names=Names({"other.name": NAME}))
    assert (layer.live.name, layer.contents.name) == (NAME, "other.name")


@pytest.mark.parametrize(
    ("ep_rank", "local_experts", "ranks"),
    [(1, (2, 3), ((0, 1, 2, 3), (2, 3))), (0, (0, 1), ((0, 1), (0, 1, 2, 3)))],
)
def test_of_files_that_both_hold_an_expert_the_ranks_own_is_read(
    ep_rank: int, local_experts: tuple[int, ...], ranks: tuple[tuple[int, ...], ...]
) -> None:
    live = replace(LIVE, ep_rank=ep_rank, local_experts=local_experts)
    (layer,) = match(module(ranks=ranks), live=live)
    assert {run.ep_rank for run in layer.runs} == {ep_rank}


def test_a_file_of_another_split_is_not_taken_for_the_ranks_own() -> None:
    twice = ((0, 1), (2, 3), (2, 3))
    (layer,) = match(module(ranks=twice))
    assert {run.ep_rank for run in layer.runs} == {2}  # the last one that holds them


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("assumed", ["concatenated", "interleaved"])
def test_where_the_adapter_only_assumes_how_rows_lie_the_model_decides(
    interleaved: bool, assumed: str
) -> None:
    (layer,) = match(
        module(projections=("gate_up_proj",), gate_up=assumed),
        live=replace(LIVE, interleaved=interleaved),
        gate_up_known=False,
    )
    gate_b = layer.assembly.factors[layer.assembly.lora_b[0]]
    (piece,) = gate_b.pieces
    assert piece.source_rows.step == (2 if interleaved else 1)


@pytest.mark.parametrize("interleaved", [False, True])
def test_an_order_of_rows_that_is_known_must_be_the_models(interleaved: bool) -> None:
    live = replace(LIVE, interleaved=interleaved)
    orders = ("concatenated", "interleaved")
    right, wrong = orders[interleaved], orders[not interleaved]
    (layer,) = match(module(projections=("gate_up_proj",), gate_up=right), live=live)
    (piece,) = layer.assembly.factors[layer.assembly.lora_b[0]].pieces
    assert piece.source_rows.step == (2 if interleaved else 1)
    text = refusal(module(projections=("gate_up_proj",), gate_up=wrong), live=live)
    assert f"gate and up rows are {wrong}, but {NAME} has them {right}." in text
    assert text.endswith(
        "\n  Is the adapter for this model? If it is, split it again with --model."
    )


def test_an_order_that_no_row_depends_on_is_no_contradiction() -> None:
    live = replace(LIVE, interleaved=True)
    (layer,) = match(module(projections=("down_proj",), gate_up="concatenated"), live=live)
    assert layer.live == live


def test_a_container_that_no_layer_takes() -> None:
    text = refusal(module("model.layers.9.mlp.experts"))
    assert text == (
        "model.layers.9.mlp.experts: the model has no MoE layer for this module of the adapter "
        "(rule unknown-module-names).\n  Is the adapter for this model?"
    )


def test_another_number_of_experts() -> None:
    text = refusal(module(), num_experts=8)
    assert text == (
        f"{NAME}: the adapter has 8 experts, {NAME} has 4.\n"
        "  Is the adapter for this model? `lorashard split --model` checks that."
    )


def test_two_containers_of_one_layer() -> None:
    text = refusal(module("a"), module("b"), names=Names({"a": NAME, "b": NAME}))
    assert text == f"a and b both belong to {NAME}."


def test_other_sizes() -> None:
    assert f"{NAME}: gate_proj lora_A has 7 features, but {NAME} has 6." in refusal(
        module(hidden=7)
    )


def test_an_r_beyond_the_engine() -> None:
    text = refusal(module(lora_rank=9))
    assert "r=9" in text
    assert "room for 8" in text
    assert "--max-lora-rank 16" in text


def test_a_gate_where_the_experts_have_none() -> None:
    assert "trains a gate" in refusal(module(), live=replace(LIVE, gated=False))


def test_factors_of_single_experts_where_the_engine_shares_them() -> None:
    text = refusal(module(), live=replace(LIVE, shared_outer=True))
    assert "--enable-moe-shared-loras" in text


def test_an_expert_that_no_file_holds() -> None:
    assert "expert 3" in refusal(module(ranks=((0, 1), (2,))), kind=PlacementError)
