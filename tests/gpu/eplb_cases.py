"""Engines with EPLB as data: how each one moves experts, and which adapters it serves meanwhile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

from tests.gpu.cases import PLAIN, Case, Check

MODEL = "glm16"
# vLLM before 0.26 loads no weights for redundant experts of GLM-4-MoE, and the plugin refuses that.
MODEL_BEFORE_0_26 = "qwen16"
# More adapters than fit on the GPU or in host memory: each round evicts, and loads again.
CHECKS = (
    Check("e0", PLAIN),
    Check("e1", "shards"),
    Check("e2", PLAIN),
    Check("fused0", "shards"),
    Check("half", "shards"),
)
STOCK_CHECKS = tuple(Check(name, PLAIN) for name in ("e0", "e1", "e2"))
MAX_LORAS, MAX_CPU_LORAS = 2, 3
STEP_INTERVAL, WINDOW_SIZE = 4, 8


def model_of(num_redundant: int) -> str:
    """The model for a case in the installed vLLM."""
    release = tuple(map(int, version("vllm").split(".")[:2]))
    return MODEL_BEFORE_0_26 if num_redundant and release < (0, 26) else MODEL


@dataclass(frozen=True, slots=True)
class EplbCase:
    """One engine. rounds: how often all adapters are asked for; steps_between: decode steps before each.

    In the first round experts stay where they are. In the last one maps are made at random, so that
    nearly every expert moves.
    """

    name: str
    in_thread: bool
    num_redundant: int = 0
    fp8: bool = False
    graphs: bool = False
    communicator: str | None = None
    rounds: int = 4
    steps_between: int = 14
    checks: tuple[Check, ...] = CHECKS
    is_first: bool = False

    @property
    def flags(self) -> str:
        """For tables."""
        names = {
            "async" if self.in_thread else "sync": True,
            f"{self.num_redundant} redundant": self.num_redundant,
            "FP8": self.fp8,
            "graphs": self.graphs,
            f"{self.communicator}": self.communicator,
        }
        return ", ".join(name for name, on in names.items() if on)

    def case(self) -> Case:
        """The engine as the other cases have it."""
        eplb: dict[str, Any] = {
            "window_size": WINDOW_SIZE,
            "step_interval": STEP_INTERVAL,
            "use_async": self.in_thread,
            "num_redundant_experts": self.num_redundant,
            "communicator": self.communicator or "torch_gloo",
        }
        options: Mapping[str, Any] = {
            "enable_eplb": True,
            "eplb_config": eplb,
            "worker_extension_cls": "tests.gpu.eplb_worker.Rebalancing",
        }
        return Case(
            self.name, model_of(self.num_redundant), self.checks, fp8=self.fp8, graphs=self.graphs, max_loras=MAX_LORAS,
            max_cpu_loras=MAX_CPU_LORAS, rounds=self.rounds, engine=options,
        )  # fmt: skip

    def stock(self) -> EplbCase:
        """The same without the plugin, once for each adapter."""
        return replace(self, checks=STOCK_CHECKS, rounds=3)


# The slowest first.
CASES = (
    EplbCase("eplb-async-graphs-fp8", in_thread=True, num_redundant=4, fp8=True, graphs=True),
    EplbCase("eplb-sync-graphs", in_thread=False, num_redundant=4, graphs=True),
    EplbCase("eplb-async-redundant", in_thread=True, num_redundant=4, is_first=True),
    EplbCase("eplb-sync-redundant", in_thread=False, num_redundant=4, is_first=True),
    EplbCase("eplb-async-fp8", in_thread=True, num_redundant=4, fp8=True, is_first=True),
    EplbCase("eplb-sync-fp8", in_thread=False, num_redundant=4, fp8=True),
    EplbCase("eplb-async", in_thread=True),
    EplbCase("eplb-sync", in_thread=False),
    EplbCase("eplb-sync-nccl", in_thread=False, num_redundant=4, communicator="torch_nccl"),
)
STOCK_CASES = tuple(
    case.stock() for case in CASES if case.name in ("eplb-async", "eplb-sync", "eplb-sync-fp8")
)
