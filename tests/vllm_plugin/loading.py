"""Run inside a vLLM release: every layout through the patched manager, compared expert by expert.

Each function returns what went wrong, as lines; test_loading_conformance.py calls them.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from lorashard import SplitRequest, split_adapter
from lorashard.vllm_plugin import register

register()

from lorashard.vllm_plugin.patches.adapter_loading import attached_loader  # noqa: E402
from tests.adapters import LAYOUTS, NON_GATED_LAYOUTS, Adapter  # noqa: E402
from tests.vllm_plugin import harness  # noqa: E402
from tests.vllm_plugin.harness_selfcheck import (  # noqa: E402
    SIZES,
    adapter_of,
    differences,
    expected_deltas,
    mismatches,
    modules,
    wrong_attention,
)

FOLDER = Path(tempfile.mkdtemp())
CUTS = tuple(itertools.product((1, 2, 3, 8), ("linear", "round_robin")))
FORMS = ("plain", "own shards", "shards for 3 ranks")
PROJECTIONS_OF = {"L4-gate_up": ("gate_proj", "up_proj"), "L4-down": ("down_proj",)}


@cache
def adapter(layout: str, num_experts: int, gated: bool = True, **fields: Any) -> Adapter:
    return adapter_of(layout, num_experts=num_experts, gated=gated, **fields)


@cache
def on_disk(
    layout: str, num_experts: int, gated: bool, form: str, ep_size: int, strategy: str
) -> Path:
    """The adapter, or a shard directory of it."""
    built = adapter(layout, num_experts, gated)
    plain = FOLDER / f"{layout}-{num_experts}-{gated}"
    if not plain.exists():
        built.write(plain)
    if form == "plain":
        return plain
    from lorashard.adapter.options import LayoutOptions

    ranks = ep_size if form == "own shards" else 3
    out = FOLDER / f"{plain.name}-{ranks}-{strategy}-{form[:3]}"
    options = LayoutOptions(**built.options | {} if gated else built.options | {"gate_up": "none"})
    placement: Any = strategy if form == "own shards" else "linear"
    split_adapter(plain, out, SplitRequest(ranks, placement, options=options), force=True)
    return out


def expected_of(built: Adapter) -> dict[Any, Any]:
    """Deltas by (module as vLLM names it, expert): experts and projections without LoRA are 0."""
    spec = built.spec
    names = ("gate_proj", "up_proj", "down_proj") if spec.gated else ("up_proj", "down_proj")
    expected: dict[Any, Any] = {}
    found = {
        (module.replace("block_sparse_moe", "mlp"), expert): deltas
        for (module, expert), deltas in expected_deltas(built).items()
    }
    for module, expert in itertools.product(modules(), range(spec.num_experts)):
        deltas = found.get((module, expert), {})
        zeros = {name: torch.zeros(spec.sizes(name)[1], spec.sizes(name)[0]) for name in names}
        expected[module, expert] = zeros | deltas
    return expected


def engines(
    num_experts: int, cuts: tuple[tuple[int, str], ...], **options: Any
) -> Iterator[tuple[Any, int, str, str]]:
    """Every rank of every cut: an ep size and a strategy."""
    for ep_size, strategy in cuts:
        for ep_rank in range(ep_size):
            engine = harness.make_engine(
                **SIZES | {"num_experts": num_experts},
                ep_size=ep_size, ep_rank=ep_rank, strategy=strategy, module_names=modules(),
                **options,
            )  # fmt: skip
            where = f"rank {ep_rank} of {ep_size} {strategy}"
            yield engine, ep_size, strategy, where


def every_layout(
    wrapper: str, num_experts: int, *, gated: bool, cuts: tuple[tuple[int, str], ...] = CUTS
) -> dict[str, Any]:
    """How many loads were looked at, what is wrong, and the largest difference of any delta."""
    wrong: list[str] = []
    checked, largest = 0, 0.0
    layouts = [name for name in LAYOUTS if gated or name in NON_GATED_LAYOUTS]
    ranks = engines(num_experts, cuts, wrapper=wrapper, gated=gated)
    for engine, ep_size, strategy, where in ranks:
        numbers = itertools.count(1)
        for layout, form in itertools.product(layouts, FORMS):
            if form == "plain" and ep_size == 1:
                continue  # vLLM's own path
            built = adapter(layout, num_experts, gated)
            path = on_disk(layout, num_experts, gated, form, ep_size, strategy)
            lora_id = next(numbers)
            what = f"{layout} as {form} on {wrapper}, {where}"
            try:
                engine.add_adapter(harness.request(engine, path, f"a{lora_id}", lora_id))
                slot = harness.slot_of(engine, lora_id)
                found = dict(differences(engine, slot, expected_of(built)))
                largest = max(largest, *found.values(), 0.0)
                lines = [place for place, difference in found.items() if not difference <= 1e-6]
                lines += wrong_attention(engine, slot, built)
            except Exception as err:  # noqa: BLE001 - told with the rest
                lines = [f"{type(err).__name__}: {err}"]
            wrong += [f"{what}: {line}" for line in lines[:2]]
            checked += 1
    return {"checked": checked, "wrong": wrong, "largest_difference": largest}


def bits_of_stock() -> list[str]:
    """What stock vLLM loads without expert parallelism, of the local experts: the same bits."""
    from vllm.lora.worker_manager import WorkerLoRAManager

    unpatched = WorkerLoRAManager._load_adapter._lorashard_original
    wrong = []
    cases = (("L1", "2d"), ("L2", "3d"))
    for (layout, wrapper), rslora in itertools.product(cases, (False, True)):
        if rslora and not _knows_rslora():
            continue
        built = adapter_of(layout, rslora=rslora, config={"lora_alpha": 3})
        path = built.write(Path(tempfile.mkdtemp()))
        stock = harness.make_engine(**SIZES, wrapper=wrapper, ep_size=1, module_names=modules())
        stock._load_adapter = unpatched.__get__(stock)
        stock.add_adapter(harness.request(stock, path))
        theirs = harness.buffers(stock, harness.slot_of(stock))
        for ep_rank in range(2):
            engine = harness.make_engine(
                **SIZES, wrapper=wrapper, ep_rank=ep_rank, module_names=modules()
            )
            engine.add_adapter(harness.request(engine, path))
            layers = harness.layers(engine)
            for module, pairs in harness.buffers(engine, harness.slot_of(engine)).items():
                experts = module.endswith(".experts")
                rows = harness.global_experts(layers[module]) if experts else slice(None)
                for name, pair in pairs.items():
                    if not all(map(torch.equal, pair, (t[rows] for t in theirs[module][name]))):
                        wrong.append(f"{layout} rslora={rslora} rank {ep_rank} {module} {name}")
    return wrong


def adapters_of_one_form() -> list[str]:
    """Versions of an adapter one after another, as in an RL loop: each is served with its own values."""
    wrong = []
    for layout, wrapper in itertools.product(("L1", "L2"), ("2d", "3d")):
        engine = harness.make_engine(**SIZES, wrapper=wrapper, ep_rank=1, module_names=modules())
        versions = [
            adapter_of(layout, seed=seed, config={"lora_alpha": alpha})
            for seed, alpha in ((0, 4), (1, 4), (2, 4), (2, 8), (0, 4))
        ]
        for number, built in enumerate(versions, 1):
            path = built.write(Path(tempfile.mkdtemp()))
            engine.add_adapter(harness.request(engine, path, f"v{number}", number))
            expected = {
                place: {p: delta * built.config["lora_alpha"] / 4 for p, delta in deltas.items()}
                for place, deltas in expected_deltas(built).items()
            }
            lines = mismatches(engine, harness.slot_of(engine, number), expected)
            wrong += [f"{layout} {wrapper} version {number}: {line}" for line in lines[:2]]
        if len(attached_loader(engine).plans) != 2:
            wrong.append(f"{layout} {wrapper}: not the plans of two forms")
    return wrong


def _knows_rslora() -> bool:
    """Before 0.32 stock scales experts with alpha / r, whatever the config says."""
    import inspect

    from vllm.lora.lora_weights import PackedLoRALayerWeights

    return "w1_scaling" in inspect.getsource(PackedLoRALayerWeights.pack_moe)


def collections_while_loading() -> list[str]:
    """The garbage collector must not look through the worker's memory in the middle of a load."""
    wrong = []
    for form in ("plain", "own shards"):
        engine = harness.make_engine(**SIZES, module_names=modules())
        path = on_disk("L1", 8, True, form, 2, "linear")
        begun: list[str] = []
        loader = attached_loader(engine)
        load = loader.from_local_checkpoint

        def counted(*args: Any, begun: list[str] = begun, load: Any = load, **kwargs: Any) -> Any:
            gc.callbacks.append(lambda phase, _: begun.append(phase))
            try:
                return load(*args, **kwargs)
            finally:
                gc.callbacks.pop()

        loader.from_local_checkpoint = counted
        thresholds = gc.get_threshold()
        gc.set_threshold(100, 1, 1)
        try:
            engine.add_adapter(harness.request(engine, path))
        finally:
            gc.set_threshold(*thresholds)
        if begun.count("start") > 1:  # one may be due before the load has begun to do anything
            wrong.append(f"{form}: {begun.count('start')} collections")
    return wrong


