"""Which expert is on which expert-parallel rank, in which local slot. Pure values.

Global expert ids are the model's logical ones, 0..E-1. A rank's tuple is its local-slot order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal, get_args

from lorashard.adapter.base_model import ModelFacts
from lorashard.adapter.layout import AdapterLayout
from lorashard.errors import PlacementError
from lorashard.vllm_options import Strategy

# What vLLM places by rule, or a list of its own for each rank.
PlacementKind = Literal[Strategy, "explicit"]
Ranks = tuple[tuple[int, ...], ...]
# Key of a map that names all the model's layers, those of the adapter or not.
OF_ENGINE = "of_engine"
MAX_EP_SIZE = 65_536  # more than any cluster; a mistyped number must not fill the memory


@dataclass(frozen=True, slots=True)
class Placement:
    """`ranks[k]` lists the global expert ids of ep rank k in local-slot order.

    `layers` holds the same for the modules whose placement differs; keys are module names.
    """

    strategy: PlacementKind
    num_experts: int
    ranks: Ranks
    layers: Mapping[str, Ranks] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def ep_size(self) -> int:
        """Number of expert-parallel ranks."""
        return len(self.ranks)

    def ranks_of(self, module: str) -> Ranks:
        """The ranks of one experts container, e.g. `model.layers.3.mlp.experts`."""
        return self.layers.get(module, self.ranks)

    def expert_map(self, ep_rank: int, module: str | None = None) -> tuple[int, ...]:
        """VLLM's `_expert_map` of a rank: [E] global id -> local slot, -1 = elsewhere."""
        ranks = self.ranks if module is None else self.ranks_of(module)
        slots = {expert: slot for slot, expert in enumerate(ranks[ep_rank])}
        return tuple(slots.get(expert, -1) for expert in range(self.num_experts))


def linear_placement(num_experts: int, ep_size: int) -> Placement:
    """Contiguous blocks; the first `num_experts % ep_size` ranks take one expert more.

    That is what vLLM's `determine_expert_map` does (0.33.0 expert_map_manager.py:76), although
    its docstring says the last ranks. Checked in tests/vllm_plugin/test_placement_conformance.py.
    """
    _check_counts(num_experts, ep_size)
    base, remainder = divmod(num_experts, ep_size)
    starts = [rank * base + min(rank, remainder) for rank in range(ep_size + 1)]
    ranks = tuple(tuple(range(starts[k], starts[k + 1])) for k in range(ep_size))
    return Placement("linear", num_experts, ranks)


def round_robin_placement(num_experts: int, ep_size: int) -> Placement:
    """Expert e is on rank e % ep_size. vLLM uses it only for grouped-topk models."""
    _check_counts(num_experts, ep_size)
    ranks = tuple(tuple(range(rank, num_experts, ep_size)) for rank in range(ep_size))
    return Placement("round_robin", num_experts, ranks)


def explicit_placement(spec: object, num_experts: int, ep_size: int) -> Placement:
    """Read a placement from parsed JSON.

    Accepted: a list with, per rank, the global ids in local-slot order; the same with vLLM's
    expert_map style (per rank [E] entries, -1 = elsewhere); an object that says which with the
    key "ranks" or "expert_map", and optionally "layers" {module name or layer number: the same}
    for the layers that differ. A map from a running engine has the key "of_engine".
    Raises PlacementError if an expert is missing, repeated on one rank or out of range.
    """
    _check_counts(num_experts, ep_size)
    layers: dict[str, Ranks] = {}
    default: Ranks | None = None
    if isinstance(spec, dict):
        unknown = sorted(
            set(spec)
            - {"ranks", "expert_map", "layers", "strategy", "ep_size", "num_experts", OF_ENGINE}
        )
        if unknown:
            raise PlacementError(f"expert map: unknown key {unknown[0]!r}.", hint=_FORMS)
        for key, expected in (("num_experts", num_experts), ("ep_size", ep_size)):
            if spec.get(key, expected) != expected:
                raise PlacementError(
                    f"expert map: {key} is {spec[key]}, but here it is {expected}."
                )
        if "ranks" in spec and "expert_map" in spec:
            raise PlacementError("expert map: both 'ranks' and 'expert_map'.", hint=_FORMS)
        for key, value in _mapping(spec.get("layers", {})).items():
            layers[key] = _read_ranks(value, None, num_experts, ep_size, where=f"layer {key}")
        if "ranks" in spec or "expert_map" in spec:
            style: _Style = "ranks" if "ranks" in spec else "expert_map"
            default = _read_ranks(spec[style], style, num_experts, ep_size, where="expert map")
    else:
        default = _read_ranks(spec, None, num_experts, ep_size, where="expert map")
    if default is None:
        raise PlacementError("expert map: neither 'ranks' nor 'expert_map' is given.", hint=_FORMS)
    return Placement("explicit", num_experts, default, MappingProxyType(layers))


