"""The two functions of NCCL that vLLM 0.33.0 looks up and older libraries lack.

vLLM's bindings ask for `ncclCommSuspend` and `ncclCommResume` (NCCL 2.29.7) as they are made, and data
parallelism needs these bindings. Only sleep mode calls the two, so a library with two functions that
refuse, before the host's, is enough. It is built with the host's compiler, or was built elsewhere.

    python -m tests.gpu.nccl OUT.so     builds one that goes with any libnccl.so.2
"""

import ctypes
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

_SOURCE = """
int ncclCommSuspend(void *comm, int flags) { (void)comm; (void)flags; return 5; }
int ncclCommResume(void *comm) { (void)comm; return 5; }
"""
_VARIABLE = "VLLM_NCCL_SO_PATH"


def nccl_variables(folder: Path, built: Path | None = None) -> Mapping[str, str]:
    """What a vLLM process needs in its environment; nothing where the host's library has all.

    folder: where a library may be built. built: one that was built before.
    """
    if _VARIABLE in os.environ:
        return {}
    host = _host_library()
    if host is None or _has_all(host):
        return {}
    library = built if built is not None else build(folder / "libnccl_and_two.so")
    return {_VARIABLE: str(library.absolute())}


def _host_library() -> str | None:
    spec = importlib.util.find_spec("nvidia.nccl") if importlib.util.find_spec("nvidia") else None
    places = spec.submodule_search_locations if spec is not None else None
    found = [path for place in places or () for path in Path(place).glob("lib/libnccl.so.2")]
    return str(found[0]) if found else None


def _has_all(library: str) -> bool:
    return hasattr(ctypes.CDLL(library), "ncclCommSuspend")


def build(target: Path) -> Path:
    """A library with the two functions that has everything else of the loaded libnccl.so.2."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        source, stub = Path(folder) / "two.c", Path(folder) / "libnccl.so.2"
        source.write_text(_SOURCE)
        # Only the name of the stub matters: torch has loaded the real library by then.
        name = "-Wl,-soname,libnccl.so.2"
        subprocess.run(
            ["cc", "-shared", "-fPIC", "-x", "c", "/dev/null", name, "-o", stub], check=True
        )
        wanted = ["-Wl,--no-as-needed", str(stub)]
        subprocess.run(
            ["cc", "-shared", "-fPIC", str(source), *wanted, "-o", str(target)], check=True
        )
    return target


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
