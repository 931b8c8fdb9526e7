"""An error is the same after it has crossed to another process."""

from __future__ import annotations

import inspect
import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from lorashard import SplitRequest, errors, split_adapter
from lorashard.errors import LorashardError
from lorashard.rules import DAMAGED_BYTES
from tests.tiny import save_config, save_header

EXAMPLES = (
    LorashardError("what", hint="do", rule=DAMAGED_BYTES),
    errors.AdapterError("what"),
    errors.HeaderError(Path("file"), "reason"),
    errors.UnsupportedAdapterError("DoRA", "adapter", hint="do"),
    errors.LayoutError("what", hint="do"),
    errors.UnclearLayoutError("what", hint="do"),
    errors.NoExpertsError("adapter"),
    errors.MissingPackageError("what", hint="do"),
    errors.PlacementError("what"),
    errors.ShardError("what"),
    errors.OutputExistsError("out", reason="exists", hint="do"),
    errors.NoRoomError("what", hint="do"),
    errors.ManifestError("shards", "reason"),
    errors.UnknownTensorError("what", hint="do"),
    errors.PartialShardsError("what", hint="do"),
    errors.VerificationError("shards", ("one", "two")),
    errors.ServerError("what", errors=[errors.ShardError("inner", hint="do")]),
    errors.NotReadyError("what"),
    errors.BatchError([errors.PlacementError("inner")], 3, noun="adapters", hint="do"),
)


def test_every_class_has_an_example() -> None:
    classes = {
        kind for _, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, LorashardError)
    }  # fmt: skip
    assert {type(error) for error in EXAMPLES} == classes


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_a_pickled_error_is_the_same(error: LorashardError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), repr(copy), copy.args) == (
        type(error), str(error), repr(error), error.args,
    )  # fmt: skip
    ours, theirs = vars(error), vars(copy)
    for inner in (ours, theirs):
        inner |= {"errors": list(map(str, inner.get("errors", ())))}
    assert ours == theirs
    assert copy.exit_code == error.exit_code


def test_an_error_of_a_process_pool_says_what_is_wrong(tmp_path: Path) -> None:
    save_config(tmp_path / "a")
    save_header(tmp_path / "b", b"not json")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        for name, kind in (("a", errors.AdapterError), ("b", errors.HeaderError)):
            split = pool.submit(split_adapter, tmp_path / name, tmp_path / "out", SplitRequest(2))
            with pytest.raises(kind, match=str(tmp_path / name)):
                split.result(timeout=60)
