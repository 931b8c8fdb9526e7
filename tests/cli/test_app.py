"""What all commands have in common: exit codes, and no colours without a terminal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lorashard import SplitRequest, split_adapter
from tests.tiny import REPO, run_cli, save_adapter

ESCAPE = "\x1b"


def test_exit_codes_name_what_cannot_be_looked_at(adapter: Path, shards: Path) -> None:
    assert run_cli("inspect", adapter.parent / "nowhere").returncode == 3
    assert run_cli("verify", adapter).returncode == 5
    assert run_cli("verify", shards, "--against", shards).returncode == 3
    assert run_cli("plan", adapter).returncode == 2
    (shards / "lorashard.json").write_text("{")
    assert run_cli("inspect", shards).returncode == 5


@pytest.mark.parametrize("environment", [{}, {"NO_COLOR": "1"}, {"TERM": "xterm-256color"}])
def test_nothing_is_coloured_without_a_terminal(
    adapter: Path, shards: Path, environment: dict[str, str]
) -> None:
    for command in (
        ["inspect", adapter], ["inspect", shards], ["plan", adapter, "--ep-size", 2],
        ["verify", shards], ["verify", adapter], ["split", "--help"], ["split", "--nonsense"],
    ):  # fmt: skip
        done = run_cli(*command, **environment)
        assert ESCAPE not in done.stdout + done.stderr, command


def test_a_reader_that_stops_early_is_no_error(adapter: Path) -> None:
    command = f"{sys.executable} -m lorashard inspect {adapter} --json | head -c 1"
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "{", "")


SIGNALS = """
import signal, sys
signal.signal(signal.SIGHUP, signal.SIG_IGN if {ignored} else signal.SIG_DFL)
from lorashard.cli import app
app.app = lambda: signal.raise_signal(signal.SIGHUP)
app.main()
"""


@pytest.mark.parametrize(("ignored", "code"), [(True, 0), (False, 128 + signal.SIGHUP)])
def test_a_hangup_ends_a_run_unless_it_was_started_with_nohup(ignored: bool, code: int) -> None:
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    command = [sys.executable, "-c", SIGNALS.format(ignored=ignored)]
    assert subprocess.run(command, env=environment, check=False).returncode == code


THREADS_OF_NUMPY = """
import os
from lorashard.cli import app
def work():
    import numpy
    print(len(os.listdir("/proc/self/task")))
