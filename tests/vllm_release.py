"""vLLM releases as importable Python sources, so that tests run vLLM's own code on the CPU.

`python tests/vllm_release.py 0.33.0 0.20.2` puts the `*.py` files of each release's wheel under
`.venv/vllm/<release>`; its compiled extensions (300 to 500 MB) are left out, and vLLM logs
"Failed to import from vllm._C" and goes on. Each release is imported in its own subprocess: two
releases cannot share one interpreter.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

_REPO = Path(__file__).resolve().parents[1]
RELEASES_DIR = _REPO / ".venv" / "vllm"

# What the plugin is tested against: LORASHARD_RELEASES="0.24.0 0.26.0", or the ends of the range
# and two between, where much changes.
_RELEASES = os.environ.get("LORASHARD_RELEASES", "0.33.0 0.22.1 0.20.2 0.16.0")
PLUGIN_RELEASES = tuple(_RELEASES.split())
# Slow tests run at the ends of the range, or in the newest, unless LORASHARD_RELEASES says where.
_ARE_CHOSEN = "LORASHARD_RELEASES" in os.environ
END_RELEASES = PLUGIN_RELEASES if _ARE_CHOSEN else (PLUGIN_RELEASES[0], PLUGIN_RELEASES[-1])

# What `vllm.lora.worker_manager` and `vllm.model_executor.layers.fused_moe` of 0.16.0, 0.20.2 and
# 0.33.0 import at module level, beyond torch, transformers and safetensors (and what these bring).
# Torch comes first and on its own (CPU wheel). xgrammar brings triton (1 GB unpacked) on Linux
# x86_64; vLLM does not need it on the CPU.
VLLM_LIGHT_PACKAGES = (
    "aiohttp",
    "cachetools",
    "cbor2",
    "cloudpickle",
    "diskcache",  # up to 0.19.1
    "einops",
    "fastapi",  # 0.33.0 only
    "gguf",  # up to 0.20.2
    "llguidance",
    "mistral-common",  # 0.16.0 only
    "msgspec",
    "openai",
    "openai-harmony",  # 0.33.0 asks for oss-harmony, which was not tried; it imports this name
    "partial-json-parser",  # 0.33.0 only
    "pillow",
    "prometheus-client",
    "psutil",
    "py-cpuinfo",
    "pybase64",
    "pydantic",
    "pyzmq",
    "regex",
    "requests",
    "urllib3",
    "uvloop",
    "xgrammar",
)


def newest_of(releases: tuple[str, ...]) -> tuple[str, ...]:
    """The first of these, or all where LORASHARD_RELEASES has chosen them."""
    return releases if _ARE_CHOSEN else releases[:1]


def release_sources(release: str) -> Path | None:
    """The directory to put on PYTHONPATH for `import vllm` of that release; None = not prepared."""
    sources = RELEASES_DIR / release
    return sources if (sources / "vllm" / "__init__.py").is_file() else None


def require_release(release: str) -> Path:
    """The same, or skip the test; with LORASHARD_REQUIRE_ALL=1, fail it."""
    import pytest

    sources = release_sources(release)
    if sources is None:
        reason = f"vLLM {release} is not prepared: run `python tests/vllm_release.py {release}`"
        if os.environ.get("LORASHARD_REQUIRE_ALL", "") not in ("", "0"):
            pytest.fail(reason)
        pytest.skip(reason)
    return sources


def run_in_release(release: str, script: str, *, timeout_s: float = 300) -> Any:
    """Run `script` with that release's vllm importable; return what it passed to `answer(...)`.

    It runs in a process of its own, forked from one that has imported what vLLM imports
    (vllm_imports.py), but neither vLLM nor lorashard. The value travels as JSON through a file,
    because vLLM logs to stdout. Skips or fails like `require_release`; a script that fails raises
    AssertionError with the end of its stderr.
    """
    sources = require_release(release)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.vllm_imports"])
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            "PYTHONPATH": str(sources),
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
            # An empty allow-list: lorashard's plugin must not touch what is tested.
            "VLLM_PLUGINS": "",
            # One intra-op thread: the tensors are tiny.
            "OMP_NUM_THREADS": "1",
        }
        process = context.Process(target=_run_script, args=(folder, script, environment))
        process.start()
        process.join(timeout_s)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise TimeoutError(f"vLLM {release}: no answer after {timeout_s} s")
        stderr = (Path(folder) / "stderr").read_text(errors="replace")
        assert process.exitcode == 0, f"vLLM {release}: {stderr[-3000:]}"
        return json.loads((Path(folder) / "answer.json").read_text())


@cache
def answers_of(release: str, module: str, *, timeout_s: float = 300) -> Any:
    """What `run_all` of a module of the tests returns there.

    Asked for once by all tests, in one process, because importing vLLM takes seconds.
    """
    script = f"""
import sys; sys.path.insert(0, {str(_REPO)!r})
import {module}
answer({module}.run_all())
"""
    return run_in_release(release, script, timeout_s=timeout_s)


def _run_script(folder: str, script: str, environment: dict[str, str]) -> None:
    """In the new process: what `python -c script` would do."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        with (Path(folder) / name).open("wb") as file:
            os.dup2(file.fileno(), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path.insert(0, environment["PYTHONPATH"])
    sys.argv = ["-c"]
    early = sorted({"vllm", "lorashard"} & sys.modules.keys())
    assert not early, f"{early} must be imported by the script, in its order"

    def answer(value: object) -> None:
        (Path(folder) / "answer.json").write_text(json.dumps(value))

    exec(script, {"__name__": "__main__", "answer": answer})


def record(release: str, name: str, findings: dict[str, Any]) -> None:
    """Keep what was found, for the table of docs/releases.md, if LORASHARD_RECORD names a folder."""
    if folder := os.environ.get("LORASHARD_RECORD"):
        kept = {k: v for k, v in findings.items() if isinstance(v, list) or k == "all_layouts"}
        path = Path(folder).absolute() / f"{release}-{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(kept, indent=1) + "\n")


def prepare_release(release: str) -> Path:
    """Download the wheel of a release without its dependencies and keep its Python sources."""
    prepared = release_sources(release)
    if prepared is not None:
        return prepared
    RELEASES_DIR.mkdir(parents=True, exist_ok=True)
    # In the same directory as the target, so that the rename is atomic: a release is there whole
    # or not at all.
    with tempfile.TemporaryDirectory(dir=RELEASES_DIR) as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run(
            [*pip, "--only-binary=:all:", "--dest", folder, f"vllm=={release}"], check=True
        )
        (wheel,) = Path(folder).glob("vllm-*.whl")
        extracted = Path(folder) / "sources"
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".py")]
            archive.extractall(extracted, names)
        extracted.rename(RELEASES_DIR / release)
    return RELEASES_DIR / release


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit("usage: python tests/vllm_release.py RELEASE ...")
    for wanted in sys.argv[1:]:
        print(prepare_release(wanted))
