"""Which parameter a fused PEFT tensor pair is for, and which way round it is. Pure.

PEFT's ParamWrapper names neither: `experts.base_layer.lora_A` and `experts.lora_A` are the
innermost and the outermost wrapped parameter, and the in and out side are swapped for some
(PEFT, transformers) pairs. The shapes decide, with H the hidden size and I the expert
intermediate size:

    role       standard                        transposed
    gate_up    A [E*r, H]   B [2I, r*E]        A [E*r, 2I]  B [H, r*E]
    up         A [E*r, H]   B [I, r*E]         A [E*r, I]   B [H, r*E]
    down       A [E*r, I]   B [H, r*E]         A [E*r, H]   B [I, r*E]

A pair can also be stacked, lora_A [E, r, x] and lora_B [y, r, E]: the same numbers in the same order.

Every reading that the shapes allow is listed, and exactly one must remain. A gated pair always has
one. A pair without a gate, or a single parameter, needs H from elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, get_args

from lorashard.adapter.keys import Projection
from lorashard.adapter.options import LayoutOptions, Orientation
from lorashard.errors import LayoutError, UnclearLayoutError
from lorashard.header import TensorEntry
from lorashard.rules import FUSED_ORIENTATION

Role = Literal["gate_up_proj", "up_proj", "down_proj"]

# Parameters are wrapped in the order in which the module defines them, the first innermost.
# All fused expert modules of transformers define down_proj last.
_PAIRS: tuple[tuple[Role, ...], ...] = (
    ("gate_up_proj", "down_proj"),
    ("down_proj", "gate_up_proj"),
    ("up_proj", "down_proj"),
)
_SINGLES: tuple[tuple[Role, ...], ...] = (("gate_up_proj",), ("up_proj",), ("down_proj",))


@dataclass(frozen=True, slots=True)
class FusedPair:
    """lora_A and lora_B of one wrapped parameter; `projection` where the key says it."""

    lora_a: TensorEntry  # [E*r, x] or [E, r, x]
    lora_b: TensorEntry  # [y, r*E] or [y, r, E]
    projection: Projection | None

    @property
    def is_stacked(self) -> bool:
        """Whether experts and r have an axis each."""
        return len(self.lora_a.shape) == 3


@dataclass(frozen=True, slots=True)
class Reading:
    """One consistent way to read a module's pairs: a role for each, one orientation for all."""

    roles: tuple[Role, ...]
    orientation: Orientation
    hidden_size: int
    intermediate_size: int

    def __str__(self) -> str:
        return (
            f"{' + '.join(self.roles)}, {self.orientation} "
            f"(hidden {self.hidden_size}, intermediate {self.intermediate_size})"
        )


def read_fused(
    module: str,
    pairs: Sequence[FusedPair],
    target_parameters: Iterable[str],
    options: LayoutOptions,
    hidden_size_hint: int | None,
) -> Reading:
    """Find the one reading of `pairs` (innermost first).

    hidden_size_hint: H as far as other tensors of the adapter show it.
    Raises LayoutError if no reading remains, or more than one.
    """
    named = _named_roles(module, target_parameters, len(pairs))
    readings = list(_consistent_readings(pairs, named))
    shapes = "; ".join(
        f"lora_A {list(pair.lora_a.shape)}, lora_B {list(pair.lora_b.shape)}" for pair in pairs
    )
    if not readings:
        raise LayoutError(
            f"{module}: {shapes} fit no gate_up, up or down parameters.",
            hint="Do lora_A and lora_B belong to one adapter, saved by PEFT with target_parameters?",
        )
    matching = [
        reading
        for reading in readings
        if options.hidden_size in (None, reading.hidden_size)
        and options.intermediate_size in (None, reading.intermediate_size)
        and options.orientation in (None, reading.orientation)
    ]
    if not matching:
        stated = {
            "hidden size": options.hidden_size,
            "intermediate size": options.intermediate_size,
            "orientation": options.orientation,
        }
        raise LayoutError(
            f"{module}: {shapes} can be read as {' or '.join(map(str, readings))}, which "
            f"contradicts {', '.join(f'{name} {v}' for name, v in stated.items() if v)}.",
            hint="Is `model` the base model of this adapter?",
            rule=FUSED_ORIENTATION,
        )
    # Other tensors may break a tie, but not overrule: experts can be narrower than attention.
    if len(matching) > 1:
        matching = [r for r in matching if r.hidden_size == hidden_size_hint] or matching
    if len(matching) > 1:
        listed = "; or ".join(map(str, matching))
        raise UnclearLayoutError(
            f"{module}: {shapes} can be read in more than one way: {listed}.",
            hint="Give `model=MODEL_DIR` (its config.json has the hidden size), or `orientation`.",
            rule=FUSED_ORIENTATION,
        )
    return matching[0]


def _consistent_readings(pairs: Sequence[FusedPair], named: frozenset[Role]) -> Iterator[Reading]:
    """The readings in which all pairs imply one H and one I. named: the only roles, if any."""
    candidates = _PAIRS if len(pairs) == 2 else _SINGLES
    for roles, orientation in product(candidates, get_args(Orientation)):
        if any(pair.projection not in (None, role) for pair, role in zip(pairs, roles)):
            continue
        if named and not named.issuperset(roles):
            continue
        sizes = {_implied_sizes(pair, role, orientation) for pair, role in zip(pairs, roles)}
        if len(sizes) == 1 and (size := sizes.pop()) is not None:
            yield Reading(roles, orientation, *size)


def _implied_sizes(pair: FusedPair, role: Role, orientation: Orientation) -> tuple[int, int] | None:
    """(H, I) that a pair implies in a role; None if it cannot have that role."""
    in_features, out_features = pair.lora_a.shape[-1], pair.lora_b.shape[0]
    if orientation == "transposed":
        in_features, out_features = out_features, in_features
    if role == "down_proj":
        return out_features, in_features
    if role == "up_proj":
        return in_features, out_features
    return (in_features, out_features // 2) if out_features % 2 == 0 else None


def _named_roles(module: str, target_parameters: Iterable[str], num_pairs: int) -> frozenset[Role]:
    """The roles that adapter_config.json's target_parameters name; empty if it names none.

    PEFT compares them with the ends of full names. Where too few are this module's, which may have
    another name in the file than in the model that was trained, their last words count.
    """
    roles: dict[str, Role] = {
        "gate_up_proj": "gate_up_proj", "input_linear": "gate_up_proj",
        "up_proj": "up_proj",
        "down_proj": "down_proj", "output_linear": "down_proj",
    }  # fmt: skip
    of_module: set[Role] = set()
    of_any: set[Role] = set()
    for target in target_parameters:
        name = target.removesuffix(".weight")
        word = name.rpartition(".")[2]
        if word in roles:
            of_any.add(roles[word])
            if f".{module}.{word}".endswith(f".{name}"):
                of_module.add(roles[word])
    return frozenset(of_module if len(of_module) >= num_pairs else of_any)
