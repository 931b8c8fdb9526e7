"""Targets: small files that are read whole. A config, a base model's config, an expert map, a list."""

from __future__ import annotations

import io
import json
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from random import Random

from lorashard.adapter.base_model import merge_facts
from lorashard.adapter.config import parse_config
from lorashard.adapter.layout import LayoutOptions
from lorashard.adapter.read import read_model_facts
from lorashard.errors import LorashardError
from lorashard.shards.expert_map import read_expert_map
from lorashard.shards.placement import Placement, bind_layers, explicit_placement, strategy_in_vllm
from lorashard.split.selection import (
    check_names_are_fixed,
    find_adapters,
    is_batch,
    plan_jobs,
    read_list,
)
from lorashard.storage.small_files import parse_json
from lorashard.verify.reference.patterns import Patterns
from tests.adapters import LAYOUTS, Spec, build
from tests.fuzz.mutators import json_mutator
from tests.fuzz.target import Target, WrongAnswer, check

_MODULES = (
    "model.layers.0.mlp.experts.0.gate_proj",
    "model.layers.11.mlp.experts.3.down_proj",
    "model.layers.0.mlp.experts.gate_up_proj",
    "model.layers.1.self_attn.q_proj",
)


def _run_config(data: bytes) -> bool:
    config = parse_config(data, "x")
    readings = [(module, config.rank_of(module), config.alpha_of(module)) for module in _MODULES]
    for module, lora_rank, _ in readings:
        if lora_rank:
            check(math.isfinite(config.scaling_of(module, lora_rank)), "a scaling without end")
    document = json.loads(data)
    try:
        ranks = Patterns("rank_pattern", document.get("rank_pattern") or {})
        alphas = Patterns("alpha_pattern", document.get("alpha_pattern") or {})
        again = [
            (name, ranks.find(name, document["r"]), alphas.find(name, document["lora_alpha"]))
            for name in _MODULES
        ]
    except LorashardError as err:
        raise WrongAnswer(f"the second reading cannot read it: {err.message}") from err
    check(readings == again, f"{readings} by one reading, {again} by the other")
    return True


def _config_seeds() -> Iterator[bytes]:
    patterns = {
        "rank_pattern": {
            r"experts\.3\.\w+": 3,
            "layers.0.mlp": 5,
            r".*gate_(up_)?proj": 7,
            "(?:a|q)_proj": 2,
        },
        "alpha_pattern": {"q_proj": 1.5, r"^model\.layers\.\d+\.self_attn": 3, "down_proj$": 8},
    }
    for layout in LAYOUTS:
        yield json.dumps(build(Spec(layout)).config).encode()
        yield json.dumps(build(Spec(layout)).config | patterns).encode()


_PATTERNS = (
    r"experts\.[0-9]+\.\w+", "layers.0", r".*\.(gate|up)_proj", "[^.]+", r"\bq_proj", "(?i:Q_PROJ)",
    r"experts\.(0|3)\.", "^model", "proj$", r"(?P<n>x)", r"\d{1,2}", "a{2,}", "x|y", r"[\w.]+",
)  # fmt: skip

_model_file = Path(tempfile.mkdtemp(dir="/dev/shm")) / "config.json"


def _run_model(data: bytes) -> bool:
    _model_file.write_bytes(data)
    facts = read_model_facts(_model_file)
    check(type(facts.num_experts) is int and facts.num_experts > 0, "experts without a number")
    merged = merge_facts(LayoutOptions(), facts)
    check(merged.num_experts == facts.num_experts, "another number of experts")
    for strategy in ("linear", "round_robin"):
        strategy_in_vllm(strategy, facts)  # type: ignore[arg-type]
    return True


def _model_seeds() -> Iterator[bytes]:
    moe = {
        "model_type": "qwen3_moe",
        "num_experts": 8,
        "hidden_size": 16,
        "moe_intermediate_size": 8,
    }
    for document in (
        moe,
        {"model_type": "gpt_oss", "num_local_experts": 4, "hidden_size": 16, "n_group": 2},
        {"model_type": "x_vl", "text_config": moe},
        {"thinker_config": {"text_config": moe}},
        {"model_type": "nemotron_h", "n_routed_experts": [4, 4], "moe_latent_size": 3},
        {"model_type": "llama4", "text_config": {"num_local_experts": 16, "hidden_size": 5}},
        {"moe_num_experts": [64, 64], "hidden_size": 2},
    ):
        yield json.dumps(document).encode()


_MAP_MODULES = ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts")
_EXPERTS = 4


def _run_map(data: bytes) -> bool:
    """The first byte says for how many ranks."""
    ep_size = 1 + data[0] % 4 if data else 1
    document = parse_json(data[1:], Path("x"))
    placement = explicit_placement(document, _EXPERTS, ep_size)
    of_engine = isinstance(document, dict) and bool(document.get("of_engine"))
    placement = bind_layers(placement, _MAP_MODULES, has_others=of_engine)
    for module in (None, *_MAP_MODULES):
        _check_placed(placement, module, ep_size)
    written = read_expert_map(placement)
    again = bind_layers(explicit_placement(written, _EXPERTS, ep_size), _MAP_MODULES)
    check(again == placement, "a placement that is read again is another one")
    rows = [list(placement.expert_map(rank)) for rank in range(ep_size)]
    check(
        explicit_placement({"expert_map": rows}, _EXPERTS, ep_size).ranks == placement.ranks,
        "as expert_map it is another placement",
    )
    return True


