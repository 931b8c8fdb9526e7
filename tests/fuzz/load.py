"""Target: what a server reads. `_load_adapter` of real vLLM code with the plugin, on hostile folders.

The first byte says which adapter (shards, or plain ones of several layouts), the second which of its
files is replaced, and by what: the rest of the input, or nothing, a pipe, a device, a folder, a link.
The engine has one MoE layer, on the CPU; tests/vllm_plugin/harness.py says what of it is real.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import torch

from lorashard import SplitRequest, split_adapter
from lorashard.vllm_plugin import register

register()

from tests.adapters import Adapter, Spec, build  # noqa: E402
from tests.fuzz.mutators import json_mutator, mutate_header  # noqa: E402
from tests.fuzz.target import Target, check  # noqa: E402
from tests.vllm_plugin import harness  # noqa: E402
from tests.vllm_plugin.harness_selfcheck import expected_deltas, mismatches  # noqa: E402

_OWN = str(Path(__file__).resolve().parents[2] / "lorashard")
_HIDDEN, _INTERMEDIATE, _EXPERTS = 16, 4, 4
_OFTEN = 500  # loads after which the engine has to load a good adapter, and right


@dataclass(frozen=True, slots=True)
class _Case:
    """An adapter in a folder. files: its names, and what is in them."""

    folder: Path
    adapter: Adapter
    files: tuple[tuple[str, bytes], ...]


class _Server:
    """Rank 0 of 2, and the folders that it is asked to load."""

    def __init__(self) -> None:
        logging.disable(logging.CRITICAL)  # a line for each load
        self.engine = harness.make_engine(
            num_experts=_EXPERTS, hidden_size=_HIDDEN, intermediate_size=_INTERMEDIATE,
            max_lora_rank=8, attention=False,
        )  # fmt: skip
        place = Path(tempfile.mkdtemp(dir="/dev/shm"))
        plain = [_adapter(layout) for layout in ("L1", "L2", "L8", "L13")]
        self.cases = [_case(a, a.write(place / f"plain{n}")) for n, a in enumerate(plain)]
        for number, (adapter, ep_size) in enumerate(((plain[0], 2), (plain[0], 3), (plain[1], 2))):
            shards = place / f"shards{number}"
            split_adapter(self.cases[plain.index(adapter)].folder, shards, SplitRequest(ep_size))
            self.cases.append(_case(adapter, shards))
        self.loads = 0

    def load(self, case: _Case) -> bool:
        """Whether the adapter was loaded; raises what is neither a refusal of ours nor of vLLM's."""
        self.loads += 1
        try:
            self.engine.add_adapter(harness.request(self.engine, case.folder, lora_id=self.loads))
        except ValueError:
            check(not self.engine.list_adapters(), "a refused adapter is there")
            return False
        except Exception as err:
            if _is_ours(err):
                raise
            return False
        return True

    def check_alive(self) -> None:
        """A good adapter is loaded after all that, and what is in the slot is right."""
        case = self.cases[self.loads % len(self.cases)]
        check(self.load(case), "a good adapter is not loaded any more")
        slot = harness.slot_of(self.engine, self.loads)
        wrong = mismatches(self.engine, slot, expected_deltas(case.adapter))
        check(not wrong, f"a good adapter is loaded wrong: {wrong[:3]}")
        self.engine.remove_adapter(self.loads)


def _adapter(layout: str) -> Adapter:
    sizes = {"hidden": _HIDDEN, "intermediate": _INTERMEDIATE, "num_experts": _EXPERTS}
    return build(Spec(layout, dtype=torch.bfloat16, fill="random", **sizes))


def _case(adapter: Adapter, folder: Path) -> _Case:
    names = sorted(os.listdir(folder))
    return _Case(folder, adapter, tuple((name, (folder / name).read_bytes()) for name in names))


@cache
def _server() -> _Server:
    return _Server()


def _is_ours(err: BaseException) -> bool:
    return traceback.extract_tb(err.__traceback__)[-1].filename.startswith(_OWN)


def _run(data: bytes) -> bool:
    if len(data) < 2:
        return False
    server = _server()
    case = server.cases[data[0] % len(server.cases)]
    name, content = case.files[data[1] % 16 % len(case.files)]
    path = case.folder / name
    _replace(path, data[1] >> 4, data[2:])
    try:
        loaded = server.load(case)
        if loaded:
            server.engine.remove_adapter(server.loads)
    finally:
        _remove(path)
        path.write_bytes(content)
    check(sorted(os.listdir(case.folder)) == [n for n, _ in case.files], "a load has left files")
    if server.loads % _OFTEN == 0:
        server.check_alive()
    return loaded


def _replace(path: Path, kind: int, content: bytes) -> None:
    _remove(path)
    if kind == 1:
        os.mkfifo(path)
    elif kind == 2:
        path.symlink_to("/dev/zero")
    elif kind == 3:
        path.mkdir()
    elif kind == 4:
        path.symlink_to(path.name)
    elif kind != 5:
        path.write_bytes(content)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _seeds() -> Iterator[bytes]:
    for number, case in enumerate(_server().cases):
        for place, (_, content) in enumerate(case.files):
            yield bytes([number, place]) + content
            for kind in range(1, 6):
                yield bytes([number, place + 16 * kind])


_mutate_json = json_mutator("explicit", [[0, 1], [2, 3]], [[3, 2, 1, 0], []], "interleaved", 8, 3)


def _mutate(data: bytes, max_bytes: int, chance: Random) -> bytes | None:
    content = data[2:]
    if content[:1] == b"{":
        made: Any = _mutate_json(content, max_bytes - 2, chance)
    else:
        made = mutate_header(content, max_bytes - 2, chance)
    return None if made is None else data[:2] + made


TARGETS = (
    Target(
        "load",
        "`_load_adapter` of vLLM 0.33.0 with the plugin, on folders with hostile files in them",
        _run,
        _seeds,
        _mutate,
        max_bytes=8192,
    ),
)
