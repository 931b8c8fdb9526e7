"""What this Python has, for `lorashard doctor`: versions, settings, patches.

Looks, and decides nothing. Patches are really applied, to vLLM as it is imported here, and the other
plugins that vLLM finds are called, as it would.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata

from lorashard.version import __version__
from lorashard.vllm_plugin import settings
from lorashard.vllm_plugin.doctor.findings import Installation, PatchState
from lorashard.vllm_plugin.engine import guards
from lorashard.vllm_plugin.patches.apply import UNSUPPORTED, apply_when_imported, outcomes
from lorashard.vllm_plugin.patches.foreign import find_foreign_patches
from lorashard.vllm_plugin.patches.table import PATCHES

NOT_INSTALLED = "vLLM is not installed"
_GROUP, _NAME = "vllm.general_plugins", "lorashard"
_PREFIX = "LORASHARD_"
_DEBUG = "LORASHARD_DEBUG"  # the command line's own (cli/app.py)
_LOG_LEVEL = "VLLM_LOGGING_LEVEL"
_CHECKED_SETTINGS = (settings.verifies_fully, settings.warm_buffers, settings.reader_threads)


def survey() -> tuple[Installation, tuple[PatchState, ...]]:
    """Look at this Python. Imports vLLM if it is installed, which takes seconds."""
    vllm, patches = _survey_vllm()
    foreign = find_foreign_patches()
    variables = {name: os.environ[name] for name in sorted(os.environ) if name.startswith(_PREFIX)}
    installation = Installation(
        lorashard=__version__,
        python=platform.python_version(),
        executable=sys.executable,
        torch=_installed("torch"),
        vllm=vllm,
        entry_point=any(point.name == _NAME for point in metadata.entry_points(group=_GROUP)),
        allowed=_is_allowed(_NAME),
        variables=variables,
        switched_on=tuple(name for name in variables if settings.is_set(name)),
        unknown=tuple(name for name in variables if name not in _known_variables()),
        faults=tuple(fault for fault in map(_setting_fault, _CHECKED_SETTINGS) if fault),
        foreign_patches=tuple(str(found) for found in foreign if found.is_harmless),
        displaced_patches=tuple(str(found) for found in foreign if not found.is_harmless),
    )
    return installation, patches


def has_vllm() -> bool:
    """Whether `import vllm` would find a package, and not just a folder of that name."""
    spec = importlib.util.find_spec("vllm")
    return spec is not None and spec.origin is not None


def _survey_vllm() -> tuple[str | None, tuple[PatchState, ...]]:
    """The release that `import vllm` gives ("?" if it does not say), and the patches."""
    if not has_vllm():
        return None, _patch_states({}, NOT_INSTALLED)
    with _quiet_stdout():
        apply_when_imported(PATCHES)
        failures = {module: _import_failure(module) for module in {p.module for p in PATCHES}}
        _call_other_plugins()
    imported = getattr(sys.modules.get("vllm"), "__version__", None)
    return imported or _installed("vllm") or "?", _patch_states(failures, None)


def _is_allowed(plugin: str) -> bool:
    allowed = os.environ.get("VLLM_PLUGINS")
    return allowed is None or plugin in allowed.split(",")  # as vLLM's envs.py splits it


def _call_other_plugins() -> None:
    for point in metadata.entry_points(group=_GROUP):
        if point.name != _NAME and _is_allowed(point.name):
            with suppress(Exception):  # vLLM logs it, and goes on as well
                point.load()()


def _import_failure(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except Exception as err:  # noqa: BLE001 - whatever it is, the user must know
        return f"{module} cannot be imported: {type(err).__name__}: {err}"
    return None


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its package is missing too
        return False


def _patch_states(
    failures: Mapping[str, str | None], not_checked: str | None
) -> tuple[PatchState, ...]:
    states = []
    for patch in PATCHES:
        outcome = outcomes.get(patch.target)
        failure = failures.get(patch.module)
        if not_checked is not None:
            state, reason = "not checked", not_checked
        elif outcome is None and patch.until is not None and not _exists(patch.module):
            state, reason = "not needed", "this release has no such module"
        elif outcome is None and patch.only_for:
            state, reason = UNSUPPORTED, failure or f"{patch.module} was imported before the plugin"
        elif outcome is None:
            state, reason = "broken", failure or f"{patch.module} was imported before the plugin"
        else:
            state, reason = outcome.state, outcome.reason
        states.append(
            PatchState(
                patch.target, state, reason, patch.why, patch.how, patch.upstream, patch.since,
                patch.until, patch.only_for,
            )
        )  # fmt: skip
    return tuple(states)


def _setting_fault(read: Callable[[], object]) -> str | None:
    try:
        read()
    except ValueError as err:
        return str(err)
    return None


def _known_variables() -> tuple[str, ...]:
    return (*settings.VARIABLES, *guards.VARIABLES, _DEBUG)


def _installed(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


@contextmanager
def _quiet_stdout() -> Iterator[None]:
    """Send to stderr what vLLM and its libraries print as they are imported; stdout is data."""
    added = _LOG_LEVEL not in os.environ
    os.environ.setdefault(_LOG_LEVEL, "ERROR")
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(stdout, 1)
        os.close(stdout)
        if added:
            del os.environ[_LOG_LEVEL]
