"""More cases: models of other families, and other kinds of weights for routed experts.

    python -m tests.gpu --work DIR --kinds

Only with --kinds or by name: they take as long as the matrix, and differ little between releases.
"""

from collections.abc import Sequence

from tests.gpu.cases import CASES, Case, Check, checks, release_key

# Its processor for images needs files that a tiny model does not have.
_NO_IMAGES = {"limit_mm_per_prompt": {"image": 0, "video": 0}}
_WEIGHS_INPUTS = r"lorashard: .*multiplies an expert's input by the router's weight"
_IGNORES_LORA = r"lorashard: .*TritonWNA16Experts, which accepts LoRA weights but never applies"


def _both(*adapters: str) -> tuple[Check, ...]:
    return (*checks("plain", *adapters), *checks("shards", *adapters))


_FAMILIES: tuple[Case, ...] = (
    Case("qwen3_moe", "qwen16", _both("e0", "e1", "fused0", "half"), max_cpu_loras=16),
    Case("qwen3_moe-fp8", "qwen16", _both("e0", "e1", "fused0"), fp8=True),
    Case(
        "qwen3_vl_moe",
        "qwen3_vl_moe",
        _both("fused0", "fused1", "e0", "text0"),
        engine=_NO_IMAGES,
        optional=True,
    ),
    Case(
        "qwen3_next",
        "qwen3_next",
        # Whether vLLM's LoRA on linear attention is right is not up to us.
        (*_both("e0", "e1", "fused0", "shared0"), *checks("plain", "linear0", optional=True)),
        max_cpu_loras=16,
    ),
    Case(
        "deepseek_v3",
        "deepseek_v3",
        _both("e0", "e1", "fused0", "half", "shared0"),
        max_cpu_loras=16,
    ),
    Case("minimax_m2", "minimax_m2", _both("e0", "e1", "fused0", "half")),
    # Optional: vLLM 0.33 multiplies the experts' input by the router's weight, but gives LoRA the
    # input without it, and LoRA's output of down_proj the weight once more.
    Case("llama4", "llama4", (), refused=_WEIGHS_INPUTS),
    Case("ernie4_5_moe", "ernie4_5_moe", _both("e0", "e1", "fused0", "shared0")),
    # vLLM 0.33 has no class of its own for it and runs that of transformers, where the modules of
    # shared experts go by other names than an adapter's.
    Case(
        "hunyuan",
        "hunyuan",
        (
            *_both("e0", "e1", "fused0"),
            *checks("plain", "shared0", optional=True),
            *checks("shards", "shared0", optional=True),
        ),
    ),
    Case("granite", "granite", _both("fused0", "linears0")),
    Case("granite_shared", "granite_shared", _both("linears0", "fused_shared0")),
    Case("glm16-shared", "glm16-shared", _both("e0", "shared0")),
    Case(
        "glm16-shared-fp8-fs", "glm16-shared", _both("e0", "shared0"), fp8=True, fully_sharded=True
    ),
)


def _experts(kind: str) -> Case:
    return Case(f"glm16-{kind}", "glm16-quantised", _both("e0", "e1"), quantised=kind)


# On GPUs without FP4 (H100, H200), all kinds of four bits run in Marlin's kernel, which reads LoRA.
_QUANTISED: tuple[Case, ...] = (
    *map(_experts, ("fp8_block", "nvfp4", "mxfp4", "int4", "gptq", "awq")),
    # vLLM's Triton kernel for four bits takes LoRA weights and never applies them.
    Case(
        "glm16-int4-triton",
        "glm16-quantised",
        (),
        quantised="int4",
        engine={"moe_backend": "triton"},
        refused=_IGNORES_LORA,
    ),
    Case(
        "glm16-awq-moe_wna16",
        "glm16-quantised",
        (),
        quantised="awq",
        engine={"quantization": "moe_wna16"},
        refused=_IGNORES_LORA,
    ),
)
_GENERATED = 32  # tokens

# Adapters on the model; what drafts tokens has none.
_SPECULATIVE: tuple[Case, ...] = (
    Case(
        "glm16-ngram",
        "glm16",
        _both("e0", "fused0"),
        generated_tokens=_GENERATED,
        engine={
            "speculative_config": {
                "method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 3,
            }
        },
    ),
    Case(
        "glm16-mtp",
        "glm16-mtp",
        _both("e0", "fused0"),
        generated_tokens=_GENERATED,
        engine={"speculative_config": {"method": "mtp", "num_speculative_tokens": 1}},
    ),
)  # fmt: skip
# Only by name: they need packages that are not vLLM's.
_EXECUTORS: tuple[Case, ...] = (
    Case(
        "glm16-ray", "glm16", _both("e0", "fused0"), engine={"distributed_executor_backend": "ray"}
    ),
)
KINDS = _FAMILIES + _QUANTISED + _SPECULATIVE
ALL = CASES + KINDS + _EXECUTORS


def applying(release: str, only: Sequence[str] = (), *, kinds: bool = False) -> list[Case]:
    """The cases that a release can run: those of the matrix or, with `kinds`, these; or some of all."""
    unknown = set(only) - {case.name for case in ALL}
    if unknown:
        raise SystemExit(f"unknown cases: {', '.join(sorted(unknown))}")
    key = release_key(release)
    asked = [case for case in ALL if case.name in only] if only else KINDS if kinds else CASES
    return [case for case in asked if release_key(case.since) <= key]
