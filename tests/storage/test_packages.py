"""A package is given where it is installed, and missed in words where it is not."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from lorashard.errors import MissingPackageError
from lorashard.installing import DRIVERS
from lorashard.publish.trainer import PublishCallback
from lorashard.storage.packages import import_package, missing_driver
from lorashard.storage.remote import locate
from tests.tiny import REPO


def test_a_package_is_the_module_itself() -> None:
    assert import_package("torch", "anything") is torch


def test_a_missing_package_says_what_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(
        MissingPackageError, match="torch is not installed, and a cast needs it"
    ) as caught:
        import_package("torch", "a cast")
    assert caught.value.hint == "pip install torch"


def test_a_package_that_is_there_and_fails_is_not_called_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    (tmp_path / "half_installed.py").write_text("import nothing_of_this_name\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="nothing_of_this_name"):
        import_package("half_installed", "anything")


def test_a_callback_without_transformers_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingPackageError, match="PublishCallback") as caught:
        PublishCallback("out", ep_size=2)
    assert caught.value.hint == "pip install transformers"


@pytest.mark.parametrize(
    "protocol", [p for p, package in DRIVERS.items() if not find_spec(package)]
)
def test_a_url_without_its_driver_names_the_package(protocol: str) -> None:
    with pytest.raises(MissingPackageError) as caught:
        locate(f"{protocol}://bucket/adapter")
    assert caught.value.hint == f"pip install {DRIVERS[protocol]}"


def test_a_driver_that_is_installed_and_cannot_be_imported_is_not_called_missing() -> None:
    assert missing_driver("s3://bucket/adapter") is None
    code = (
        "import sys; sys.modules['botocore'] = None\n"
        "from lorashard.errors import MissingPackageError, LorashardError\n"
        "from lorashard.storage.remote import locate\n"
        "try:\n    locate('s3://bucket/adapter')\n"
        "except LorashardError as err:\n    print(type(err).__name__, err)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(
        "AdapterError s3://bucket/adapter: its driver cannot be imported ("
    )
