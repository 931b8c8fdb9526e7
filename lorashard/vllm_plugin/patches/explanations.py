"""What lorashard says in a server's answer about an adapter that is not loaded."""

from __future__ import annotations

import re
from contextlib import ExitStack
from pathlib import Path

from lorashard.adapter.config import (
    CONFIG_NAME,
    PICKLE_NAME,
    WEIGHTS_NAME,
    LoraConfig,
    parse_config,
)
from lorashard.adapter.layout import detect_layout
from lorashard.errors import LorashardError
from lorashard.parameters import with_flags
from lorashard.shards.directory import claims_to_be_shards
from lorashard.storage.small_files import read_small_file
from lorashard.vllm_plugin.load.loader import AdapterLoader
from lorashard.vllm_plugin.load.plain_source import open_with_experts
from lorashard.vllm_plugin.load.shard_source import open_shard_directory

_SPLIT_OPTION = re.compile(
    r"--(?:model|num-experts|orientation|lora-b-layout|allow-pickle|dtype|expert-map)\b"
)
# vLLM's words for r=0 (from 0.32.0 on; 0.33.0 lora/peft_helper.py:108).
_NO_RANK_0 = "in `rank_pattern` must be a positive integer, got 0"


def for_a_server(error: LorashardError) -> str:
    """The error's text, for somebody who has typed no lorashard command."""
    text = with_flags(str(error))
    if not _SPLIT_OPTION.search(text):
        return text
    return (
        f"{text}\n  That is an option of `lorashard split`, not of `vllm serve`: split the adapter "
        "with it, and serve the directory that this writes."
    )


def text_of(error: Exception) -> str:
    """What vLLM says, with the kind of an error that is not meant for the user."""
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


def explain_refusal(path: Path, said: str, loader: AdapterLoader | None) -> str | None:
    """What to add to vLLM's refusal of an adapter that lorashard was not asked for. Never raises.

    said: vLLM's text. None where lorashard knows no more, or vLLM alone would load the adapter.
    """
    try:
        return _explain(path, said, loader)
    except LorashardError as err:
        return for_a_server(err)
    except Exception:  # noqa: BLE001 - vLLM's own error is raised, whatever happens here
        return None


def _explain(path: Path, said: str, loader: AdapterLoader | None) -> str | None:
    """How to get the adapter served, if lorashard reads what vLLM refuses.

    Reads configuration and headers as a load does. Raises LorashardError for what a load refuses.
    """
    is_shards = claims_to_be_shards(path)
    config = _config_of_shards(path) if is_shards else _config_of_plain(path, loader)
    return None if config is None else way_out(said, is_shards=is_shards)


def way_out(said: str, *, is_shards: bool) -> str | None:
    """What to do about what vLLM says against a configuration; None where nothing is known."""
    if _NO_RANK_0 not in said:
        return None
    run = "`lorashard convert`" if is_shards else "`lorashard split`, then `lorashard convert`"
    return (
        f"modules with r=0 are not trained. Run {run}: the configuration that convert writes names "
        "no r=0. Serve what it writes, or split that."
    )


def _config_of_shards(path: Path) -> LoraConfig:
    with ExitStack() as stack:
        return open_shard_directory(path, stack).config


def _config_of_plain(path: Path, loader: AdapterLoader | None) -> LoraConfig | None:
    """None for an adapter that vLLM's own loader takes, or whose layout is in a pickle."""
    if loader is None or loader.ep_size == 1 or not path.is_dir():
        return None
    if not (path / WEIGHTS_NAME).exists() and (path / PICKLE_NAME).exists():
        parse_config(read_small_file(path, CONFIG_NAME), str(path / CONFIG_NAME))
        return None
    with ExitStack() as stack:
        source = open_with_experts(path, stack)
        if source is None:
            return None
        detect_layout(source.index, loader.layout_options(), str(path))
        return source.index.config
