"""Weights in several files with an index, as transformers saves what is large: told, not read."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from lorashard.adapter.config import WEIGHTS_NAME
from lorashard.errors import UnsupportedAdapterError
from lorashard.storage.remote import Location, RemoteFolder

# transformers 5 calls the index of an adapter as it calls that of a model.
_PART = re.compile(r"(?P<stem>adapter_model|model)-[0-9]{5}-of-(?P<count>[0-9]{5})\.safetensors")
_JOIN = (
    "import glob, safetensors.torch as s; s.save_file({{k: v for f in sorted(glob.glob("
    "'{stem}-*-of-{count}.safetensors')) for k, v in s.load_file(f).items()}}, '{name}', "
    "{{'format': 'pt'}})"
)


def refuse_several_files(place: Location) -> None:
    """Raise UnsupportedAdapterError if an adapter without its one weights file has parts of it."""
    names = place.files() if isinstance(place, RemoteFolder) else _local_files(place)
    parts = [match for name in sorted(names) if (match := _PART.fullmatch(name))]
    if not parts:
        return
    first = parts[0]
    same = sum(part.group("stem", "count") == first.group("stem", "count") for part in parts)
    count = int(first["count"])
    if same != count:
        raise UnsupportedAdapterError(
            f"an adapter in {count} files ({first[0]} and so on), of which {same} are there,",
            str(place),
            hint="Complete it first: copy or download the folder again.",
        )
    code = _JOIN.format(stem=first["stem"], count=first["count"], name=WEIGHTS_NAME)
    command = f'python -c "{code}"'
    hint = f"Download the folder, and join them in it: {command}"
    if isinstance(place, Path):
        hint = f"Join them: cd {shlex.quote(str(place))} && {command}"
    raise UnsupportedAdapterError(
        f"an adapter in {count} files ({first[0]} and so on)",
        str(place),
        hint=hint,
    )


def _local_files(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir() if path.is_file()]
