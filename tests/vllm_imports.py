"""What vLLM imports, imported once: the tests fork each process that runs vLLM from this one.

Most of the seconds that `import vllm` takes go here; vLLM itself is not imported. Nothing depends on
the list: what it lacks, or what is not installed, each process imports for itself.
"""

from __future__ import annotations

import importlib
import os
import sys
from contextlib import suppress

# Read when torch is imported: no threads that a fork would lose.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

# Not prometheus_client: it reads its directory from the environment, which tests set, when imported.
MODULES = (
    "torch",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch._inductor.pattern_matcher",
    "torch.distributed.tensor",
    "torch.distributed._symmetric_memory",
    "transformers",
    "transformers.modeling_utils",
    "transformers.processing_utils",
    "transformers.models.auto",
    "aiohttp",
    "fastapi",
    "openai",
    "openai.types.responses",
    "sympy",
)

for _name in MODULES:
    with suppress(ImportError):
        importlib.import_module(_name)

_running = len(os.listdir("/proc/self/task")) if sys.platform == "linux" else 1
assert _running == 1, f"{_running} threads: a fork would lose some"
