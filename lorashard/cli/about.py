"""`lorashard version`, `env` and `help`: what a bug report needs, and no secrets; what `--help` shows."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from typer.core import TyperGroup

from lorashard.cli import options as opt
from lorashard.cli import render
from lorashard.installing import documentation
from lorashard.version import __version__

_PACKAGES = (
    "torch", "vllm", "safetensors", "peft", "transformers", "huggingface_hub", "fsspec", "s3fs",
    "gcsfs", "numpy", "blake3", "typer", "rich",
)  # fmt: skip
_VARIABLES = re.compile(
    r"(LORASHARD|VLLM|HF|CUDA|NCCL|PYTORCH|OMP)_.*|PYTHONPATH|VIRTUAL_ENV|COLUMNS|NO_COLOR|TERM"
    r"|(HTTPS?|NO)_PROXY"
)
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL|AUTH")
_USER_INFO, _QUERY = re.compile(r"//[^/\s]*@"), re.compile(r"\?\S*")
_GPUS = Path("/proc/driver/nvidia/gpus")


def version() -> None:
    """Show the version."""
    render.print_line(f"lorashard {__version__}")


def env(as_json: opt.Json = False) -> None:
    """Show what a bug report needs: versions, platform, GPUs and settings, but no secrets."""
    found = describe_environment(os.environ)
    if as_json:
        render.print_json(found)
        return
    variables = found.pop("variables")
    packages = found.pop("packages")
    gpus = found.pop("gpus")
    render.print_facts(
        {name: str(value) for name, value in found.items()}
        | {"gpus": ", ".join(gpus) or "none found"}
        | {name: installed or "not installed" for name, installed in packages.items()}
        | variables
    )


def help(  # noqa: A001 - the command's name
    ctx: typer.Context,
    command: Annotated[
        Optional[str],
        typer.Argument(metavar="COMMAND", show_default=False, help="All, if none is named."),
    ] = None,
) -> None:
    """Show the help of a command, as its --help does."""
    root = ctx.find_root()
    shown = root
    if command is not None:
        assert isinstance(root.command, TyperGroup)
        _, found, _ = root.command.resolve_command(root, [command])
        assert found is not None, "an unknown command ends in a usage error"
        shown = found.make_context(command, [], root, resilient_parsing=True)
    for line in shown.get_help().splitlines():
        render.print_line(line)


def describe_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    """The facts. Imports none of the packages. gpus: as the NVIDIA driver names them."""
    return {
        "lorashard": __version__,
        "documentation": str(documentation()),
        "python": f"{platform.python_version()}, {sys.executable}",
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "gpus": _find_gpus(_GPUS),
        "packages": {name: _installed(name) for name in _PACKAGES},
        "variables": {
            name: _shown(name, value)
            for name, value in sorted(environment.items())
            if _VARIABLES.fullmatch(name.upper())
        },
    }


def _installed(package: str) -> str | None:
    from importlib import metadata  # noqa: PLC0415 - not for `--help`

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _shown(name: str, value: str) -> str:
    if _SECRET.search(name.upper()):
        return "(set; not shown)"
    return _QUERY.sub("?...", _USER_INFO.sub("//...@", value))


def _find_gpus(folder: Path) -> list[str]:
    """2 x NVIDIA H100 80GB HBM3, for each model; empty without a driver."""
    try:
        texts = [path.read_text() for path in sorted(folder.glob("*/information"))]
    except OSError:
        return []
    models = re.findall(r"^Model:\s*(.+?)\s*$", "\n".join(texts), re.MULTILINE)
    return [f"{count} x {model}" for model, count in Counter(models).items()]
