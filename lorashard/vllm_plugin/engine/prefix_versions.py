"""Versions of an adapter's name, for the keys of vLLM's prefix cache.

In: the names of adapters that were unloaded, or replaced in place. Out: what their cached prefixes
are told apart by. vLLM's key has the adapter's name, since 0.31.0 its path as well: under the same
name, the next adapter would get what the one before has left in the cache.
"""

from __future__ import annotations

MAX_NAMES = 2**16  # of a hundred bytes each


class PrefixVersions:
    """The version of each name, which changes with its adapter. Any thread may ask."""

    def __init__(self) -> None:
        self._versions: dict[str, int] = {}
        self._of_all = 0

    def renew(self, name: str) -> None:
        """The adapter of that name is another one from now on."""
        if len(self._versions) >= MAX_NAMES and name not in self._versions:
            self.renew_all()
        self._versions[name] = self._versions.get(name, 0) + 1

    def renew_all(self) -> None:
        """Any adapter may be another one from now on."""
        self._of_all += 1
        self._versions.clear()

    def version(self, name: str) -> str:
        """Empty as long as the name has had one adapter, so that vLLM's own key stays."""
        of_name = self._versions.get(name, 0)
        return f"{self._of_all}.{of_name}" if self._of_all or of_name else ""
