"""The matrix as data: which engine, which adapters in which form, and what must come out."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

EP_SIZE = 2

# How an adapter is handed over: as PEFT wrote it, or split with these options.
SPLITS: Mapping[str, tuple[str, ...]] = {
    "shards": ("--ep-size", str(EP_SIZE)),
    "shards-rr": ("--ep-size", str(EP_SIZE), "--placement", "round_robin"),
    "shards-ep4": ("--ep-size", "4"),
}
PLAIN = "plain"


@dataclass(frozen=True, slots=True)
class Check:
    """One adapter in one form, asked for in one engine."""

    adapter: str
    form: str = PLAIN
    # Reported, but no reason to fail: nobody promised it.
    optional: bool = False
    # Sent as LoRARequest.is_3d_lora_weight.
    is_3d: bool = False
    # A regular expression that must match the engine's log.
    log: str = ""


@dataclass(frozen=True, slots=True)
class Case:
    """One engine. `refused` is a regular expression that the failure to start must match."""

    name: str
    model: str
    checks: tuple[Check, ...]
    fp8: bool = False
    # Another kind of weights for the routed experts, of quantised.KINDS.
    quantised: str = ""
    ep: bool = True
    fully_sharded: bool = False
    graphs: bool = False
    max_loras: int = 4
    max_cpu_loras: int = 8
    rounds: int = 1
    engine: Mapping[str, Any] = field(default_factory=dict)
    refused: str = ""
    since: str = "0"
    # A model that stock vLLM may not be able to start: reported, not failed.
    optional: bool = False
    # Tokens to generate before the checks, without an adapter.
    warmup_tokens: int = 0
    # Tokens to generate with each adapter, which are as likely in a prompt.
    generated_tokens: int = 0

    @property
    def weights(self) -> str:
        """What the names of the checkpoint and of reference answers end with: "", "_fp8", "_awq"."""
        return f"_{self.quantised}" if self.quantised else "_fp8" if self.fp8 else ""

    @property
    def flags(self) -> str:
        """What differs from a plain bf16 eager start, for tables."""
        names = {
            "EP": self.ep,
            "FP8": self.fp8,
            f"{self.quantised} experts": bool(self.quantised),
            "fully sharded": self.fully_sharded,
            "graphs": self.graphs,
            "round_robin": self.engine.get("expert_placement_strategy") == "round_robin",
            "speculative": "speculative_config" in self.engine,
            "Ray": self.engine.get("distributed_executor_backend") == "ray",
            "EPLB": bool(self.engine.get("enable_eplb")),
            "mixed format": bool(self.engine.get("enable_mixed_moe_lora_format")),
        }
        return ", ".join(name for name, on in names.items() if on)


def checks(form: str, *adapters: str, optional: bool = False) -> tuple[Check, ...]:
    return tuple(Check(adapter, form, optional) for adapter in adapters)


_E = ("e0", "e1", "e2")
_BOTH = (*checks("plain", *_E), *checks("shards", *_E))
# More of it: eplb_cases.py.
_EPLB = {"window_size": 8, "step_interval": 4, "communicator": "torch_gloo"}
_ROUND_ROBIN = {"expert_placement_strategy": "round_robin"}
_ONE_EXPERT = {"worker_extension_cls": "tests.gpu.one_expert.OneExpert"}
_OTHER_EP_SIZE = Check("e1", "shards-ep4", log=r"lorashard: .*shards-ep4: split for 4 ranks")
_OTHER_PLACEMENT = Check(
    "e0", "shards", log=r"lorashard: .*e0\.shards: split for 2 ranks, with a different placement"
)

CASES: tuple[Case, ...] = (
    # The slowest first, so that they do not start last.
    Case(
        "glm16-fp8-fs-graphs",
        "glm16",
        (*_BOTH, *checks("shards", "fused0", "rs", "half")),
        fp8=True,
        fully_sharded=True,
        graphs=True,
    ),
    Case("glm16-fp8-graphs", "glm16", _BOTH, fp8=True, graphs=True),
    Case("glm16-graphs", "glm16", (*_BOTH, *checks("shards", "fused0")), graphs=True),
    Case(
        "glm16g2-rr-fp8-fs-graphs",
        "glm16g2",
        (*checks("plain", *_E), *checks("shards-rr", *_E)),
        fp8=True,
        fully_sharded=True,
        graphs=True,
        engine=_ROUND_ROBIN,
    ),
    Case(
        "glm16-eplb",
        "glm16",
        checks("plain", *_E),
        warmup_tokens=32,
        since="0.24.0",
        engine={"enable_eplb": True, "eplb_config": _EPLB},
    ),
    Case(
        "glm16",
        "glm16",
        (
            *_BOTH,
            *checks("shards", "fused0", "rs", "half"),
            _OTHER_EP_SIZE,
            *checks("plain", "rs", "half", "half_padded", "fused0"),
        ),
        max_cpu_loras=16,
    ),
    Case("glm15", "glm15", (*_BOTH, *checks("shards", "fused0", "half")), max_cpu_loras=16),
    Case(
        "glm16g2-rr",
        "glm16g2",
        (
            *checks("plain", *_E),
            *checks("shards-rr", *_E, "fused0", "half"),
            _OTHER_PLACEMENT,
        ),
        engine=_ROUND_ROBIN,
        max_cpu_loras=16,
    ),
    Case(
        "glm16-fs",
        "glm16",
        (*_BOTH, *checks("shards", "fused0", "half")),
        fully_sharded=True,
        max_cpu_loras=16,
    ),
    Case(
        "glm15-fs",
        "glm15",
        _BOTH,
        fully_sharded=True,
    ),
    Case("glm16-fp8", "glm16", _BOTH, fp8=True),
    Case("glm15-fp8", "glm15", _BOTH, fp8=True),
    Case(
        "glm16g2-rr-fp8",
        "glm16g2",
        (*checks("plain", *_E), *checks("shards-rr", *_E)),
        fp8=True,
        engine=_ROUND_ROBIN,
    ),
    Case(
        "glm16-swap",
        "glm16",
        (Check("e0", "shards"), Check("e1"), Check("e2", "shards"), Check("e3")),
        max_loras=2,
        max_cpu_loras=4,
        rounds=2,
    ),
    Case(
        "glm16-evict",
        "glm16",
        (
            Check("e0", "shards"),
            Check("fused0", "shards"),
            Check("half", "shards"),
            Check("e1", "shards"),
        ),
        max_loras=1,
        max_cpu_loras=2,
        rounds=2,
    ),
    Case(
        "glm16-mixed-format",
        "glm16",
        (
            Check("fused0", is_3d=True),
            Check("fused0", "shards"),
            Check("e0"),
            Check("e1", "shards"),
        ),
        engine={"enable_mixed_moe_lora_format": True},
        since="0.22.1",
    ),
    Case(
        "glm16-no-ep",
        "glm16",
        (*checks("plain", *_E), *checks("shards", *_E, optional=True)),
        ep=False,
    ),
    Case(
        "glm16-no-ep-fp8",
        "glm16",
        (*checks("plain", *_E), *checks("shards", *_E, optional=True)),
        fp8=True,
        ep=False,
    ),
    # One expert for two ranks: the second has none.
    Case(
        "qwen1",
        "qwen1",
        (*checks("plain", "e0", "fused0"), *checks("shards", "e0")),
        engine=_ONE_EXPERT,
        optional=True,
    ),
    Case(
        "qwen1-fp8-fs-graphs",
        "qwen1",
        (*checks("plain", "e0"), *checks("shards", "e0", "e1")),
        fp8=True,
        fully_sharded=True,
        graphs=True,
        engine=_ONE_EXPERT,
        optional=True,
    ),
    Case(
        "gpt_oss",
        "gpt_oss",
        (*checks("plain", "fused0", "fused1"), *checks("shards", "fused0", "fused1")),
    ),
    Case(
        "gpt_oss-fs",
        "gpt_oss",
        (*checks("plain", "fused0"), *checks("shards", "fused0", "fused1")),
        fully_sharded=True,
    ),
    Case(
        "nemotron_h",
        "nemotron_h",
        (*checks("plain", "e0", "e1"), *checks("shards", "e0", "e1", "fused0")),
        optional=True,
        since="0.26.0",
    ),
)


def release_key(release: str) -> tuple[int, ...]:
    """0.33.0 -> (0, 33, 0), so that releases compare."""
    return tuple(int(part) for part in release.split(".") if part.isdigit())


def as_stock(case: Case) -> Case:
    """The same engine without the plugin: plain adapters, each once."""
    checks: list[Check] = []
    for check in case.checks:
        plain = replace(check, form=PLAIN, optional=False, log="")
        if plain.adapter not in {seen.adapter for seen in checks}:
            checks.append(plain)
    # A failing adapter can leave the engine in a bad way, so the unusual ones go last.
    checks.sort(key=lambda check: not check.adapter.startswith(("e", "half_padded")))
    return replace(case, checks=tuple(checks), refused="")
