"""Servers with two data-parallel engines as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

MODEL = "glm16"
# Served name -> adapter. More than an engine has slots for, so each evicts and loads again.
SERVED = {"a": "e0", "b": "e1", "c": "fused0"}
STOCK_SERVED = SERVED | {"c": "e3"}  # stock vLLM does not start with a fused one here
LATE = "e2"  # loaded and unloaded at run time
SHARDS = (*SERVED.values(), LATE)  # adapters that must be there as shards
MAX_LORAS, MAX_CPU_LORAS = 4, 4
NUM_ENGINES = 2


def served_adapters(stock: bool) -> Mapping[str, str]:
    """The adapters of a server's start, by the name that they are served by."""
    return STOCK_SERVED if stock else SERVED


@dataclass(frozen=True, slots=True)
class DpCase:
    """One server. requests: how many mixed ones at the end, each of which is judged."""

    name: str
    fp8: bool = False
    graphs: bool = False
    requests: int = 1000
    max_loras: int = MAX_LORAS
    is_first: bool = False

    @property
    def flags(self) -> str:
        """For tables."""
        names = {"FP8": self.fp8, "bf16": not self.fp8, "graphs": self.graphs}
        names["eager"] = not self.graphs
        names[f"{self.max_loras} slots"] = True
        return ", ".join(name for name, on in names.items() if on)

    @property
    def reference(self) -> str:
        """The case of `cases.py` whose reference this one has."""
        return "glm16-fp8" if self.fp8 else "glm16"

    def command(self, directory: Path, *, stock: bool) -> list[str]:
        """Arguments of Python. directory: the model's. Stock vLLM gets plain adapters."""
        form = "" if stock else ".shards"
        return [
            *("-m", "vllm.entrypoints.cli.main", "serve"),
            str(directory / ("model_fp8" if self.fp8 else "model")),
            *("-dp", str(NUM_ENGINES), "-tp", "1", "--enable-expert-parallel"),
            *("--api-server-count", "1", "--enable-lora", "--max-lora-rank", "32"),
            *("--max-loras", str(self.max_loras), "--max-cpu-loras", str(MAX_CPU_LORAS)),
            "--no-enable-prefix-caching",
            *("--served-model-name", "base", "--max-model-len", "512", "--max-num-seqs", "16"),
            *("--gpu-memory-utilization", "0.1", "--kv-cache-memory-bytes", str(1 << 30)),
            *self._graphs(),
            "--lora-modules",
            *(
                f"{name}={directory / f'{adapter}{form}'}"
                for name, adapter in served_adapters(stock).items()
            ),
        ]

    def _graphs(self) -> Sequence[str]:
        if not self.graphs:
            return ("--enforce-eager",)
        return ("--compilation-config", '{"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 256]}')


# The slowest first.
CASES = (
    DpCase("dp-graphs-fp8", fp8=True, graphs=True),
    DpCase("dp-graphs", graphs=True, is_first=True),
    DpCase("dp-eager", is_first=True),
    DpCase("dp-eager-fp8", fp8=True),
    DpCase("dp-eager-2-slots", max_loras=2, requests=300),
)
