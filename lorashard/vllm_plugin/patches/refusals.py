"""Refusals -> a ValueError, unless the user has accepted the risk."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from lorashard.vllm_plugin import settings
from lorashard.vllm_plugin.engine.guards import Refusal

logger = logging.getLogger("vllm.lorashard")


def enforce(refusals: Iterable[Refusal]) -> None:
    """Raise ValueError for the first refusal whose variable is not set; log each that is overridden."""
    for refusal in refusals:
        if not settings.is_set(refusal.variable):
            raise ValueError(str(refusal))
        logger.warning(
            "lorashard: not refused because %s is set: %s", refusal.variable, refusal.reason
        )
