"""S3 on loopback for the real s3fs: moto's, behind an application that logs requests and produces faults.

    with ObjectStorage() as storage:
        storage.put_folder("adapter", directory)
        storage.cut_after("model.safetensors", 1000)
        subprocess.run([..., storage.url("adapter")], env=os.environ | storage.environment())
        assert storage.ranges("model.safetensors") == [(0, 8)]

Objects lie in one bucket. Requests without the right key are refused as S3 does; signatures are
not checked. A fault applies to all requests whose path contains a text.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import fsspec
from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from werkzeug.serving import make_server

from tests.faults import Fault, Faults

BUCKET = "bucket"
KEY_ID = "AKIALOOPBACK"
CHUNK_BYTES = 1 << 14  # small, so that a test can say exactly what a broken connection loses

_CODES = {403: "AccessDenied", 404: "NoSuchKey", 500: "InternalError", 503: "ServiceUnavailable"}


@dataclass
class Request:
    """A request and its answer. sent_bytes: of the body."""

    method: str
    path: str
    query: str
    range: str | None
    status: int = 0
    sent_bytes: int = 0

    @property
    def ranged(self) -> tuple[int, int] | None:
        """The bytes [begin, end) that the request asks for."""
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.range or "")
        return (int(found[1]), int(found[2]) + 1) if found else None

    @property
    def line(self) -> str:
        return f"{self.method} {self.path} {self.status}"


@dataclass
class ObjectStorage:
    """See the module."""

    requests: list[Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._faults = Faults()
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, True, request_handler=_Handler)
        self._client = boto3.client("s3", endpoint_url=self.endpoint, **self._credentials)

    def __enter__(self) -> ObjectStorage:  # noqa: PYI034 - Self came with Python 3.11
        # fsspec keeps drivers by their arguments, to which the endpoint does not belong.
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        self._client.create_bucket(Bucket=BUCKET)
        self.requests.clear()
        return self

    def __exit__(self, *_: object) -> None:
        self.empty()
        self._client.delete_bucket(Bucket=BUCKET)
        self._client.close()
        self._server.shutdown()
        self._server.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def _credentials(self) -> dict[str, str]:
        return {
            "aws_access_key_id": KEY_ID,
            "aws_secret_access_key": "secret",
            "region_name": "us-east-1",
        }

    def environment(self, **changes: str) -> dict[str, str]:
        """For a subprocess that uses this S3, whatever its user has configured."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": KEY_ID,
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
            "AWS_EC2_METADATA_DISABLED": "true",  # otherwise a machine without keys waits for its host's
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
            **changes,
        }

    @staticmethod
    def url(key: str) -> str:
        return f"s3://{BUCKET}/{key}"

    # Objects

    def put(self, key: str, content: bytes) -> None:
        with self._unlogged():
            self._client.put_object(Bucket=BUCKET, Key=key, Body=content)

    def put_folder(self, prefix: str, directory: Path) -> None:
        for path in directory.rglob("*"):
            if path.is_file():
                self.put(f"{prefix}/{path.relative_to(directory)}", path.read_bytes())

    def get(self, key: str) -> bytes:
        with self._unlogged():
            content: bytes = self._client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
        return content

    def delete(self, key: str) -> None:
        with self._unlogged():
            self._client.delete_object(Bucket=BUCKET, Key=key)

    def keys(self, prefix: str = "") -> list[str]:
        with self._unlogged():
            listed = self._client.list_objects_v2(Bucket=BUCKET, Prefix=prefix)
        return [entry["Key"] for entry in listed.get("Contents", [])]

    def hold_only(self, name: str, folder: Path) -> None:
        """Be as new, with nothing but this folder, and with no requests counted."""
        self.mend()
        self.empty()
        self.put_folder(name, folder)
        self.requests.clear()

    def empty(self) -> None:
        for key in self.keys():
            self.delete(key)

    # The log of requests

    def lines(self) -> list[str]:
        return [request.line for request in self.requests]

    def ranges(self, key: str) -> list[tuple[int, int]]:
        """The bytes [begin, end) of an object that were asked for, in the order of their begin."""
        return sorted(r.ranged for r in self._contents(key) if r.ranged)

    def sent_bytes(self, key: str) -> int:
        """How much of an object's content was sent, over all requests."""
        return sum(request.sent_bytes for request in self._contents(key))

    def _contents(self, key: str) -> list[Request]:
        return [r for r in self.requests if r.method == "GET" and r.path.endswith(key)]

    # Faults

    def cut_after(self, match: str, num_bytes: int, times: int | None = 1, skip: int = 0) -> None:
        """Close the connection after `num_bytes` of an answer. times=None: always."""
        self._faults.lay(Fault("cut", match, num_bytes, times, skip))

    def fail(
        self,
        match: str,
        status: int = 503,
        times: int | None = 1,
        skip: int = 0,
        method: str | None = "GET",
        beyond: int = 0,
    ) -> None:
        """Answer with an error instead. method=None: whatever is asked.

        beyond: only where bytes from there on are asked for.
        """
        self._faults.lay(Fault("fail", match, status, times, skip, method, beyond))

    def corrupt(self, match: str, offset: int) -> None:
        """Invert the byte at `offset` of an object whenever it is sent, without its checksum."""
        self._faults.lay(Fault("corrupt", match, offset, None))

    def when(
        self, match: str, action: Callable[[], object], nth: int = 1, method: str = "GET"
    ) -> None:
        """Call `action` just before the `nth` GET of an object is answered, or what `method` says."""
        self._faults.lay(Fault("when", match, action, 1, nth - 1, method))

    def mend(self) -> None:
        """Remove all faults."""
        self._faults.mend()

    # Answers

    def _answer(self, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        request = Request(
            environ["REQUEST_METHOD"],
            environ["PATH_INFO"],
            environ["QUERY_STRING"],
            environ.get("HTTP_RANGE"),
        )
        self.requests.append(request)
        if action := self._faults.due("when", request):
            action()
        status = self._faults.due("fail", request)
        code = _CODES[status] if status else None
        signed = re.search(r"Credential=(\w+)/", environ.get("HTTP_AUTHORIZATION", ""))
        if signed is None or signed[1] != KEY_ID:
            status, code = 403, "InvalidAccessKeyId" if signed else "AccessDenied"
        if code:
            return self._refuse(request, status, code, start)

        wrong = self._faults.due("corrupt", request)

        def logged(line: str, headers: list[tuple[str, str]], *more: Any) -> Any:
            request.status = int(line.split(maxsplit=1)[0])
            if wrong is not None:
                headers = [h for h in headers if not h[0].lower().startswith("x-amz-checksum")]
            return start(line, headers, *more)

        body = b"".join(self._moto(environ, logged))
        if request.method == "HEAD":
            return [body]
        return self._send(request, body, wrong)

    @staticmethod
    def _refuse(request: Request, status: int, code: str, start: Any) -> list[bytes]:
        request.status = status
        body = f"<Error><Code>{code}</Code><Message>{code} on purpose</Message></Error>".encode()
        kind = [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
        start(f"{status} {code}", kind)
        return [] if request.method == "HEAD" else [body]

    def _send(self, request: Request, body: bytes, wrong: int | None) -> Iterator[bytes]:
        begin = request.ranged[0] if request.ranged else 0
        cut = self._faults.due("cut", request)
        if wrong is not None and begin <= wrong < begin + len(body):
            place = wrong - begin
            body = body[:place] + bytes([body[place] ^ 0xFF]) + body[place + 1 :]
        end = len(body) if cut is None else min(cut, len(body))
        for at in range(0, end, CHUNK_BYTES):
            chunk = body[at : min(at + CHUNK_BYTES, end)]
            request.sent_bytes += len(chunk)
            yield chunk
        if end < len(body):
            raise ConnectionAbortedError

    def _unlogged(self) -> _Unlogged:
        return _Unlogged(self)


class _Unlogged:
    """Keeps the test's own requests out of the log."""

    def __init__(self, storage: ObjectStorage) -> None:
        self._storage = storage

    def __enter__(self) -> None:
        self._before = len(self._storage.requests)

    def __exit__(self, *_: object) -> None:
        del self._storage.requests[self._before :]


class _Handler(MotoRequestHandler):
    def log(self, type: str, message: str, *args: Any) -> None:  # noqa: A002
        """Nothing on stderr: the requests are in the log."""
