"""`lorashard split` of many adapters: each is done, or its failure is told."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.bench.generate import write_adapter
from tests.bench.measure import run_command
from tests.bench.models import MODELS, scale_layers
from tests.hub_server import HubServer
from tests.tiny import (
    RANK_FILES,
    contents,
    per_expert_tensors,
    run_cli,
    save_adapter,
    save_config,
    save_fused,
    save_pickled,
)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Three adapters with other values, one without weights, and a folder that is none."""
    folder = tmp_path / "runs"
    for number in range(3):
        save_adapter(folder / f"step-{number}", per_expert_tensors(seed=number))
    save_config(folder / "step-broken")
    (folder / "logs").mkdir()
    return folder


def statuses(printed: str) -> dict[str, str]:
    return {Path(item["adapter"]).name: item["status"] for item in json.loads(printed)}


def test_a_failure_is_told_and_the_rest_is_done(runs: Path, tmp_path: Path) -> None:
    done = run_cli("split", runs / "*", "--ep-size", 2, "-o", tmp_path / "out", "--workers", 2)
    assert done.returncode == 3
    assert sorted(os.listdir(tmp_path / "out")) == [f"step-{n}-ep2" for n in range(3)]
    assert "3 split, 0 already there, 1 failed\n" in done.stderr
    (error,) = re.findall("^error: (.*adapter_model.*)$", done.stderr, re.MULTILINE)
    assert error.startswith(f"{runs}/step-broken: no adapter_model.safetensors")
    assert f"  failed: {error}\n" in done.stderr
    hint = "Run it again with --resume to retry only those that failed."
    assert done.stderr.endswith(f"error: 1 of 4 adapters failed.\n  {hint}\n")
    assert sorted(done.stdout.split()) == [f"{tmp_path}/out/step-{n}-ep2" for n in range(3)]


def test_an_error_without_a_name_gets_that_of_its_adapter(runs: Path, tmp_path: Path) -> None:
    tensors = {n: t for n, t in per_expert_tensors().items() if ".experts.0." not in n}
    save_adapter(runs / "step-partial", tensors)
    named = (runs / "step-partial", runs / "step-broken")
    done = run_cli("split", *named, "--ep-size", 2, "-o", tmp_path / "out")
    assert f"error: {named[0]}: The adapter trains experts 1, 2, 3 and does not say" in done.stderr
    assert f"  failed: {named[0]}: The adapter trains experts" in done.stderr
    assert done.stderr.endswith(
        "error: 2 of 2 adapters failed.\n  None was split; the messages above say why.\n"
    )


