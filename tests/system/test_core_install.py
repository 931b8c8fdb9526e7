"""lorashard as `pip install .` installs it: the wheel, and the commands where there is no torch.

`.venv/bare` (`make .venv/.bare`) has what lorashard depends on and nothing else. The wheel is built
anew for the tests, and unpacked in front of what is installed there.
"""

from __future__ import annotations

import configparser
import json
import os
import re
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from email import message_from_string
from email.message import Message
from importlib.util import find_spec
from pathlib import Path

import pytest

from lorashard import SplitRequest, installing, split_adapter
from lorashard.cli.groups import EXAMPLES
from tests.tiny import REPO, contents, save_adapter, save_fused, save_pickled

BARE = REPO / ".venv" / "bare" / "bin" / "python"
PAGES = re.compile(r"docs/([\w-]+\.md)")


def require(condition: bool, otherwise: str) -> None:
    if not condition and os.environ.get("LORASHARD_REQUIRE_ALL", "") not in ("", "0"):
        pytest.fail(otherwise)
    if not condition:
        pytest.skip(otherwise)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheel of this checkout."""
    require(find_spec("hatchling") is not None, "hatchling is not installed: make .venv/.test")
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=REPO, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    (path,) = wheel.glob("*.dist-info/METADATA")
    return message_from_string(path.read_text())


@pytest.fixture
def bare(wheel: Path, tmp_path: Path):
    """Runs Python with these arguments in the bare environment, in tmp_path."""
    require(BARE.exists(), f"{BARE} is missing: make .venv/.bare")

    def run(*args: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [BARE, *map(str, args)],
            env=os.environ | {"PYTHONPATH": str(wheel)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, (args, done.stdout, done.stderr)
        return done

    return run


def test_the_wheel_has_the_package_its_types_its_licence_and_nothing_else(wheel: Path) -> None:
    names = set(contents(wheel))
    own = {
        f"lorashard/{p.relative_to(REPO / 'lorashard')}" for p in (REPO / "lorashard").rglob("*.py")
    }
    assert own <= names
    assert "lorashard/py.typed" in names
    extra = {re.sub(r"lorashard-[^/]+", "INFO", name) for name in names - own}
    pages = {name for name in extra if name.startswith("lorashard/docs/")}
    assert extra - pages == {
        "lorashard/py.typed", "INFO/METADATA", "INFO/RECORD", "INFO/WHEEL",
        "INFO/entry_points.txt", "INFO/licenses/LICENSE",
    }  # fmt: skip


def test_the_wheel_has_every_page_that_messages_and_help_refer_to(wheel: Path) -> None:
    text = "".join(path.read_text() for path in (REPO / "lorashard").rglob("*.py"))
    for page in {*PAGES.findall(text), "cli.md"}:
        installed = wheel / "lorashard" / "docs" / page
        assert installed.read_bytes() == (REPO / "docs" / page).read_bytes()


def test_the_metadata_asks_for_no_torch_and_names_the_extras(metadata: Message) -> None:
    asked = metadata.get_all("Requires-Dist", [])
    extras: dict[str, set[str]] = {}
    for requirement in asked:
        name, _, extra = requirement.partition("; extra == ")
        extras.setdefault(extra.strip("'\""), set()).add(re.split(r"[<>=!~ ]", name)[0])
    assert "torch" not in extras.pop("")
    assert extras == {name: set(packages) for name, packages in installing.EXTRAS.items()}
    assert set(metadata.get_all("Provides-Extra", [])) == set(installing.EXTRAS)


def test_the_wheel_brings_the_command_and_the_plugin(wheel: Path) -> None:
    (path,) = wheel.glob("*.dist-info/entry_points.txt")
    points = configparser.ConfigParser()
    points.read_string(path.read_text())
    assert {name: dict(points[name]) for name in points.sections()} == {
        "console_scripts": {"lorashard": "lorashard.cli.app:main"},
        "vllm.general_plugins": {"lorashard": "lorashard.vllm_plugin:register"},
    }


@pytest.mark.parametrize(
    "page", [*sorted(str(p.relative_to(REPO)) for p in (REPO / "docs").rglob("*.md")), "README.md"]
)
def test_no_page_tells_to_install_from_an_index(page: str) -> None:
    text = (REPO / page).read_text()
    assert not re.search(
        r"(pip|pipx|uv\w*|uv tool|uv pip) (install|add|run)? ?['\"]?lorashard", text
    )


def test_readme_installs_as_the_messages_do() -> None:
    text = (REPO / "README.md").read_text()
    assert f"\n{installing.INSTALL}\n" in text
    for extra in installing.EXTRAS:
        assert f"[{extra}]" in text


def test_the_bare_environment_has_no_torch(bare) -> None:
    for package in ("torch", "vllm", "transformers", "s3fs"):
        assert f"'{package}'" in bare("-c", f"import {package}", code=1).stderr


@pytest.mark.parametrize("save", [save_adapter, save_fused])
def test_adapters_need_no_torch(bare, tmp_path: Path, save) -> None:
    adapter, shards = save(tmp_path / "adapter"), tmp_path / "shards"
    run = lambda *args: bare("-m", "lorashard", *args)  # noqa: E731
    run("split", adapter, "--ep-size", 2, "-o", shards)
    run("verify", shards, "--against", adapter)
    for path in (adapter, shards):
        assert json.loads(run("inspect", path, "--json").stdout)["num_experts"] == 4
    run("plan", adapter, "--ep-size", 4, "--placement", "round_robin")
    run("merge", shards, "-o", tmp_path / "merged")
    assert contents(tmp_path / "merged") == contents(adapter)
    run("reshard", shards, "--ep-size", 4, "-o", tmp_path / "four")
    split_adapter(adapter, tmp_path / "four-split", SplitRequest(ep_size=4))
    assert contents(tmp_path / "four") == contents(tmp_path / "four-split")
    for layout in ("per_expert", "fused"):
        run("convert", shards, "--layout", layout, "-o", tmp_path / layout)
    run("push", shards, (tmp_path / "there").as_uri())
    run("pull", (tmp_path / "there").as_uri(), "--node-ranks", "0-1", "-o", tmp_path / "pulled")
    assert contents(tmp_path / "pulled") == contents(shards)


def test_doctor_and_env_say_what_is_not_installed(bare, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter")
    found = json.loads(bare("-m", "lorashard", "doctor", adapter, "--json", code=5).stdout)
    assert [problem for problem in found["problems"] if "vLLM is not installed" in problem["text"]]
    assert found["adapter"]["kind"] == "plain adapter"
    environment = json.loads(bare("-m", "lorashard", "env", "--json").stdout)
    assert environment["packages"]["torch"] is None
    assert (Path(environment["documentation"]) / "cli.md").is_file()


@pytest.mark.parametrize("command", EXAMPLES)
def test_each_help_ends_with_a_page_that_is_there(bare, command: str) -> None:
    last = bare("-m", "lorashard", command, "-h").stdout.splitlines()[-1]
    assert Path(last.split()[-1]).is_file()


@pytest.mark.parametrize(
    ("words", "package"),
    [
        ("split adapter --ep-size 2 -o new --dtype float16", "torch"),
        ("split pickled --ep-size 2 -o new --allow-pickle", "torch"),
        ("verify cast --against adapter", "torch"),
        ("split s3://bucket/adapter --ep-size 2 -o new", "s3fs"),
        ("pull gs://bucket/shards --ep-rank 0 -o new", "gcsfs"),
        ("push cast s3://bucket/shards", "s3fs"),
    ],
)
def test_what_needs_more_names_the_command_that_installs_it(
    bare, tmp_path: Path, words: str, package: str
) -> None:
    save_pickled(tmp_path / "pickled")
    split_adapter(
        save_adapter(tmp_path / "adapter"), tmp_path / "cast", SplitRequest(2, dtype="float16")
    )
    done = bare("-m", "lorashard", *shlex.split(words), "--json", code=3)
    error: Mapping[str, str] = json.loads(done.stdout)
    assert error["kind"] == "MissingPackageError"
    assert error["error"].startswith(f"{package} is not installed, and ")
    assert error["hint"] == f"pip install {package}"
    assert not (tmp_path / "new").exists()


def test_python_reads_bytes_without_torch_and_says_what_a_tensor_needs(
    bare, tmp_path: Path
) -> None:
    split_adapter(save_adapter(tmp_path / "adapter"), tmp_path / "shards", SplitRequest(2))
    bare(
        "-c",
        "import lorashard\n"
        "rank = lorashard.open_shards('shards').rank(0)\n"
        "name = 'model.layers.0.mlp.experts.gate_proj.lora_A'\n"
        "assert len(rank.read_bytes(name)) == 2 * 2 * 8 * 2\n"
        "try:\n    rank.tensor(name)\n"
        "except lorashard.errors.MissingPackageError as err:\n    assert 'pip install torch' in str(err)\n"
        "else:\n    raise SystemExit(1)\n",
    )
