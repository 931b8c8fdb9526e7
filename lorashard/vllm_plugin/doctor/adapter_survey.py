"""Read an adapter's headers as the plugin would, for `lorashard doctor`. Looks, and decides nothing.

In: a path. Out: a `SurveyedAdapter`; a fault becomes its `error`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from lorashard.adapter.config import LoraConfig
from lorashard.adapter.layout import detect_layout
from lorashard.adapter.options import LayoutOptions
from lorashard.adapter.read import opened_adapter
from lorashard.errors import LorashardError, UnclearLayoutError
from lorashard.shards.directory import check_file, claims_to_be_shards, read_manifest
from lorashard.shards.placement import linear_placement
from lorashard.vllm_plugin.doctor.findings import (
    PLAIN_ADAPTER,
    SHARDS,
    AdapterSummary,
    SurveyedAdapter,
)
from lorashard.vllm_plugin.load.contents import AdapterContents, NoSources
from lorashard.vllm_plugin.load.plain_plan import module_contents
from lorashard.vllm_plugin.load.plain_source import open_with_experts
from lorashard.vllm_plugin.load.shard_source import open_shard_directory


def survey_adapter(path: Path, options: LayoutOptions, *, expert_parallel: bool) -> SurveyedAdapter:
    """What a path holds. options: what the model says of its experts.

    Without expert parallelism vLLM's own loader takes a plain adapter, and its layout is not read.
    """
    is_shards = claims_to_be_shards(path)
    try:
        if is_shards:
            return _survey_shards(path)
        return _survey_plain(path, options) if expert_parallel else _survey_config(path)
    except (LorashardError, OSError) as err:
        summary = AdapterSummary(str(path), SHARDS if is_shards else PLAIN_ADAPTER, error=str(err))
        # A running engine has all the facts that a model's config.json may leave out.
        knows_all = None not in (
            options.num_experts, options.hidden_size, options.intermediate_size,
        )  # fmt: skip
        unclear = isinstance(err, UnclearLayoutError) and not knows_all
        return SurveyedAdapter(summary, needs_model=unclear)


def _survey_shards(path: Path) -> SurveyedAdapter:
    with ExitStack() as stack:
        contents = open_shard_directory(path, stack)
    manifest = read_manifest(path)
    for name, file in manifest.files.items():
        check_file(path / name, file)
    replicated, *rank_bytes = (file.digest.size_bytes for file in manifest.files.values())
    placement = manifest.placement
    summary = AdapterSummary(
        str(path),
        SHARDS,
        lora_rank=_largest_rank(
            contents.config, [info.lora_rank for info in manifest.modules.values()]
        ),
        num_experts=placement.num_experts,
        separate_gate=any("gate_proj" in info.scaling for info in manifest.modules.values()),
        strategy=placement.strategy,
        ranks=placement.ranks,
        other_ranks=tuple(dict.fromkeys(placement.layers.values())),
        rank_bytes=tuple(rank_bytes),
        replicated_bytes=replicated,
    )
    return SurveyedAdapter(summary, contents)


def _survey_plain(path: Path, options: LayoutOptions) -> SurveyedAdapter:
    with ExitStack() as stack:
        source = open_with_experts(path, stack)
        if source is None:
            return _survey_without_experts(path)
        config = source.index.config
        layout = detect_layout(source.index, options, str(path))
    summary = AdapterSummary(
        str(path),
        PLAIN_ADAPTER,
        lora_rank=_largest_rank(config, [module.lora_rank for module in layout.modules]),
        num_experts=layout.num_experts,
        separate_gate=any("gate_proj" in module.scaling for module in layout.modules),
    )
    contents = AdapterContents(
        config,
        layout.num_experts,
        gate_up_known=True,  # as the loader has it: where nothing says, the engine's model decides
        modules=module_contents(layout, linear_placement(layout.num_experts, 1)),
        dense=(),
        sources=NoSources(),
    )
    return SurveyedAdapter(summary, contents)


def _survey_without_experts(path: Path) -> SurveyedAdapter:
    """As far as it can be read: whatever may be wrong with it is left to vLLM."""
    try:
        return _survey_config(path)
    except LorashardError:
        return SurveyedAdapter(AdapterSummary(str(path), PLAIN_ADAPTER))


def _survey_config(path: Path) -> SurveyedAdapter:
    # vLLM reads adapter_model.bin too, with weights_only=True.
    with opened_adapter(path, allow_pickle=True) as source:
        lora_rank = _largest_rank(source.index.config, [])
    return SurveyedAdapter(AdapterSummary(str(path), PLAIN_ADAPTER, lora_rank=lora_rank))


def _largest_rank(config: LoraConfig, lora_ranks: Sequence[int]) -> int:
    """The larger of what vLLM compares with --max-lora-rank (0.33.0 lora/peft_helper.py:193) and
    what the experts have.
    """
    return max([config.lora_rank, *config.rank_pattern.values(), *lora_ranks])
