"""A vLLM command line -> the options that matter to expert LoRA, and what was not read. Pure.

vLLM 0.33.0: `FlexibleArgumentParser` (utils/argparse_utils.py) and the flags of engine/arg_utils.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast, get_args

from lorashard.errors import PlacementError
from lorashard.vllm_options import Strategy
from lorashard.vllm_plugin.doctor.flags import EngineFlags

_SHORT = {
    "-tp": "--tensor-parallel-size",
    "-dp": "--data-parallel-size",
    "-ep": "--enable-expert-parallel",
    "-pcp": "--prefill-context-parallel-size",
}
_NUMBERS = {
    "--tensor-parallel-size": "tensor_parallel_size",
    "--data-parallel-size": "data_parallel_size",
    "--max-lora-rank": "max_lora_rank",
    "--max-loras": "max_loras",
}
_SWITCHES = {
    "--enable-expert-parallel": "enable_expert_parallel",
    "--enable-eplb": "enable_eplb",
    "--fully-sharded-loras": "fully_sharded_loras",
}
_PLACEMENT = "--expert-placement-strategy"
_ENABLE_LORA, _LORA_MODULES, _MODEL = "--enable-lora", "--lora-modules", "--model"
_UNREAD = {
    "--config": "its file is not read; give the options in it on the command line",
    "--prefill-context-parallel-size": "lorashard is not tested with it",
}
_SERVERS = ("vllm.entrypoints.openai.api_server", "vllm.entrypoints.cli.main")
_EXAMPLE = "For example: lorashard doctor -- vllm serve MODEL --enable-lora -tp 2"


@dataclass(frozen=True, slots=True)
class VllmCommand:
    """What a command line says.

    environment: the assignments before the command. model: None = not clear which word it is.
    adapters: the paths of --lora-modules, in order. ignored: the words that mean nothing here.
    notes: what would matter and is not read.
    """

    flags: EngineFlags
    enable_lora: bool
    environment: Mapping[str, str]
    model: str | None = None
    adapters: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def starts_command(words: Sequence[str]) -> bool:
    """Whether these words are a command line and not the path of an adapter."""
    return len(words) > 1 and (_is_assignment(words[0]) or _options_start(words) is not None)


def parse_command(words: Sequence[str], defaults: EngineFlags) -> VllmCommand:
    """Read a command line as vLLM would. defaults: the flags that it does not name.

    Raises PlacementError if it is not one of vLLM's servers, or a value is not valid.
    """
    assigned = 0
    while assigned < len(words) and _is_assignment(words[assigned]):
        assigned += 1
    environment = dict(word.split("=", 1) for word in words[:assigned])
    words = words[assigned:]
    start = _options_start(words)
    if start is None:
        raise PlacementError(
            f"{' '.join(words[:3])!r} does not start a vLLM server.", hint=_EXAMPLE
        )
    return _read_options(_Words(words[start:]), VllmCommand(defaults, False, environment))


def _is_assignment(word: str) -> bool:
    name, equals, _ = word.partition("=")
    return bool(equals) and name.isidentifier()


def _options_start(words: Sequence[str]) -> int | None:
    """Where the options begin; None = this is no server of vLLM's."""
    program = words[0].rpartition("/")[2] if words else ""
    if program == "vllm":
        return 2 if words[1:2] == ["serve"] else None
    if program.startswith("python") and "-m" in words[:-1]:
        module = words.index("-m") + 1
        if words[module] in _SERVERS:
            after = module + 1
            return after + 1 if words[after : after + 1] == ["serve"] else after
    return None


class _Words:
    """The words that are left, in order."""

    def __init__(self, words: Sequence[str]) -> None:
        self._left = list(words)

    def __bool__(self) -> bool:
        return bool(self._left)

    def take(self) -> str:
        return self._left.pop(0)

    def take_values(self, most: int | None = None) -> list[str]:
        """The words up to the next option, at most that many."""
        values: list[str] = []
        while self._left and not _is_option(self._left[0]) and len(values) != most:
            values.append(self._left.pop(0))
        return values


def _is_option(word: str) -> bool:
    return word.startswith("-") and len(word) > 1 and not word[1].isdigit()


def _read_options(words: _Words, read: VllmCommand) -> VllmCommand:
    while words:
        word = words.take()
        if _is_option(word):
            read = _read_option(word, words, read)
        elif read.model is None:
            read = replace(read, model=word)
        else:
            read = _ignore(read, [word])
    return read


def _read_option(option: str, words: _Words, read: VllmCommand) -> VllmCommand:
    """Read an option, and from `words` its values."""
    name, equals, value = option.partition("=")
    name = _long_name(name)
    positive = name.replace("--no-", "--", 1)
    if positive in _SWITCHES or positive == _ENABLE_LORA:
        if equals:
            raise PlacementError(f"{name} takes no value, got {value!r}.")
        if positive == _ENABLE_LORA:
            return replace(read, enable_lora=name == positive)
        return _set_flag(read, _SWITCHES[positive], name == positive)
    if name == _LORA_MODULES:
        found = tuple(_adapter_paths([value] if equals else words.take_values()))
        return replace(read, adapters=(*read.adapters, *found))
    if name in (*_NUMBERS, _PLACEMENT, _MODEL):
        text = value if equals else "".join(words.take_values(1))
        return _set_value(read, name, text)
    # How many values an option takes is not known here: the words up to the next one. So a model
    # is not found behind such an option, and is then no worse than not named.
    read = _ignore(read, [option, *([] if equals else words.take_values())])
    if name in _UNREAD:
        read = replace(read, notes=(*read.notes, f"{name}: {_UNREAD[name]}."))
    return read


def _set_value(read: VllmCommand, name: str, text: str) -> VllmCommand:
    if name == _MODEL:
        return replace(read, model=text or None)
    if name == _PLACEMENT:
        return _set_flag(read, "expert_placement_strategy", _strategy(text))
    return _set_flag(read, _NUMBERS[name], _number(name, text))


def _long_name(name: str) -> str:
    if name.startswith("--"):
        return name.replace("_", "-")
    return _SHORT.get(name, name)


def _set_flag(read: VllmCommand, field: str, value: Any) -> VllmCommand:
    return replace(read, flags=replace(read.flags, **{field: value}))


def _ignore(read: VllmCommand, words: Sequence[str]) -> VllmCommand:
    return replace(read, ignored=(*read.ignored, " ".join(words)))


def _number(name: str, text: str) -> int:
    if not text.isdecimal() or len(text) > 9 or int(text) < 1:
        raise PlacementError(f"{name} needs a number above 0, got {text!r}.")
    return int(text)


def _strategy(text: str) -> Strategy:
    for strategy in get_args(Strategy):
        if strategy == text:
            return cast("Strategy", strategy)
    choices = " or ".join(get_args(Strategy))
    raise PlacementError(f"{_PLACEMENT} is {choices}, got {text!r}.")


def _adapter_paths(modules: Sequence[str]) -> Iterator[str]:
    """The paths in the values of --lora-modules: NAME=PATH, or JSON with a "path"."""
    for module in modules:
        if module.startswith(("{", "[")):
            try:
                parsed = json.loads(module)
            except ValueError:
                raise PlacementError(
                    f"{_LORA_MODULES}: {module[:60]!r} is not valid JSON.",
                    hint="Quote the JSON for the shell.",
                ) from None
            entries = parsed if isinstance(parsed, list) else [parsed]
            yield from (str(e["path"]) for e in entries if isinstance(e, dict) and "path" in e)
        else:
            yield module.partition("=")[2] or module
