"""A patch is a record; applying it replaces a method in place, once, as its module is imported.

A method, not its class: vLLM compares `__class__.__name__` and refers to its classes in several
places (0.33.0 lora/model_manager.py:701, lora/utils.py:83), so some of them would miss a subclass.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import inspect
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from lorashard.rules import Rule

logger = logging.getLogger("vllm.lorashard")

# What `Patch.upstream` begins with: a thread, or a line of the release that was read.
VLLM = "https://github.com/vllm-project/vllm"
SOURCE = f"{VLLM}/blob/v0.33.0/vllm"

_MARK = "_lorashard_original"
UNSUPPORTED = "unsupported"

# original -> replacement. The replacement gets the original's arguments.
Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


def source_line(module: str, line: int) -> str:
    """The link to a line of a module of vLLM."""
    return f"{SOURCE}/{module.removeprefix('vllm.').replace('.', '/')}.py#L{line}"


@dataclass(frozen=True, slots=True)
class Patch:
    """One change to vLLM.

    module, owner, method: what is replaced; owner is a class, or "" for a function of the module.
    parameters: the leading parameter names that the replacement relies on. why, how: sentences that
    `lorashard doctor` shows. upstream: the code, issue or pull request in question. since, until:
    releases, inclusive; until None = still needed. needed: given the owner, False if this release
    does not need the patch. only_for: the one option of vLLM that needs it, which is refused where
    the patch cannot be applied; "" where nothing works without. hazard: what it mends, if nobody would
    notice it.
    """

    module: str
    owner: str
    method: str
    parameters: tuple[str, ...]
    why: str
    how: str
    upstream: str
    since: str
    until: str | None
    wrap: Wrap
    needed: Callable[[Any], bool] = lambda _: True
    only_for: str = ""
    hazard: Rule | None = None

    @property
    def target(self) -> str:
        """The full name of what is replaced."""
        return ".".join(filter(None, (self.module, self.owner, self.method)))

    def find_owner(self) -> Any:
        """The class or module that has the method, as it is imported; None if there is no such."""
        module = sys.modules[self.module]
        owner = getattr(module, self.owner, None) if self.owner else module
        return owner if isinstance(owner, (type, ModuleType)) else None


@dataclass(frozen=True, slots=True)
class Outcome:
    """The state of a patch: applied, not needed, unsupported or broken (with the reason).

    unsupported: it cannot be applied, and the option that it is for is refused.
    """

    patch: Patch
    state: str
    reason: str = ""


outcomes: dict[str, Outcome] = {}
replacements: dict[str, Callable[..., Any]] = {}  # by the target of their patch
_registered: dict[str, Patch] = {}


def broken_patches(option: str = "") -> tuple[str, ...]:
    """A sentence for each patch that is missing from a module that is imported.

    option: only those that this option of vLLM needs; "" for those that nothing works without.
    """
    broken = [
        outcome
        for outcome in outcomes.values()
        if outcome.state in ("broken", UNSUPPORTED) and outcome.patch.only_for == option
    ]
    missed = [
        target
        for target, patch in _registered.items()
        if target not in outcomes and patch.only_for == option and _is_imported(patch.module)
    ]
    return (
        *(f"{outcome.patch.target}: {outcome.reason}" for outcome in broken),
        *(f"{target}: its module was imported without the patch" for target in missed),
    )


def apply_patch(patch: Patch) -> Outcome:
    """Replace the method if the module has what the patch relies on. Never replaces it twice."""
    owner = patch.find_owner()
    method = None if owner is None else vars(owner).get(patch.method)
    if hasattr(function_of(method), _MARK):
        return outcomes.setdefault(patch.target, Outcome(patch, "applied"))
    outcome = _applied(patch, owner, method)
    if outcome.state == "broken" and patch.only_for:
        outcome = replace(outcome, state=UNSUPPORTED)
    outcomes[patch.target] = outcome
    if outcome.state == "broken":
        logger.error(
            "lorashard: cannot patch %s: %s. lorashard does not know this vLLM; "
            "`lorashard doctor` says more.", patch.target, outcome.reason,
        )  # fmt: skip
    return outcome


def _applied(patch: Patch, owner: Any, method: Any) -> Outcome:
    if absent := _absent(patch, owner, method):
        # A patch for older releases has nothing to do in one that no longer has its target.
        return Outcome(patch, "broken" if patch.until is None else "not needed", absent)
    function = function_of(method)
    if not inspect.isfunction(function):
        return Outcome(patch, "broken", f"{patch.method} is a {type(method).__name__}")
    try:
        if not patch.needed(owner):
            return Outcome(patch, "not needed", "this release does not need it")
    except OSError as err:  # `needed` reads source
        return Outcome(patch, "broken", f"its source cannot be read: {err}")
    parameters = tuple(inspect.signature(function).parameters)
    if parameters[: len(patch.parameters)] != patch.parameters:
        return Outcome(patch, "broken", f"its parameters are {', '.join(parameters)}")
    replacement = functools.wraps(function)(patch.wrap(function))
    setattr(replacement, _MARK, function)
    is_of_class = isinstance(method, classmethod)
    setattr(owner, patch.method, classmethod(replacement) if is_of_class else replacement)
    replacements[patch.target] = replacement
    return Outcome(patch, "applied")


def function_of(method: Any) -> Any:
    """What stands in a class: the function itself, or that of a class method."""
    return method.__func__ if isinstance(method, classmethod) else method


def original_of(replacement: Any) -> Callable[..., Any] | None:
    """The function of vLLM that one of ours has replaced; None for another function."""
    original: Callable[..., Any] | None = getattr(replacement, _MARK, None)
    return original


def _absent(patch: Patch, owner: Any, method: Any) -> str:
    if owner is None:
        return f"there is no class {patch.owner}"
    if method is not None:
        return ""
    if isinstance(owner, ModuleType):
        return f"there is no function {patch.method}"
    return f"{patch.owner} has no method {patch.method} of its own"


def apply_when_imported(patches: Sequence[Patch]) -> None:
    """Apply each patch as soon as its module is imported; at once if it already is.

    The API server never loads an adapter, and this way it imports no LoRA code either.
    """
    for patch in patches:
        _registered[patch.target] = patch
        if _is_imported(patch.module):
            apply_patch(patch)
    all_there = all(_is_imported(patch.module) for patch in patches)
    if not all_there and not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _is_imported(name: str) -> bool:
    """Whether a module has been imported and fully executed."""
    module = sys.modules.get(name)
    return module is not None and not getattr(module.__spec__, "_initializing", False)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Has the other finders find a module, and its patches applied once it is executed."""

    def find_spec(
        self, fullname: str, path: Any, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        patches = [patch for patch in _registered.values() if patch.module == fullname]
        if not patches:
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec: importlib.machinery.ModuleSpec | None = (
                find(fullname, path, target) if find is not None else None
            )
            if spec is not None and spec.loader is not None:
                spec.loader = _PatchingLoader(spec.loader, patches)
                return spec
        return None


class _PatchingLoader(importlib.abc.Loader):
    def __init__(self, loader: Any, patches: Sequence[Patch]) -> None:
        self._loader = loader
        self._patches = patches

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        # inspect.getsource and pickling by name look at the loader, so put vLLM's own back.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        for patch in self._patches:
            apply_patch(patch)
