"""The last field of lorashard.json: the digest of all bytes before it. Pure.

Most fields are proven by the files and by the source that is described in them. The rest, such as the
version that wrote the directory, only the digest can prove.
"""

from __future__ import annotations

import re

from blake3 import blake3

CHANGED = "it was changed since it was written, as the BLAKE3 in its last field shows"

# Without a seal the last field is `files`, an object.
_UNSEALED = re.compile(rb"\}\s*\}\s*\Z")
_SEAL = re.compile(rb',\n  "blake3": "([0-9a-f]{64})"\n\}\n\Z')
_LONGEST = 128  # bytes, of a seal
_END = b"\n}\n"


def seal(content: bytes) -> bytes:
    """A formatted JSON object with its seal as its last field."""
    body = content.removesuffix(_END)
    return body + b',\n  "blake3": "' + blake3(body).hexdigest().encode() + b'"' + _END


def is_seal_broken(content: bytes) -> bool:
    """Whether something was changed since it was sealed. What has no seal is taken as it is."""
    end = content[-_LONGEST:]
    if _UNSEALED.search(end):
        return False
    match = _SEAL.search(end)
    if match is None:
        return True
    body = memoryview(content)[: len(content) - len(match[0])]
    return blake3(body).hexdigest().encode() != match[1]
