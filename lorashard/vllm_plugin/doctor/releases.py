"""The vLLM releases that the plugin is tested with. Pure."""

from __future__ import annotations

import re

Release = tuple[int, int, int]

# Inclusive.
FIRST_KNOWN: Release = (0, 16, 0)
LAST_KNOWN: Release = (0, 33, 0)
FIRST_WITH_EPLB: Release = (0, 24, 0)  # in which LoRA follows experts that EPLB moves
FIRST_WITH_DATA_PARALLEL: Release = (0, 24, 0)  # in which engines that share experts agree on slots
KNOWN_RELEASES = (".".join(map(str, FIRST_KNOWN)), ".".join(map(str, LAST_KNOWN)))
KNOWN_RANGE = " to ".join(KNOWN_RELEASES)


def release_number(text: str | None) -> Release | None:
    """0.33.0+cu129 -> (0, 33, 0); None for what is not a release, such as a development build."""
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", text or "")
    return (int(match[1]), int(match[2]), int(match[3] or 0)) if match else None


def is_known(release: Release | None) -> bool:
    """Whether the plugin is tested with releases before and after this one, or with this one."""
    return release is not None and FIRST_KNOWN <= release <= LAST_KNOWN
