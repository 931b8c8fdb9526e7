"""What the drivers of fsspec have in common, and where they differ.

In: a file system of fsspec's and a path as it names it. Out: a range of bytes, or a file's size and
version, with retries where the driver has none of its own; or an upload that is counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from lorashard.progress import Progress
from lorashard.storage.hub import access_error

T = TypeVar("T")

_ATTEMPTS = 3
_FIRST_WAIT_S = 0.25
_OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss"})
# In what a driver's `info` says of a file, the fields that change with its content.
_VERSION_FIELDS = ("ETag", "etag", "blob_id", "md5Hash", "LastModified", "mtime")


def read_range(fs: Any, path: str, begin: int, end: int, size_bytes: int) -> bytes:
    """Bytes [begin, end) of a file of `size_bytes`, exactly. Raises what the driver raises."""
    # HfFileSystem by default has a cache of its own, for which it reads 5 MiB further.
    uncached = {"cache_type": "none", "size": size_bytes} if is_hub(fs) else {}

    def read() -> bytes:
        data: bytes = fs.cat_file(path, start=begin, end=end, **uncached)
        if len(data) != end - begin:
            raise EOFError(f"{len(data)} bytes arrived instead of {end - begin}")
        return data

    # huggingface_hub retries reads itself, for 20 s.
    return _retry(read, 1 if is_hub(fs) else _attempts(fs))


def size_and_version(fs: Any, path: str, shown: str, *, refresh: bool = False) -> tuple[int, str]:
    """A file's size in bytes, and a text that changes with its content.

    shown: the file as the user named it. refresh: ask the server even if the driver remembers.
    Raises FileNotFoundError, or AdapterError if the place does not answer.
    """
    if refresh:
        fs.invalidate_cache()
    try:
        info = _retry(lambda: fs.info(path), _attempts(fs))
    except (FileNotFoundError, NotADirectoryError) as err:
        raise FileNotFoundError(shown) from err
    except Exception as err:
        raise access_error(shown, err) from err
    if info.get("type") != "file" or info.get("size") is None:
        raise FileNotFoundError(shown)
    fields = (f"{info[field]}" for field in _VERSION_FIELDS if field in info)
    return int(info["size"]), " ".join(fields)


def put_counted(fs: Any, source: Path, path: str, progress: Progress) -> None:
    """Upload a file. Raises what the driver raises.

    progress: called with the bytes sent since the last call, in parts if the driver says so; they add
    up to the file's size.
    """
    from fsspec.callbacks import Callback  # noqa: PLC0415 - fsspec takes 0.1 s

    size, done = source.stat().st_size, 0

    def count(_total: int, sent: int, **_: Any) -> None:
        nonlocal done
        sent = min(int(sent), size)
        if sent > done:
            progress(sent - done)
            done = sent

    fs.put_file(str(source), path, callback=Callback(hooks={"count": count}))
    count(size, size)


def is_hub(fs: Any) -> bool:
    """Whether this is huggingface_hub's file system."""
    return "hf" in _protocols(fs)


def is_object_store(fs: Any) -> bool:
    """Whether folders are only prefixes of names there, and the driver retries by itself."""
    return bool(_protocols(fs) & _OBJECT_STORES)


def lacks_bucket(fs: Any, path: str) -> bool:
    """Whether a path is in an S3 bucket that does not exist: s3fs lists one as an empty folder."""
    if "s3" not in _protocols(fs):
        return False
    try:
        fs.call_s3("head_bucket", Bucket=path.partition("/")[0])
    except FileNotFoundError:
        return True
    except Exception:  # noqa: BLE001 - who may use only a part of a bucket may not ask this
        return False
    return False


def _protocols(fs: Any) -> frozenset[str]:
    return frozenset(fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,))


def _attempts(fs: Any) -> int:
    """How often to try. Drivers of object stores retry for 10 s themselves; more only adds delay."""
    return 1 if is_object_store(fs) else _ATTEMPTS


def _retry(action: Callable[[], T], attempts: int) -> T:
    """The result of `action`, called up to `attempts` times. Raises what its last call raises.

    A missing file and missing rights are raised at once: another attempt changes nothing.
    """
    for attempt in range(attempts - 1):
        try:
            return action()
        except (FileNotFoundError, NotADirectoryError, PermissionError):  # noqa: PERF203
            raise
        except Exception:  # noqa: BLE001 - each driver has its own for a broken connection
            time.sleep(_FIRST_WAIT_S * 2**attempt)
    return action()