app.app = work
app.main()
"""


def test_numpy_starts_no_threads() -> None:
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    command = [sys.executable, "-c", THREADS_OF_NUMPY]
    assert subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    ).stdout == "1\n"  # fmt: skip


def test_an_error_with_json_is_one_document(adapter: Path, shards: Path) -> None:
    nowhere = adapter.parent / "nowhere"
    (shards / "lorashard.json").write_text("{")
    for command, code in (
        (["inspect", nowhere], 3), (["split", nowhere, "--ep-size", 2], 3),
        (["plan", nowhere, "--ep-size", 2], 3), (["verify", shards], 5),
        (["merge", shards, "-o", nowhere], 5), (["pull", shards, "--ep-rank", 0, "-o", nowhere], 5),
    ):  # fmt: skip
        done = run_cli(*command, "--json")
        document = json.loads(done.stdout)
        assert (done.returncode, document.pop("exit_code")) == (code, code)
        assert set(document) == {"error", "hint", "kind", "where", "rule"}
        assert document["kind"] in {"AdapterError", "ManifestError"}
        text, rule = document["error"].removesuffix("."), document["rule"]
        assert f"error: {text}{f' (rule {rule})' if rule else ''}.\n" in done.stderr


def test_an_error_as_json_says_what_it_is_about(adapter: Path, shards: Path) -> None:
    (adapter / "adapter_model.safetensors").write_bytes(bytes(4))
    (shards / "lorashard.json").write_text("{")
    for named, file, kind in (
        (adapter, "adapter_model.safetensors", "HeaderError"),
        (shards, "lorashard.json", "ManifestError"),
    ):
        document = json.loads(run_cli("inspect", named, "--json").stdout)
        assert (document["kind"], document["where"]) == (kind, str(named / file))


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (["split", "a"], "Missing option '--ep-size'."),
        (["inspect"], "Missing argument 'ADAPTER_OR_SHARDS'."),
        (["verify", "a", "--nonsense"], "No such option: --nonsense"),
        (["split", "a", "--ep-size", "two"], "Invalid value for '--ep-size'"),
        (["split", "a", "--ep-size", 2, "--dtype", "int8"], "Invalid value for '--dtype'"),
        (["split", "--ep-size", 2, "--from", "nowhere"], "Invalid value for '--from'"),
        (["nonsense"], "No such command 'nonsense'."),
        ([], "No such option: --json"),
    ],
)
def test_wrong_usage_with_json_is_one_document_too(argv: list[object], error: str) -> None:
    done = run_cli(*argv, "--json")
    document = json.loads(done.stdout)
    assert error in document.pop("error")
    assert document == {
        "hint": "Add --help to see the options.", "exit_code": 2, "kind": "UsageError",
        "where": None, "rule": None,
    }  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("Usage: ")
    assert error in done.stderr


def test_wrong_usage_without_json_leaves_stdout_empty() -> None:
    assert run_cli("split", "a").stdout == ""


def test_a_result_that_is_a_failure_is_the_only_document(shards: Path) -> None:
    (shards / "extra").write_text("")
    done = run_cli("verify", shards, "--json")
    assert done.returncode == 5
    assert json.loads(done.stdout)["ok"] is False


INTERRUPTED = """
import signal
from lorashard.cli import app
import lorashard.storage.remote as remote
remote.locate = lambda _: signal.raise_signal(signal.SIGINT)
import sys
sys.argv = ["lorashard", "inspect", "x"]
app.main()
"""


def test_ctrl_c_is_said() -> None:
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


STOPPED = """
import signal, sys
from lorashard.cli import app
import lorashard.{module} as module
module.{function} = lambda *_, **__: signal.raise_signal(signal.{sign})
sys.argv = ["lorashard", *sys.argv[1:]]
app.main()
"""


@pytest.mark.parametrize(
    ("command", "place", "sign", "said"),
    [
        ("split adapter --ep-size 2 -o new", "split.run:run_split", "SIGINT", "interrupted; new is as it was."),
        ("merge shards -o new", "merge:merge_shards", "SIGTERM", "stopped by SIGTERM; new is as it was."),
        ("reshard shards --ep-size 4 -o new", "reshard.reshard:reshard_shards", "SIGHUP", "stopped by SIGHUP; new is as it was."),
        ("convert shards -o new --layout fused", "convert.convert:write_conversion", "SIGINT", "interrupted; new is as it was."),
        ("pull shards --ep-rank 0 -o new", "transfer.pull:pull_shards", "SIGINT", "interrupted; what was fetched is kept, and the same command goes on from there."),
        ("push shards file:///there", "transfer.push:verify_shards", "SIGINT", "interrupted; file:///there is as it was."),
        ("push shards file:///there", "transfer.push:upload_shards", "SIGINT", "interrupted; file:///there is incomplete if it has no lorashard.json. Push again."),
        ("split adapter adapter2 --ep-size 2 -o new", "split.batch:run_concurrently", "SIGINT", "interrupted; 0 of 2 adapters are finished. The same command with --resume does the rest."),
    ],
)  # fmt: skip
def test_a_command_that_is_stopped_says_what_is_there(
    tmp_path: Path, command: str, place: str, sign: str, said: str
) -> None:
    save_adapter(tmp_path / "adapter")
    save_adapter(tmp_path / "adapter2")
    split_adapter(tmp_path / "adapter", tmp_path / "shards", SplitRequest(2))
    module, function = place.split(":")
    code = STOPPED.format(module=module, function=function, sign=sign)
    done = subprocess.run(
        [sys.executable, "-c", code, *command.split()], cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPO)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}[sign]
    assert done.stderr.splitlines()[-1] == said
    assert not (tmp_path / "new").exists()
