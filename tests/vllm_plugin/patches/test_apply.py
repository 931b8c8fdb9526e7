"""Patches: applied once, at the import of their module, and to nothing that is not known."""

from __future__ import annotations

import inspect
import json
import logging
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lorashard.vllm_plugin.patches import apply as patch_module
from lorashard.vllm_plugin.patches.apply import Patch, apply_patch, broken_patches
from lorashard.vllm_plugin.patches.table import PATCHES
from tests.tiny import REPO

MODULE = "a_module_of_some_vllm"


class Manager:
    def load(self, request: Any, *, again: bool = False) -> str:
        """Loads it."""
        return f"loaded {request}"

    @classmethod
    def made(cls, request: Any) -> str:
        return f"{cls.__name__} {request}"


class Derived(Manager):
    pass


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A loaded module with a class `Manager`; no patch has an outcome yet."""
    made = ModuleType(MODULE)
    made.Manager = type("Manager", (), dict(vars(Manager)))  # type: ignore[attr-defined]
    made.Derived = type("Derived", (made.Manager,), {})  # type: ignore[attr-defined]
    made.number = 7  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, MODULE, made)
    monkeypatch.setattr(patch_module, "outcomes", {})
    return made


def upper(original: Callable[..., Any]) -> Callable[..., Any]:
    def replacement(self: Any, *args: Any, **kwargs: Any) -> Any:
        return original(self, *args, **kwargs).upper()

    return replacement


def patch(**fields: Any) -> Patch:
    given: dict[str, Any] = {
        "module": MODULE, "owner": "Manager", "method": "load", "parameters": ("self", "request"),
        "why": "", "how": "", "upstream": "", "since": "0.16.0", "until": None, "wrap": upper,
    }  # fmt: skip
    return Patch(**given | fields)


def test_a_patch_replaces_the_method_of_every_instance(module: Any) -> None:
    made_before = module.Manager()
    assert apply_patch(patch()).state == "applied"
    assert made_before.load("x") == "LOADED X"
    assert module.Derived().load("x") == "LOADED X"


def test_a_class_method_stays_one(module: Any) -> None:
    wanted = patch(method="made", parameters=("cls", "request"))
    assert apply_patch(wanted).state == "applied"
    assert (module.Manager.made("x"), module.Derived().made("x")) == ("MANAGER X", "DERIVED X")
    replaced = vars(module.Manager)["made"]
    assert apply_patch(wanted).state == "applied"
    assert vars(module.Manager)["made"] is replaced


def test_a_second_time_does_nothing(module: Any) -> None:
    first = apply_patch(patch())
    replaced = module.Manager.load
    assert apply_patch(patch()) is first
    assert module.Manager.load is replaced


def test_the_replacement_looks_like_the_original(module: Any) -> None:
    original = module.Manager.load
    apply_patch(patch())
    replaced = module.Manager.load
    assert replaced is not original
    assert replaced.__wrapped__ is original
    for name in ("__name__", "__qualname__", "__doc__", "__module__", "__annotations__"):
        assert getattr(replaced, name) == getattr(original, name)
    assert inspect.signature(replaced) == inspect.signature(original)


def test_a_function_of_the_module_can_be_replaced(module: Any) -> None:
    module.describe = lambda request: f"about {request}"
    wanted = patch(owner="", method="describe", parameters=("request",), wrap=lambda original: (
        lambda request: original(request).upper()
    ))  # fmt: skip
    assert wanted.target == f"{MODULE}.describe"
    assert apply_patch(wanted).state == "applied"
    assert module.describe("x") == "ABOUT X"


def test_what_a_class_inherits_is_not_touched_through_its_base(module: Any) -> None:
    apply_patch(patch())
    assert "load" not in vars(module.Derived)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"parameters": ("self", "lora_request")}, "its parameters are self, request, again"),
        ({"parameters": ("self", "request", "again", "more")}, "its parameters are self, request"),
        ({"owner": "Missing"}, "there is no class Missing"),
        ({"owner": "number"}, "there is no class number"),
        ({"method": "missing"}, "Manager has no method missing of its own"),
        ({"owner": "Derived"}, "Derived has no method load of its own"),
        ({"owner": "", "method": "missing"}, "there is no function missing"),
    ],
)
def test_what_is_not_known_is_left_alone_reported_and_logged(
    module: Any, caplog: pytest.LogCaptureFixture, fields: dict[str, Any], reason: str
) -> None:
    before = dict(vars(module.Manager))
    wanted = patch(**fields)
    with caplog.at_level(logging.ERROR, logger="vllm.lorashard"):
        outcome = apply_patch(wanted)
    assert (outcome.state, broken_patches()) == (
        "broken",
        (f"{outcome.patch.target}: {outcome.reason}",),
    )
    assert reason in outcome.reason
    assert dict(vars(module.Manager)) == before
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert f"cannot patch {wanted.target}: {outcome.reason}" in record.getMessage()
    assert "lorashard doctor" in record.getMessage()


def test_a_release_that_does_it_itself_is_left_alone_in_silence(
    module: Any, caplog: pytest.LogCaptureFixture
) -> None:
    outcome = apply_patch(patch(needed=lambda owner: owner is not module.Manager))
    assert outcome.state == "not needed"
    assert module.Manager().load("x") == "loaded x"
    assert broken_patches() == ()
    assert not caplog.records


def test_a_patch_that_is_not_needed_asks_for_no_signature(module: Any) -> None:
    wanted = patch(parameters=("self", "other"), needed=lambda _: False)
    assert apply_patch(wanted).state == "not needed"


def test_a_patch_whose_need_cannot_be_seen_is_broken(module: Any) -> None:
    def unreadable(_: type) -> bool:
        raise OSError("no source")

    outcome = apply_patch(patch(needed=unreadable))
    assert (outcome.state, outcome.reason) == ("broken", "its source cannot be read: no source")


def test_what_one_option_needs_is_missed_by_that_option_alone(module: Any) -> None:
    outcome = apply_patch(patch(method="missing", only_for="--some-option"))
    assert outcome.state == "unsupported"
    assert broken_patches() == ()
    assert broken_patches("--some-option") == (f"{outcome.patch.target}: {outcome.reason}",)


@pytest.mark.parametrize("missing", [{"owner": "Gone"}, {"method": "gone"}], ids=str)
def test_what_was_repaired_until_some_release_may_be_gone(
    module: Any, missing: dict[str, str]
) -> None:
    assert apply_patch(patch(**missing)).state == "broken"
    patch_module.outcomes.clear()
    assert apply_patch(patch(**missing, until="0.20.2")).state == "not needed"


# A package that is imported after apply_when_imported, in a process of its own.
PACKAGE = {
    "late/__init__.py": "",
    "late/layers.py": """
        class Layer:
            def size(self, unit):
                return 1

            def name(self):
                return "layer"

        class Other:
            def size(self, unit):
                return 2
    """,
    "late/early.py": """
        class Early:
            def size(self, unit):
                return 3
    """,
    "late/user.py": """
        from late.layers import Layer

        def size():
            return Layer().size("MB")
    """,
    "late/more.py": "from late.layers import Layer",
}
PROLOGUE = """
import importlib, importlib.util, inspect, json, sys
from lorashard.vllm_plugin.patches.apply import Patch, apply_when_imported, outcomes

