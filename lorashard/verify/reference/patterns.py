"""rank_pattern and alpha_pattern -> the value of a module, by PEFT's `get_pattern_key`.

Keys that spell a name are found by their outline, "layers.0" by "______._": a dot of the key can be
any character of the name. Other keys are run by RE2, as `re` may never come back.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lorashard.errors import AdapterError

_ESCAPED = re.compile(r"\\[ !-/:-@\[-^`{-~]")  # a character that means itself
_SPELLED = re.compile(r"[\w.-]*")
# Where `re` and RE2 differ without an error: references, {,n}, flags, sets in sets.
_AMBIGUOUS = re.compile(r"\\\d|\{,|\(\?(?![ims-]*:|P<)|\[[^\]]*(?:\[|--|&&|\|\||~~)|[^\x00-\x7f]")


class Patterns:
    """The keys of one field of adapter_config.json. Raises AdapterError for a key it cannot match."""

    def __init__(self, field: str, values: Mapping[str, Any]) -> None:
        self._values = values
        self._in_order = tuple(values.values())
        self._expressions: list[tuple[int, str, Any]] = []
        self._outlines: dict[int, set[str]] = {}
        self._first_of: dict[tuple[str, str], int] = {}
        for number, key in enumerate(values):
            if _SPELLED.fullmatch(_ESCAPED.sub("", key)):
                self._remember(key, number)
            else:
                self._expressions.append((number, key, _compiled(field, key)))

    def find(self, name: str, default: Any) -> Any:
        """The value of the first key that matches `name`, else of the key `name` itself."""
        numbers = []
        if self._first_of:
            starts = [0, *(dot.end() for dot in re.finditer(r"\.", name))]
            for end in (name[start:] for start in starts):
                for outline in self._outlines.get(len(end), ()):
                    number = self._first_of.get((outline, _covered(end, outline)))
                    numbers += [] if number is None else [number]
        for number, key, compiled in self._expressions:
            if numbers and number > min(numbers):
                break
            if not name.isascii():
                raise AdapterError(f"{key!a} cannot be matched with the name {name!a}.")
            if compiled.fullmatch(name):
                numbers.append(number)
        if not numbers:
            return self._values.get(name, default)
        return self._in_order[min(numbers)]

    def _remember(self, key: str, number: int) -> None:
        spelled = re.findall(r"\\.|.", key)
        outline = "".join("." if part == "." else "_" for part in spelled)
        text = "".join(part[-1] for part in spelled)
        self._outlines.setdefault(len(outline), set()).add(outline)
        self._first_of.setdefault((outline, _covered(text, outline)), number)


def _covered(text: str, outline: str) -> str:
    """The text without the characters that may be any."""
    return "".join(letter for letter, kind in zip(text, outline) if kind == "_")


def _compiled(field: str, key: str) -> Any:
    import re2  # noqa: PLC0415 - only for the few adapters that need it

    refusal = AdapterError(
        f"{field}: the key {key[:80]!a} cannot be matched in linear time.",
        hint="Name the modules in full.",
    )
    if _AMBIGUOUS.search(_ESCAPED.sub("x", key)):
        raise refusal
    options = re2.Options()
    options.log_errors = False
    try:
        return re2.compile(rf"(?:.*\.)?(?:{key})", options)
    except re2.error as err:
        raise refusal from err
