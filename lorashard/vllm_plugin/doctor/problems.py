"""What is broken or would be refused. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lorashard.vllm_plugin import settings
from lorashard.vllm_plugin.doctor.findings import Installation, PatchState
from lorashard.vllm_plugin.doctor.flags import EngineFlags
from lorashard.vllm_plugin.doctor.releases import FIRST_KNOWN, KNOWN_RANGE, release_number
from lorashard.vllm_plugin.engine.guards import Refusal, displaced_refusal


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that would be refused or is broken. about: vllm, plugin, patches, flags, adapter."""

    about: str
    text: str


def installation_problems(
    installation: Installation, patches: Sequence[PatchState]
) -> Iterator[Problem]:
    """Why the plugin would not work in this Python."""
    if installation.vllm is None:
        yield Problem(
            "vllm",
            f"vLLM is not installed in this Python ({installation.executable}). Install lorashard "
            "into vLLM's environment.",
        )
    release = release_number(installation.vllm)
    if release is not None and release < FIRST_KNOWN:
        yield Problem("vllm", f"vLLM {installation.vllm} is too old for lorashard ({KNOWN_RANGE}).")
    if not installation.entry_point:
        yield Problem(
            "plugin", "vLLM would not find the plugin. Install lorashard with pip, next to vLLM."
        )
    if not installation.allowed:
        yield Problem("plugin", "VLLM_PLUGINS leaves the plugin out. Add lorashard to its list.")
    if settings.DISABLE in installation.switched_on:
        yield Problem("plugin", f"{settings.DISABLE} is set: the plugin does nothing.")
    for fault in installation.faults:
        yield Problem("plugin", fault)
    yield from _patch_problems(installation, patches)


def _patch_problems(installation: Installation, patches: Sequence[PatchState]) -> Iterator[Problem]:
    for patch in patches:
        if patch.state == "broken":
            yield Problem("patches", f"{patch.target} cannot be patched: {patch.reason}.")
    if installation.displaced_patches:
        refusal = displaced_refusal(installation.displaced_patches)
        if refusal.variable not in installation.switched_on:
            yield Problem("patches", refusal.explanation)


def flag_problems(flags: EngineFlags, refusals: Sequence[Refusal]) -> Iterator[Problem]:
    """Why vLLM would not start. refusals: those that no variable overrides."""
    if flags.enable_eplb and flags.ep_size == 1:
        yield Problem(
            "flags",
            "vLLM itself accepts --enable-eplb only with --enable-expert-parallel on more than one "
            "rank.",
        )
    for refusal in refusals:
        yield Problem("flags", refusal.explanation)


def lora_problems(*, enable_lora: bool) -> Iterator[Problem]:
    """Why a vLLM command line would serve no adapter at all."""
    if not enable_lora:
        yield Problem(
            "flags", "Without --enable-lora, vLLM takes no adapters. Add it to the command."
        )
