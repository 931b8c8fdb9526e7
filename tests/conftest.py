"""Which tests stay in one process when several run the suite, as `make test` has them do; a folder in memory."""

from __future__ import annotations

import re
import signal
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from lorashard.storage.syscalls import is_in_memory
from tests.tiny import REPO
from tests.vllm_release import PLUGIN_RELEASES


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """`--dist loadfile` by `group_of`. pytest-xdist 3.8 does not see its groups in pytest 9.2."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class GroupScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return GroupScheduling(config, log)


def pytest_configure(config: pytest.Config) -> None:
    """No example is too slow because another process has the CPU; signals are not ignored.

    A shell ignores SIGINT for what it starts in the background, and nohup SIGHUP; children inherit that.
    """
    for sign, handler in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGHUP, signal.SIG_DFL),
    ):
        if signal.getsignal(sign) is signal.SIG_IGN:
            signal.signal(sign, handler)
    if hasattr(config, "workerinput"):
        hypothesis.settings.register_profile("parallel", deadline=None)
        hypothesis.settings.load_profile("parallel")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What runs vLLM goes first in each process: it is slow, and at the end it would run alone."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: release_of(item.nodeid) is None)


@pytest.fixture
def memory_path() -> Iterator[Path]:
    """A folder in memory, as tmp_path is one on a disk."""
    memory = Path("/dev/shm")
    if not is_in_memory(memory):
        pytest.skip("/dev/shm is not in memory")
    with tempfile.TemporaryDirectory(dir=memory) as path:
        yield Path(path)


def group_of(nodeid: str) -> str:
    """The test's file and the release that it runs in: a process keeps what a release answered."""
    file, release = nodeid.split("::", maxsplit=1)[0], release_of(nodeid)
    if release is None:
        return file
    return f"{release} patched.py" if asks_patched(file) else f"{release} {file}"


def release_of(nodeid: str) -> str | None:
    """The vLLM release among the parameters of a test."""
    parameters = re.search(r"\[(.*)\]$", nodeid, re.DOTALL)
    found = set(parameters[1].split("-")) & set(PLUGIN_RELEASES) if parameters else None
    return found.pop() if found else None


@cache
def asks_patched(file: str) -> bool:
    """Whether its tests read the answers of patched.py, which several files share."""
    return "from tests.vllm_plugin.patched_answers import" in (REPO / file).read_text()
