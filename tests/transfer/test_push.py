"""Shard directories published: what is there afterwards, and what is never there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lorashard import push_shards
from lorashard.uploading.card import is_untouched
from tests.hub_server import HubServer
from tests.tiny import (
    RANK_FILES,
    contents,
    mounted_tmpfs,
    per_expert_tensors,
    run_cli,
    save_adapter,
)

REPO = "owner/mine-ep2"
NAMES = {
    "adapter_config.json",
    "adapter_model.safetensors",
    "lorashard.json",
    "replicated.safetensors",
    *RANK_FILES,
}


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    adapter = save_adapter(tmp_path / "adapter", per_expert_tensors(hidden=64))
    assert run_cli("split", adapter, "--ep-size", 2, "-o", tmp_path / "mine-ep2").returncode == 0
    return tmp_path / "mine-ep2"


@pytest.fixture
def wider(tmp_path: Path, shards: Path) -> Path:
    """The same experts on four ranks."""
    out = tmp_path / "mine-ep4"
    assert run_cli("reshard", shards, "--ep-size", 4, "-o", out).returncode == 0
    return out


def push(
    hub: HubServer, shards: Path, target: str, *options: str, token: str | None = HubServer.token
) -> Any:
    home = shards.parent / "hf"
    return run_cli("push", shards, target, *options, **hub.environment(home, token))


class Counts:
    """The bytes of each stage: as they were said first, and as they were done."""

    def __init__(self) -> None:
        self.expected: dict[str, int] = {}
        self.done: dict[str, int] = {}

    def begin(self, stage: str, size_bytes: int) -> None:
        self.stage = stage
        self.expected[stage], self.done[stage] = size_bytes, 0

    def advance(self, size_bytes: int) -> None:
        self.done[self.stage] += size_bytes


def commits(hub: HubServer, repo: str = REPO) -> int:
    return len(hub.repos[repo].commits)


def test_what_is_pushed_can_be_pulled(tmp_path: Path, hub: HubServer, shards: Path) -> None:
    done = push(hub, shards, f"hf://{REPO}", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["revision"] == hub.head(REPO)
    assert set(hub.files(REPO)) == NAMES | {"README.md", ".gitattributes"}
    out, env = tmp_path / "out", hub.environment(tmp_path / "pods")
    assert run_cli("pull", REPO, "--node-ranks", "0-1", "-o", out, **env).returncode == 0
    assert contents(out) == contents(shards)


def test_the_card_says_what_it_is_and_its_first_command_works(
    tmp_path: Path, hub: HubServer, shards: Path
) -> None:
    adapter = tmp_path / "adapter"
    hub.add_repo("owner/source", {path.name: path for path in adapter.iterdir()})
    env = hub.environment(tmp_path / "hf", hub.token)
    out = tmp_path / "from-hub"
    split = ("split", "owner/source", "--ep-size", 3, "--placement", "round_robin", "-o", out)
    assert run_cli(*split, **env).returncode == 0
    assert push(hub, out, f"hf://{REPO}").returncode == 0
    card = hub.read(REPO, "README.md").decode()
    assert "base_model: some/qwen3-moe\n" in card
    assert f"`owner/source` at `{hub.head('owner/source')}`" in card
    assert "round_robin, 3 expert-parallel ranks" in card
    pull, serve = card.split("```\n")[1].split("\n", 1)
    for flag in ("-tp 3", "--enable-expert-parallel", "--expert-placement-strategy round_robin"):
        assert flag in serve
    (tmp_path / "pod").mkdir()
    command = pull.replace("lorashard", f"{sys.executable} -m lorashard", 1)
    subprocess.run(command, shell=True, check=True, cwd=tmp_path / "pod", env=env)
    assert f"=./{REPO.split('/')[1]}" in serve
    assert contents(tmp_path / "pod" / "mine-ep2") == contents(out)


def test_another_placement_replaces_the_old_one_in_one_commit(
    hub: HubServer, shards: Path, wider: Path
) -> None:
    push(hub, shards, f"hf://{REPO}")
    first, before = hub.head(REPO), commits(hub)
    done = push(hub, wider, f"hf://{REPO}")
    assert done.returncode == 0, done.stderr
    assert commits(hub) == before + 1
    assert not set(RANK_FILES) & set(hub.files(REPO))
    assert set(RANK_FILES) < set(hub.files(REPO, first)), "the history keeps the old one"
    assert "4 expert-parallel ranks" in hub.read(REPO, "README.md").decode()


def test_a_branch_and_a_folder_are_made(hub: HubServer, shards: Path) -> None:
    assert push(hub, shards, f"hf://{REPO}@runs/ep2").returncode == 0
    assert {f"ep2/{name}" for name in NAMES} < set(hub.files(REPO, "runs"))
    assert hub.files(REPO, "main") == [".gitattributes"]


def test_a_card_that_someone_has_edited_stays(hub: HubServer, shards: Path, wider: Path) -> None:
    push(hub, shards, f"hf://{REPO}")
    edited = hub.read(REPO, "README.md").replace(b"A LoRA adapter", b"My best adapter")
    hub.commit(REPO, {"README.md": edited})
    done = push(hub, wider, f"hf://{REPO}")
    assert "was edited" in done.stderr
    assert hub.read(REPO, "README.md") == edited


def test_a_repository_with_an_adapter_in_it_is_left_alone(hub: HubServer, shards: Path) -> None:
    adapter = shards.parent / "adapter"
    hub.add_repo("owner/adapter", {path.name: path for path in adapter.iterdir()})
    done = push(hub, shards, "hf://owner/adapter")
    assert done.returncode == 5
    assert "hf://owner/adapter/ep2" in done.stderr
    assert commits(hub, "owner/adapter") == 1
    assert push(hub, shards, "hf://owner/adapter/ep2").returncode == 0


def test_shards_without_a_notice_are_pushed_with_one(
    tmp_path: Path, hub: HubServer, shards: Path
) -> None:
    notice = (shards / "adapter_model.safetensors").read_bytes()
    (shards / "adapter_model.safetensors").unlink()
    assert push(hub, shards, f"hf://{REPO}").returncode == 0
    assert hub.read(REPO, "adapter_model.safetensors") == notice
    for _ in range(2):  # also onto itself
        done = run_cli("push", shards, (tmp_path / "there").as_uri(), "--force")
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "there" / "adapter_model.safetensors").read_bytes() == notice


def test_an_adapter_as_small_as_the_notice_is_left_alone(
    tmp_path: Path, hub: HubServer, shards: Path
) -> None:
    size = (shards / "adapter_model.safetensors").stat().st_size
    folder = tmp_path / "there"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(bytes(size))
    hub.add_repo("owner/small", {path.name: path for path in folder.iterdir()})
    assert push(hub, shards, "hf://owner/small").returncode == 5
    assert run_cli("push", shards, folder.as_uri(), "--force").returncode == 5


def test_a_damaged_directory_is_not_pushed(hub: HubServer, shards: Path) -> None:
    path = shards / RANK_FILES[1]
    path.write_bytes(path.read_bytes()[:-1] + b"\x11")
    done = push(hub, shards, f"hf://{REPO}")
    assert done.returncode == 5
    assert RANK_FILES[1] in done.stderr
    assert not hub.requests


@pytest.mark.parametrize("token", [None, HubServer.stranger_token])
def test_without_a_token_that_may_write_nothing_is_changed(
    hub: HubServer, shards: Path, wider: Path, token: str | None
) -> None:
    push(hub, shards, f"hf://{REPO}")
    before = commits(hub)
    for place in (f"hf://{REPO}", "hf://owner/new"):
        done = push(hub, wider, place, token=token)
        assert done.returncode == 3, done.stderr
        assert "HF_TOKEN" in done.stderr
    assert commits(hub) == before
    assert "owner/new" not in hub.repos


def test_a_private_repository_stays_so(tmp_path: Path, hub: HubServer, shards: Path) -> None:
    assert push(hub, shards, f"hf://{REPO}", "--private").returncode == 0
    assert hub.repos[REPO].private
    env = hub.environment(tmp_path / "pod")
    done = run_cli("pull", f"hf://{REPO}", "--ep-rank", 0, "-o", tmp_path / "out", **env)
    assert done.returncode == 3
    assert "HF_TOKEN" in done.stderr


def test_someone_who_was_faster_is_not_overwritten(
    hub: HubServer, shards: Path, wider: Path
) -> None:
    push(hub, shards, f"hf://{REPO}")
    hub.when("/commit/", lambda: hub.commit(REPO, {"theirs.txt": b"x"}))
    done = push(hub, wider, f"hf://{REPO}")
    assert done.returncode == 3, done.stdout
    assert "run it again" in done.stderr
    assert set(RANK_FILES) | {"theirs.txt"} < set(hub.files(REPO))
    assert push(hub, wider, f"hf://{REPO}").returncode == 0


def test_an_upload_that_breaks_changes_nothing(hub: HubServer, shards: Path, wider: Path) -> None:
    push(hub, shards, f"hf://{REPO}")
    before = commits(hub)
    hub.fail("/upload/", status=403, times=None)
    assert push(hub, wider, f"hf://{REPO}").returncode == 3
    assert commits(hub) == before
    hub.mend()
    assert push(hub, wider, f"hf://{REPO}").returncode == 0


def test_a_dry_run_says_what_a_push_would_do_and_changes_nothing(
    hub: HubServer, shards: Path, wider: Path
) -> None:
    done = push(hub, shards, f"hf://{REPO}", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    assert REPO not in hub.repos
    document = json.loads(done.stdout)
    assert (document["dry_run"], document["revision"], document["removed"]) == (True, None, [])
    assert set(document["files"]) == NAMES - {"adapter_model.safetensors"}
    assert push(hub, shards, f"hf://{REPO}").returncode == 0
    before = commits(hub)
    for target in (f"hf://{REPO}", f"hf://{REPO}@v2"):
        done = push(hub, wider, target, "--dry-run")
        assert done.returncode == 0, done.stderr
        assert f"note: would be removed there: {', '.join(RANK_FILES)}\n" in done.stderr
        assert done.stderr.endswith(f" to {target} (dry run, nothing uploaded)\n")
    assert commits(hub) == before
    assert set(hub.repos[REPO].branches) == {"main"}


def test_a_dry_run_elsewhere_refuses_what_a_push_would_refuse(
    hub: HubServer, shards: Path, tmp_path: Path
) -> None:
    there = tmp_path / "there"
    assert push(hub, shards, there.as_uri(), "--dry-run").returncode == 0
    assert not there.exists()
    assert push(hub, shards, there.as_uri()).returncode == 0
    before = contents(there)
    refused = push(hub, shards, there.as_uri(), "--dry-run")
    assert refused.returncode == 5
    assert "--force replaces it." in refused.stderr
    assert push(hub, shards, there.as_uri(), "--dry-run", "--force").returncode == 0
    assert contents(there) == before
    (shards / RANK_FILES[0]).write_bytes(b"damaged")
    assert push(hub, shards, there.as_uri(), "--dry-run", "--force").returncode == 5


def test_an_upload_counts_each_byte_once(shards: Path, tmp_path: Path) -> None:
    total = sum((shards / name).stat().st_size for name in ("replicated.safetensors", *RANK_FILES))
    for target in (tmp_path / "there").as_uri(), "memory://there":
        counts = Counts()
        push_shards(shards, target, stage=counts.begin, progress=counts.advance)
        assert list(counts.expected) == ["check", "upload"]
        assert counts.done == counts.expected
        assert counts.expected["upload"] == total


def test_a_full_disk_elsewhere_is_called_so(shards: Path, tmp_path: Path) -> None:
    with mounted_tmpfs(tmp_path / "disk", "size=8k") as mounted:
        if not mounted:
            pytest.skip("mounting needs root")
        there = (tmp_path / "disk" / "there").as_uri()
        done = run_cli("push", shards, there)
    assert done.returncode == 3
    assert f"error: {there}: no space left there.\n" in done.stderr


def test_elsewhere_the_manifest_goes_up_last_and_only_force_replaces(
    tmp_path: Path, shards: Path, wider: Path
) -> None:
    place = f"file://{tmp_path}/bucket/mine"
    assert run_cli("push", shards, place).returncode == 0
    target = tmp_path / "bucket" / "mine"
    files = contents(target)
    assert is_untouched(files.pop("README.md").decode())
    assert files == contents(shards)
    newest = max(target.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert newest.name == "lorashard.json"
    refused = run_cli("push", wider, place)
    assert refused.returncode == 5
    assert "--force" in refused.stderr
    assert set(RANK_FILES) < set(os.listdir(target))
    assert run_cli("push", wider, place, "--force").returncode == 0
    assert {k: v for k, v in contents(target).items() if k != "README.md"} == contents(wider)


def test_what_was_left_by_a_push_that_broke_is_in_nobodys_way(tmp_path: Path, shards: Path) -> None:
    target = tmp_path / "bucket"
    target.mkdir()
    shutil.copy(shards / RANK_FILES[0], target)
    assert run_cli("push", shards, f"file://{target}").returncode == 0
    assert run_cli("verify", target).returncode == 0


def test_a_local_path_is_no_target(shards: Path, tmp_path: Path) -> None:
    done = run_cli("push", shards, tmp_path / "elsewhere")
    assert done.returncode == 3
    assert "hf://owner/name" in done.stderr


@pytest.mark.parametrize("name", ["README.md", "adapter_model.safetensors", "lorashard.json"])
def test_an_empty_file_of_an_upload_that_ended_is_written_again(
    tmp_path: Path, shards: Path, name: str
) -> None:
    whole, target = tmp_path / "whole", tmp_path / "bucket"
    assert run_cli("push", shards, f"file://{whole}").returncode == 0
    target.mkdir()
    (target / name).touch()
    assert run_cli("push", shards, f"file://{target}", "--force").returncode == 0
    assert set(contents(target)) == set(contents(whole))
    assert (target / name).stat().st_size > 0