def partly_trained() -> list[str]:
    """Some experts, one projection, other ranks for some experts, patterns, rsLoRA."""
    wrong = []
    variants: dict[str, dict[str, Any]] = {
        "some experts": {"experts": (1, 5, 6)},
        "one expert": {"experts": (7,)},
        "down only": {"projections": ("down_proj",)},
        "up only": {"projections": ("up_proj",)},
        "odd ranks": {"lora_ranks": {0: 1, 3: 3}},
        "some experts, up only": {"experts": (0, 2), "projections": ("up_proj",)},
        "some of 128": {
            "num_experts": 128,
            "experts": (0, *range(30, 90), 127),
            "lora_ranks": {60: 1},
        },
    }
    for (name, trained), wrapper in itertools.product(variants.items(), ("2d", "3d")):
        built = adapter_of("L1", **trained)
        path = built.write(Path(tempfile.mkdtemp()))
        scaling = {e: 4 / r for e, r in built.spec.lora_ranks.items()}
        expected = expected_of(built)
        for (module, expert), deltas in expected.items():
            factor = scaling.get(expert, 2.0) / 2.0
            expected[module, expert] = {p: delta * factor for p, delta in deltas.items()}
        for ep_rank in range(2):
            engine = harness.make_engine(
                **SIZES | {"num_experts": built.spec.num_experts},
                wrapper=wrapper, ep_rank=ep_rank, module_names=modules(),
            )  # fmt: skip
            engine.add_adapter(harness.request(engine, path))
            slot = harness.slot_of(engine)
            limit = 1e-2 if name == "odd ranks" else 1e-6  # 2 / 3 is not a bf16 number
            found = mismatches(engine, slot, expected, limit=limit)
            wrong += [f"{name} on {wrapper}, rank {ep_rank}: {line}" for line in found[:2]]
    return wrong


