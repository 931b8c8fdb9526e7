"""Where lorashard is installed from, and what else some of the work needs.

Everything that names an install command takes it from here: messages, model cards, the notice.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

# lorashard is on no package index. Its name there is free for anyone to take, so nothing may tell a
# user to install it from one.
INSTALL = "pip install ."
INSTALL_IN = "a clone of lorashard's repository"

# Extra -> the packages that it installs, without their versions: pyproject.toml has those.
EXTRAS: Mapping[str, tuple[str, ...]] = {
    "torch": ("torch",),
    "s3": ("s3fs",),
    "gs": ("gcsfs",),
    "train": ("peft", "torch", "transformers"),
}

# Protocol of a URL -> the package with fsspec's driver for it, or what that driver needs.
DRIVERS: Mapping[str, str] = {
    "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs",
    "abfs": "adlfs", "abfss": "adlfs", "az": "adlfs",
    "http": "aiohttp", "https": "aiohttp",
}  # fmt: skip


def documentation() -> Path:
    """The folder of the pages that messages and help refer to: in the wheel, or in a clone."""
    package = Path(__file__).parent
    inside = package / "docs"
    return inside if inside.is_dir() else package.parent / "docs"


def install_command(package: str) -> str:
    """What installs a package that some of the work needs, in the environment of lorashard."""
    return f"pip install {package}"
