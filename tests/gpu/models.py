"""Make the tiny base models, their adapters, and what each must answer.

    python -m tests.gpu.models OUT

OUT/<model>/model           bf16 checkpoint with random weights
OUT/<model>/model_fp8       compressed-tensors: channel weights, dynamic token activations
OUT/<model>/model_<kind>    experts in another kind of weights, of quantised.py
OUT/<model>/<adapter>       PEFT adapters
OUT/<model>/reference.safetensors   log-probabilities: base, base_fp8, <adapter>, <adapter>_fp8, and
                            <adapter>_noisy in bf16, <adapter>_fp8_noisy with activations in FP8; and
                            the same for each kind, in bf16
"""

import argparse
import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.gpu.adapter import Adapter
from tests.gpu.checkpoint import (
    add_mtp_layer,
    quantise_views,
    save_fp8,
    save_tokenizer,
    transpose_experts,
)
from tests.gpu.families import FAMILIES
from tests.gpu.loras import RECIPES, VERSIONS
from tests.gpu.processes import one_at_a_time
from tests.gpu.quantised import KINDS, quantise, save_quantised
from tests.gpu.reference import VOCABULARY, Reference, make_prompts
from tests.gpu.tiny_model import HIDDEN, INTERMEDIATE, TinyModel

FINISHED = "reference.safetensors"


def _glm4_moe(num_experts: int, num_groups: int = 1) -> Any:
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    return Glm4MoeForCausalLM(
        Glm4MoeConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=1024,
            moe_intermediate_size=INTERMEDIATE,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=64,
            n_routed_experts=num_experts,
            num_experts_per_tok=4,
            n_shared_experts=1,
            first_k_dense_replace=1,
            n_group=num_groups,
            topk_group=num_groups,
            norm_topk_prob=True,
            routed_scaling_factor=1.0,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
            num_nextn_predict_layers=0,
            use_qk_norm=False,
            attention_bias=False,
            partial_rotary_factor=0.5,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )


def _qwen3_moe(num_experts: int) -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=1024,
            moe_intermediate_size=INTERMEDIATE,
            num_hidden_layers=3,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=64,
            num_experts=num_experts,
            num_experts_per_tok=min(4, num_experts),
            norm_topk_prob=True,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )


def _gpt_oss() -> Any:
    from transformers import GptOssConfig, GptOssForCausalLM

    return GptOssForCausalLM(
        GptOssConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            num_hidden_layers=3,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=64,
            num_local_experts=16,
            num_experts_per_tok=4,
            sliding_window=128,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )


def _nemotron_h() -> Any:
    from transformers import NemotronHConfig, NemotronHForCausalLM

    return NemotronHForCausalLM(
        NemotronHConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            hybrid_override_pattern="ME*E",
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=64,
            intermediate_size=512,
            ssm_state_size=128,
            mamba_num_heads=16,
            mamba_head_dim=64,
            n_groups=2,
            n_routed_experts=16,
            n_shared_experts=1,
            moe_intermediate_size=INTERMEDIATE,
            moe_shared_expert_intermediate_size=INTERMEDIATE,
            num_experts_per_tok=4,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )


_PER_EXPERT = ("e0", "e1", "e2")
MODELS: Mapping[str, TinyModel] = {
    "glm16": TinyModel(
        lambda: _glm4_moe(16), (*_PER_EXPERT, "e3", "half", "half_padded", "rs", "fused0")
    ),
    "glm15": TinyModel(lambda: _glm4_moe(15), (*_PER_EXPERT, "half", "fused0")),
    # For tests.gpu.beside_verl. vLLM places experts round-robin only where they are in groups.
    "glm15-versions": TinyModel(lambda: _glm4_moe(15), (*VERSIONS, "half", "fused0"), fp8=False),
    "glm15g3-versions": TinyModel(
        lambda: _glm4_moe(15, num_groups=3), (*VERSIONS, "half", "fused0"), fp8=False
    ),
    "glm16g2": TinyModel(lambda: _glm4_moe(16, num_groups=2), (*_PER_EXPERT, "half", "fused0")),
    "qwen16": TinyModel(lambda: _qwen3_moe(16), (*_PER_EXPERT, "half", "fused0")),
    "qwen1": TinyModel(lambda: _qwen3_moe(1), ("e0", "e1", "fused0"), optional=True),
    "gpt_oss": TinyModel(
        _gpt_oss, ("fused0", "fused1"), fp8=False, transposed=True, interleaved=True
    ),
    "nemotron_h": TinyModel(_nemotron_h, ("e0", "e1", "fused0"), fp8=False, optional=True),
    "glm16-shared": TinyModel(lambda: _glm4_moe(16), ("e0", "shared0")),
    "glm16-mtp": TinyModel(lambda: _glm4_moe(16), ("e0", "fused0"), fp8=False, mtp=True),
    "glm16-quantised": TinyModel(
        lambda: _glm4_moe(16), _PER_EXPERT[:2], fp8=False, quantised=tuple(KINDS)
    ),
    **FAMILIES,
}


