"""The vLLM plugin. vLLM calls `register` in every process, through `vllm.general_plugins`.

Start with patches/table.py: what is changed in vLLM, and why. What it is changed for is
load/loader.py, which reads adapters.
"""

from __future__ import annotations


def register() -> None:
    """Have vLLM's modules patched as they are imported. A second call changes nothing."""
    from lorashard.vllm_plugin import settings

    if settings.is_set(settings.DISABLE):
        return
    from lorashard.vllm_plugin.patches.apply import apply_when_imported
    from lorashard.vllm_plugin.patches.table import PATCHES

    apply_when_imported(PATCHES)