def test_a_note_about_many_is_said_once(runs: Path, tmp_path: Path) -> None:
    for number in range(3):
        save_fused(runs / f"step-{number}", base_model_name_or_path="/local/model")
    names = [runs / f"step-{number}" for number in range(3)]
    done = run_cli("split", *names, "--ep-size", 2, "-o", tmp_path / "out")
    notes = [line for line in done.stderr.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1
    assert notes[0].startswith(f"note: {names[0]} and 2 more: Neither the adapter nor --model says")


def test_json_has_them_all_in_the_order_named(runs: Path, tmp_path: Path) -> None:
    named = ["step-2", "step-broken", "step-0"]
    options = ("--ep-size", 2, "-o", tmp_path / "out", "--json")
    done = run_cli("split", *(runs / name for name in named), *options)
    assert done.returncode == 3
    assert list(statuses(done.stdout)) == named
    failed = json.loads(done.stdout)[1]
    assert failed["status"] == "failed"
    assert failed["exit_code"] == 3
    assert "no adapter_model.safetensors" in failed["error"]


def test_each_is_what_it_would_be_alone(runs: Path, tmp_path: Path) -> None:
    save_pickled(tmp_path / "runs" / "pickled")
    options = ("--ep-size", 3, "--dtype", "float16", "--allow-pickle", "-q")
    names = ["pickled", *(f"step-{number}" for number in range(3))]
    done = run_cli("split", *(runs / n for n in names), *options, "-o", tmp_path, "--workers", 4)
    assert done.returncode == 0, done.stderr
    for name in names:
        alone = tmp_path / "alone" / name
        assert run_cli("split", runs / name, *options, "-o", alone).returncode == 0
        assert contents(tmp_path / f"{name}-ep3") == contents(alone)


def test_a_list_comes_from_a_file_or_stdin(runs: Path, tmp_path: Path) -> None:
    text = f"# the last two\n{runs}/step-1\n\n{runs}/step-2\n"
    (tmp_path / "list").write_text(text)
    options = ("--ep-size", 2, "--json", "-o", tmp_path / "out")
    done = run_cli("split", "--from", tmp_path / "list", *options)
    assert statuses(done.stdout) == {"step-1": "done", "step-2": "done"}
    command = [sys.executable, "-m", "lorashard", "split", "--from", "-", *map(str, options)]
    again = subprocess.run(
        [*command, "--force"], input=text, capture_output=True, text=True, check=True
    )
    assert statuses(again.stdout) == {"step-1": "done", "step-2": "done"}


def test_a_list_that_has_no_end_is_refused_and_a_pipe_is_read(runs: Path, tmp_path: Path) -> None:
    options = ("--ep-size", 2, "--json", "-o", tmp_path / "out")
    done = run_cli("split", "--from", "/dev/zero", *options)
    assert done.returncode == 3
    assert "error: /dev/zero: more than 16777216 characters are no list of adapters." in done.stderr
    command = f'exec "$0" -m lorashard split --from <(echo {runs}/step-1) "$@"'
    piped = subprocess.run(
        ["bash", "-c", command, sys.executable, *map(str, options)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert statuses(piped.stdout) == {"step-1": "done"}


def test_shards_that_lie_among_the_adapters_are_no_adapters(runs: Path) -> None:
    (runs / "step-broken" / "adapter_config.json").unlink()
    for expected in ("done", "skipped"):
        done = run_cli("split", runs / "*", "--ep-size", 2, "--resume", "--json")
        assert done.returncode == 0, done.stderr
        assert statuses(done.stdout) == {f"step-{n}": expected for n in range(3)}


def test_shards_that_a_shell_named_too_are_ignored(runs: Path) -> None:
    named = [runs / "step-0", runs / "step-0-ep2", runs / "step-1"]
    assert run_cli("split", runs / "step-0", "--ep-size", 2).returncode == 0
    done = run_cli("split", *named, "--ep-size", 2, "--resume", "--json")
    assert done.returncode == 0, done.stderr
    assert statuses(done.stdout) == {"step-0": "skipped", "step-0-ep2": "ignored", "step-1": "done"}
    assert "1 split, 1 already there, 0 failed, 1 ignored as shards\n" in done.stderr


def test_resume_leaves_what_is_there_and_writes_what_is_not(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    named = [runs / f"step-{number}" for number in range(3)]
    assert run_cli("split", *named, "--ep-size", 2, "-o", out).returncode == 0
    (out / "step-1-ep2" / "lorashard.json").unlink()
    for child in list((out / "step-1-ep2").iterdir()):
        child.unlink()
    before = (out / "step-0-ep2" / RANK_FILES[0]).stat().st_mtime_ns
    done = run_cli("split", *named, "--ep-size", 2, "-o", out, "--resume", "--json")
    assert done.returncode == 0, done.stderr
    assert list(statuses(done.stdout).values()) == ["skipped", "done", "skipped"]
    assert (out / "step-0-ep2" / RANK_FILES[0]).stat().st_mtime_ns == before


@pytest.mark.parametrize("change", ["values", "config", "placement", "dtype", "shards"])
def test_resume_does_not_take_another_adapters_shards_for_these(
    runs: Path, tmp_path: Path, change: str
) -> None:
    adapter, out = runs / "step-0", tmp_path / "out"
    assert run_cli("split", adapter, "--ep-size", 2, "-o", out).returncode == 0
    options: list[Any] = ["--ep-size", 2, "-o", out, "--resume"]
    if change == "values":  # the same names, shapes and sizes
        save_adapter(adapter, per_expert_tensors(seed=7))
    elif change == "config":
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 3}))
    elif change == "placement":
        options += ["--placement", "round_robin"]
    elif change == "dtype":
        options += ["--dtype", "float16"]
    else:
        path = out / RANK_FILES[0]
        path.write_bytes(path.read_bytes()[:-1])
    before = contents(out)
    done = run_cli("split", adapter, *options)
    assert done.returncode == 5
    assert "--force" in done.stderr
    assert contents(out) == before
    assert run_cli("split", adapter, *options, "--force").returncode == 0
    assert contents(out) != before
    assert "already there" in run_cli("split", adapter, *options).stderr


def test_a_pattern_that_means_nothing_is_an_error(tmp_path: Path) -> None:
    done = run_cli("split", tmp_path / "no*", "--ep-size", 2)
    assert done.returncode == 3
    assert "no adapter matches" in done.stderr
    assert run_cli("split", "--ep-size", 2).returncode == 3


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


def test_a_batch_that_is_interrupted_leaves_nothing_half_written(
    tmp_path: Path, hub: HubServer
) -> None:
    adapter = save_adapter(tmp_path / "adapter", per_expert_tensors(hidden=512, layers=3))
    weights = adapter / "adapter_model.safetensors"
    names = ("one", "two", "three")
    for name in names:
        hub.add_repo(f"owner/{name}", {path.name: path for path in adapter.iterdir()})
    hub.throttle(weights.name, bytes_per_s=weights.stat().st_size / 4)  # not done before the signal
    (tmp_path / "here").mkdir()
    command = [sys.executable, "-m", "lorashard", "split", *(f"hf://owner/{n}" for n in names)]
    environment = hub.environment(tmp_path / "hf")
    with subprocess.Popen(
        [*command, "--ep-size", "2"], cwd=tmp_path / "here", env=environment
    ) as process:
        deadline = time.monotonic() + 60
        while not list((tmp_path / "here").glob(".one-ep2*")):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.002)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    assert os.listdir(tmp_path / "here") == []


