"""The vLLM plugin. vLLM calls `register` in every process, through `vllm.general_plugins`.

Start with patches.py: what is changed in vLLM and why. `loader.py` is what it is changed for.
"""

from __future__ import annotations


def register() -> None:
    """Patch vLLM as soon as the modules concerned are imported. Does nothing twice."""
    from lorashard.vllm_plugin import settings

    if settings.is_set(settings.DISABLE):
        return
    from lorashard.vllm_plugin.patches.apply import apply_when_imported
    from lorashard.vllm_plugin.patches.table import PATCHES

    apply_when_imported(PATCHES)
