"""What servers were given under a version's name: a file beside its directory, with a digest.

Servers go by the name: one that has a version does not load it again. So if its directory was written
again meanwhile, they would go on with the weights from before, and nothing would say so.
"""

from __future__ import annotations

from pathlib import Path

from blake3 import blake3

from lorashard.shards.directory import manifest_bytes

_SUFFIX = ".lorashard-published"


def record(path: Path) -> None:
    """Note the manifest of a version's directory, before a server loads it."""
    noted = _beside(path)
    new = noted.with_name(f"{noted.name}.new")
    new.write_text(_digest(path))
    new.replace(noted)


def was_written_again(path: Path) -> bool:
    """Whether the directory has another manifest than the one that was noted."""
    try:
        return _beside(path).read_text() != _digest(path)
    except FileNotFoundError:
        return False


def forget(path: Path) -> None:
    """The version is gone."""
    _beside(path).unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}{_SUFFIX}")


def _digest(path: Path) -> str:
    return blake3(manifest_bytes(path)).hexdigest()
