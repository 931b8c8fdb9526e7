"""A process in which a vLLM release runs is a fresh one, whatever it is forked from has imported."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.tiny import REPO
from tests.vllm_release import PLUGIN_RELEASES, release_sources, run_in_release

RELEASE = PLUGIN_RELEASES[0]


def test_a_script_finds_no_vllm_and_no_lorashard_until_it_imports_them() -> None:
    script = f"""
import os, sys; sys.path.insert(0, {str(REPO)!r})
early = [name for name in sys.modules if name.split(".")[0] in ("vllm", "lorashard")]
threads = len(os.listdir("/proc/self/task"))
import torch, vllm
answer([os.getpid(), early, threads, torch.get_num_threads(), vllm.__file__, os.getcwd()])
"""
    pid, early, threads, torch_threads, file, folder = run_in_release(RELEASE, script)
    assert (early, threads, torch_threads) == ([], 1, 1)
    assert file == str(release_sources(RELEASE) / "vllm" / "__init__.py")
    assert pid != os.getpid()
    assert not Path(folder).exists()


def test_what_one_script_changes_no_other_sees() -> None:
    change = "import os, torch; torch.changed = os.environ['CHANGED'] = 'yes'; answer(1)"
    look = "import os, torch; answer([hasattr(torch, 'changed'), 'CHANGED' in os.environ])"
    assert run_in_release(RELEASE, change) == 1
    assert run_in_release(RELEASE, look) == [False, False]


def test_a_script_has_the_environment_of_its_test(monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import os; answer(os.environ.get('LORASHARD_STRICT'))"
    assert run_in_release(RELEASE, script) is None
    monkeypatch.setenv("LORASHARD_STRICT", "1")
    assert run_in_release(RELEASE, script) == "1"


def test_a_script_that_fails_is_an_error_with_its_last_words() -> None:
    with pytest.raises(AssertionError, match=f"vLLM {RELEASE}: (.|\n)*ValueError: a reason"):
        run_in_release(RELEASE, "raise ValueError('a reason')")


def test_a_script_that_never_answers_is_stopped() -> None:
    with pytest.raises(TimeoutError, match="no answer after 1 s"):
        run_in_release(RELEASE, "import time; time.sleep(600)", timeout_s=1)


def test_what_vllm_imports_is_there_already() -> None:
    names = ("torch", "transformers", "prometheus_client")
    script = f"import sys; answer([name in sys.modules for name in {names}])"
    assert run_in_release(RELEASE, script) == [True, True, False]  # the last reads what tests set
