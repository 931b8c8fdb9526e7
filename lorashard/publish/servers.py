"""What publishing asks of a vLLM server, over HTTP.

In: a base URL and an adapter's name. Out: what the server did, or a ServerError with its own words.
The API key is in no message.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from lorashard.errors import ServerError
from lorashard.storage.hub import summarize_error

_SHOWN = 500  # characters of an answer
_OK, _NOT_FOUND = 200, 404
_HINTS = {
    401: "Give the key that the server was started with as api_key.",
    404: "Was the server started with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, and "
    "does it see the directory under this path?",
}


class _NoRedirects(HTTPRedirectHandler):
    """A redirected POST becomes a GET, and takes the key to another host."""

    def redirect_request(self, *_: object) -> None:
        return None


_OPENER = build_opener(_NoRedirects)


@dataclass(frozen=True, slots=True)
class Server:
    """A server. url: without /v1. timeout_s: without a byte from it, for each request."""

    url: str
    api_key: str | None = field(repr=False)
    timeout_s: float

    def has(self, name: str, path: str) -> bool:
        """Whether it has loaded the adapter. Raises ServerError if that came from another path."""
        found = self.models().get(name)
        if found not in (None, path):
            raise ServerError(
                f"{self.url}: {name} has already been loaded, from {found or 'an unknown path'}.",
                hint="Unload it there, or publish under another name.",
            )
        return found is not None

    def load(self, name: str, path: str) -> None:
        """Load an adapter. path: as the server sees it."""
        self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})

    def unload(self, name: str) -> None:
        """Unload an adapter. It is no error if the server does not know it, as after a restart."""
        self._post("/v1/unload_lora_adapter", {"lora_name": name}, accepted=(_OK, _NOT_FOUND))

    def answer(self, name: str) -> None:
        """Have the adapter make one token."""
        question = {"model": name, "prompt": [1], "max_tokens": 1, "temperature": 0}
        answer = self._parsed("/v1/completions", self._post("/v1/completions", question))
        if not answer.get("choices"):
            raise ServerError(f"{self.url}: /v1/completions has no answer for {name}.")

    def models(self) -> Mapping[str, str | None]:
        """What it serves: the path of each adapter, and the base model's, by name."""
        document = self._parsed("/v1/models", self._request("/v1/models", None, (_OK,)))
        try:
            return {card["id"]: card.get("root") for card in document["data"]}
        except (KeyError, TypeError, AttributeError) as err:
            raise ServerError(f"{self.url}: /v1/models answers with no list of models.") from err

    def _post(
        self, path: str, document: Mapping[str, Any], accepted: tuple[int, ...] = (_OK,)
    ) -> str:
        return self._request(path, json.dumps(document).encode(), accepted)

    def _request(self, path: str, body: bytes | None, accepted: tuple[int, ...]) -> str:
        headers = {"Content-Type": "application/json"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        request = Request(self.url + path, body, headers)  # noqa: S310 - parse_server saw to the scheme
        try:
            try:
                with _OPENER.open(request, timeout=self.timeout_s) as answer:
                    status, said = answer.status, answer.read()
            except HTTPError as err:
                with err:
                    status, said = err.code, err.read()
        except (OSError, HTTPException) as err:
            reason = err.reason if isinstance(err, URLError) else err
            summary = summarize_error(reason) if isinstance(reason, Exception) else str(reason)
            raise ServerError(
                f"{self.url}: {path} does not answer ({summary}).",
                hint="Does the server run, and can this machine reach it?",
            ) from err
        text = str(said.decode("utf-8", "replace"))
        if status not in accepted:
            raise ServerError(
                f"{self.url}: {path} answers {status} ({_in_short(text)}).",
                hint=_HINTS.get(status, "See the server's log."),
            )
        return text

    def _parsed(self, path: str, text: str) -> Mapping[str, Any]:
        try:
            document = json.loads(text)
        except ValueError:
            document = None
        if not isinstance(document, Mapping):
            raise ServerError(f"{self.url}: {path} does not answer as vLLM does.")
        return document


def parse_server(url: str, api_key: str | None, timeout_s: float) -> Server:
    """A server by what a user calls it: http://host:8000, with or without /v1.

    Raises ValueError, which does not show the key.
    """
    if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
        raise ValueError("api_key: a header cannot hold it; does a line end belong to it?")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url}: not the address of a server, such as http://host:8000")
    if parts.username is not None or parts.password is not None:
        raise ValueError(f"{parts.hostname}: give the key as api_key, and not in the address")
    return Server(url.rstrip("/").removesuffix("/v1").rstrip("/"), api_key, timeout_s)


def _in_short(text: str) -> str:
    """What an answer says. vLLM's errors are JSON: {"error": {"message": ...}}."""
    try:
        found = json.loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        found = text
    return " ".join(str(found).split())[:_SHOWN]
