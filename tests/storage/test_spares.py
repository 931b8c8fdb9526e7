"""Spare files: who may write to them, and that nobody else has them."""

from __future__ import annotations

import mmap
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import pytest

from lorashard.storage.spares import SPARE_NAME, keep_spare, take_spare
from lorashard.storage.syscalls import is_in_memory


@pytest.fixture
def folder(memory_path: Path) -> Path:
    return memory_path


def outdated(folder: Path, *names: str, content: bytes = b"old") -> Path:
    path = folder / "outdated"
    path.mkdir()
    for name in names:
        (path / name).write_bytes(content)
    return path


def spare(folder: Path, *names: str) -> Path:
    """The spare directory, with these files."""
    assert keep_spare(outdated(folder, *names), lambda _: True)
    return folder / SPARE_NAME


def taken(folder: Path) -> list[str]:
    take_spare(folder, folder / "new")
    return sorted(os.listdir(folder / "new")) if (folder / "new").exists() else []


def test_the_files_that_are_wanted_are_had_again_as_they_are(folder: Path) -> None:
    path = outdated(folder, "a", "b", "manifest")
    before = {name: (path / name).stat().st_ino for name in ("a", "b")}
    assert keep_spare(path, lambda name: name != "manifest")
    assert os.listdir(folder) == [SPARE_NAME]
    assert taken(folder) == ["a", "b"]
    assert os.listdir(folder) == ["new"]
    assert {child.name: child.stat().st_ino for child in (folder / "new").iterdir()} == before


def test_a_folder_has_one_spare_directory(folder: Path) -> None:
    spare(folder, "a")
    path = outdated(folder, "b", "c")
    assert not keep_spare(path, lambda name: name == "b")
    assert sorted(os.listdir(path)) == ["b", "c"]
    assert os.listdir(folder / SPARE_NAME) == ["a"]


def test_without_a_spare_directory_nothing_is_taken(folder: Path) -> None:
    assert taken(folder) == []
    assert taken(folder / "missing") == []


def test_of_several_that_take_it_one_has_it(folder: Path) -> None:
    for attempt in range(20):
        spare(folder, "a")
        places = [folder / f"new-{attempt}-{number}" for number in range(4)]
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(lambda place: take_spare(folder, place), places))
        assert [place.exists() for place in places].count(True) == 1


def test_only_in_memory(tmp_path: Path) -> None:
    if is_in_memory(tmp_path):
        pytest.skip("the temporary files are in memory")
    path = outdated(tmp_path, "a")
    assert not keep_spare(path, lambda _: False)
    assert os.listdir(path) == ["a"]
    path.rename(tmp_path / SPARE_NAME)
    take_spare(tmp_path, tmp_path / "new")
    assert os.listdir(tmp_path) == [SPARE_NAME]


@contextmanager
def reader(path: Path) -> Iterator[None]:
    with path.open("rb"):
        yield


@contextmanager
def mapping(path: Path) -> Iterator[None]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        file.close()
        yield
        assert mapped[:] == b"old"


@contextmanager
def reader_elsewhere(path: Path) -> Iterator[None]:
    code = "import sys; f = open(sys.argv[1]); print(flush=True); sys.stdin.read(); print(f.read())"
    command = [sys.executable, "-c", code, path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield
        assert process.communicate()[0] == b"old\n"


@contextmanager
def hard_link(path: Path) -> Iterator[None]:
    os.link(path, path.parent.parent / "kept")
    yield
    assert (path.parent.parent / "kept").read_bytes() == b"old"


@contextmanager
def symbolic_link(path: Path) -> Iterator[None]:
    kept = path.rename(path.parent.parent / "kept")
    path.symlink_to(kept)
    yield
    assert kept.read_bytes() == b"old"


@contextmanager
def pipe(path: Path) -> Iterator[None]:
    path.unlink()
    os.mkfifo(path)
    yield


@contextmanager
def directory(path: Path) -> Iterator[None]:
    path.unlink()
    (path / "inner").mkdir(parents=True)
    yield


@contextmanager
def foreign(path: Path) -> Iterator[None]:
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    os.chown(path, 12345, 12345)
    yield


@pytest.mark.parametrize(
    "use",
    [
        reader, mapping, reader_elsewhere, hard_link, symbolic_link, pipe, directory, foreign,
    ],
)  # fmt: skip
def test_what_others_could_read_is_not_to_be_written_to(
    folder: Path, use: Callable[[Path], AbstractContextManager[None]]
) -> None:
    path = spare(folder, "a", "b")
    with use(path / "a"):
        assert taken(folder) == ["b"]


@pytest.mark.parametrize("kind", ["link", "foreign", "file"])
def test_a_spare_directory_of_somebody_else_is_left_alone(folder: Path, kind: str) -> None:
    path = spare(folder, "a")
    with ExitStack() as stack:
        if kind == "foreign":
            stack.enter_context(foreign(path))
        elif kind == "link":
            path.rename(folder / "elsewhere")
            path.symlink_to(folder / "elsewhere")
        else:
            shutil.rmtree(path)
            path.write_bytes(b"mine")
        assert taken(folder) == []
        assert os.path.lexists(path)


def test_whoever_opens_a_file_as_it_is_taken_ends_nobody(folder: Path) -> None:
    """The kernel tells the holder of a lease by a signal, whose default is to end the process."""
    code = """if True:
        import os, sys
        from pathlib import Path
        from lorashard.storage.spares import _is_unused
        path = Path(sys.argv[1])
        print(len({_is_unused(path) for _ in range(20_000)}))
    """
    path = spare(folder, "a") / "a"
    with subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE) as process:
        while process.poll() is None:
            path.open("rb").close()
        assert process.stdout is not None
        assert (process.returncode, process.stdout.read()) == (0, b"2\n")
