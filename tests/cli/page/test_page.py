"""`--html` of `plan` and `inspect`: what the page says, and how large it becomes."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from lorashard.cli.page.document import PagePart, make_page
from lorashard.inspect.picture import ModuleExperts
from tests.adapters import Spec, build
from tests.cli.page.test_markup import HOSTILE, read
from tests.tiny import contents, edit_json, run_cli, save_adapter

MODULE = "model.layers.0.mlp.experts"


def html_of(path: Path, *args: object, returncode: int = 0) -> str:
    done = run_cli(*args, "--html", path)
    assert done.returncode == returncode, done.stderr
    assert f"page written: {path}\n" in done.stderr
    return path.read_text()


def test_a_plan_s_page_has_what_the_table_has(adapter: Path, tmp_path: Path) -> None:
    text = html_of(tmp_path / "p.html", "plan", adapter, "--ep-size", 3)
    found = read(text)
    plan = json.loads(run_cli("plan", adapter, "--ep-size", 3, "--json").stdout)
    for rank in plan["ranks"]:
        assert f"rank {rank['ep_rank']}" in found.text
    assert str(adapter) in found.text
    assert "4 in 1 layer" in found.text
    assert "Warning: The experts are not in equal, contiguous blocks" in found.text
    assert "Without lorashard" in found.text
    assert "replicated.safetensors and ep-00000-of-00003.safetensors" in found.text


def test_stdout_is_the_same_with_a_page(adapter: Path, tmp_path: Path) -> None:
    for options in ((), ("--json",)):
        plain = run_cli("plan", adapter, "--ep-size", 2, *options)
        paged = run_cli("plan", adapter, "--ep-size", 2, *options, "--html", tmp_path / "p.html")
        assert plain.stdout == paged.stdout


def test_a_page_of_several_paths_has_a_part_for_each_and_the_error(
    adapter: Path, shards: Path, tmp_path: Path
) -> None:
    paths = (adapter, tmp_path / "nowhere", shards)
    text = html_of(tmp_path / "p.html", "inspect", *paths, returncode=3)
    assert text.count("<article>") == 3
    found = read(text)
    for said in (
        str(adapter),
        str(shards),
        "nowhere does not exist",
        "not split",
        "linear placement",
    ):
        assert said in found.text


def test_no_page_is_written_if_there_is_nothing_to_show(tmp_path: Path) -> None:
    done = run_cli("inspect", tmp_path / "nowhere", "--html", tmp_path / "p.html")
    assert (done.returncode, contents(tmp_path)) == (3, {})


@pytest.mark.parametrize("command", ["plan", "inspect"])
def test_a_file_of_somebody_s_is_not_replaced(adapter: Path, command: str) -> None:
    before = contents(adapter)
    size = ("--ep-size", 2) if command == "plan" else ()
    done = run_cli(command, adapter, *size, "--html", adapter / "adapter_config.json")
    assert (done.returncode, done.stdout) == (5, "")
    assert "is not a page that lorashard wrote" in done.stderr
    assert contents(adapter) == before


def test_pages_load_nothing_and_run_nothing(adapter: Path, tmp_path: Path) -> None:
    text = html_of(tmp_path / "p.html", "inspect", adapter)
    found = read(text)
    assert not {"script", "link", "img", "iframe", "a"} & {name for name, _ in found.elements}
    assert "url(" not in text
    assert "http:" not in text.replace("http-equiv", "")
    assert "https:" not in text
    attributes = {name for _, attrs in found.elements for name in attrs}
    assert not attributes & {"href", "src", "srcset"}
    assert not [name for name in attributes if name.startswith("on")]
    (policy,) = [attrs["content"] for _, attrs in found.elements if "http-equiv" in attrs]
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_names_of_an_adapter_are_text(tmp_path: Path) -> None:
    """The path, the base model, the modules: whoever made the adapter chose them."""
    part = PagePart(
        HOSTILE,
        {
            "kind": "shards", "num_experts": 2, "num_modules": 1, "dtype_cast": HOSTILE,
            "lorashard_version": HOSTILE, "source": {"repo": HOSTILE, "revision": HOSTILE},
            "placement": {"strategy": HOSTILE, "ep_size": 1, "ranks": [[0, 1]]},
            "files": {HOSTILE: {"bytes": 1}, HOSTILE + "1": {"bytes": 2}},
        },
        (
            ModuleExperts(HOSTILE, ((0, 1),), (1, 2), frozenset()),
            ModuleExperts("b", ((1, 0),), (1, 2), frozenset()),
        ),
        notes=(HOSTILE,),
        module_table=((HOSTILE,) * 7,) * 2,
    )  # fmt: skip
    text = make_page("inspect", [part])
    plain = make_page("inspect", [_renamed(part)])
    assert [e for e, _ in read(text).elements] == [e for e, _ in read(plain).elements]
    assert "<script" not in text
    assert "\u202e" not in text


def _renamed(part: PagePart) -> PagePart:
    """The same part, with harmless names."""
    renamed = repr(part).replace(repr(HOSTILE + "1"), "'ab1'").replace(repr(HOSTILE), "'ab'")
    names = {"PagePart": PagePart, "ModuleExperts": ModuleExperts}
    harmless: PagePart = eval(renamed, names)
    assert "script" not in repr(harmless)
    return harmless


def test_a_hostile_directory_name_is_shown(tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / '"><b onclick=alert(1)>')
    text = html_of(tmp_path / "p.html", "plan", adapter, "--ep-size", 2)
    assert '"><b onclick=alert(1)>' in read(text).text
    assert not [attrs for _, attrs in read(text).elements if "onclick" in attrs]


def test_a_hostile_base_model_and_manifest_are_text(shards: Path, tmp_path: Path) -> None:
    document = json.loads((shards / "lorashard.json").read_text())
    edit_json(shards / "lorashard.json", lorashard_version="<b>1</b>", source=document["source"] | {
        "repo": "<script>x</script>", "revision": "</dd><script>",
    })  # fmt: skip
    text = html_of(tmp_path / "p.html", "inspect", shards)
    assert "<script" not in text
    assert "<script>x</script>@</dd><script>" in read(text).text


@pytest.mark.parametrize("differ", [False, True])
def test_a_large_plan_makes_a_small_page(tmp_path: Path, differ: bool) -> None:
    """128 experts, 8 ranks, 46 layers; in the worst case each layer with experts in an order of its own."""
    spec = Spec(num_experts=128, num_layers=46, hidden=2, intermediate=1, lora_rank=1)
    adapter = build(spec).write(tmp_path / "adapter")
    options = []
    if differ:
        experts, shuffle = list(range(128)), random.Random(0).shuffle
        layers = {}
        for layer in range(46):
            shuffle(experts)
            layers[str(layer)] = [experts[k : k + 16] for k in range(0, 128, 16)]
        ranks = [list(range(k, k + 16)) for k in range(0, 128, 16)]
        (tmp_path / "map.json").write_text(json.dumps({"ranks": ranks, "layers": layers}))
        options = ["--expert-map", tmp_path / "map.json"]
    text = html_of(tmp_path / "p.html", "plan", adapter, "--ep-size", 8, *options)
    assert len(text) < (500_000 if differ else 25_000)
    assert text.count("<table") == 2 + 46 * differ


def test_what_a_page_has_no_room_for_is_said(tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter")
    text = html_of(tmp_path / "p.html", "plan", adapter, "--ep-size", 300)
    assert "The first 256 of 300 rows are shown." in text
    assert "The first 256 of 300 ranks are shown." in text
    assert len(text) < 500_000
    modules = tuple(
        ModuleExperts(
            str(n), ((n, *range(6, 260)), *((e,) for e in range(255))), (1,) * 260, frozenset()
        )
        for n in range(6)
    )
    ranks = [
        {
            "ep_rank": 0,
            "experts": [0],
            "bytes_on_disk": 1,
            "bytes_to_read": 1,
            "gpu_buffer_bytes": 1,
            "host_bytes": 1,
            "host_bytes_without": 1,
        }
    ]
    summary = {
        "num_experts": 260, "num_modules": 6, "ep_size": 256, "placement": "explicit", "max_loras": 1,
        "max_lora_rank": 8, "replicated_bytes": 0, "total_bytes": 0, "files": ["r", "0"],
        "ranks": ranks,
    }  # fmt: skip
    text = make_page("plan", [PagePart("a", summary, modules)])
    drawn = text.count('<table class="map"') - 1
    assert 0 < drawn < 6
    assert f"{6 - drawn} more are not drawn" in text
    assert len(text) < 500_000
