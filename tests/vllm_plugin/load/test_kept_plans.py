"""A plan serves the next adapter of the same form, and no other."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorashard.adapter.options import LayoutOptions
from lorashard.errors import AdapterError, LorashardError
from lorashard.vllm_plugin.load import kept_plans, plain_source
from lorashard.vllm_plugin.load.contents import AdapterContents
from lorashard.vllm_plugin.load.kept_plans import KeptPlans
from lorashard.vllm_plugin.load.plain_source import open_plain_adapter
from tests.tiny import (
    E,
    H,
    I,
    fused_tensors,
    per_expert_tensors,
    save_adapter,
    save_fused,
    save_pickled,
)
from tests.vllm_plugin.load.plain_loads import read_stacks

OPTIONS = LayoutOptions(num_experts=E, hidden_size=H, intermediate_size=I, gate_up="concatenated")
OWN = (0, 1)


@pytest.fixture(scope="module")
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as made:
        yield made


class Loads:
    """Loads with one set of kept plans, and how many of them had to plan."""

    def __init__(self, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
        self.plans, self.num_planned, self._threads = KeptPlans(), 0, threads
        plan_plain = plain_source.plan_plain

        def counted(*args: Any) -> Any:
            self.num_planned += 1
            return plan_plain(*args)

        monkeypatch.setattr(plain_source, "plan_plain", counted)

    def load(
        self,
        path: Path,
        options: LayoutOptions = OPTIONS,
        experts: tuple[int, ...] = OWN,
        plans: KeptPlans | None = None,
    ) -> tuple[AdapterContents, dict[str, bytes], list[bytes]]:
        """Contents, the experts' stacks and the other tensors."""
        with ExitStack() as stack:
            contents = open_plain_adapter(
                path, options, lambda _: experts, stack, self.plans if plans is None else plans
            )
            assert contents is not None
            dense = []
            for entry in contents.dense:
                data = bytearray(entry.end - entry.begin)
                contents.sources.source_of(-1).read_into(memoryview(data), entry.begin)
                dense.append(bytes(data))
            return contents, read_stacks(contents, self._threads), dense

    def load_afresh(self, path: Path, **arguments: Any) -> Any:
        return self.load(path, plans=KeptPlans(), **arguments)


