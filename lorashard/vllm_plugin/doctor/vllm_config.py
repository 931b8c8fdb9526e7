"""Whether vLLM takes an adapter's configuration, which it looks at before it calls a loader."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from lorashard.adapter.config import CONFIG_NAME
from lorashard.adapter.read import find_adapter
from lorashard.errors import LorashardError
from lorashard.storage.small_files import read_json
from lorashard.vllm_plugin.patches.explanations import text_of, way_out

_ANY_RANK = 2**31


def find_config_refusal(path: Path, *, is_shards: bool) -> str | None:
    """What vLLM's own class says against it; None = nothing, or there is no vLLM to ask.

    --max-lora-rank is left out.
    """
    try:
        from vllm.lora.peft_helper import PEFTHelper
    except Exception:  # noqa: BLE001 - the survey of vLLM reports what cannot be imported
        return None
    try:
        config = read_json((path if is_shards else find_adapter(path)) / CONFIG_NAME)
    except (LorashardError, OSError):
        return None  # the survey of the adapter reports that
    try:
        helper = PEFTHelper.from_dict(config)
        helper.validate_legal(SimpleNamespace(max_lora_rank=_ANY_RANK))
    except Exception as err:  # noqa: BLE001 - an adapter's values go through vLLM unchecked
        said = text_of(err)
        text = f"{path}: vLLM refuses its {CONFIG_NAME}: {said}"
        advice = way_out(said, is_shards=is_shards)
        return text if advice is None else f"{text}\n  {advice}"
    return None
