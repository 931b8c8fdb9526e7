"""Every hint that names an r, an option or the model is followed: the result is right, or refused."""

from __future__ import annotations

import ast
import importlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lorashard.adapter
from lorashard import LayoutOptions, SplitRequest, split_adapter
from lorashard.errors import AdapterError, LorashardError
from tests.adapters import SPLIT, Spec, build
from tests.deltas import expert_deltas, split_gate_up

E, H, I, R = 64, 40, 24, 4  # noqa: E741 - experts, hidden and intermediate size, lora_rank
MODEL = {
    "model_type": "qwen3_moe", "num_experts": E, "hidden_size": H, "moe_intermediate_size": I,
}  # fmt: skip
TOLD = re.compile(r"`(?:model|num_experts|orientation|lora_b_layout)|rank_pattern|\br\b|option")
STATED = re.compile(r'"rank_pattern": (\{.*?\})')


@dataclass(frozen=True)
class Attempt:
    """What a user gives a command beside the adapter, and changes in adapter_config.json."""

    model: Mapping[str, Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """An adapter that is refused, and what its user may do on reading the hint.

    config: what is wrong in its adapter_config.json. change: what is odd about its tensors. right: the attempts that must succeed.
    refused: those that must be refused again. A rank_pattern in the hint is tried literally, too.
    """

    spec: Spec
    first: Attempt
    config: Mapping[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    change: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = dict
    right: tuple[Attempt, ...] = ()
    refused: tuple[Attempt, ...] = ()


def of(layout: str, **fields: Any) -> Spec:
    sizes = {"num_experts": E, "hidden": H, "intermediate": I, "lora_rank": R}
    return Spec(layout, **{**sizes, "fill": "random", **fields})


def named_fused(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """PEFT's fused tensors under the parameters' own names, as unsloth-zoo #1250 has them."""
    named = {
        name.replace("experts.lora", "experts.down_proj.lora"): t for name, t in tensors.items()
    }
    return {name.replace("base_layer", "gate_up_proj"): tensor for name, tensor in named.items()}


def other_way_round(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """[E, in, r] and [E, r, out], as Linear layers of other frameworks have them."""
    return {name: tensor.mT.contiguous() for name, tensor in tensors.items()}


NAMED = Attempt(MODEL)
COUNTED = Attempt(options={"num_experts": E})
ALONE = Attempt()
HALF = {"r": R // 2, "rank_pattern": {}}
TRUE_R = {"r": R}
WRONG_SIZES = MODEL | {"hidden_size": 2 * H}
SMALLER = {"model_type": "qwen3_moe", "num_experts": E // 2}
NO_COUNT = {"model_type": "qwen3_moe", "hidden_size": H}

CASES = {
    "fused, r is half": Case(
        of("L2"), NAMED, HALF, right=(Attempt(MODEL, config=TRUE_R), Attempt(config=TRUE_R)),
    ),
    "fused, rows are no multiple": Case(of("L2"), NAMED, {"r": 3}, right=(Attempt(config=TRUE_R),)),
    "fused, r from a shape": Case(
        of("L2"), ALONE, {"r": 32},
        right=(Attempt(MODEL, config=TRUE_R), Attempt(config=TRUE_R)), refused=(NAMED, COUNTED),
    ),
    "fused, too many": Case(
        of("L2", lora_rank=1040), ALONE, {"r": 1}, refused=(NAMED, COUNTED),
        right=(Attempt(MODEL, config={"r": 1040}),),
    ),
    "fused, more than the router's": Case(
        of("L2", extras=True), ALONE, {"rank_pattern": {r"experts\..*": 2}}, refused=(NAMED,),
        right=(Attempt(config={"rank_pattern": {}}),),
    ),
    "fused, fewer than the router's": Case(
        of("L2", extras=True), ALONE, {"rank_pattern": {r"experts\..*": 8}},
        refused=(NAMED, COUNTED), right=(Attempt(config={"rank_pattern": {}}),),
    ),
    "fused, scaled": Case(
        of("L2"), NAMED, {"r": 8 * R, "moe_rank_scaling": True}, refused=(COUNTED,),
        right=(Attempt(MODEL, config={
            "rank_pattern": {"experts.gate_up_proj": R, "experts.down_proj": R},
        }),),
    ),
    "fused, another model": Case(of("L2"), Attempt(WRONG_SIZES), right=(NAMED, ALONE)),
    "one parameter": Case(
        of("L4-gate_up", intermediate=H // 4), ALONE,
        right=(Attempt(options={"orientation": "standard"}),
               Attempt(MODEL | {"moe_intermediate_size": H // 4})),
    ),
    "order of columns": Case(
        of("L6", peft_version=None), ALONE, without=("lora_B_layout",), refused=(NAMED,),
        right=(Attempt(options={"lora_b_layout": "grouped_by_expert"}),),
    ),
    "order of columns, twice": Case(
        of("L6"), Attempt(options={"lora_b_layout": "rank_major"}), right=(ALONE, NAMED),
    ),
    "some experts": Case(of("L1", experts=(0, 3, 5)), ALONE, right=(NAMED, COUNTED)),
    "beyond the model's": Case(of("L1"), Attempt(SMALLER), right=(NAMED, COUNTED)),
    "counted twice": Case(
        of("L1"), Attempt(MODEL, options={"num_experts": E // 2}), right=(NAMED,),
    ),
    "a model that does not say": Case(of("L1", experts=(1,)), Attempt(NO_COUNT), right=(COUNTED,)),
    **{
        f"{layout}, r is half": Case(of(layout), NAMED, HALF, right=(Attempt(MODEL, config=TRUE_R),))
        for layout in ("L1", "L1-w", "L8", "L9", "L10", "L12", "L14", "L15")
    },
    "named, r and patterns": Case(
        of("L2"), NAMED, {"rank_pattern": dict.fromkeys(("gate_up_proj", "down_proj"), E * R)},
        change=named_fused,
        refused=(COUNTED, Attempt(MODEL, config={"r": E * R, "rank_pattern": {}}),
                 Attempt(MODEL, config={"rank_pattern": {}})),
    ),
    "the other way round": Case(
        of("L10", intermediate=H), COUNTED, change=other_way_round, refused=(ALONE,),
    ),
    "one expert's r": Case(
        of("L1", lora_ranks={3: 6}), NAMED, {"rank_pattern": {}},
        right=(Attempt(config={"rank_pattern": {r"experts\.3\..*": 6}}),),
    ),
    "an r for all of one kind": Case(
        of("L2b"), NAMED, {"rank_pattern": {}},
        right=(Attempt(config={"rank_pattern": {"gate_up_proj": 2 * R}}),),
    ),
}  # fmt: skip


class Tried:
    """A case's adapter on disk, and what comes of an attempt with it."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self.folder, self.adapter = case, folder, build(case.spec)
        changed = replace(self.adapter, tensors=case.change(self.adapter.tensors))
        self.source = changed.write(folder / "adapter")
        self.attempts = 0

    def deltas(self, attempt: Attempt) -> dict[str, Tensor]:
        """Split, and read what the shards say. Raises the refusal."""
        self.attempts += 1
        config = self.adapter.config | dict(self.case.config) | dict(attempt.config)
        config = {k: v for k, v in config.items() if k not in self.case.without}
        (self.source / "adapter_config.json").write_text(json.dumps(config))
        model = None
        if attempt.model is not None:
            model = self.folder / "config.json"
            model.write_text(json.dumps(attempt.model))
        options = LayoutOptions(**attempt.options)
        out = self.folder / f"out{self.attempts}"
        split_adapter(self.source, out, SplitRequest(2, model=model, options=options))
        manifest = json.loads((out / "lorashard.json").read_text())
        found = dict(expert_deltas(out, manifest, torch.float64))
        return {key: delta for key, delta in found.items() if delta.any()}

    def wanted(self) -> dict[str, Tensor]:
        alphas = self.adapter.config["alpha_pattern"]
        deltas = {}
        for (module, expert, projection), (a, b) in self.adapter.factors.items():
            alpha = 2 * self.case.spec.lora_rank
            if alphas and projection == "gate_up_proj":
                (alpha,) = alphas.values()
            delta = alpha / a.shape[0] * (b.double() @ a.double())
            for part, value in split_gate_up(projection, delta, "concatenated"):
                deltas[f"experts|{module}|{expert}|{part}"] = value
        return deltas

    def is_right(self, attempt: Attempt) -> bool:
        """False if it is refused. Fails if the result is another adapter."""
        try:
            found = self.deltas(attempt)
        except AdapterError:
            return False
        wanted = self.wanted()
        assert set(found) == set(wanted), "experts are missing, or there are others"
        for key, delta in wanted.items():
            assert torch.allclose(found[key], delta, rtol=1e-9, atol=1e-12), key
        return True

    def follow_literally(self, model: Mapping[str, Any] | None) -> None:
        """State each r that a hint gives, until there is no such hint."""
        pattern: dict[str, int] = {}
        attempt = replace(self.case.first, model=model)
        for _ in range(len(SPLIT) + 1):
            try:
                self.deltas(attempt)
            except AdapterError as err:
                stated = STATED.search(err.hint or "")
                if stated is None:
                    return
                pattern |= json.loads(stated[1])
            else:
                assert self.is_right(attempt), "it was refused a moment ago"
                return
            attempt = replace(attempt, config={"rank_pattern": dict(pattern)})


def refusal(case: Case, folder: Path) -> LorashardError:
    with pytest.raises(AdapterError) as caught:
        Tried(case, folder).deltas(case.first)
    return caught.value


@pytest.mark.parametrize("name", CASES)
def test_a_hint_that_is_followed_leads_to_no_wrong_adapter(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    hint = refusal(case, tmp_path / "first").hint
    assert hint
    tried = Tried(case, tmp_path / "then")
    for attempt in case.right:
        assert tried.is_right(attempt), attempt
    for attempt in case.refused:
        assert not tried.is_right(attempt), attempt
    tried.follow_literally(case.first.model)


def advising_hints() -> Iterator[str]:
    """The longest constant part of each hint of adapter/ that names an r, an option or the model."""
    for path in sorted(Path(lorashard.adapter.__file__).parent.glob("*.py")):
        module = importlib.import_module(f"lorashard.adapter.{path.stem}")
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.keyword) and node.arg == "hint"):
                continue
            if isinstance(node.value, ast.Name):
                named = getattr(module, node.value.id, None)
                parts = [named] if isinstance(named, str) else []
            else:
                parts = [
                    part.value
                    for part in ast.walk(node.value)
                    if isinstance(part, ast.Constant) and isinstance(part.value, str)
                ]
            if any(TOLD.search(part) for part in parts) and "allow_pickle" not in " ".join(parts):
                yield max(parts, key=len)


def test_every_hint_of_this_kind_is_followed(tmp_path: Path) -> None:
    hints = [refusal(case, tmp_path / str(n)).hint for n, case in enumerate(CASES.values())]
    assert not [part for part in advising_hints() if not any(part in (h or "") for h in hints)]
    assert len(list(advising_hints())) > 10
