"""The targets by name. A target's module is imported when it is asked for, so that it can be
instrumented first, and as the one of the server needs a vLLM.
"""

from __future__ import annotations

from importlib import import_module

from tests.fuzz.target import Target

MODULES = {
    "header": "header",
    "config": "documents",
    "model": "documents",
    "expert_map": "documents",
    "list": "documents",
    "layout": "layout",
    "manifest": "manifest",
    "load": "load",
}
NAMES = tuple(MODULES)


def find_target(name: str) -> Target:
    """The target of this name."""
    module = import_module(f"tests.fuzz.{MODULES[name]}")
    found: tuple[Target, ...] = module.TARGETS
    return next(target for target in found if target.name == name)