def _check_placed(placement: Placement, module: str | None, ep_size: int) -> None:
    ranks = placement.ranks if module is None else placement.ranks_of(module)
    check(len(ranks) == ep_size, "another number of ranks")
    check({e for rank in ranks for e in rank} == set(range(_EXPERTS)), "an expert is nowhere")
    check(all(len(set(rank)) == len(rank) for rank in ranks), "an expert twice on a rank")
    check(all(type(e) is int for rank in ranks for e in rank), "an expert that is no number")


def _map_seeds() -> Iterator[bytes]:
    two = [[0, 2], [3, 1]]
    slots = [[0, -1, 1, -1], [-1, 1, -1, 0]]
    for ep_size, document in (
        (2, {"ranks": two}),
        (2, {"expert_map": slots}),
        (2, two),
        (2, slots),
        (2, {"ranks": two, "layers": {"1": slots, _MAP_MODULES[0]: {"expert_map": slots}}}),
        (
            2,
            {
                "of_engine": True,
                "ranks": two,
                "layers": {"0": two, "7": {"ranks": [[0, 1], [2, 3]]}},
            },
        ),
        (2, {"strategy": "explicit", "ep_size": 2, "num_experts": 4, "ranks": two}),
        (4, [[0], [1], [2], [3]]),
        (3, {"ranks": [[0, 1, 2, 3], [], [1, 0]]}),
        (1, [[3, 2, 1, 0]]),
    ):
        yield bytes([ep_size - 1]) + json.dumps(document).encode()


_mutate_map_json = json_mutator([0, 1], [0, -1, 1, -1], {"ranks": [[0, 1], [2, 3]]}, True)


def _mutate_map(data: bytes, max_bytes: int, chance: Random) -> bytes | None:
    made = _mutate_map_json(data[1:], max_bytes - 1, chance)
    first = data[:1] if chance.random() < 0.9 else bytes([chance.randrange(256)])
    return None if made is None else first + made


_folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
_ADAPTERS = ("a", "b", "runs/checkpoint-1", "runs/checkpoint-2")


def _run_list(data: bytes) -> bool:
    """A list of `--from`, in a folder with some adapters. Other machines are never asked."""
    text = data.decode("utf-8", "surrogateescape")
    if (
        "://" in text
        or ".." in text
        or any(line.strip().startswith("/") for line in text.split("\n"))
    ):
        return False  # what a network or a whole disk answers is not the list's matter
    if not _folder.joinpath("a").exists():
        for name in _ADAPTERS:
            (_folder / name).mkdir(parents=True)
            (_folder / name / "adapter_config.json").write_text("{}")
    before = os.getcwd()  # noqa: PTH109 - as it is
    os.chdir(_folder)
    try:
        return _check_list(read_list(io.StringIO(text)))
    finally:
        os.chdir(before)


def _check_list(names: tuple[str, ...]) -> bool:
    if not names:
        return False
    found = find_adapters(names)
    check(len(set(found)) == len(found), "an adapter twice")
    jobs = plan_jobs(found, None, 2, batch=is_batch(names))
    check([job.adapter for job in jobs] == list(found), "other adapters than were found")
    check(len({job.target for job in jobs}) == len(jobs), "two adapters with one target")
    check_names_are_fixed(names)
    return True


def _list_seeds() -> Iterator[bytes]:
    yield b"a\nb\n# a comment\n\n  runs/checkpoint-1  \n"
    yield b"runs/checkpoint-*\n[ab]\n"
    yield "a\r\né\nrun?\n[!a]\n[[]x\n~\n.\n\0\n".encode()
    yield b"owner/name\nowner/name@main\n"


def _mutate_list(data: bytes, max_bytes: int, chance: Random) -> bytes | None:
    if chance.random() < 0.3:
        return None
    lines = data.split(b"\n")
    at = chance.randrange(len(lines))
    pieces = (b"a", b"b", b"runs/checkpoint-1", b"*", b"?", b"[a]", b"[", b"#", b" ", b"\0", b"x" * 300,
              b"\xff", b"./", b"//", b"@", b"-ep2", b"~", "é".encode(), b"\r", b"\x85", b"checkpoint-1")  # fmt: skip
    position = chance.randrange(len(lines[at]) + 1)
    lines[at] = lines[at][:position] + chance.choice(pieces) + lines[at][position:]
    if chance.random() < 0.3:
        lines.insert(at, chance.choice(pieces))
    if chance.random() < 0.2:
        del lines[at]
    made = b"\n".join(lines)
    return made if len(made) <= max_bytes else None


TARGETS = (
    Target(
        "config",
        "`adapter_config.json`; r and alpha of modules by both readings of the patterns",
        _run_config,
        _config_seeds,
        json_mutator(*_PATTERNS),
        max_bytes=4096,
    ),
    Target("model", "a base model's `config.json`", _run_model, _model_seeds, json_mutator(), 4096),
    Target(
        "expert_map",
        "`--expert-map`: every expert somewhere, once on a rank, and the same when read again",
        _run_map,
        _map_seeds,
        _mutate_map,
        max_bytes=2048,
    ),
    Target("list", "a list of adapters for `--from`", _run_list, _list_seeds, _mutate_list, 1024),
)