def place_experts(
    layout: AdapterLayout, ep_size: int, strategy: Strategy, expert_map: object = None
) -> Placement:
    """The placement of an adapter's experts. expert_map: parsed JSON; it overrides `strategy`.

    Raises PlacementError.
    """
    num_experts = layout.num_experts
    if strategy not in get_args(Strategy):
        raise PlacementError(f"Placement strategy {strategy!r} is not known.")
    if expert_map is not None:
        placement = explicit_placement(expert_map, num_experts, ep_size)
        of_engine = isinstance(expert_map, dict) and bool(expert_map.get(OF_ENGINE))
        names = [module.name for module in layout.modules]
        return bind_layers(placement, names, has_others=of_engine)
    if strategy == "round_robin":
        return round_robin_placement(num_experts, ep_size)
    return linear_placement(num_experts, ep_size)


def strategy_in_vllm(strategy: Strategy, facts: ModelFacts | None) -> tuple[Strategy, str | None]:
    """The strategy that vLLM really uses (0.33.0 expert_map_manager.py:116), and a note if any.

    strategy: as asked for with --expert-placement-strategy. facts: the base model's; None = unknown.
    """
    if strategy == "linear":
        return "linear", None
    if facts is None:
        return "round_robin", (
            "vLLM places experts round-robin only if the model has expert groups (n_group > 1), and "
            "linearly otherwise; `model` tells which."
        )
    if (facts.num_expert_group or 1) > 1:
        return "round_robin", None
    return "linear", (
        f"vLLM places the experts of {facts.model_type} linearly even if round_robin is asked for, "
        "since the model has no expert groups."
    )


def bind_layers(
    placement: Placement, modules: Sequence[str], *, has_others: bool = False
) -> Placement:
    """Replace layer numbers among the keys of `layers` by the names of their modules.

    has_others: the map is of a model, which has layers that the adapter does not train.
    Raises PlacementError for a key that is neither a module of the adapter nor a layer number.
    """
    bound: dict[str, Ranks] = {}
    for key, ranks in placement.layers.items():
        named = [m for m in modules if m == key or (key.isdecimal() and key in m.split("."))]
        if not named and not has_others:
            raise PlacementError(
                f"expert map: layer {key!r} is not in the adapter.",
                hint=f"Its expert modules are named like {modules[0]!r}.",
            )
        for module in named:
            if bound.setdefault(module, ranks) != ranks:
                raise PlacementError(f"expert map: {module} is listed twice, differently.")
    differing = {m: bound[m] for m in modules if m in bound and bound[m] != placement.ranks}
    return replace(placement, layers=MappingProxyType(differing))


_Style = Literal["ranks", "expert_map"]
_FORMS = (
    'Give {"ranks": [[global ids of rank 0], ...]} in local-slot order, or '
    '{"expert_map": [[local slot or -1 for each expert], ...]}.'
)


def check_ep_size(ep_size: int) -> None:
    """Raise PlacementError for a number of ranks that no deployment has."""
    if not isinstance(ep_size, int):
        raise PlacementError(f"ep_size is {ep_size!r}; it must be a whole number.")
    if ep_size < 1:
        raise PlacementError(f"ep_size is {ep_size}; it must be at least 1.")
    if ep_size > MAX_EP_SIZE:
        raise PlacementError(
            f"ep_size is {ep_size}; it can be {MAX_EP_SIZE} at most.",
            hint="Give the number of expert-parallel ranks of the deployment.",
        )