@pytest.fixture
def loads(threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> Loads:
    return Loads(threads, monkeypatch)


def same(one: Any, other: Any) -> bool:
    fields = ("config", "num_experts", "modules", "dense", "version", "rearranged")
    equal = [repr(getattr(one[0], name)) == repr(getattr(other[0], name)) for name in fields]
    return all(equal) and one[1:] == other[1:]


@pytest.mark.parametrize("form", ["per expert", "fused", "pickled"])
def test_the_next_adapter_of_the_same_form_is_not_planned_and_read_right(
    tmp_path: Path, loads: Loads, form: str
) -> None:
    save = {
        "per expert": lambda path, seed: save_adapter(path, per_expert_tensors(seed)),
        "fused": lambda path, seed: save_adapter(
            path, fused_tensors(seed), peft_version="0.21.2",
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        ),
        "pickled": lambda path, seed: save_pickled(path, per_expert_tensors(seed)),
    }[form]  # fmt: skip
    first = loads.load(save(tmp_path / "first", 0))
    second_path = save(tmp_path / "second", 1)
    second = loads.load(second_path)
    assert loads.num_planned == 1
    assert same(second, loads.load_afresh(second_path))
    assert second[1] != first[1], "it has other values"
    assert second[2] != first[2], "it has other values"


def test_any_other_form_is_planned_anew(tmp_path: Path, loads: Loads) -> None:
    tensors = per_expert_tensors()
    q_proj = next(name for name in tensors if "q_proj.lora_A" in name)
    renamed = {name.replace("q_proj", "o_proj"): t for name, t in tensors.items()}
    wider = per_expert_tensors(hidden=2 * H)
    fewer = {name: t for name, t in tensors.items() if ".experts.1." not in name}
    other_dtype = {name: t.float() if name == q_proj else t for name, t in tensors.items()}
    cases: list[tuple[Path, dict[str, Any]]] = [
        (save_adapter(tmp_path / "a"), {}),
        (save_adapter(tmp_path / "alpha", lora_alpha=64), {}),
        (save_adapter(tmp_path / "name", renamed), {}),
        (save_adapter(tmp_path / "shape", wider), {"options": replace(OPTIONS, hidden_size=2 * H)}),
        (save_adapter(tmp_path / "fewer", fewer), {}),
        (save_adapter(tmp_path / "dtype", other_dtype), {}),
        (save_fused(tmp_path / "fused"), {}),
        (tmp_path / "a", {"options": replace(OPTIONS, gate_up="interleaved")}),
        (tmp_path / "fused", {"options": replace(OPTIONS, gate_up="interleaved")}),
        (tmp_path / "a", {"experts": (0, 2)}),
        (tmp_path / "a", {"experts": (1, 0)}),
        (tmp_path / "a", {"experts": ()}),
    ]
    for number, (path, arguments) in enumerate(cases):
        before = loads.num_planned
        found = loads.load(path, **arguments)
        assert loads.num_planned == before + 1, number
        assert same(found, loads.load_afresh(path, **arguments)), number


def test_few_plans_are_kept_and_the_last_used_longest(tmp_path: Path, loads: Loads) -> None:
    def adapter(layers: int) -> Path:
        path = tmp_path / str(layers)
        return path if path.exists() else save_adapter(path, per_expert_tensors(layers=layers))

    for layers in (1, 2, 3, 4, 1, 5, 1):
        loads.load(adapter(layers))
    assert len(loads.plans) == 4
    assert loads.num_planned == 5
    loads.load(adapter(2))  # gave way to 5, as 1 was used after it
    assert loads.num_planned == 6


def test_headers_of_all_kept_plans_have_a_limit(
    tmp_path: Path, loads: Loads, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = (
        save_adapter(tmp_path / str(layers), per_expert_tensors(layers=layers)) for layers in (1, 2)
    )
    size = (two / "adapter_model.safetensors").read_bytes()[:8]
    monkeypatch.setattr(kept_plans, "_MOST_HEADER_BYTES", int.from_bytes(size, "little") + 8)
    loads.load(one)
    loads.load(two)
    assert len(loads.plans) == 1
    monkeypatch.setattr(kept_plans, "_MOST_HEADER_BYTES", 10)
    loads.load(one)
    assert len(loads.plans) == 0


def test_an_adapter_of_a_known_form_is_looked_at_as_closely(tmp_path: Path, loads: Loads) -> None:
    loads.load(save_adapter(tmp_path / "a"))
    longer = save_adapter(tmp_path / "longer") / "adapter_model.safetensors"
    longer.write_bytes(longer.read_bytes() + b"\0")
    with pytest.raises(AdapterError, match="tensors end at byte"):
        loads.load(longer.parent)
    shorter = save_adapter(tmp_path / "shorter") / "adapter_model.safetensors"
    os.truncate(shorter, shorter.stat().st_size - 1)
    with pytest.raises(AdapterError, match="tensors end at byte"):
        loads.load(shorter.parent)
    config = save_adapter(tmp_path / "config") / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"peft_type": "LOHA"}))
    with pytest.raises(LorashardError, match="LOHA"):
        loads.load(config.parent)


def test_an_adapter_of_a_known_form_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, loads: Loads
) -> None:
    loads.load(save_adapter(tmp_path / "a"))
    path = save_adapter(tmp_path / "b")
    opened = ExitStack()
    assert open_plain_adapter(path, OPTIONS, lambda _: OWN, opened, loads.plans)
    save_adapter(path, per_expert_tensors(1))
    with pytest.raises(AdapterError, match="changed while being read"):
        opened.close()


def test_threads_that_load_at_once_each_get_their_own_adapter(tmp_path: Path, loads: Loads) -> None:
    paths = [
        save_adapter(tmp_path / str(n), per_expert_tensors(n, layers=1 + n % 3)) for n in range(6)
    ]
    expected = [loads.load_afresh(path) for path in paths]
    began = threading.Barrier(6)

    def load(number: int) -> list[bool]:
        began.wait()
        return [same(loads.load(paths[number]), expected[number]) for _ in range(10)]

    with ThreadPoolExecutor(6) as pool:
        assert all(all(found) for found in pool.map(load, range(6)))