def _randomise(model: Any) -> None:
    """Weights that make every layer and every expert count."""
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and "conv1d" not in name:
            torch.nn.init.normal_(parameter, std=0.05)
        elif name.endswith(("bias", "sinks")) and "dt_bias" not in name:
            torch.nn.init.normal_(parameter, std=0.02)
    for name, buffer in model.named_buffers():
        if "e_score_correction_bias" in name:
            torch.nn.init.normal_(buffer, std=0.01)


def _name_experts_as_transformers_4(config: Path) -> None:
    """What vLLM up to 0.18 reads the file with calls Qwen3-MoE's count `num_experts`."""
    values = json.loads(config.read_text())
    if values["model_type"] == "qwen3_moe":
        config.write_text(json.dumps(values | {"num_experts": values["num_local_experts"]}))


def _as_users_have_it(recipe: TinyModel, adapter: Adapter) -> Adapter:
    """With the names of the model's own code, where the adapter has tensors for each expert."""
    if adapter.config["target_parameters"]:
        return adapter
    return adapter.renamed(recipe.per_expert_names)


@torch.no_grad()
def build(name: str, out: Path) -> None:
    """Make one model with all that belongs to it."""
    recipe = MODELS[name]
    directory = out / name
    directory.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = recipe.make().eval()
    _randomise(model)
    model.to(torch.bfloat16).save_pretrained(directory / "model")
    _name_experts_as_transformers_4(directory / "model" / "config.json")
    if recipe.transposed_on_disk:
        transpose_experts(directory / "model", HIDDEN)
    if recipe.mtp:
        add_mtp_layer(directory / "model")
    save_tokenizer(directory / "model")
    reference = Reference(
        model.to(torch.float32), transposed=recipe.transposed, interleaved=recipe.interleaved
    )
    adapters = {
        adapter: _as_users_have_it(recipe, RECIPES[adapter](reference.views))
        for adapter in recipe.adapters
    }
    exact = {name: tensor.clone() for name, tensor in reference.state.items()}
    results = {"prompts": make_prompts(), "base": reference.log_probs()}
    for adapter, made in adapters.items():
        made.save(directory / adapter)
        results[adapter] = reference.log_probs(made.factors)
        results[f"{adapter}_noisy"] = reference.log_probs(made.factors, in_bf16=True)
    if recipe.fp8:
        scales = quantise_views(reference.views)
        save_fp8(directory / "model", directory / "model_fp8", scales)
        reference.remember()
        results["base_fp8"] = reference.log_probs()
        for adapter, made in adapters.items():
            results[f"{adapter}_fp8"] = reference.log_probs(made.factors)
            results[f"{adapter}_fp8_noisy"] = reference.log_probs(
                made.factors, inputs_in_fp8=scales
            )
    for kind in recipe.quantised:
        reference.restore(exact)
        tensors = quantise(kind, reference.views)
        save_quantised(kind, directory / "model", directory / f"model_{kind}", tensors)
        reference.remember()
        results[f"base_{kind}"] = reference.log_probs()
        for adapter, made in adapters.items():
            results[f"{adapter}_{kind}"] = reference.log_probs(made.factors)
            results[f"{adapter}_{kind}_noisy"] = reference.log_probs(made.factors, in_bf16=True)
    save_file(results, directory / FINISHED)
    for adapter in adapters:
        effect = (results[adapter] - results["base"]).abs().mean().item()
        print(f"{name} {adapter}: mean effect {effect:.3f}", flush=True)


def build_all(out: Path, names: Iterable[str]) -> None:
    """Make what is missing."""
    for name in names:
        with one_at_a_time(out):
            if not (out / name / FINISHED).exists():
                _build(name, out)


def _build(name: str, out: Path) -> None:
    started = time.perf_counter()
    try:
        build(name, out)
    except Exception as err:
        if not MODELS[name].optional:
            raise
        print(f"{name}: not made: {type(err).__name__}: {err}", flush=True)
    else:
        print(f"{name}: {time.perf_counter() - started:.1f} s", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.models", description=__doc__)
    parser.add_argument("out", type=Path)
    build_all(parser.parse_args().out, MODELS)