def test_a_collection_and_a_pattern_on_the_hub(tmp_path: Path, hub: HubServer, runs: Path) -> None:
    for name in ("step-0", "step-1"):
        files = {path.name: path for path in (runs / name).iterdir()}
        hub.add_repo(f"owner/{name}", files)
        hub.add_repo(f"owner/all-{name}", {f"{name}/{k}": v for k, v in files.items()})
    hub.add_collection("owner/adapters-0123", ["owner/step-0", "owner/gone", "owner/step-1"])
    env = hub.environment(tmp_path / "hf")
    options = ("--ep-size", 2, "-o", tmp_path / "out", "--json")
    done = run_cli("split", "hf://collections/owner/adapters-0123", *options, **env)
    assert done.returncode == 3
    assert statuses(done.stdout) == {"step-0": "done", "gone": "failed", "step-1": "done"}
    hub.clear()
    again = run_cli(
        "split", f"{hub.endpoint}/collections/owner/adapters-0123", "--resume", *options, **env
    )
    assert statuses(again.stdout) == {"step-0": "skipped", "gone": "failed", "step-1": "skipped"}
    weights = (runs / "step-0" / "adapter_model.safetensors").read_bytes()
    header = 8 + int.from_bytes(weights[:8], "little")
    assert hub.sent_bytes("adapter_model.safetensors") == 2 * header, "a commit says it all"
    parts = run_cli("split", "hf://owner/all-step-1/s*", "-o", tmp_path / "x", *options[:2], **env)
    assert parts.returncode == 0, parts.stderr
    assert os.listdir(tmp_path / "x") == ["step-1-ep2"]


def test_memory_does_not_grow_with_the_number_of_adapters(tmp_path: Path) -> None:
    model = scale_layers(MODELS["glm-4.5-air"], 2 / MODELS["glm-4.5-air"].num_layers)
    write_adapter(tmp_path / "one", model, "fused")
    peaks = []
    for count in (2, 8):
        links = [tmp_path / f"{count}-{number}" for number in range(count)]
        for link in links:
            link.symlink_to(tmp_path / "one")
        command = (sys.executable, "-m", "lorashard", "split", *links, "--ep-size", "2")
        peaks.append(run_command([*map(str, command), "-o", str(tmp_path / "out")]).peak_rss_bytes)
    assert peaks[1] < 1.15 * peaks[0], peaks


def test_a_line_of_a_list_that_is_not_utf_8_is_one_adapter(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "list").write_bytes(b"/caf\xe9/none\n" + bytes(adapter) + b"\n")
    done = run_cli("split", "--from", tmp_path / "list", "--ep-size", 2, "-o", tmp_path / "many")
    assert done.returncode == 3
    assert "1 split, 0 already there, 1 failed" in done.stderr


def test_joined_parts_are_the_whole_run(runs: Path, tmp_path: Path) -> None:
    """Five adapters, one of them broken, in one process and in three parts; twice, with --resume."""
    for number in (3, 4):
        save_adapter(runs / f"step-{number}", per_expert_tensors(seed=number))
    names = [f"{runs}/step-{name}" for name in (0, 1, "broken", 2, 3)]
    listed = tmp_path / "list.txt"
    listed.write_text("# a comment\n" + "\n".join(names) + "\n\n")

    def split(out: str, *options: object) -> tuple[int, list[dict[str, Any]]]:
        done = run_cli(
            "split", "--from", listed, "--ep-size", 2, "-o", tmp_path / out, "--json", *options
        )
        documents = json.loads(done.stdout.replace(f"{tmp_path}/{out}/", "OUT/"))
        return done.returncode, documents

    code, whole = split("whole")
    for status in ("done", "skipped"):
        parts = [split("parts", "--part", f"{index}/3", "--resume") for index in range(3)]
        assert [part_code for part_code, _ in parts] == [0, 0, code]
        assert [len(documents) for _, documents in parts] == [2, 2, 1]
        joined = {item["adapter"]: item for _, documents in parts for item in documents}
        expected = {
            item["adapter"]: item | {"status": status if item["status"] == "done" else "failed"}
            for item in whole
        }
        assert joined == expected
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_a_part_without_adapters_has_nothing_to_do(runs: Path, tmp_path: Path) -> None:
    """More machines than adapters: not an error, or a job of Kubernetes would try it again."""
    done = run_cli(
        "split", runs / "step-0", "--part", "3/4", "--ep-size", 2, "-o", tmp_path / "out", "--json"
    )
    assert (done.returncode, json.loads(done.stdout)) == (0, [])
    assert "0 split, 0 already there, 0 failed" in done.stderr


def test_a_part_that_is_none_is_told_before_anything_is_done(runs: Path, tmp_path: Path) -> None:
    done = run_cli("split", runs / "*", "--part", "4/4", "--ep-size", 2, "-o", tmp_path / "out")
    assert done.returncode == 3
    assert "There is no part 4/4." in done.stderr
    assert not (tmp_path / "out").exists()
