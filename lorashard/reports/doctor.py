"""Whether an adapter would be right in this vLLM, with these flags or this command line."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from lorashard.adapter.base_model import ModelFacts, merge_facts
from lorashard.adapter.options import LayoutOptions
from lorashard.adapter.read import read_model_facts
from lorashard.errors import LorashardError
from lorashard.storage.remote import Location, is_remote, locate
from lorashard.vllm_options import Strategy
from lorashard.vllm_plugin.doctor.adapter_survey import survey_adapter
from lorashard.vllm_plugin.doctor.command import VllmCommand, parse_command
from lorashard.vllm_plugin.doctor.diagnosis import Report, diagnose
from lorashard.vllm_plugin.doctor.findings import SurveyedAdapter
from lorashard.vllm_plugin.doctor.flags import EngineFlags
from lorashard.vllm_plugin.doctor.outline import local_outline
from lorashard.vllm_plugin.doctor.problems import lora_problems
from lorashard.vllm_plugin.doctor.survey import survey
from lorashard.vllm_plugin.doctor.vllm_config import find_config_refusal


def run_doctor(
    path: str | os.PathLike[str] | None = None,
    command: str | Sequence[str] | None = None,
    *,
    model: str | os.PathLike[str] | None = None,
    tensor_parallel_size: int = 1,
    data_parallel_size: int = 1,
    enable_expert_parallel: bool = False,
    enable_eplb: bool = False,
    fully_sharded_loras: bool = False,
    expert_placement_strategy: Strategy = "linear",
    max_lora_rank: int = 16,
    max_loras: int = 1,
) -> Report:
    """What the vLLM plugin finds here, and would do with this adapter: `ok`, `problems`, `notes`, ...

    path: an adapter or a shard directory, here or elsewhere; by default the first one that the command
    names. command: what starts vLLM, as a line or as words; what it says outweighs the flags.
    Imports vLLM if it is installed. Raises AdapterError for a remote place that does not answer, and
    PlacementError for a command that is not vLLM's; all other faults are in the report.
    """
    flags = EngineFlags(
        tensor_parallel_size=tensor_parallel_size,
        data_parallel_size=data_parallel_size,
        enable_expert_parallel=enable_expert_parallel,
        enable_eplb=enable_eplb,
        fully_sharded_loras=fully_sharded_loras,
        expert_placement_strategy=expert_placement_strategy,
        max_lora_rank=max_lora_rank,
        max_loras=max_loras,
    )
    if not command:
        return _examine(path, model, flags, None)
    words = shlex.split(command) if isinstance(command, str) else command
    parsed = parse_command(words, flags)
    with _environment(parsed.environment):
        return _examine(path, model, parsed.flags, parsed)


def _examine(
    path: str | os.PathLike[str] | None,
    model: str | os.PathLike[str] | None,
    flags: EngineFlags,
    command: VllmCommand | None,
) -> Report:
    notes: list[str] = []
    facts = _read_model(model, command, notes)
    is_chosen = path is None and command is not None
    if path is None and command is not None:
        path = _choose_adapter(command, notes)
    installation, patches = survey()
    adapter = None
    if path is not None:
        options = merge_facts(LayoutOptions(), facts)
        try:
            adapter = _survey(locate(path), options, expert_parallel=flags.ep_size > 1)
        except LorashardError as err:
            if not is_chosen:
                raise
            notes.append(f"{path} of --lora-modules was not looked at: {err.message}")
    report = diagnose(installation, patches, flags, facts, adapter)
    if command is None:
        return report
    problems = (*report.problems, *lora_problems(enable_lora=command.enable_lora))
    return replace(
        report,
        ok=not problems,
        problems=problems,
        notes=(*report.notes, *command.notes, *notes),
        ignored=command.ignored,
    )


def _survey(place: Location, options: LayoutOptions, *, expert_parallel: bool) -> SurveyedAdapter:
    """What a place holds. Of a remote one, its headers are fetched."""
    with local_outline(place) as path:
        adapter = survey_adapter(path, options, expert_parallel=expert_parallel)
        refusal = find_config_refusal(path, is_shards=adapter.is_shard_directory)

    def named(text: str | None) -> str | None:
        return None if text is None else text.replace(str(path), str(place))

    summary = replace(adapter.summary, path=str(place), error=named(adapter.summary.error))
    return replace(adapter, summary=summary, vllm_refusal=named(refusal))


def _read_model(
    model: str | os.PathLike[str] | None, command: VllmCommand | None, notes: list[str]
) -> ModelFacts | None:
    """The facts of `model`, or of the one that the command serves, where that can be read."""
    if model is not None:
        return read_model_facts(locate(model))
    if command is None or command.model is None:
        return None
    try:
        return read_model_facts(locate(command.model))
    except LorashardError as err:
        notes.append(f"The model was not looked at: {err.message}")
        return None


def _choose_adapter(command: VllmCommand, notes: list[str]) -> str | None:
    """The first local adapter of --lora-modules, or the first one on the Hub."""
    local = [name for name in command.adapters if Path(name).exists()]
    chosen = next(iter([*local, *filter(is_remote, command.adapters)]), None)
    notes += [
        f"{name} of --lora-modules was not looked at."
        for name in command.adapters
        if name != chosen
    ]
    return chosen


@contextmanager
def _environment(assigned: Mapping[str, str]) -> Iterator[None]:
    """The variables that a command sets, for as long as the block lasts."""
    before = {name: os.environ.get(name) for name in assigned}
    os.environ.update(assigned)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