def other_dtypes() -> list[str]:
    """A float32 or float16 file in a bf16 engine: cast first, then scaled, as vLLM does."""
    wrong = []
    for dtype, wrapper in itertools.product((torch.float32, torch.float16), ("2d", "3d")):
        layout = "L1" if wrapper == "2d" else "L2"
        built = adapter_of(layout)
        cast = {name: tensor.to(dtype) for name, tensor in built.tensors.items()}
        path = type(built)(built.spec, cast, built.config, built.factors, built.options).write(
            Path(tempfile.mkdtemp())
        )
        for ep_rank, form in itertools.product(range(2), ("plain", "shards")):
            engine = harness.make_engine(
                **SIZES, wrapper=wrapper, ep_rank=ep_rank, module_names=modules()
            )
            if form == "shards":
                shards = Path(tempfile.mkdtemp()) / "s"
                split_adapter(path, shards, SplitRequest(2))
            engine.add_adapter(harness.request(engine, path if form == "plain" else shards))
            found = mismatches(engine, harness.slot_of(engine), expected_of(built))
            wrong += [f"{dtype} {form} on {wrapper}: {line}" for line in found[:2]]
    return wrong


def all_layouts() -> dict[str, dict[str, Any]]:
    return {
        "2d": every_layout("2d", 8, gated=True),
        "3d uneven": every_layout("3d", 7, gated=True),
        "2d non-gated uneven": every_layout("2d", 7, gated=False),
        "2d of a real size": every_layout("2d", 160, gated=True, cuts=((3, "round_robin"),)),
    }


