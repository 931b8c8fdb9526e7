"""A program whose stderr is a terminal."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import threading

from tests.tiny import REPO


def run_on_terminal(code: str, **env: str) -> str:
    """What a program writes to a stderr that is a terminal."""
    ours, theirs = pty.openpty()
    chunks: list[bytes] = []

    def read() -> None:
        while True:
            try:
                chunk = os.read(ours, 4096)
            except OSError:  # EIO: the other end is closed
                return
            if not chunk:
                return
            chunks.append(chunk)

    reader = threading.Thread(target=read)
    reader.start()
    environment = os.environ | {"PYTHONPATH": str(REPO), "TERM": "xterm", "COLUMNS": "100"} | env
    subprocess.run([sys.executable, "-c", code], stderr=theirs, env=environment, check=True)
    os.close(theirs)
    reader.join()
    os.close(ours)
    return b"".join(chunks).decode()
