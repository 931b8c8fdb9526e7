"""The config of an adapter in memory, with the r and alpha of some modules.

vLLM's PEFTHelper knows rank_pattern and alpha_pattern since 0.32 and drops them before, so that these
modules would be scaled as all others are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_PATTERNS = ("rank_pattern", "alpha_pattern")


def wrap_from_dict(original: Callable[..., Any]) -> Callable[..., Any]:
    """PEFTHelper.from_dict: the helper keeps the patterns, for lorashard's loader."""

    def from_dict(cls: Any, config_dict: dict[str, Any]) -> Any:
        helper = original(cls, config_dict)
        for name in _PATTERNS:
            if not hasattr(helper, name):
                setattr(helper, name, config_dict.get(name) or {})
        return helper

    return from_dict


def drops_patterns(helper_class: Any) -> bool:
    """Whether this release's PEFTHelper lacks one of the fields."""
    return not set(_PATTERNS) <= set(helper_class.__dataclass_fields__)