def refused() -> dict[str, str]:
    """Adapters that must not load -> the message of each; "loaded" for one that does."""
    messages = {}

    def load(name: str, path: Path, **options: Any) -> None:
        engine = harness.make_engine(**SIZES | options, module_names=modules())
        try:
            engine.add_adapter(harness.request(engine, path))
        except ValueError as err:
            messages[name] = str(err)
            assert not engine.list_adapters()
            good = adapter_of("L1").write(Path(tempfile.mkdtemp()))
            if not options:
                assert engine.add_adapter(harness.request(engine, good, "good", 2))
        else:
            messages[name] = "loaded"

    built = adapter_of("L1")
    plain = built.write(FOLDER / "refused")

    def shards(name: str) -> Path:
        out = FOLDER / name
        split_adapter(plain, out, SplitRequest(2))
        return out

    cut = shards("truncated")
    with (cut / "ep-00000-of-00002.safetensors").open("r+b") as file:
        file.truncate(2000)
    load("truncated", cut)
    swapped = shards("swapped")
    first, second = (swapped / f"ep-0000{k}-of-00002.safetensors" for k in (0, 1))
    first.rename(swapped / "x"), second.rename(first), (swapped / "x").rename(second)
    load("swapped", swapped)
    missing = shards("missing")
    (missing / "ep-00000-of-00002.safetensors").unlink()
    load("missing", missing)
    other = shards("config")
    text = (other / "adapter_config.json").read_text()
    (other / "adapter_config.json").write_text(text.replace('"r": 2', '"r": 4'))
    load("config", other)
    flipped = shards("flipped")
    with (flipped / "ep-00000-of-00002.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    load("flipped, header checks", flipped)
    os.environ["LORASHARD_VERIFY"] = "full"
    load("flipped", flipped)
    del os.environ["LORASHARD_VERIFY"]
    forged = shards("forged")
    manifest = json.loads((forged / "lorashard.json").read_text())
    manifest["placement"]["ranks"] = [[0, 1, 2, 3, 4], [5, 6, 7]]
    manifest["placement"]["strategy"] = "explicit"
    (forged / "lorashard.json").write_text(json.dumps(manifest))
    load("forged placement", forged)
    load("wrong model", shards("wrong"), num_experts=16)
    load("wrong size", shards("size"), hidden_size=32)
    load("r too large", adapter_of("L1", lora_ranks={0: 9}).write(FOLDER / "rank"))
    stray = dict(built.tensors)
    for matrix, shape in (("A", (2, 16)), ("B", (16, 2))):
        stray[f"base_model.model.model.layers.0.extra_proj.lora_{matrix}.weight"] = torch.ones(
            shape, dtype=torch.bfloat16
        )
    load(
        "stray",
        type(built)(built.spec, stray, built.config, built.factors, {}).write(FOLDER / "stray"),
    )
    os.environ["LORASHARD_STRICT"] = "1"
    out = FOLDER / "strict"
    split_adapter(plain, out, SplitRequest(4))
    load("strict", out)
    del os.environ["LORASHARD_STRICT"]
    return messages


def only_needed_files() -> list[str]:
    """A rank needs its own file alone; a foreign cut needs those that hold its experts."""
    wrong = []
    built = adapter_of("L1")
    plain = built.write(Path(tempfile.mkdtemp()))
    for ranks, keep in ((2, {0}), (4, {0, 1})):
        out = Path(tempfile.mkdtemp()) / "s"
        split_adapter(plain, out, SplitRequest(ranks))
        for rank in set(range(ranks)) - keep:
            (out / f"ep-{rank:05d}-of-{ranks:05d}.safetensors").unlink()
        engine = harness.make_engine(**SIZES, ep_rank=0, module_names=modules())
        engine.add_adapter(harness.request(engine, out))
        wrong += mismatches(engine, harness.slot_of(engine), expected_of(built))
    return wrong


def stays_inert() -> list[str]:
    """Without expert parallelism a plain adapter takes vLLM's own path; nothing is prepared."""
    wrong = []
    engine = harness.make_engine(**SIZES, ep_size=1, module_names=modules())
    built = adapter_of("L1")
    engine.add_adapter(harness.request(engine, built.write(Path(tempfile.mkdtemp()))))
    wrong += mismatches(engine, harness.slot_of(engine), expected_of(built))
    if hasattr(engine, "_lorashard_loader"):
        wrong.append("a loader was made")
    shards = on_disk("L1", 8, True, "own shards", 2, "linear")
    engine.add_adapter(harness.request(engine, shards, "shards", 2))
    wrong += mismatches(engine, harness.slot_of(engine, 2), expected_of(adapter("L1", 8)))
    return wrong


def without_experts() -> list[str]:
    """An adapter without expert weights is vLLM's own business, also with names unknown to us."""
    wrong = []
    built = adapter_of("L1")
    attention = {name: t for name, t in built.tensors.items() if "self_attn" in name}
    renamed = {name.removeprefix("base_model.model."): t for name, t in attention.items()}
    for tensors in (attention, renamed):
        path = type(built)(built.spec, tensors, built.config, {}, {}).write(
            Path(tempfile.mkdtemp())
        )
        engine = harness.make_engine(**SIZES, ep_rank=1, module_names=modules())
        engine.add_adapter(harness.request(engine, path))
        wrong += wrong_attention(engine, harness.slot_of(engine), built)
        if engine._lorashard_loader.last_report is not None:
            wrong.append("the loader was used")
    return wrong


def interleaved_rows() -> list[str]:
    """gpt-oss: rows alternate in the 3-D class; in the 2-D class they are taken apart."""
    wrong = []
    formats = (False, True) if "enable_mixed_moe_lora_format" in _lora_options() else (False,)
    for mixed, form, ep_rank in itertools.product(formats, FORMS, range(2)):
        engine = harness.make_engine(
            **SIZES, wrapper="3d", mixed_format=mixed, ep_rank=ep_rank, module_names=modules(),
            architecture="GptOssForCausalLM",
        )  # fmt: skip
        for number, layout in enumerate(("L2", "L1"), start=1):
            built = adapter(layout, 8)
            path = on_disk(layout, 8, True, form, 2, "linear")
            engine.add_adapter(harness.request(engine, path, f"a{number}", number))
            slot = harness.slot_of(engine, number)
            expected = expected_deltas(built, interleaved=True)
            found = mismatches(engine, slot, expected)
            wrong += [f"{layout} {form} mixed={mixed} rank {ep_rank}: {x}" for x in found[:2]]
    return wrong


def _lora_options() -> set[str]:
    return {field.name for field in fields(harness.LoRAConfig)}


def shared_factors() -> list[str]:
    """An engine that keeps one factor for all experts takes shared adapters, and no others."""
    try:
        harness.make_engine(**SIZES, shared_loras=True)
    except ValueError:
        return []  # a release without --enable-moe-shared-loras
    wrong = []
    for form, ep_rank in itertools.product(FORMS, range(2)):
        engine = harness.make_engine(
            **SIZES, shared_loras=True, ep_rank=ep_rank, module_names=modules()
        )
        built = adapter("L8", 8)
        path = on_disk("L8", 8, True, form, 2, "linear")
        engine.add_adapter(harness.request(engine, path))
        wrong += mismatches(engine, harness.slot_of(engine), expected_of(built))
        try:
            other = on_disk("L1", 8, True, form, 2, "linear")
            engine.add_adapter(harness.request(engine, other, "other", 2))
            wrong.append(f"{form}: an adapter with a factor for each expert was taken")
        except ValueError as err:
            if "--enable-moe-shared-loras" not in str(err):
                wrong.append(str(err))
    return wrong


def model_names() -> list[str]:
    """The model's own renaming, and a block that is called otherwise."""
    wrong = []
    prefix = "language_model."
    mapper = {"orig_to_new_prefix": {"model.": f"{prefix}model."}}
    for form in FORMS:
        path = on_disk("L1", 8, True, form, 2, "linear")
        engine = harness.make_engine(
            **SIZES, ep_rank=1, module_names=modules(prefix), mapper=mapper
        )
        engine.add_adapter(harness.request(engine, path))
        slot = harness.slot_of(engine)
        wrong += mismatches(engine, slot, expected_deltas(adapter("L1", 8)), prefix)
        names = [name.replace("mlp", "block_sparse_moe") for name in modules()]
        engine = harness.make_engine(**SIZES, ep_rank=1, module_names=names)
        engine.add_adapter(harness.request(engine, path))
        loaded = harness.deltas(engine, harness.slot_of(engine))
        for (module, expert), deltas in expected_of(adapter("L1", 8)).items():
            found = loaded[module.replace("mlp", "block_sparse_moe")].get(expert)
            if found and not all(torch.equal(found[name], deltas[name]) for name in deltas):
                wrong.append(f"{form}: {module} {expert}")
    return wrong


def draft_layers() -> list[str]:
    """Experts and attention of a block for multi-token prediction are left out, the rest is right."""
    wrong: list[str] = []
    built = adapter("L1", 8)
    mtp = {name.replace(".model.layers.1.", ".mtp.layers.1."): tensor.clone()
           for name, tensor in built.tensors.items() if ".layers.1." in name}  # fmt: skip
    plain = replace(built, tensors=built.tensors | mtp).write(FOLDER / "mtp")
    split_adapter(plain, FOLDER / "mtp-shards", SplitRequest(2))
    for path, ep_rank in itertools.product((plain, FOLDER / "mtp-shards"), (0, 1)):
        engine = harness.make_engine(**SIZES, ep_rank=ep_rank, module_names=modules())
        engine.add_adapter(harness.request(engine, path))
        slot = harness.slot_of(engine)
        wrong += mismatches(engine, slot, expected_deltas(built))
        wrong += wrong_attention(engine, slot, built)
        report = attached_loader(engine).last_report
        if report.num_left_to_mtp != 1 + 4:
            wrong.append(f"{path}: {report.num_left_to_mtp} modules left out")
    return wrong


def fully_sharded() -> list[str]:
    """--fully-sharded-loras with expert parallelism: experts whole, attention sharded."""
    wrong = []
    for wrapper, layout in (("2d", "L1"), ("3d", "L2")):
        built = adapter(layout, 8)
        for ep_rank, form in itertools.product(range(2), FORMS):
            engine = harness.make_engine(
                **SIZES, wrapper=wrapper, ep_rank=ep_rank, module_names=modules(),
                fully_sharded=True, attention_tp_size=2,
            )  # fmt: skip
            path = on_disk(layout, 8, True, form, 2, "linear")
            engine.add_adapter(harness.request(engine, path))
            found = mismatches(engine, harness.slot_of(engine), expected_of(built))
            wrong += [f"{layout} rank {ep_rank} {form}: {line}" for line in found[:2]]
            for name, layer in harness.layers(engine).items():
                if name.endswith(".experts") and layer.fully_sharded:
                    wrong.append(f"{name} is fully sharded")
            sharded = engine._adapter_manager.modules["model.layers.0.self_attn.o_proj"]
            if "Sharded" not in type(sharded).__name__:
                wrong.append(f"attention is {type(sharded).__name__}")
            if not engine.lora_config.fully_sharded_loras:
                wrong.append("the engine's own configuration was changed")
    return wrong


def slots_and_eviction() -> list[str]:
    """Adapters that push each other out of slots and of the cache; buffers are used again."""
    wrong = []
    built = [adapter_of("L1", seed=seed) for seed in range(4)]
    paths = []
    for seed, one in enumerate(built):
        plain = one.write(Path(tempfile.mkdtemp()))
        paths.append(Path(tempfile.mkdtemp()) / str(seed))
        split_adapter(plain, paths[-1], SplitRequest(2))
    engine = harness.make_engine(
        **SIZES, ep_rank=1, module_names=modules(), max_loras=1, max_cpu_loras=2
    )
    sizes = engine._lorashard_loader.regions.sizes()
    if len(sizes) != 3:
        wrong.append(f"{len(sizes)} buffers were prepared, not 3")
    for number in [0, 1, 0, 1, 2, 3, 0, 3, 2, 1, 0, 0]:
        engine.add_adapter(harness.request(engine, paths[number], f"a{number}", number + 1))
        slot = harness.slot_of(engine, number + 1)
        wrong += mismatches(engine, slot, expected_deltas(built[number]))
    renewed = harness.request(engine, paths[1], "a0", 1, load_inplace=True)
    engine.add_adapter(renewed)  # what an RL loop does: new weights under the same id
    wrong += mismatches(engine, harness.slot_of(engine, 1), expected_deltas(built[1]))
    engine._adapter_manager.remove_all_adapters()
    if engine._lorashard_loader.regions.sizes() != sizes:
        wrong.append("not every buffer came back, or more were made")
    return wrong


def engine_refusals() -> dict[str, tuple[str, str]]:
    """What stops the start, and that its variable lets it go on."""
    import re

    from vllm.lora import model_manager

    found = {}

    def start(name: str, **options: Any) -> None:
        outcomes = []
        variable = ""
        for _ in range(2):
            try:
                harness.make_engine(**SIZES | options)
                outcomes.append("started")
            except ValueError as err:
                outcomes.append(str(err))
                (variable,) = re.findall(r"LORASHARD_RISK_\w+", str(err))
                os.environ[variable] = "1"
            except AssertionError as err:
                outcomes.append(str(err))
        os.environ.pop(variable, None)
        found[name] = (outcomes[0], outcomes[1])

    eplb = SimpleNamespace(num_redundant_experts=0, communicator="nixl")
    start("eplb", parallel={"enable_eplb": True, "eplb_config": eplb})
    start("data parallel", parallel={"data_parallel_size": 2, "enable_dbo": True})
    experts = harness.TritonExperts
    if hasattr(experts, "supports_lora"):
        apply = experts.apply
        experts.apply = _ignores_adapters
        start("experts without lora")
        experts.apply = apply
    manager = model_manager.LoRAModelManager
    merge = manager._create_merged_loras_inplace
    manager._create_merged_loras_inplace = _reverses
    start("packing changed")
    manager._create_merged_loras_inplace = merge
    from vllm.lora import lora_weights

    packed = lora_weights.PackedLoRALayerWeights
    original = packed.__init__
    packed.__init__ = _other_parameters
    start("signature changed")
    packed.__init__ = original
    return found


def _ignores_adapters(self: Any, *args: Any, **kwargs: Any) -> None:
    """Stands for TritonWNA16Experts.apply."""


def _other_parameters(self: Any, name: str, lora_a: Any, lora_b: Any) -> None:
    """Stands for a later release."""


def _reverses(self: Any, lora_model: Any) -> None:
    for lora in lora_model.loras.values():
        lora.lora_a = lora.lora_a[::-1]


def experts_classes() -> list[str]:
    """The release's own experts classes: which apply LoRA, and which only take it."""

    from lorashard.vllm_plugin.engine.facts import reads_lora_context

    package = "vllm.model_executor.layers.fused_moe"
    wrong = []
    has_context = hasattr(harness.TritonExperts, "supports_lora")  # from 0.20 on
    expected = {
        "TritonExperts": True,
        # Before, LoRA stands around the steps of every class that is a TritonExperts.
        "TritonWNA16Experts": not has_context,
        "UnfusedOAITritonExperts": True,
    }
    places = (
        "experts.triton_moe", "fused_moe", "experts.gpt_oss_triton_kernels_moe",
        "gpt_oss_triton_kernels_moe",
    )  # fmt: skip
    for name, applies in expected.items():
        classes = (getattr(_module(f"{package}.{place}"), name, None) for place in places)
        found = next(cls for cls in classes if cls is not None)
        if has_context and not found.supports_lora():
            wrong.append(f"{name} does not claim to support LoRA")
        if reads_lora_context(found) != applies:
            wrong.append(f"{name}: applies LoRA: {not applies}")
    return wrong


def _module(name: str) -> Any:
    from importlib import import_module

    try:
        return import_module(name)
    except ModuleNotFoundError:
        return None


def found_by_vllm() -> list[str]:
    """VLLM's own discovery: the entry point, VLLM_PLUGINS, and a resolver for shard directories."""
    import asyncio

    from vllm.plugins import load_plugins_by_group
    from vllm.plugins.lora_resolvers.filesystem_resolver import FilesystemResolver

    wrong = []
    for allowed, expected in ((None, True), ("lorashard", True), ("other", False)):
        before = os.environ.pop("VLLM_PLUGINS", None)
        if allowed is not None:
            os.environ["VLLM_PLUGINS"] = allowed
        plugins = load_plugins_by_group("vllm.general_plugins")
        if ("lorashard" in plugins) != expected:
            wrong.append(f"VLLM_PLUGINS={allowed}: {sorted(plugins)}")
        if expected and plugins["lorashard"] is not register:
            wrong.append("the entry point is not register")
        os.environ["VLLM_PLUGINS"] = before or ""
    folder = Path(tempfile.mkdtemp())
    plain = adapter_of("L1").write(Path(tempfile.mkdtemp()))
    split_adapter(plain, folder / "mine", SplitRequest(2))
    found = asyncio.run(FilesystemResolver(str(folder)).resolve_lora("tiny/moe", "mine"))
    if found is None or Path(found.lora_path) != folder / "mine":
        wrong.append(f"the resolver found {found}")
    return wrong


CHECKS: dict[str, Callable[[], Any]] = {
    check.__name__: check
    for check in (
        all_layouts, bits_of_stock, collections_while_loading, partly_trained, other_dtypes, only_needed_files, stays_inert,
        adapters_of_one_form, without_experts,
        interleaved_rows, shared_factors, model_names, draft_layers, fully_sharded, slots_and_eviction, refused,
        experts_classes, found_by_vllm,
        engine_refusals,
    )
}  # fmt: skip


def run_all() -> dict[str, Any]:
    """Every check's findings; what a check raises is its finding."""
    found: dict[str, Any] = {}
    for name, check in CHECKS.items():
        try:
            found[name] = check()
        except Exception:  # noqa: BLE001 - told with the rest
            found[name] = [traceback.format_exc()[-2000:]]
    return found
