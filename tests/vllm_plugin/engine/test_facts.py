"""What is read from vLLM's configuration and kernels, on stand-ins with the attributes that count.

Real classes of several releases: test_loading_conformance.py.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lorashard.vllm_plugin.engine.facts import (
    _source_has,
    config_facts,
    module_facts,
    reads_lora_context,
)
from lorashard.vllm_plugin.engine.guards import (
    ALL2ALL,
    ELASTIC_ENGINES,
    ELASTIC_EPLB,
    EPLB_TOO,
    MICROBATCHES,
    NIXL_EPLB,
    OLD_DATA_PARALLEL,
    OLD_EPLB,
    PIPELINES,
    TENSOR_PARALLEL,
    TOO_FEW_SLOTS,
    EngineFacts,
)


def config(count: Any = None, **parallel: Any) -> Any:
    fields = {"enable_expert_parallel": True, "tensor_parallel_size": 2}
    model = SimpleNamespace() if count is None else SimpleNamespace(get_num_experts=lambda: count)
    return SimpleNamespace(parallel_config=SimpleNamespace(**fields | parallel), model_config=model)


class ReadsLora:
    def supports_lora(self) -> bool:
        return True

    def apply(self, lora_context: object) -> object:
        return lora_context


class Inherits(ReadsLora):
    pass


class Ignores(ReadsLora):
    def apply(self, hidden_states: object) -> object:
        return hidden_states


class Delegates(ReadsLora):
    def apply(self, *args: object) -> object:
        return super().apply(*args)


class BeforeTheContext:
    def apply(self, hidden_states: object) -> object:
        return hidden_states


# The name is what it is known by; this module has no masked_moe_sum.
UnfusedOAITritonExperts = type("UnfusedOAITritonExperts", (Inherits,), {"__module__": __name__})


def wrapper(experts: object = None, place: str = "wrapper", **method: Any) -> Any:
    """A MoE LoRA wrapper that holds its experts where a release does."""
    kernel = SimpleNamespace(impl=SimpleNamespace(fused_experts=experts))
    if place == "moe_kernel":
        method["moe_kernel"] = kernel
    if place == "moe_mk":
        method["moe_mk"] = kernel.impl
    made = SimpleNamespace(base_layer=SimpleNamespace(quant_method=SimpleNamespace(**method)))
    if place == "wrapper":
        made._moe_kernel = kernel
    return made


@pytest.mark.parametrize(
    ("parallel", "expected"),
    [
        ({}, True),
        ({"enable_expert_parallel": False}, False),
        ({"tensor_parallel_size": 1}, False),
        ({"tensor_parallel_size": 1, "data_parallel_size": 2}, True),
        ({"tensor_parallel_size": 1, "prefill_context_parallel_size": 2}, True),
    ],
)
def test_expert_parallelism_needs_its_flag_and_more_than_one_rank(
    parallel: dict[str, Any], expected: bool
) -> None:
    assert config_facts(config(**parallel)).expert_parallel is expected


def test_a_configuration_gives_its_sizes_and_the_experts_that_vllm_counts() -> None:
    facts = config_facts(config(128, data_parallel_size=4, enable_eplb=True))
    assert facts == EngineFacts(
        True,
        data_parallel_size=4,
        eplb=True,
        data_parallel_obstacle=TENSOR_PARALLEL,
        num_experts=128,
    )
    assert config_facts(config()).num_experts is None


@pytest.mark.parametrize(
    ("changes", "obstacle"),
    [
        ({}, None),
        ({"eplb_config": SimpleNamespace(communicator="torch_gloo")}, None),
        ({"eplb_config": SimpleNamespace(communicator="nixl")}, NIXL_EPLB),
        ({"enable_elastic_ep": True}, ELASTIC_EPLB),
    ],
)
def test_why_lora_could_not_follow_its_experts_is_seen_in_the_configuration(
    changes: dict[str, Any], obstacle: str | None
) -> None:
    assert config_facts(config(enable_eplb=True, **changes)).eplb_obstacle == obstacle


@pytest.mark.parametrize(
    ("source", "obstacle"),
    [("", OLD_EPLB), ("class MoERunner:\n    def get_expert_weights(self):\n", None)],
)
def test_a_vllm_whose_layers_do_not_say_what_eplb_moves_is_too_old(
    source: str, obstacle: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = tmp_path / "vllm/model_executor/layers/fused_moe/runner/moe_runner.py"
    runner.parent.mkdir(parents=True)
    (tmp_path / "vllm/__init__.py").touch()
    runner.write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    _source_has.cache_clear()
    try:
        assert config_facts(config(enable_eplb=True)).eplb_obstacle == obstacle
    finally:
        _source_has.cache_clear()


@pytest.mark.parametrize(
    ("changes", "obstacle"),
    [
        ({}, None),
        ({"tensor_parallel_size": 2}, TENSOR_PARALLEL),
        ({"pipeline_parallel_size": 2}, PIPELINES),
        ({"all2all_backend": "deepep_low_latency"}, ALL2ALL),
        ({"enable_dbo": True}, MICROBATCHES),
        ({"ubatch_size": 2}, MICROBATCHES),
        ({"enable_elastic_ep": True}, ELASTIC_ENGINES),
        ({"enable_eplb": True}, EPLB_TOO),
        ({"data_parallel_size": 3}, TOO_FEW_SLOTS),
    ],
)
def test_why_engines_could_not_agree_on_slots_is_seen_in_the_configuration(
    changes: dict[str, Any], obstacle: str | None
) -> None:
    engines = config(**{"tensor_parallel_size": 1, "data_parallel_size": 2} | changes)
    engines.lora_config = SimpleNamespace(max_loras=2)
    assert config_facts(engines).data_parallel_obstacle == obstacle


def test_experts_that_get_others_tokens_quantised_are_too_old_for_data_parallelism(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm/__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    _source_has.cache_clear()
    try:
        facts = config_facts(config(tensor_parallel_size=1, data_parallel_size=2))
    finally:
        _source_has.cache_clear()
    assert facts.data_parallel_obstacle == OLD_DATA_PARALLEL


def test_a_patch_that_is_missing_is_an_obstacle_for_data_parallelism() -> None:
    engines = config(128, tensor_parallel_size=1, data_parallel_size=2)
    facts = module_facts(engines, {}, [], [], ["f: there is no f"])
    assert "f: there is no f." in str(facts.data_parallel_obstacle)


def test_a_patch_that_is_missing_is_an_obstacle_for_eplb() -> None:
    facts = module_facts(config(128, enable_eplb=True), {}, [], ["f: there is no f"])
    assert "f: there is no f." in str(facts.eplb_obstacle)


def test_a_model_without_moe_layers_has_no_experts_whatever_vllm_counts() -> None:
    assert module_facts(config(128), {}, []).num_experts == 0
    assert module_facts(config(0), {"experts": wrapper()}, []).num_experts is None


@pytest.mark.parametrize("place", ["wrapper", "moe_kernel", "moe_mk"])
def test_the_experts_class_is_found_where_each_release_keeps_it(place: str) -> None:
    facts = module_facts(config(), {"experts": wrapper(Ignores(), place)}, ["a break"])
    assert (facts.experts_class, facts.reads_lora) == ("Ignores", False)
    assert facts.contract_breaks == ("a break",)


def test_a_kernel_that_is_not_found_is_not_held_against_the_engine() -> None:
    facts = module_facts(config(), {"experts": wrapper(place="nowhere")}, [])
    assert (facts.experts_class, facts.reads_lora, facts.leaves_rows) == (None, True, False)


def test_one_layer_that_ignores_lora_is_enough() -> None:
    layers = {"a": wrapper(Ignores()), "b": wrapper(ReadsLora())}
    assert module_facts(config(), layers, []).reads_lora is False


@pytest.mark.parametrize("inside", [True, False])
def test_one_layer_that_weighs_inputs_is_enough(inside: bool) -> None:
    weighing = wrapper(ReadsLora())
    holder = SimpleNamespace(apply_router_weight_on_input=True)
    if inside:
        weighing.base_layer.routed_experts = holder
    else:
        vars(weighing.base_layer).update(vars(holder))
    layers = {"a": wrapper(ReadsLora()), "b": weighing}
    assert module_facts(config(), layers, []).weighs_inputs is True
    assert module_facts(config(), {"a": layers["a"]}, []).weighs_inputs is False


@pytest.mark.parametrize(
    ("experts_class", "expected"),
    [(ReadsLora, True), (Inherits, True), (Delegates, True), (Ignores, False),
     (BeforeTheContext, True)],
)  # fmt: skip
def test_whether_a_class_looks_at_its_lora_context(experts_class: type, expected: bool) -> None:
    assert reads_lora_context(experts_class) is expected


def test_a_class_without_source_is_not_held_against_the_engine() -> None:
    namespace: dict[str, Any] = {}
    exec("class Compiled:\n def supports_lora(self): pass\n def apply(self): pass", namespace)
    assert reads_lora_context(namespace["Compiled"]) is True


def test_unfused_gpt_oss_experts_without_a_masked_sum_leave_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layers = {"experts": wrapper(UnfusedOAITritonExperts())}
    assert module_facts(config(), layers, []).leaves_rows is True
    monkeypatch.setitem(globals(), "masked_moe_sum", None)
    assert module_facts(config(), layers, []).leaves_rows is False


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ({"unquantized_backend": SimpleNamespace(name="FLASHINFER", value="FlashInfer")},
         "FlashInfer"),
        ({"old_quant_method": SimpleNamespace(
            unquantized_backend=SimpleNamespace(name="FLASHINFER", value="FlashInfer"))},
         "FlashInfer"),
        ({"unquantized_backend": SimpleNamespace(name="TRITON", value="Triton")}, None),
        ({"unquantized_backend": SimpleNamespace(name="FLASHINFER", value="FlashInfer"),
          "supports_internal_mk": True}, None),
        ({}, None),
    ],
)  # fmt: skip
def test_weights_laid_out_for_a_kernel_that_lora_does_not_use(
    method: dict[str, Any], expected: str | None
) -> None:
    assert module_facts(config(), {"experts": wrapper(**method)}, []).rearranged_for == expected
