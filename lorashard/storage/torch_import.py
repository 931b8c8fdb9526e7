"""torch, which only some of the work needs: imported as late as possible, and missed in plain words."""

from __future__ import annotations

from typing import Any

from lorashard.errors import AdapterError


def import_torch(purpose: str) -> Any:
    """The module torch. Raises AdapterError if it is not installed."""
    try:
        import torch
    except ModuleNotFoundError as err:
        if err.name != "torch":
            raise
        raise AdapterError(
            f"torch is not installed, and {purpose} needs it.", hint="pip install torch"
        ) from err
    return torch
