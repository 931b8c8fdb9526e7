"""Regular expressions of an adapter's config, matched against names in linear time. Pure.

PEFT's rule for rank_pattern and alpha_pattern (`get_pattern_key`): a key is a regular expression for
the end of a module's name, from a dot on, and the first key that matches wins. An adapter can have
one key per module, as EVA writes, or a key on which `re` backtracks for ever. So keys that are plain
names are looked up in a table, and all others are run by RE2.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from lorashard.errors import UnsupportedAdapterError
from lorashard.rules import PATTERNS_IGNORED

_Number = TypeVar("_Number", int, float)

# Letters, digits, "_", "-" and what is escaped. A dot that is not escaped is any character.
_PLAIN_KEY = re.compile(r"(?:[\w.-]|\\[ -/:-@\[-^`{-~])*")
_CHARACTER = re.compile(r"\\.|.")
_ANY = "\n"  # in a form, a character that can be any other one

# What one adapter may ask for. Names of real models have dozens of forms, and real configs a few
# patterns that are not plain names.
_MAX_FORMS = 1024  # of plain keys: their length and where any character will do
_MAX_OTHERS = 256
_MAX_LENGTH = 10_000
_MEMORY = 2**21  # bytes that RE2 may take for one pattern
_END_OF_NAME = r"(?:.*\.)?(?:{})$"
_HINT = (
    "Name the modules in full, or by regular expressions without references, assertions and "
    "possessive or unusual forms: every pattern must be matched in linear time."
)

# What `re` and RE2 both accept and understand differently, or what RE2 alone takes for an extension:
# numbers after a backslash, {,n}, flags for the whole pattern, and sets within sets.
_TOKEN = re.compile(
    r"(?P<different>\\[0-9]|\{,|\(\?(?![ims-]*:|P<)|\[\^?\]?(?:\\[^0-9]|[^\]\\\[])*(?:\[|\\[0-9]))"
    r"|\\.|\[(?P<set>\^?\]?(?:\\.|[^\]\\])*)\]|.",
    re.DOTALL,
)
_SET_OPERATORS = re.compile(r"--|&&|\|\||~~")


class NamePattern:
    """One regular expression for a whole name, which does not backtrack.

    field: the config's field that it is from. template: what is matched, with the pattern as {}.
    Raises re.error for what PEFT cannot compile, UnsupportedAdapterError for what RE2 cannot, or might
    understand differently.
    """

    __slots__ = ("_compiled", "_field", "_text", "_where")

    def __init__(self, text: str, field: str, where: str, template: str = "{}") -> None:
        self._text, self._field, self._where = text, field, where
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(template.format(text))
            if len(text) > _MAX_LENGTH or not text.isascii() or _means_something_else(text):
                raise self._unsupported()
            re.compile(text)  # whose parentheses are its own
        self._compiled = self._compile(template.format(text))

    def matches(self, name: str) -> bool:
        """Whether the pattern matches the whole name."""
        if not name.isascii() or not name.isprintable():
            # "\w", "\d" and "\b" know more characters in `re` than in RE2; "$" and "." know lines.
            raise self._unsupported(f" for a module called {name!a}")
        return self._compiled.fullmatch(name) is not None

    def _compile(self, pattern: str) -> Any:
        import re2  # noqa: PLC0415 - only for the few adapters that need it

        options = re2.Options()
        options.log_errors = False
        options.max_mem = _MEMORY
        try:
            return re2.compile(pattern, options)
        except re2.error as err:
            raise self._unsupported() from err

    def _unsupported(self, why: str = "") -> UnsupportedAdapterError:
        text = ascii(self._text if len(self._text) <= 80 else self._text[:80] + "...")
        return UnsupportedAdapterError(
            f"{self._field}: the regular expression {text}{why}",
            self._where,
            hint=_HINT,
            rule=PATTERNS_IGNORED,
        )


class NamePatterns(Mapping[str, _Number]):
    """The keys and values of one pattern field, in the order of the file.

    Raises re.error and UnsupportedAdapterError as `NamePattern` does.
    """

    __slots__ = ("_forms", "_others", "_values", "_values_in_order")

    def __init__(self, values: Mapping[str, _Number], field: str, where: str) -> None:
        self._values: dict[str, _Number] = dict(values)
        self._values_in_order: tuple[_Number, ...] = tuple(self._values.values())
        # length -> where any character will do -> the rest of the key -> the key's place
        self._forms: dict[int, dict[tuple[int, ...], dict[str, int]]] = {}
        self._others: list[tuple[int, NamePattern]] = []
        for place, key in enumerate(self._values):
            if _PLAIN_KEY.fullmatch(key):
                self._add_plain(key, place)
            elif len(self._others) == _MAX_OTHERS:
                feature = f"{field} with more than {_MAX_OTHERS} keys that are no names"
                raise UnsupportedAdapterError(feature, where, hint=_HINT, rule=PATTERNS_IGNORED)
            else:
                self._others.append((place, NamePattern(key, field, where, _END_OF_NAME)))
        if sum(map(len, self._forms.values())) > _MAX_FORMS:
            feature = f"{field} with keys of more than {_MAX_FORMS} forms"
            raise UnsupportedAdapterError(feature, where, hint=_HINT, rule=PATTERNS_IGNORED)

    def __getitem__(self, key: str) -> _Number:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return repr(self._values)

    def first_match(self, module: str, default: _Number) -> _Number:
        """The value of the first key that matches the module's name, or is spelled like it."""
        if not self._values:
            return default
        end = len(self._values)
        first = min(self._plain_matches(module), default=end)
        for place, pattern in self._others:
            if place > first:
                break
            if pattern.matches(module):
                first = place
        if first == end:
            return self._values.get(module, default)
        return self._values_in_order[first]

    def _add_plain(self, key: str, place: int) -> None:
        characters = _CHARACTER.findall(key)
        wild = tuple(place for place, text in enumerate(characters) if text == ".")
        text = "".join(_ANY if text == "." else text[-1] for text in characters)
        self._forms.setdefault(len(text), {}).setdefault(wild, {}).setdefault(text, place)

    def _plain_matches(self, module: str) -> Iterator[int]:
        name = module.removesuffix("\n")  # "$" is before a last newline, too
        if "\n" in name or not self._forms:  # no plain key, and no dot of one, matches a newline
            return
        begin = 0
        while True:
            for wild, table in self._forms.get(len(name) - begin, {}).items():
                characters = list(name[begin:])
                for position in wild:
                    characters[position] = _ANY
                place = table.get("".join(characters))
                if place is not None:
                    yield place
            begin = name.find(".", begin) + 1
            if not begin:
                return


def _means_something_else(text: str) -> bool:
    return any(
        token["different"] or (token["set"] and _SET_OPERATORS.search(token["set"]))
        for token in _TOKEN.finditer(text)
    )