def _check_counts(num_experts: int, ep_size: int) -> None:
    check_ep_size(ep_size)
    if num_experts < 1:
        raise PlacementError(f"num_experts is {num_experts}; it must be at least 1.")


def _mapping(value: object) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise PlacementError("expert map: 'layers' is not an object.", hint=_FORMS)
    return value


def _read_ranks(
    value: object, style: _Style | None, num_experts: int, ep_size: int, *, where: str
) -> Ranks:
    if isinstance(value, dict) and style is None and len(value) == 1:
        key, inner = next(iter(value.items()))
        if key in ("ranks", "expert_map"):
            return _read_ranks(inner, key, num_experts, ep_size, where=where)
    rows = _integer_rows(value, where)
    if len(rows) != ep_size:
        raise PlacementError(
            f"{where}: {len(rows)} ranks listed, `ep_size` is {ep_size}.",
            hint="Give one list for each expert-parallel rank.",
        )
    as_ranks, as_map = rows, _invert(rows, num_experts)
    if style is None:
        style = _guess_style(rows, as_map, num_experts, where)
    if style == "expert_map":
        if as_map is None:
            raise PlacementError(
                f"{where}: not an expert_map: each rank needs {num_experts} entries whose "
                "values >= 0 are 0, 1, 2, ... once each.",
                hint=_FORMS,
            )
        as_ranks = as_map
    _check_ranks(as_ranks, num_experts, where)
    return as_ranks


def _integer_rows(value: object, where: str) -> Ranks:
    if not isinstance(value, (list, tuple)):
        raise PlacementError(f"{where}: not a list of lists.", hint=_FORMS)
    rows = []
    for ep_rank, row in enumerate(value):
        if not isinstance(row, (list, tuple)) or not all(type(n) is int for n in row):
            raise PlacementError(f"{where}: rank {ep_rank} is not a list of integers.", hint=_FORMS)
        rows.append(tuple(row))
    return tuple(rows)


def _invert(rows: Ranks, num_experts: int) -> Ranks | None:
    """Rows of an expert_map (global id -> slot) turned into slot order; None if they are not one."""
    inverted = []
    for row in rows:
        slots = sorted((slot, expert) for expert, slot in enumerate(row) if slot >= 0)
        in_order = [slot for slot, _ in slots] == list(range(len(slots)))
        if len(row) != num_experts or not in_order or any(slot < -1 for slot in row):
            return None
        inverted.append(tuple(expert for _, expert in slots))
    return tuple(inverted)


def _guess_style(rows: Ranks, as_map: Ranks | None, num_experts: int, where: str) -> _Style:
    if any(-1 in row for row in rows):
        return "expert_map"
    if as_map is not None and as_map != rows and all(len(row) == num_experts for row in rows):
        raise PlacementError(
            f"{where}: every rank lists all {num_experts} experts, so the lists can be read as "
            "slot order or as expert_map, with different results.",
            hint=_FORMS,
        )
    return "ranks"


def _check_ranks(ranks: Ranks, num_experts: int, where: str) -> None:
    for ep_rank, experts in enumerate(ranks):
        bad = [expert for expert in experts if not 0 <= expert < num_experts]
        if bad:
            raise PlacementError(
                f"{where}: rank {ep_rank} lists expert {bad[0]}; the model has experts 0 to "
                f"{num_experts - 1}."
            )
        if len(set(experts)) != len(experts):
            twice = next(expert for expert in experts if experts.count(expert) > 1)
            raise PlacementError(f"{where}: expert {twice} is twice on rank {ep_rank}.")
    missing = sorted(set(range(num_experts)) - {expert for rank in ranks for expert in rank})
    if missing:
        raise PlacementError(
            f"{where}: no rank holds expert {_ids(missing)} of {num_experts}.",
            hint="Every expert must be on at least one rank.",
        )


def _ids(experts: Sequence[int]) -> str:
    return ", ".join(map(str, experts[:8])) + (", …" if len(experts) > 8 else "")
