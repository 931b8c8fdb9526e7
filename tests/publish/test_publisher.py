"""Versions on two servers over HTTP: all or none, the old one until the new one answers, what is left."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from lorashard import AdapterWriter, Publisher, SplitRequest, split_adapter, verify_shards
from lorashard.errors import ManifestError, ServerError, ShardError
from lorashard.storage.locked_directory import locked_directory
from lorashard.storage.spares import SPARE_NAME
from tests.lora_endpoints import Endpoints
from tests.tiny import RANK_FILES, contents, per_expert_tensors, save_adapter

Servers = tuple[Endpoints, Endpoints]


@pytest.fixture
def servers() -> Iterator[Servers]:
    with ExitStack() as stack:
        yield (
            stack.enter_context(Endpoints().running()),
            stack.enter_context(Endpoints().running()),
        )


def publisher_of(tmp_path: Path, servers: tuple[Endpoints, ...], **options: Any) -> Publisher:
    urls = [server.url for server in servers]
    return Publisher(tmp_path / "versions", "policy", servers=urls, **{"timeout_s": 20} | options)


def write(publisher: Publisher, *versions: int) -> None:
    """What the trainer commits, with other weights for each version."""
    for version in versions:
        path = publisher.path(version)
        adapter = path.parent.parent / f"adapter-{version}"
        save_adapter(adapter, per_expert_tensors(seed=version))
        split_adapter(adapter, path, SplitRequest(ep_size=2))


def publish_all(publisher: Publisher, *versions: int) -> None:
    for version in versions:
        write(publisher, version)
        publisher.publish(version)


def served(server: Endpoints) -> list[str]:
    return sorted(server.loaded)


def present(tmp_path: Path) -> list[str]:
    """What is in the directory, but for the records of what was published."""
    found = os.listdir(tmp_path / "versions")
    return sorted(name for name in found if not name.endswith(".lorashard-published"))


def names(*versions: int) -> list[str]:
    return [f"policy-v{version:05}" for version in versions]


def test_a_version_is_on_all_servers_under_its_own_name_and_path(
    tmp_path: Path, servers: Servers
) -> None:
    publisher = publisher_of(tmp_path, servers)
    write(publisher, 17)
    published = publisher.publish(17)
    path = tmp_path / "versions" / "policy-v00017"
    assert (published.version, published.name, published.path) == (17, "policy-v00017", path)
    assert published.servers == tuple(server.url for server in servers)
    assert published.removal.versions == published.removal.left == ()
    for server in servers:
        assert server.paths == {"policy-v00017": str(path)}


@pytest.mark.parametrize("keep", [1, 3])
def test_the_last_k_versions_stay(tmp_path: Path, servers: Servers, keep: int) -> None:
    publisher = publisher_of(tmp_path, servers, keep=keep)
    for version in range(5):
        write(publisher, version)
        removed = publisher.publish(version).removal.versions
        assert removed == (() if version < keep else (version - keep,))
        kept = names(*range(max(0, version - keep + 1), version + 1))
        assert present(tmp_path) == served(servers[0]) == served(servers[1]) == kept


def test_the_old_version_is_unloaded_after_the_new_one_has_answered(
    tmp_path: Path, servers: Servers
) -> None:
    publish_all(publisher_of(tmp_path, servers, keep=1), 1, 2)
    for server in servers:
        of_new = server.requests.index("/v1/completions policy-v00002")
        assert of_new < server.requests.index("/v1/unload_lora_adapter policy-v00001")


def test_if_one_server_does_not_load_it_none_has_it(tmp_path: Path, servers: Servers) -> None:
    publisher = publisher_of(tmp_path, servers, keep=1)
    publish_all(publisher, 1)
    write(publisher, 2)
    servers[1].refused.add("policy-v00002")
    with pytest.raises(ServerError) as caught:
        publisher.publish(2)
    assert "policy-v00002: 1 of 2 servers did not take it: " in caught.value.message
    assert f"{servers[1].url}: /v1/load_lora_adapter answers 500" in caught.value.message
    assert "policy-v00002 is not for this server." in caught.value.message
    assert servers[0].url not in caught.value.message
    assert len(caught.value.errors) == 1
    assert "loaded policy-v00002" in servers[0].events
    for server in servers:
        assert served(server) == names(1)
        assert server.complete({"model": "policy-v00001", "prompt": [1]})[0] == 200
    assert present(tmp_path) == names(1, 2)
    servers[1].refused.clear()
    assert publisher.publish(2).removal.versions == (1,)


def test_if_one_server_loads_it_and_has_no_answer_none_has_it(
    tmp_path: Path, servers: Servers
) -> None:
    publisher = publisher_of(tmp_path, servers, keep=1)
    publish_all(publisher, 1)
    write(publisher, 2)
    servers[0].silent.add("policy-v00002")
    with pytest.raises(ServerError, match=r"answers 500 \(The engine is dead\.\)"):
        publisher.publish(2)
    for server in servers:
        assert "loaded policy-v00002" in server.events
        assert served(server) == names(1)


def test_all_servers_that_failed_are_named(tmp_path: Path, servers: Servers) -> None:
    publisher = publisher_of(tmp_path, servers)
    write(publisher, 1)
    for server in servers:
        server.refused.add("policy-v00001")
    with pytest.raises(ServerError) as caught:
        publisher.publish(1)
    assert all(server.url in caught.value.message for server in servers)


def test_a_server_that_is_down_is_known_before_others_load(
    tmp_path: Path, servers: Servers
) -> None:
    publisher = publisher_of(tmp_path, servers)
    write(publisher, 1)
    servers[1].stop()
    with pytest.raises(ServerError, match=r"does not answer \(ConnectionRefusedError"):
        publisher.publish(1)
    assert servers[0].events == []


def test_a_server_that_dies_while_it_loads_leaves_the_version_on_none(
    tmp_path: Path, servers: Servers
) -> None:
    publisher = publisher_of(tmp_path, servers)
    write(publisher, 1)
    servers[1].hung_up.add("/v1/load_lora_adapter")
    servers[1].hung_up.add("/v1/unload_lora_adapter")
    with pytest.raises(ServerError) as caught:
        publisher.publish(1)
    assert served(servers[0]) == []
    assert caught.value.hint is not None
    assert "It may have been loaded where it could not be unloaded again: " in caught.value.hint
    assert f"{servers[1].url}: /v1/unload_lora_adapter does not answer" in caught.value.hint


def test_what_a_server_does_not_unload_stays_until_it_does(
    tmp_path: Path, servers: Servers
) -> None:
    publisher = publisher_of(tmp_path, servers, keep=1)
    publish_all(publisher, 1)
    write(publisher, 2)
    servers[1].hung_up.add("/v1/unload_lora_adapter")
    removal = publisher.publish(2).removal
    assert removal.versions == ()
    (left,) = removal.left
    assert left.startswith(f"policy-v00001: {servers[1].url}: /v1/unload_lora_adapter does not ans")
    assert present(tmp_path) == names(1, 2)
    assert served(servers[0]) == names(2)
    servers[1].hung_up.clear()
    write(publisher, 3)
    removal = publisher.publish(3).removal
    assert (removal.versions, removal.left) == ((1, 2), ())
    assert present(tmp_path) == served(servers[0]) == served(servers[1]) == names(3)


def test_a_directory_that_a_server_lists_under_another_name_stays(
    tmp_path: Path, servers: Servers
) -> None:
    publisher = publisher_of(tmp_path, servers, keep=1)
    publish_all(publisher, 1)
    servers[0].load("best", str(publisher.path(1)))
    write(publisher, 2)
    assert publisher.publish(2).removal.left == (f"policy-v00001: {servers[0].url} still lists it",)
    assert present(tmp_path) == names(1, 2)


def test_a_server_that_has_started_again_is_no_error(tmp_path: Path, servers: Servers) -> None:
    publisher = publisher_of(tmp_path, servers, keep=1)
    publish_all(publisher, 1)
    servers[1].stop()
    with Endpoints(port=servers[1].server_port).running() as started:
        write(publisher, 2)
        removal = publisher.publish(2).removal
        assert (removal.versions, removal.left) == ((1,), ())
        assert started.events == ["loaded policy-v00002"]


def test_a_trainer_that_has_started_again_removes_what_the_first_has_published(
    tmp_path: Path, servers: Servers
) -> None:
    publish_all(publisher_of(tmp_path, servers), 1, 2)
    publish_all(publisher_of(tmp_path, servers), 3)
    assert present(tmp_path) == served(servers[0]) == names(2, 3)


def test_a_version_published_twice_is_loaded_once(tmp_path: Path, servers: Servers) -> None:
    publisher = publisher_of(tmp_path, servers)
    publish_all(publisher, 1)
    servers[1].unload("policy-v00001")  # as if the first call had been killed between the two
    publisher.publish(1)
    assert servers[0].events == ["loaded policy-v00001"]
    assert served(servers[1]) == names(1)


def test_a_version_that_was_served_before_stays_served_if_publishing_it_again_fails(
    tmp_path: Path, servers: Servers
) -> None:
    publisher = publisher_of(tmp_path, servers)
    publish_all(publisher, 1)
    servers[1].unload("policy-v00001")
    servers[1].refused.add("policy-v00001")
    with pytest.raises(ServerError):
        publisher.publish(1)
    assert served(servers[0]) == names(1)


def test_a_name_that_a_server_has_from_another_path_is_refused(
    tmp_path: Path, servers: Servers
) -> None:
    publisher = publisher_of(tmp_path, servers)
    write(publisher, 1)
    other = tmp_path / "adapter-1"
    servers[0].load("policy-v00001", str(other))
    with pytest.raises(ServerError, match=f"has already been loaded, from {other}"):
        publisher.publish(1)
    assert served(servers[0]) == names(1)
    assert served(servers[1]) == []


def test_the_same_names_from_another_directory_are_left_to_their_owner(
    tmp_path: Path, servers: Servers
) -> None:
    (tmp_path / "other").mkdir()
    publish_all(publisher_of(tmp_path / "other", servers), 1)
    publish_all(publisher_of(tmp_path, servers, keep=1), 2, 3)
    assert served(servers[0]) == names(1, 3)


@pytest.mark.parametrize("foreign", ["more", "no shards", "file", "link"])
def test_what_is_not_ours_is_never_deleted(tmp_path: Path, servers: Servers, foreign: str) -> None:
    publisher = publisher_of(tmp_path, servers, keep=1)
    write(publisher, 1)
    path = publisher.path(1)
    if foreign == "more":
        (path / "notes.txt").write_text("mine")
    elif foreign == "no shards":
        (path / "lorashard.json").unlink()
    else:
        path.rename(tmp_path / "elsewhere")
        if foreign == "link":
            path.symlink_to(tmp_path / "elsewhere")
        else:
            path.write_text("mine")
    before = contents(tmp_path / "versions")
    write(publisher, 2)
    (left,) = publisher.publish(2).removal.left
    assert left.startswith("policy-v00001: ")
    after = contents(tmp_path / "versions").items()
    assert {name: data for name, data in after if "policy-v00002" not in name} == before


def test_directories_with_similar_names_are_not_touched(tmp_path: Path, servers: Servers) -> None:
    publisher = publisher_of(tmp_path, servers, keep=1)
    similar = [
        "policy-v1", "policy-v000001", "policy-v00001-best", "policy2-v00001", "my-policy-v00001",
        ".policy-v1.lorashard-removed", ".policy-v00009.lorashard-partial",
    ]  # fmt: skip
    write(publisher, 1)
    for name in similar:
        publisher.path(1).rename(tmp_path / "versions" / name)
        write(publisher, 1)
    publish_all(publisher, 2, 3)
    assert present(tmp_path) == sorted([*similar, *names(3)])


def test_what_a_killed_run_was_deleting_goes_with_the_next_version(
    tmp_path: Path, servers: Servers
) -> None:
    publisher = publisher_of(tmp_path, servers)
    leftover = tmp_path / "versions" / ".policy-v00001.lorashard-removed"
    leftover.mkdir(parents=True)
    (leftover / RANK_FILES[0]).write_bytes(b"half")
    publish_all(publisher, 2)
    assert present(tmp_path) == names(2)


def inodes(publisher: Publisher, version: int) -> list[int]:
    return [(publisher.path(version) / name).stat().st_ino for name in RANK_FILES]


def write_in_place(publisher: Publisher, *versions: int) -> None:
    """What a trainer commits, with other weights for each version."""
    for version in versions:
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["gate_proj"]}
        writer = AdapterWriter(publisher.path(version), config, ep_size=2)
        for name, tensor in per_expert_tensors(seed=version).items():
            writer.tensor(name, tensor)
        writer.commit()


@pytest.mark.parametrize("keep", [1, 3])
def test_in_memory_a_version_is_written_to_the_files_of_the_last_that_was_removed(
    memory_path: Path, servers: Servers, keep: int
) -> None:
    publisher, written = publisher_of(memory_path, servers, keep=keep), []
    for version in range(2 * keep + 3):
        write_in_place(publisher, version)
        written.append(inodes(publisher, version))
        removed = publisher.publish(version).removal.versions
        assert removed == (() if version < keep else (version - keep,))
        kept = names(*range(max(0, version - keep + 1), version + 1))
        assert served(servers[0]) == served(servers[1]) == kept
        assert present(memory_path) == sorted([*kept, *([SPARE_NAME] if removed else [])])
        for kept_version in kept:
            verify_shards(memory_path / "versions" / kept_version)
    assert written[keep + 1 :] == written[: -keep - 1]
    assert publisher.withdraw().left == ()
    assert present(memory_path) == []


def test_who_wants_no_spare_files_has_none(memory_path: Path, servers: Servers) -> None:
    publisher = publisher_of(memory_path, servers, keep=1, keep_spare=False)
    for version in range(3):
        write_in_place(publisher, version)
        publisher.publish(version)
    assert present(memory_path) == names(2)


def test_several_versions_that_go_at_once_leave_one_spare(
    memory_path: Path, servers: Servers
) -> None:
    publish_all(publisher_of(memory_path, servers, keep=4), 0, 1, 2, 3)
    publish_all(publisher_of(memory_path, servers, keep=1), 4)
    assert present(memory_path) == [SPARE_NAME, *names(4)]


def test_a_version_that_failed_takes_no_place_of_one_that_is_served(
    tmp_path: Path, servers: Servers
) -> None:
    publisher = publisher_of(tmp_path, servers)
    publish_all(publisher, 1)
    write(publisher, 2)
    servers[0].refused.add("policy-v00002")
    with pytest.raises(ServerError):
        publisher.publish(2)
    publish_all(publisher, 3)
    assert served(servers[0]) == served(servers[1]) == names(1, 3)
    publish_all(publisher, 4)
    assert present(tmp_path) == served(servers[0]) == names(3, 4)


def test_versions_ahead_of_the_published_one_are_left_alone(
    tmp_path: Path, servers: Servers
) -> None:
    publisher = publisher_of(tmp_path, servers, keep=1)
    write(publisher, 8)
    publish_all(publisher, 6, 7)
    assert present(tmp_path) == names(7, 8)
    assert served(servers[0]) == names(7)


def test_all_versions_can_be_withdrawn(tmp_path: Path, servers: Servers) -> None:
    publisher = publisher_of(tmp_path, servers)
    publish_all(publisher, 1, 2)
    removal = publisher.withdraw()
    assert (removal.versions, removal.left) == ((1, 2), ())
    assert os.listdir(tmp_path / "versions") == served(servers[0]) == served(servers[1]) == []


def test_a_version_that_was_written_again_is_refused_while_a_server_has_the_first(
    tmp_path: Path, servers: Servers
) -> None:
    publisher = publisher_of(tmp_path, servers)
    publish_all(publisher, 1)
    servers[0].unload("policy-v00001")
    shutil.rmtree(publisher.path(1))
    adapter = save_adapter(tmp_path / "other", per_expert_tensors(seed=99))
    split_adapter(adapter, publisher.path(1), SplitRequest(ep_size=2))
    with pytest.raises(ShardError, match="written again after a server had loaded it"):
        publisher_of(tmp_path, servers).publish(1)
    assert served(servers[0]) == []
    servers[1].unload("policy-v00001")
    publisher.publish(1)
    assert served(servers[0]) == served(servers[1]) == names(1)


def test_while_a_server_is_down_nothing_is_deleted(tmp_path: Path, servers: Servers) -> None:
    publisher = publisher_of(tmp_path, servers)
    publish_all(publisher, 1, 2)
    servers[1].stop()
    removal = publisher.withdraw()
    assert removal.versions == ()
    assert [line.partition(": ")[0] for line in removal.left] == names(1, 2)
    assert present(tmp_path) == names(1, 2)


@pytest.mark.parametrize("damage", ["manifest", "rank file", "cut", "config"])
def test_a_damaged_directory_reaches_no_server(
    tmp_path: Path, servers: Servers, damage: str
) -> None:
    publisher = publisher_of(tmp_path, servers)
    write(publisher, 1)
    path = publisher.path(1)
    if damage == "manifest":
        (path / "lorashard.json").unlink()
    elif damage == "rank file":
        (path / RANK_FILES[1]).unlink()
    elif damage == "cut":
        os.truncate(path / RANK_FILES[1], (path / RANK_FILES[1]).stat().st_size - 1)
    else:
        (path / "adapter_config.json").write_text("{}")
    with pytest.raises(ManifestError if damage == "manifest" else ShardError):
        publisher.publish(1)
    assert servers[0].requests == []


def test_servers_are_contacted_at_the_same_time(tmp_path: Path, servers: Servers) -> None:
    publisher = publisher_of(tmp_path, servers)
    write(publisher, 1)
    gate = threading.Barrier(2, timeout=15)  # one load alone would not pass it
    servers[0].gate = servers[1].gate = gate
    publisher.publish(1)
    assert served(servers[0]) == served(servers[1]) == names(1)


def test_the_key_is_sent_with_every_request_and_never_shown(tmp_path: Path) -> None:
    with Endpoints(api_key="sesame").running() as server:
        publisher = publisher_of(tmp_path, (server,), keep=1, api_key="sesame")
        publish_all(publisher, 1, 2)
        assert served(server) == names(2)
        write(publisher, 3)
        wrong = publisher_of(tmp_path, (server,), api_key="wrong-key")
        with pytest.raises(ServerError, match="answers 401") as caught:
            wrong.publish(3)
    assert "api_key" in str(caught.value)
    assert "wrong-key" not in str(caught.value)
    with pytest.raises(ValueError, match="api_key") as refused:
        publisher_of(tmp_path, (server,), api_key="sesame\n")
    assert "sesame" not in str(refused.value)


def test_servers_may_see_the_directory_under_another_path(tmp_path: Path, servers: Servers) -> None:
    mount = tmp_path / "mount"
    mount.symlink_to(tmp_path / "versions")
    publisher = publisher_of(tmp_path, servers, keep=1, directory_on_servers=f"{mount}/")
    publish_all(publisher, 1, 2)
    assert servers[0].paths["policy-v00002"] == f"{mount}/policy-v00002"
    assert present(tmp_path) == served(servers[0]) == names(2)


def test_a_redirect_is_not_followed(tmp_path: Path, servers: Servers) -> None:
    publisher = publisher_of(tmp_path, servers[:1], api_key="sesame")
    write(publisher, 1)
    servers[0].redirected_to = servers[1].url
    with pytest.raises(ServerError, match="answers 307"):
        publisher.publish(1)
    assert servers[1].requests == []


def test_what_is_no_vllm_server_is_named(tmp_path: Path, servers: Servers) -> None:
    publisher = publisher_of(tmp_path, servers)
    write(publisher, 1)
    servers[1].nonsense = "<html>hello</html>"
    with pytest.raises(ServerError, match=f"{servers[1].url}: /v1/models does not answer as vLLM"):
        publisher.publish(1)
    servers[1].nonsense = '{"data": 3}'
    with pytest.raises(ServerError, match="no list of models"):
        publisher.publish(1)


def test_an_address_may_end_with_v1(tmp_path: Path, servers: Servers) -> None:
    urls = [f"{servers[0].url}/v1/", servers[0].url]
    publisher = Publisher(tmp_path / "versions", "policy", servers=urls)
    write(publisher, 1)
    assert publisher.publish(1).servers == (servers[0].url,)


def test_without_servers_directories_are_kept_by_their_numbers(tmp_path: Path) -> None:
    publish_all(publisher_of(tmp_path, ()), 1, 2, 4)
    assert present(tmp_path) == names(2, 4)


@pytest.mark.parametrize(
    "given",
    [
        {"name": "a/b"}, {"name": ".."}, {"name": ""}, {"keep": 0},
        {"servers": ["a:8000"]}, {"servers": ["ftp://a"]}, {"servers": ["http://me:secret@a"]},
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_at_once(tmp_path: Path, given: dict[str, Any]) -> None:
    options = {"directory": tmp_path, "name": "policy"} | given
    with pytest.raises(ValueError, match=r".") as caught:
        Publisher(**options)
    assert "secret" not in str(caught.value)


def test_versions_count_from_0(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="version -1"):
        publisher_of(tmp_path, ()).path(-1)


def test_what_a_killed_writer_left_of_an_older_version_goes_with_the_next_one(
    tmp_path: Path,
) -> None:
    publisher = publisher_of(tmp_path, ())
    write(publisher, 3)
    folder = tmp_path / "versions"
    for name in ("policy-v00001", "policy-v00002", "policy-v00004", "other-v00001"):
        (folder / f".{name}.lorashard-partial").mkdir()
        (folder / f".{name}.lorashard-partial" / "ep-00000-of-00002.safetensors").touch()
    at_work = folder / ".policy-v00002.lorashard-partial"
    with locked_directory(at_work, publisher.path(2)):
        publisher.publish(3)
    kept = {"policy-v00002", "policy-v00004", "other-v00001"}
    assert {name for name in os.listdir(folder) if "partial" in name} == {
        f".{name}.lorashard-partial" for name in kept
    }
    publisher.withdraw()
    assert {name for name in os.listdir(folder) if "partial" in name} == {
        ".other-v00001.lorashard-partial"
    }
