"""Packages that only some of the work needs: imported late, and missed in plain words."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any

from lorashard.errors import MissingPackageError
from lorashard.installing import DRIVERS, install_command


def import_package(name: str, purpose: str) -> Any:
    """The module of this name. purpose: what needs it, for the message.

    Raises MissingPackageError if it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as err:
        if err.name != name:  # it is there, and what it needs itself is not
            raise
        raise missing_package(name, purpose) from err


def missing_package(name: str, purpose: str) -> MissingPackageError:
    """The error for a package that is not installed, with the command that installs it."""
    return MissingPackageError(
        f"{name} is not installed, and {purpose} needs it.", hint=install_command(name)
    )


def missing_driver(url: str) -> MissingPackageError | None:
    """The error for a URL whose driver is not installed; None if that is not what is wrong."""
    package = DRIVERS.get(url.partition("://")[0].lower())
    if package is None or find_spec(package) is not None:
        return None
    return missing_package(package, url)
