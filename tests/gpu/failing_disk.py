"""A vLLM worker extension: on one rank, reads of files below a folder fail as on a broken disk.

For tests.gpu.load, which calls it through /collective_rpc (VLLM_SERVER_DEV_MODE=1).
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

_preadv = os.preadv
_broken: list[str] = []


def _preadv_or_fail(fd: int, *arguments: Any) -> int:
    if _broken:
        path = str(Path(f"/proc/self/fd/{fd}").readlink())
        if any(path.startswith(folder) for folder in _broken):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
    return _preadv(fd, *arguments)


class FailingDisk:
    """Methods for the workers, called on all ranks at once."""

    rank: int

    def break_disk(self, rank: int, folder: str) -> int:
        """On the worker of that rank, reads below `folder` fail from now on. Returns its own rank."""
        if self.rank == rank:
            os.preadv = _preadv_or_fail
            _broken.append(folder)
        return self.rank

    def mend_disk(self) -> None:
        """All reads succeed again."""
        _broken.clear()
        os.preadv = _preadv
