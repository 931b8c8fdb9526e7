"""What is there, for `lorashard doctor`: versions, settings, patches, an adapter's headers.

This looks and decides nothing. Patches are really applied, to vLLM as it is imported here.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from lorashard.adapter.config import LoraConfig
from lorashard.adapter.layout import detect_layout
from lorashard.adapter.options import LayoutOptions
from lorashard.adapter.read import opened_adapter
from lorashard.errors import LorashardError, NoExpertsError
from lorashard.shards.directory import check_file, read_manifest
from lorashard.shards.placement import Ranks
from lorashard.version import __version__
from lorashard.vllm_plugin import settings
from lorashard.vllm_plugin.engine import guards
from lorashard.vllm_plugin.load.shard_source import is_shard_directory, open_shard_directory
from lorashard.vllm_plugin.patches.apply import apply_when_imported, outcomes
from lorashard.vllm_plugin.patches.table import PATCHES

# The vLLM releases that the plugin is tested with, inclusive.
Release = tuple[int, int, int]
FIRST_KNOWN: Release = (0, 16, 0)
LAST_KNOWN: Release = (0, 33, 0)

NOT_INSTALLED = "vLLM is not installed"
_GROUP, _NAME = "vllm.general_plugins", "lorashard"
_PREFIX = "LORASHARD_"
_DEBUG = "LORASHARD_DEBUG"  # the command line's own, cli/app.py
_LOG_LEVEL = "VLLM_LOGGING_LEVEL"
_CHECKED_SETTINGS = (settings.verifies_fully, settings.warm_buffers, settings.reader_threads)


@dataclass(frozen=True, slots=True)
class Installation:
    """What this Python has. None = not installed.

    entry_point: vLLM can find the plugin. allowed: VLLM_PLUGINS does not leave it out.
    variables: every LORASHARD_* that is set. switched_on: those that are not empty, 0 or off.
    unknown: those that nothing reads. faults: values that the plugin would stop at.
    """

    lorashard: str
    python: str
    executable: str
    torch: str | None
    vllm: str | None
    entry_point: bool
    allowed: bool
    variables: Mapping[str, str]
    switched_on: tuple[str, ...]
    unknown: tuple[str, ...]
    faults: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PatchState:
    """A patch and what became of it: applied, not needed, broken or not checked."""

    target: str
    state: str
    reason: str
    why: str
    how: str
    upstream: str
    since: str
    until: str | None


@dataclass(frozen=True, slots=True)
class FoundAdapter:
    """What a path holds: shards or a plain adapter.

    lora_rank: the largest. num_experts: None = no experts, or not looked at. separate_gate: gate
    and up have a lora_A each. ranks: what a shard directory was cut for, other_ranks: the same for
    modules placed differently. rank_bytes, replicated_bytes: file sizes. error: why it cannot be
    read.
    """

    path: str
    kind: str
    lora_rank: int | None = None
    num_experts: int | None = None
    separate_gate: bool = False
    strategy: str | None = None
    ranks: Ranks = ()
    other_ranks: tuple[Ranks, ...] = ()
    rank_bytes: tuple[int, ...] = ()
    replicated_bytes: int | None = None
    error: str | None = None

    @property
    def directory(self) -> Path:
        """`path`, which is text for the sake of --json."""
        return Path(self.path)


def release_number(text: str | None) -> Release | None:
    """0.33.0+cu129 -> (0, 33, 0); None for what is no release."""
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", text or "")
    return (int(found[1]), int(found[2]), int(found[3] or 0)) if found else None


def survey() -> tuple[Installation, tuple[PatchState, ...]]:
    """Look at this Python. Imports vLLM if it is there, which takes seconds."""
    vllm, patches = _survey_vllm()
    variables = {name: os.environ[name] for name in sorted(os.environ) if name.startswith(_PREFIX)}
    allowed = os.environ.get("VLLM_PLUGINS")
    installation = Installation(
        lorashard=__version__,
        python=platform.python_version(),
        executable=sys.executable,
        torch=_installed("torch"),
        vllm=vllm,
        entry_point=any(point.name == _NAME for point in metadata.entry_points(group=_GROUP)),
        allowed=allowed is None or _NAME in allowed.split(","),  # as vLLM's envs.py splits it
        variables=variables,
        switched_on=tuple(name for name in variables if settings.is_set(name)),
        unknown=tuple(name for name in variables if name not in _known_variables()),
        faults=tuple(fault for fault in map(_setting_fault, _CHECKED_SETTINGS) if fault),
    )
    return installation, patches


def has_vllm() -> bool:
    """Whether `import vllm` would find a package, and not just a folder of that name."""
    spec = importlib.util.find_spec("vllm")
    return spec is not None and spec.origin is not None


def survey_adapter(path: Path, options: LayoutOptions, *, expert_parallel: bool) -> FoundAdapter:
    """Read headers as the plugin would. A fault becomes `error`.

    Without expert parallelism the layout of a plain adapter is vLLM's affair.
    """
    kind = "shards" if is_shard_directory(path) else "plain adapter"
    try:
        if kind == "shards":
            return _survey_shards(path)
        return _survey_plain(path, options if expert_parallel else None)
    except (LorashardError, OSError) as err:
        return FoundAdapter(str(path), kind, error=str(err))


def _survey_shards(path: Path) -> FoundAdapter:
    with ExitStack() as stack:
        config = open_shard_directory(path, stack).config
    manifest = read_manifest(path)
    for name, file in manifest.files.items():
        check_file(path / name, file)
    replicated, *rank_bytes = (file.digest.size_bytes for file in manifest.files.values())
    placement = manifest.placement
    return FoundAdapter(
        str(path),
        "shards",
        _largest_rank(config, [info.lora_rank for info in manifest.modules.values()]),
        placement.num_experts,
        separate_gate=any("gate_proj" in info.scaling for info in manifest.modules.values()),
        strategy=placement.strategy,
        ranks=placement.ranks,
        other_ranks=tuple(dict.fromkeys(placement.layers.values())),
        rank_bytes=tuple(rank_bytes),
        replicated_bytes=replicated,
    )


def _survey_plain(path: Path, options: LayoutOptions | None) -> FoundAdapter:
    # The plugin takes a pickle too: vLLM itself reads it with weights_only=True.
    with opened_adapter(path, allow_pickle=True) as source:
        config = source.index.config
        found = FoundAdapter(str(path), "plain adapter", _largest_rank(config, []))
        if options is None:
            return found
        try:
            layout = detect_layout(source.index, options, str(path))
        except NoExpertsError:
            return found
    return FoundAdapter(
        str(path),
        "plain adapter",
        _largest_rank(config, [module.lora_rank for module in layout.modules]),
        layout.num_experts,
        separate_gate=any("gate_proj" in module.scaling for module in layout.modules),
    )


def _largest_rank(config: LoraConfig, lora_ranks: list[int]) -> int:
    """What vLLM compares with --max-lora-rank (0.33.0 lora/peft_helper.py:193), and the experts'."""
    return max([config.lora_rank, *config.rank_pattern.values(), *lora_ranks])


def _survey_vllm() -> tuple[str | None, tuple[PatchState, ...]]:
    """The release that `import vllm` gives, and the patches; "?" if it does not say."""
    if not has_vllm():
        return None, _patch_states({}, NOT_INSTALLED)
    with _quiet_stdout():
        apply_when_imported(PATCHES)
        failures = {module: _import_failure(module) for module in {p.module for p in PATCHES}}
    imported = getattr(sys.modules.get("vllm"), "__version__", None)
    return imported or _installed("vllm") or "?", _patch_states(failures, None)


def _import_failure(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except Exception as err:  # noqa: BLE001 - whatever it is, it is what the user must know
        return f"{module} cannot be imported: {type(err).__name__}: {err}"
    return None


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # nor has it the package
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
        elif outcome is None:
            state, reason = "broken", failure or f"{patch.module} was imported before"
        else:
            state, reason = outcome.state, outcome.reason
        states.append(
            PatchState(
                patch.target, state, reason, patch.why, patch.how, patch.upstream, patch.since,
                patch.until,
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
    """What vLLM and its libraries print as they are imported goes to stderr; stdout is data."""
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