def ten_times(original):
    return lambda self, *args: original(self, *args) * 10

def patch(module, owner, method, *parameters):
    return Patch(module, owner, method, ("self", *parameters), "", "", "", "0", None, ten_times)

LAYER = patch("late.layers", "Layer", "size", "unit")
OTHER = patch("late.layers", "Other", "size", "unit")
NAME = patch("late.layers", "Layer", "name")
EARLY = patch("late.early", "Early", "size", "unit")
"""


def run(folder: Path, script: str, files: dict[str, str] = PACKAGE, **env: str) -> Any:
    """What `script` assigns to `answer`, in a fresh Python with `files` importable."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(content))
    epilogue = "\nsys.stdout.write(json.dumps(answer))"
    done = subprocess.run(
        [sys.executable, "-c", PROLOGUE + textwrap.dedent(script) + epilogue],
        env={"PYTHONPATH": f"{folder}:{REPO}", "PATH": "", **env},
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_a_module_is_patched_when_it_is_imported_and_not_imported_for_that(tmp_path: Path) -> None:
    script = """
    apply_when_imported([LAYER])
    before = [name for name in sys.modules if name.startswith("late")]
    import late.user
    answer = [before, late.user.size(), outcomes[LAYER.target].state]
    """
    assert run(tmp_path, script) == [[], 10, "applied"]


def test_a_module_that_is_there_is_patched_at_once(tmp_path: Path) -> None:
    script = """
    import late.early
    finders = list(sys.meta_path)
    apply_when_imported([EARLY])
    answer = [late.early.Early().size("MB"), sys.meta_path == finders]
    """
    assert run(tmp_path, script) == [30, True]


def test_all_patches_of_all_modules_apply_each_in_its_time(tmp_path: Path) -> None:
    script = """
    import late.early
    apply_when_imported([LAYER, EARLY, OTHER, NAME])
    early = sorted(outcomes)
    from late.layers import Layer, Other
    answer = [early, Layer().size(""), Other().size(""), len(Layer().name()), len(outcomes)]
    """
    assert run(tmp_path, script) == [["late.early.Early.size"], 10, 20, 50, 4]


def test_one_patch_that_is_broken_leaves_the_others_and_the_import_alone(tmp_path: Path) -> None:
    script = """
    apply_when_imported([patch("late.layers", "Layer", "size", "scale"), OTHER])
    from late.layers import Layer, Other
    answer = [Layer().size(""), Other().size(""), sorted(o.state for o in outcomes.values())]
    """
    assert run(tmp_path, script) == [1, 20, ["applied", "broken"]]


def test_the_module_keeps_its_own_loader_and_its_source(tmp_path: Path) -> None:
    script = """
    import late.early
    apply_when_imported([LAYER])
    import late.layers
    source = inspect.getsource(late.layers)
    answer = [
        type(late.layers.__loader__) is type(late.early.__loader__),
        late.layers.__spec__.loader is late.layers.__loader__,
        source == late.layers.__loader__.get_source("late.layers") and "class Other" in source,
        inspect.getsource(late.layers.Other).startswith("class Other"),
        inspect.getsource(late.layers.Layer.size).strip().startswith("def size(self, unit)"),
        importlib.util.find_spec("late.layers") is late.layers.__spec__,
    ]
    """
    assert run(tmp_path, script) == [True] * 6


def test_other_imports_are_left_to_the_other_finders(tmp_path: Path) -> None:
    script = """
    apply_when_imported([LAYER, patch("late.missing", "Layer", "size")])
    import late.more, email.message
    found = []
    for name in ("late.missing", "late.absent"):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as err:
            found.append(err.name)
    answer = found
    """
    assert run(tmp_path, script) == ["late.missing", "late.absent"]


# A stand-in for a vLLM that needs the patches without an end.
LASTING = [entry.target for entry in PATCHES if entry.until is None]
VLLM = {
    "vllm/__init__.py": "", "vllm/engine/__init__.py": "", "vllm/lora/__init__.py": "",
    "vllm/lora/layers/__init__.py": "",
    "vllm/engine/arg_utils.py": """
        class EngineArgs:
            def create_engine_config(self):
                return None
    """,
    "vllm/lora/worker_manager.py": """
        class WorkerLoRAManager:
            def _load_adapter(self, lora_request):
                return lora_request

            def add_adapter(self, adapter_request):
                return True

            def create_lora_manager(self, model, vllm_config=None):
                return model

            def set_active_adapters(self, requests, mapping):
                return None

            def pin_adapter(self, adapter_id):
                return True

            def remove_adapter(self, adapter_id):
                return True

        class LRUCacheWorkerLoRAManager(WorkerLoRAManager):
            def add_adapter(self, lora_request):
                return True

            def create_lora_manager(self, model, vllm_config=None):
                return model
    """,
    "vllm/v1/executor/__init__.py": "",
    "vllm/v1/executor/abstract.py": """
        class Executor:
            def add_lora(self, lora_request):
                return True
    """,
    "vllm/lora/request.py": """
        class LoRARequest:
            def __eq__(self, value):
                return True

            def __hash__(self):
                return 0
    """,
    "vllm/lora/punica_wrapper/__init__.py": "",
    "vllm/lora/punica_wrapper/punica_gpu.py": """
        class PunicaWrapperGPU:
            def add_lora_fused_moe(self, y, x, lora_a_stacked):
                return None
    """,
    "vllm/lora/model_manager.py": """
        class LoRAModelManager:
            def _add_adapter(self, lora):
                return None

            def activate_adapter(self, lora_id):
                return True

            def create_dummy_lora(self, lora_id, rank, embedding_modules=None):
                return None

        class LRUCacheLoRAModelManager(LoRAModelManager):
            def activate_adapter(self, lora_id):
                return True
    """,
    "vllm/v1/worker/__init__.py": "", "vllm/v1/worker/gpu/__init__.py": "",
    "vllm/v1/worker/dp_utils.py": """
        def _run_ar(
            should_ubatch, orig_num_tokens_per_ubatch, padded_num_tokens_per_ubatch, cudagraph_mode,
            parallel_config,
        ):
            return None
    """,
    "vllm/v1/worker/gpu/dp_utils.py": """
        def sync_cudagraph_and_dp_padding(
            cudagraph_manager, desired_batch_desc, num_tokens, num_reqs, uniform_token_count,
            dp_size, dp_rank, num_active_loras=0,
        ):
            return None
    """,
    "vllm/v1/worker/gpu/model_runner.py": """
        def get_num_active_loras_for_dispatch(lora_config, lora_state, req_ids, dummy_run):
            return 0
    """,
    "vllm/v1/worker/gpu_worker.py": """
        class Worker:
            def compile_or_warm_up_model(self):
                return None

            def sleep(self, level=1):
                return None
    """,
    "vllm/v1/worker/lora_model_runner_mixin.py": """
        class LoRAModelRunnerMixin:
            def maybe_dummy_run_with_lora(self, lora_config, num_scheduled_tokens):
                return None
    """,
    "vllm/v1/cudagraph_dispatcher.py": """
        class CudagraphDispatcher:
            def dispatch(self, num_tokens, uniform_decode=False, has_lora=False):
                return None
    """,
    "vllm/lora/layers/fused_moe.py": """
        class FusedMoEWithLoRA:
            def create_lora_weights(self, max_loras, lora_config, model_config=None):
                return None

        class FusedMoE3DWithLoRA(FusedMoEWithLoRA):
            def create_lora_weights(self, max_loras, lora_config, model_config=None):
                return None
    """,
    "vllm/distributed/__init__.py": "", "vllm/distributed/eplb/__init__.py": "",
    "vllm/distributed/eplb/eplb_state.py": """
        def rearrange_expert_weights_inplace(
            old_global_expert_indices, new_global_expert_indices, expert_weights, expert_buffer,
            ep_group, communicator, is_profile=False, rank_mapping=None,
        ):
            return None

        def move_from_buffer(
            expert_weights, expert_weights_buffers, transfer_metadata, new_indices, ep_rank
        ):
            return None

        def _commit_eplb_maps(model_state, new_physical_to_logical_map):
            return None

        def _commit_eplb_maps_for_layer(model_state, new_physical_to_logical_map, layer):
            return None

        class EplbState:
            def add_model(self, model, model_config):
                return None
    """,
    "vllm/distributed/eplb/async_worker.py": """
        def transfer_layer(
            old_layer_indices, new_layer_indices, expert_weights, expert_weights_buffer, ep_group,
            communicator, is_profile=False, stream=None, rank_mapping=None, layer_idx=0,
        ):
            return None
    """,
    "vllm/model_executor/__init__.py": "", "vllm/model_executor/layers/__init__.py": "",
    "vllm/model_executor/layers/fused_moe/__init__.py": "",
    "vllm/entrypoints/__init__.py": "", "vllm/entrypoints/openai/__init__.py": "",
    "vllm/entrypoints/openai/models/__init__.py": "",
    "vllm/entrypoints/openai/models/serving.py": """
        class OpenAIServingModels:
            async def unload_lora_adapter(self, request):
                return None
    """,
    "vllm/v1/__init__.py": "", "vllm/v1/engine/__init__.py": "", "vllm/v1/core/__init__.py": "",
    "vllm/v1/core/sched/__init__.py": "",
    "vllm/v1/engine/async_llm.py": """
        class AsyncLLM:
            async def add_lora(self, lora_request):
                return True
    """,
    "vllm/v1/engine/core.py": """
        class EngineCore:
            def add_lora(self, lora_request):
                return True

            def remove_lora(self, lora_id):
                return True
    """,
    "vllm/v1/core/sched/scheduler.py": """
        class Scheduler:
            def __init__(self, vllm_config):
                pass

            def add_request(self, request):
                return None

            def _free_request(self, request):
                return None
    """,
    "vllm/v1/core/kv_cache_utils.py": """
        def _gen_lora_extra_hash_keys(request):
            return []
    """,
}  # fmt: skip
REGISTER = """
from lorashard.vllm_plugin import register

MODULES = (
    "vllm.engine.arg_utils", "vllm.lora.worker_manager", "vllm.lora.layers.fused_moe",
    "vllm.lora.request", "vllm.v1.executor.abstract",
    "vllm.lora.model_manager", "vllm.lora.punica_wrapper.punica_gpu",
    "vllm.entrypoints.openai.models.serving", "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.core.sched.scheduler", "vllm.v1.core.kv_cache_utils",
    "vllm.distributed.eplb.eplb_state", "vllm.distributed.eplb.async_worker",
    "vllm.v1.worker.dp_utils", "vllm.v1.worker.gpu.dp_utils", "vllm.v1.worker.gpu.model_runner",
    "vllm.v1.worker.gpu_worker", "vllm.v1.worker.lora_model_runner_mixin",
    "vllm.v1.cudagraph_dispatcher",
)

def state():
    found = {}
    for name in MODULES:
        for owner in vars(sys.modules.get(name, object())).values() if name in sys.modules else ():
            if isinstance(owner, type):
                found |= {f"{owner.__name__}.{k}": id(v) for k, v in vars(owner).items()}
    return found, [id(finder) for finder in sys.meta_path]

def import_all():
    for name in MODULES:
        importlib.import_module(name)
"""


def test_register_waits_for_vllm_and_a_second_call_changes_nothing(tmp_path: Path) -> None:
    script = f"""{REGISTER}
register()
waiting = state()
imported = "vllm" in sys.modules
register()
same_before = state() == waiting
import_all()
patched = state()
register()
applied = [target for target, outcome in outcomes.items() if outcome.state == "applied"]
answer = [imported, same_before, state() == patched, sorted(applied)]
"""
    assert run(tmp_path, script, VLLM) == [False, True, True, sorted(LASTING)]


def test_register_after_vllm_patches_at_once_and_once(tmp_path: Path) -> None:
    script = f"""{REGISTER}
import_all()
untouched = state()
register()
patched = state()
register()
applied = [o for o in outcomes.values() if o.state == "applied"]
answer = [patched[0] != untouched[0], state() == patched, len(applied)]
"""
    assert run(tmp_path, script, VLLM) == [True, True, len(LASTING)]


def test_a_plugin_that_is_switched_off_does_nothing(tmp_path: Path) -> None:
    script = f"""{REGISTER}
before = state()
register()
import_all()
answer = [state()[1] == before[1], len(outcomes)]
"""
    assert run(tmp_path, script, VLLM, LORASHARD_DISABLE="1") == [True, 0]
