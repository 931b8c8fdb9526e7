"""All cases of one environment: every family once, then the variants."""

from __future__ import annotations

import families_v4
import families_v5
from case import Case
from variants import v4_variants, v5_variants


def cases_for(transformers_version: str) -> tuple[Case, ...]:
    """Cases for the given transformers, in a fixed order."""
    is_legacy = _is_legacy(transformers_version)
    families = families_v4.FAMILIES if is_legacy else families_v5.FAMILIES
    by_name = {family.name: family for family in families}
    variants = v4_variants(by_name) if is_legacy else v5_variants(by_name)
    return tuple(Case(family.name, family) for family in families) + variants


def skipped_for(transformers_version: str) -> dict[str, str]:
    """MoE families of the given transformers that have no case, and why."""
    return families_v4.SKIPPED if _is_legacy(transformers_version) else families_v5.SKIPPED


def _is_legacy(transformers_version: str) -> bool:
    return transformers_version.startswith("4.")
