"""adapter_config.json before vLLM opens it, which waits for a pipe and reads a device to no end."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

from lorashard.adapter.config import CONFIG_NAME
from lorashard.errors import AdapterError
from lorashard.storage.small_files import MAX_SMALL_FILE_BYTES


def refuse_odd_config(request: Any) -> None:
    """Raise AdapterError for a local adapter whose configuration is no file, or larger than any.

    One that is missing, or on the Hub, is left to vLLM.
    """
    try:
        path = Path(request.lora_path).expanduser() / CONFIG_NAME
        status = path.stat()
    except (OSError, ValueError, RuntimeError):  # nothing there, NUL in a name, no such user
        return
    if not stat.S_ISREG(status.st_mode):
        raise AdapterError(f"{path}: not a file.", hint="Save the adapter again.")
    if status.st_size > MAX_SMALL_FILE_BYTES:
        raise AdapterError(
            f"{path}: larger than {MAX_SMALL_FILE_BYTES} bytes.", hint="Save the adapter again."
        )
