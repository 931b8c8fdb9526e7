"""Other packages' patches on the methods that lorashard patches: who stands where, and whether it matters.

verl and ms-swift replace `_load_adapter` for adapters in memory. That is no harm: what they make goes
through the stand-in and through `_add_adapter`. Another method that is replaced without a call of
lorashard's is missed, so the engine is refused, by the name of what stands there.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CellType
from typing import Any

from lorashard.vllm_plugin.engine.guards import displaced_refusal
from lorashard.vllm_plugin.patches.apply import Patch, function_of, outcomes, replacements
from lorashard.vllm_plugin.patches.refusals import enforce

logger = logging.getLogger("vllm.lorashard")

_NOT_NEEDED = "_load_adapter"  # see above
_DEPTH = 5  # of functions that hold each other


@dataclass(frozen=True, slots=True)
class ForeignPatch:
    """A function of another package in the place of lorashard's.

    place: the class and the method. by: the function and its file. calls_ours: as far as can be seen.
    """

    place: str
    by: str
    calls_ours: bool

    @property
    def is_harmless(self) -> bool:
        """Whether adapters are loaded right all the same."""
        return self.calls_ours or self.place.endswith(f".{_NOT_NEEDED}")

    def __str__(self) -> str:
        return f"{self.place} is {self.by}"


def find_foreign_patches() -> tuple[ForeignPatch, ...]:
    """What stands in the place of lorashard's patches now."""
    return tuple(
        found
        for outcome in outcomes.values()
        if outcome.state == "applied"
        for found in _on_classes(outcome.patch)
    )


def refuse_displaced() -> None:
    """Raise ValueError if a patch that adapters need has been displaced."""
    displaced = [str(found) for found in find_foreign_patches() if not found.is_harmless]
    enforce([displaced_refusal(displaced)] if displaced else [])


def log_foreign_patches() -> None:
    """Say once, as an engine starts, which package lorashard shares a method with."""
    for found in find_foreign_patches():
        if found.is_harmless:
            logger.info("lorashard: %s. Its adapters get the right experts, too.", found)


def _on_classes(patch: Patch) -> Iterator[ForeignPatch]:
    """In the patched place, and on each subclass that another package has given the method."""
    ours = replacements[patch.target]
    owner = patch.find_owner()
    for place in (owner, *_subclasses(owner)):
        function = function_of(vars(place).get(patch.method))
        if function is None or function is ours or is_of_vllm(function):
            continue
        if function in replacements.values():
            continue  # a subclass has a patch of its own
        name = f"{_name_of(place)}.{patch.method}"
        calls_ours = _reaches(function, ours, _DEPTH) or _calls_super(function, patch.method)
        yield ForeignPatch(name, _describe(function), calls_ours)


def _name_of(place: Any) -> str:
    return f"{place.__module__}.{place.__qualname__}" if isinstance(place, type) else place.__name__


def _subclasses(owner: Any) -> Iterator[type]:
    direct: list[type] = owner.__subclasses__() if isinstance(owner, type) else []
    for subclass in direct:
        yield subclass
        yield from _subclasses(subclass)


def is_of_vllm(function: Any) -> bool:
    """Whether the code is in vLLM's folder. A wrapper may have taken over a name and a module."""
    folder = Path(sys.modules["vllm"].__file__ or "").parent
    return folder in Path(_file_of(function)).parents


def _file_of(function: Any) -> str:
    code = getattr(function, "__code__", None)
    return str(code.co_filename) if code is not None else ""


def _describe(function: Any) -> str:
    code = getattr(function, "__code__", None)
    if code is None:
        return repr(function)
    # Python 3.11 has the qualified name; functools.wraps takes over that of what is wrapped.
    name = getattr(code, "co_qualname", code.co_name)
    return f"{name} ({code.co_filename}:{code.co_firstlineno})"


def _reaches(function: Any, ours: Callable[..., Any], depth: int) -> bool:
    """Whether a function holds ours, in its closure or as what it wraps, so that it can call it."""
    if function is ours:
        return True
    if depth == 0 or not inspect.isfunction(function):
        return False
    held = [
        getattr(function, "__wrapped__", None),
        *(function.__defaults__ or ()),
        *map(_content, function.__closure__ or ()),
    ]
    return any(_reaches(one, ours, depth - 1) for one in held)


def _calls_super(function: Any, method: str) -> bool:
    """Whether a method of a subclass calls the one that it overrides."""
    code = getattr(function, "__code__", None)
    return code is not None and "__class__" in code.co_freevars and method in code.co_names


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None
