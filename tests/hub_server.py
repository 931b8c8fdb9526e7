"""A Hugging Face Hub on loopback, for the real huggingface_hub: HF_ENDPOINT points at it.

    with HubServer() as hub:
        first = hub.add_repo("owner/name", {"config.json": b"{}", "model.safetensors": path})
        second = hub.commit("owner/name", {"config.json": b"[]"})  # main moves, `first` stays
        hub.cut_after("model.safetensors", 1000)
        subprocess.run(..., env=hub.environment(tmp_path))
        assert hub.ranges("model.safetensors") == [(0, 8)]

It keeps commits, branches, tags, private and gated repositories, answers with the Hub's headers and
error codes, and accepts uploads with a token that may write. As on the Hub, a small file is behind
a redirect to /api/resolve-cache, and a large one behind a signed link to another server, the CDN,
which refuses requests with a token. It has no Xet, pull requests, datasets or multi-part uploads,
and repositories cannot be changed or deleted.

Every request is logged. A fault applies to all requests whose path contains a text; on either
server the path of a file's content ends with the file's name.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from tests.faults import Fault, Faults

CHUNK_BYTES = 1 << 16
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".npz", ".zip")
REGULAR_LIMIT_BYTES = 10_000_000  # larger files go to LFS whatever their name
_BURST_S = 0.01  # what may be sent at once with a limited bandwidth, in seconds of it
DATE = "2026-01-01T00:00:00.000Z"
OWNER = "owner"  # who may read and write everything, with the right token

Content = bytes | Path


@dataclass
class Request:
    """A request and its answer. sent_bytes: of the body, without headers.

    ranged: the bytes [begin, end) of a 206 answer. token: as the client sent it.
    """

    server: str
    method: str
    path: str
    query: str
    range: str | None
    token: str | None
    status: int = 0
    sent_bytes: int = 0
    ranged: tuple[int, int] | None = None

    @property
    def line(self) -> str:
        """For comparing whole conversations: `hub GET /owner/name/resolve/main/file 302`."""
        return f"{self.server} {self.method} {self.path} {self.status}"


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of a commit. blob_id: its git id; for an LFS file, that of the pointer."""

    content: Content
    size_bytes: int
    sha256: str
    blob_id: str
    lfs: bool

    @classmethod
    def store(cls, name: str, content: Content) -> StoredFile:
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size)
        for chunk in read_chunks(content, 0, size):
            sha256.update(chunk)
            git.update(chunk)
        lfs = name.endswith(LFS_SUFFIXES) or size > REGULAR_LIMIT_BYTES
        if lfs:
            pointer = lfs_pointer(sha256.hexdigest(), size)
            git = hashlib.sha1(b"blob %d\0" % len(pointer) + pointer)
        return cls(content, size, sha256.hexdigest(), git.hexdigest(), lfs)

    @property
    def etag(self) -> str:
        return f'"{self.sha256 if self.lfs else self.blob_id}"'

    @property
    def pointer(self) -> dict[str, Any]:
        size = len(lfs_pointer(self.sha256, self.size_bytes))
        return {"size": self.size_bytes, "pointerSize": size}


@dataclass(frozen=True, slots=True)
class Commit:
    hash: str
    title: str
    files: Mapping[str, StoredFile]


@dataclass
class Repo:
    name: str
    private: bool
    gated: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, changes: Mapping[str, StoredFile | None], branch: str, title: str) -> str:
        parent = self.branches.get(branch)
        files = dict(self.commits[parent].files) if parent else {}
        for path, stored in changes.items():
            if stored is None:
                del files[path]
            else:
                files[path] = stored
        text = f"{self.name} {parent} {len(self.commits)} {branch} {title}"
        made = Commit(hashlib.sha1(text.encode()).hexdigest(), title, files)
        self.commits[made.hash] = made
        self.branches[branch] = made.hash
        return made.hash

    def resolve(self, revision: str) -> Commit:
        named = self.branches.get(revision) or self.tags.get(revision) or revision
        if named not in self.commits:
            raise _Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return self.commits[named]


class _Refusal(Exception):
    def __init__(self, status: int, code: str | None, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers
        if code:
            self.headers["X-Error-Code"] = code


class HubServer:
    """See the module. Names of repositories are `owner/name`; all of them are models."""

    token = "hf_" + "o" * 34
    read_token = "hf_" + "r" * 34  # also the owner's, but may not write
    stranger_token = "hf_" + "s" * 34  # of someone who may only read what is public

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.collections: dict[str, tuple[str, ...]] = {}
        self.uploads: dict[str, Path] = {}
        self.page_size = 1000  # entries of one page of a tree listing
        self._requests: list[Request] = []
        self._faults = Faults()
        self.lock = threading.RLock()
        self._signature = 0
        self._bandwidth: float | None = None
        self._free_at = 0.0
        self._folder = tempfile.TemporaryDirectory(prefix="hub-server-")
        self._servers = {role: _Server(self, role) for role in ("hub", "cdn")}

    def __enter__(self) -> HubServer:  # noqa: PYI034 - Self came with Python 3.11
        for server in self._servers.values():
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers.values():
            server.shutdown()
            server.server_close()
        self._folder.cleanup()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._servers['hub'].server_port}"

    @property
    def cdn(self) -> str:
        return f"http://127.0.0.1:{self._servers['cdn'].server_port}"

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """For a subprocess whose huggingface_hub talks to this server and keeps its files in `home`."""
        env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        for name in ("http_proxy", "https_proxy", "all_proxy", "TRANSFORMERS_OFFLINE"):
            env.pop(name, None)
            env.pop(name.upper(), None)
        env |= {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",  # otherwise uploads go through Xet, which this server does not have
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        return env | ({"HF_TOKEN": token} if token else {})

    # Repositories

    def add_repo(
        self,
        name: str,
        files: Mapping[str, Content],
        private: bool = False,
        gated: bool = False,
    ) -> str:
        """The hash of its first commit, on branch main."""
        self.repos[name] = Repo(name, private, gated)
        return self.commit(name, files, title="initial commit")

    def commit(
        self,
        name: str,
        changes: Mapping[str, Content | None],
        branch: str = "main",
        title: str = "a change",
    ) -> str:
        """The hash of a new commit, to which `branch` moves. None deletes a file."""
        stored = {
            path: None if content is None else StoredFile.store(path, content)
            for path, content in changes.items()
        }
        with self.lock:
            return self.repos[name].commit(stored, branch, title)

    def add_collection(self, slug: str, models: Sequence[str]) -> None:
        """slug: owner/name-id. Its models need not exist any more."""
        self.collections[slug] = tuple(models)

    def move_branch(self, name: str, branch: str, commit: str) -> None:
        self.repos[name].branches[branch] = commit

    def tag(self, name: str, tag: str, commit: str) -> None:
        self.repos[name].tags[tag] = commit

    def head(self, name: str, branch: str = "main") -> str:
        return self.repos[name].branches[branch]

    def files(self, name: str, revision: str = "main") -> list[str]:
        return sorted(self.repos[name].resolve(revision).files)

    def read(self, name: str, path: str, revision: str = "main") -> bytes:
        stored = self.repos[name].resolve(revision).files[path]
        return b"".join(read_chunks(stored.content, 0, stored.size_bytes))

    # The log of requests

    @property
    def requests(self) -> list[Request]:
        """All requests to both servers, in the order in which they arrived."""
        with self.lock:
            return list(self._requests)

    def clear(self) -> None:
        with self.lock:
            self._requests.clear()

    def lines(self) -> list[str]:
        return [request.line for request in self.requests]

    def sent_bytes(self, file: str) -> int:
        """How many bytes of a file's content were sent, over all requests."""
        return sum(request.sent_bytes for request in self._contents(file))

    def ranges(self, file: str) -> list[tuple[int, int]]:
        """The bytes [begin, end) of each answer with content of a file; (0, size) for the whole."""
        return [request.ranged for request in self._contents(file) if request.ranged]

    def _contents(self, file: str) -> list[Request]:
        return [r for r in self.requests if r.method == "GET" and r.ranged and file in r.path]

    # Faults

    def cut_after(self, match: str, num_bytes: int, times: int | None = 1, skip: int = 0) -> None:
        """Close the connection after `num_bytes` of a file's content. times=None: always."""
        self._faults.lay(Fault("cut", match, num_bytes, times, skip, "GET"))

    def fail(
        self,
        match: str,
        status: int = 503,
        times: int | None = 1,
        method: str | None = None,
        skip: int = 0,
        **headers: str,
    ) -> None:
        """Answer with `status` instead; 0 closes the connection without an answer."""
        self._faults.lay(Fault("fail", match, (status, headers), times, skip, method))

    def corrupt(self, match: str, offset: int, times: int | None = None) -> None:
        """Invert the byte at `offset` of a file whenever it is sent."""
        self._faults.lay(Fault("corrupt", match, offset, times, 0, "GET"))

    def delay(self, match: str, seconds: float, times: int | None = None) -> None:
        """Wait before the answer."""
        self._faults.lay(Fault("delay", match, seconds, times, 0, None))

    def throttle(self, match: str, bytes_per_s: float, times: int | None = None) -> None:
        """Send a file's content slowly."""
        self._faults.lay(Fault("throttle", match, bytes_per_s, times, 0, "GET"))

    def limit_bandwidth(self, bytes_per_s: float | None) -> None:
        """Limit the speed of all connections together; None removes the limit."""
        self._bandwidth, self._free_at = bytes_per_s, 0.0

    def ignore_range(self, match: str, times: int | None = None) -> None:
        """Ignore the requested range and answer 200 with the whole file."""
        self._faults.lay(Fault("whole", match, None, times, 0, None))

    def drop(self, match: str) -> None:
        """Lose files: listings still show them, their content is 404 EntryNotFound."""
        self._faults.lay(Fault("drop", match, None, None, 0, None))

    def when(self, match: str, action: Callable[[], object], nth: int = 1) -> None:
        """Call `action` just before the `nth` matching request is answered: to move a branch then."""
        self._faults.lay(Fault("when", match, action, 1, nth - 1, None))

    def expire_links(self) -> None:
        """Links to the CDN given out so far answer 403."""
        self._signature += 1

    def mend(self) -> None:
        """Remove all faults."""
        self._faults.mend()

    # For the handler

    def log(self, request: Request) -> None:
        with self.lock:
            self._requests.append(request)

    def fault(self, kind: str, request: Request) -> Any:
        """The value of a fault that applies now; True if it has no value, None if none applies."""
        return self._faults.due(kind, request)

    def pace(self, num_bytes: int) -> None:
        """Wait until the bandwidth that all connections share allows these bytes."""
        if self._bandwidth is None:
            return
        with self.lock:
            now = time.monotonic()
            self._free_at = max(now, self._free_at) + num_bytes / self._bandwidth
            wait = self._free_at - now
        # Sleeping too long is made up for: the next bytes wait less.
        if wait > _BURST_S:
            time.sleep(wait - _BURST_S)

    @property
    def signature(self) -> str:
        return f"signed-{self._signature}"

    def upload_path(self, sha256: str) -> Path:
        return Path(self._folder.name) / sha256

    @property
    def users(self) -> dict[str | None, str | None]:
        """The user of each token; None for requests without one."""
        return {
            None: None,
            self.token: OWNER,
            self.read_token: OWNER,
            self.stranger_token: "stranger",
        }

    def has_object(self, repo: str, sha256: str) -> Content | None:
        """An LFS object that was uploaded, or is in a commit already."""
        if sha256 in self.uploads:
            return self.uploads[sha256]
        commits = self.repos[repo].commits.values()
        stored = (file for commit in commits for file in commit.files.values())
        return next((file.content for file in stored if file.lfs and file.sha256 == sha256), None)

    def make_repo(self, name: str, private: bool) -> None:
        attributes = "".join(f"*{suffix} filter=lfs\n" for suffix in LFS_SUFFIXES)
        self.add_repo(name, {".gitattributes": attributes.encode()}, private)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # kept-alive connections have threads that wait

    def __init__(self, hub: HubServer, role: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub, self.role = hub, role

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that disconnects is not worth printing."""


_REPO, _REV = r"(?P<repo>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
_MODEL = rf"/api/models/{_REPO}"
_ROUTES: dict[str, list[tuple[str, str, str]]] = {
    "hub": [
        ("GET", r"/api/agent-harnesses", "agent_harnesses"),
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/repos/create", "create_repo"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("GET", r"/api/collections/(?P<slug>[^/]+/[^/]+)", "collection"),
        ("GET", rf"{_MODEL}(?:/revision/{_REV})?", "model_info"),
        ("GET", rf"{_MODEL}/tree/{_REV}(?:/(?P<path>.+))?", "tree"),
        ("POST", rf"{_MODEL}/paths-info/{_REV}", "paths_info"),
        ("GET", rf"{_MODEL}/refs", "refs"),
        ("POST", rf"{_MODEL}/branch/{_REV}", "create_branch"),
        ("POST", rf"{_MODEL}/tag/{_REV}", "create_tag"),
        ("POST", rf"{_MODEL}/preupload/{_REV}", "preupload"),
        ("POST", rf"{_MODEL}/commit/{_REV}", "commit"),
        ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
        ("POST", rf"/{_REPO}\.git/info/lfs/objects/verify", "lfs_verify"),
        ("GET HEAD", rf"/{_REPO}/resolve/{_REV}/(?P<path>.+)", "resolve"),
        ("GET HEAD", rf"/api/resolve-cache/models/{_REPO}/{_REV}/(?P<path>.+)", "small_file"),
    ],
    "cdn": [
        ("GET HEAD", rf"/{_REPO}/(?P<sha256>\w+)/(?P<signature>[^/]+)/(?P<path>.+)", "large_file"),
        ("PUT", r"/upload/(?P<signature>[^/]+)/(?P<sha256>\w{64})", "upload"),
    ],
}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = CHUNK_BYTES
    server: _Server

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        authorization = self.headers.get("Authorization")
        token = authorization.removeprefix("Bearer ") if authorization else None
        self.query = parse_qs(url.query)
        self.hub = self.server.hub
        self.request_log = Request(
            self.server.role,
            self.command,
            unquote(url.path),
            url.query,
            self.headers.get("Range"),
            token,
        )
        # A list of coding agents that huggingface_hub requests once a day, whatever it is used for.
        if url.path != "/api/agent-harnesses":
            self.hub.log(self.request_log)
        self.chunks = self.body_chunks()
        self.body = b"".join(self.chunks) if self.command == "POST" else b""
        try:
            self.misbehave()
            self.route(url.path)
        except _Refusal as refusal:
            # Unread bytes would be taken for the next request, and closing the connection on them
            # would lose the answer.
            self.drain()
            headers = {"X-Error-Message": refusal.message, **refusal.headers}
            self.send_json({"error": refusal.message}, refusal.status, headers)
        except ConnectionError:
            self.close_connection = True

    do_HEAD = do_POST = do_PUT = do_GET

    def misbehave(self) -> None:
        if action := self.hub.fault("when", self.request_log):
            action()
        if seconds := self.hub.fault("delay", self.request_log):
            time.sleep(seconds)
        if failure := self.hub.fault("fail", self.request_log):
            status, headers = failure
            if not status:
                raise ConnectionAbortedError
            headers = {name.replace("_", "-"): value for name, value in headers.items()}
            raise _Refusal(status, None, "out of order", **headers)

    def route(self, path: str) -> None:
        for methods, pattern, name in _ROUTES[self.server.role]:
            found = re.fullmatch(pattern, path)
            if found and self.command in methods.split():
                given = {k: unquote(v) for k, v in found.groupdict().items() if v is not None}
                getattr(self, name)(**given)
                return
        raise _Refusal(404, None, f"no such page: {self.command} {path}")

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Nothing on stderr: the requests are in the log."""

    # Requests

    def drain(self) -> None:
        for _ in self.chunks:
            pass

    def body_chunks(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length", 0))
        while left and (chunk := self.rfile.read(min(left, CHUNK_BYTES))):
            left -= len(chunk)
            yield chunk

    def find(self, name: str, write: bool = False, content: bool = False) -> Repo:
        """A repository that this user may use in this way. Others do not learn that it exists."""
        token, repo = self.request_log.token, self.hub.repos.get(name)
        user = self.user()
        if repo is None or (repo.private and user != OWNER):
            status = 401 if token is None else 404
            # The client takes a bare 401 for RepoNotFound only from an https endpoint.
            raise _Refusal(status, "RepoNotFound", "Repository not found")
        if repo.gated and content and user != OWNER:
            message = f"Access to model {name} is restricted."
            raise _Refusal(401 if token is None else 403, "GatedRepo", message)
        if write:
            self.check_write(user)
        return repo

    def user(self) -> str | None:
        if self.request_log.token not in self.hub.users:
            raise _Refusal(401, None, "Invalid credentials in Authorization header")
        return self.hub.users[self.request_log.token]

    def check_write(self, user: str | None) -> None:
        if user is None:
            raise _Refusal(401, None, "Invalid username or password.")
        if user != OWNER:
            raise _Refusal(403, None, f"You have no write access to what is {OWNER}'s")
        if self.request_log.token == self.hub.read_token:
            raise _Refusal(403, None, "you must use a write token to upload to a repository.")

    # Answers

    def start(self, status: int, headers: Mapping[str, str]) -> None:
        self.request_log.status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()

    def send_body(self, body: bytes) -> None:
        self.request_log.sent_bytes += len(body)
        self.wfile.write(body)

    def send_json(
        self, answer: Any, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        body = json.dumps(answer).encode()
        kind = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        self.start(status, {**kind, **(headers or {})})
        if self.command != "HEAD":
            self.send_body(body)

    def redirect(self, status: int, location: str, headers: Mapping[str, str]) -> None:
        body = b"" if self.command == "HEAD" else f"Redirecting to {location}".encode()
        self.start(status, {**headers, "Location": location, "Content-Length": str(len(body))})
        self.send_body(body)

    def send_file(self, stored: StoredFile, headers: Mapping[str, str]) -> None:
        size = stored.size_bytes
        whole = self.hub.fault("whole", self.request_log)
        asked = None if whole or self.command == "HEAD" else self.request_log.range
        begin, end = parse_range(asked, size) or (0, size)
        if begin >= end and asked:
            raise _Refusal(
                416, None, "Range not satisfiable", **{"Content-Range": f"bytes */{size}"}
            )
        is_part = parse_range(asked, size) is not None
        part = {"Content-Range": f"bytes {begin}-{end - 1}/{size}"} if is_part else {}
        kind = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"}
        length = {"Content-Length": str(end - begin)}
        if self.command != "HEAD":
            self.request_log.ranged = (begin, end)
        self.start(206 if is_part else 200, {**kind, **length, **headers, **part})
        if self.command != "HEAD":
            self.send_content(stored, begin, end)

    def send_content(self, stored: StoredFile, begin: int, end: int) -> None:
        cut = self.hub.fault("cut", self.request_log)
        speed = self.hub.fault("throttle", self.request_log)
        wrong = self.hub.fault("corrupt", self.request_log)
        # To keep a speed limit, send a twentieth of a second's worth at a time.
        step = max(1, int(speed / 20)) if speed else CHUNK_BYTES
        for at, chunk in enumerate_chunks(stored.content, begin, end, step):
            if wrong is not None and at <= wrong < at + len(chunk):
                place = wrong - at
                chunk = chunk[:place] + bytes([chunk[place] ^ 0xFF]) + chunk[place + 1 :]  # noqa: PLW2901
            if cut is not None and at + len(chunk) - begin > cut:
                self.send_body(chunk[: cut - (at - begin)])
                self.wfile.flush()
                raise ConnectionAbortedError
            self.hub.pace(len(chunk))
            self.send_body(chunk)
            if speed:
                self.wfile.flush()
                time.sleep(len(chunk) / speed)

    # Pages: reading

    def agent_harnesses(self) -> None:
        self.send_json({"standardEnvVars": [], "harnesses": {}})

    def whoami(self) -> None:
        user = self.user()
        if user is None:
            raise _Refusal(401, None, "Invalid username or password.")
        role = "read" if self.request_log.token == self.hub.read_token else "write"
        auth = {"type": "access_token", "accessToken": {"displayName": "mine", "role": role}}
        self.send_json({"type": "user", "name": user, "orgs": [], "auth": auth})

    def model_info(self, repo: str, revision: str | None = None) -> None:
        found = self.find(repo)
        commit = found.resolve(revision or "main")
        blobs = self.query.get("blobs", ["false"])[0].lower() == "true"
        siblings = [
            {"rfilename": path, **(blob_info(stored) if blobs else {})}
            for path, stored in sorted(commit.files.items())
        ]
        info = {
            "_id": commit.hash[:24],
            "id": repo,
            "modelId": repo,
            "author": repo.split("/", maxsplit=1)[0],
            "sha": commit.hash,
            "lastModified": DATE,
            "createdAt": DATE,
            "private": found.private,
            "gated": "auto" if found.gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": siblings,
        }
        if wanted := self.query.get("expand"):
            info = {key: value for key, value in info.items() if key in {"_id", "id", *wanted}}
        self.send_json(info)

    def collection(self, slug: str) -> None:
        if slug not in self.hub.collections:
            raise _Refusal(404, None, "Collection not found")
        items = [
            {"_id": f"{number:024x}", "id": name, "type": "model", "position": number}
            for number, name in enumerate(self.hub.collections[slug])
        ]
        self.send_json({
            "slug": slug,
            "title": slug,
            "owner": {"name": slug.split("/", maxsplit=1)[0]},
            "items": items,
            "lastUpdated": DATE,
            "position": 0,
            "private": False,
            "theme": "green",
            "upvotes": 0,
        })  # fmt: skip

    def tree(self, repo: str, revision: str, path: str = "") -> None:
        commit = self.find(repo).resolve(revision)
        folder = f"{path}/" if path else ""
        entries = tree_entries(commit, self.flag("expand"))
        below = {name: entry for name, entry in entries.items() if name.startswith(folder)}
        if not below and path:
            missing = f"{path} does not exist on {revision}"
            raise _Refusal(404, "EntryNotFound", missing, **{"X-Repo-Commit": commit.hash})
        if not self.flag("recursive"):
            below = {k: v for k, v in below.items() if "/" not in k.removeprefix(folder)}
        listed = [below[name] for name in sorted(below)]
        start = int(self.query.get("cursor", ["0"])[0])
        stop = start + self.hub.page_size
        more = {}
        if stop < len(listed):
            url = f"{self.hub.endpoint}{urlsplit(self.path).path}?cursor={stop}"
            flags = "".join(
                f"&{k}={self.query[k][0]}" for k in ("recursive", "expand") if k in self.query
            )
            more = {"Link": f'<{url}{flags}>; rel="next"'}
        self.send_json(listed[start:stop], headers=more)

    def flag(self, name: str) -> bool:
        return self.query.get(name, ["false"])[0].lower() in {"true", "1"}

    def paths_info(self, repo: str, revision: str) -> None:
        commit = self.find(repo).resolve(revision)
        form = parse_qs(self.body.decode())
        expand = form.get("expand", ["false"])[0].lower() == "true"
        entries = tree_entries(commit, expand)
        asked = [path.strip("/") for path in form.get("paths", [])]
        self.send_json([entries[path] for path in asked if path in entries])

    def refs(self, repo: str) -> None:
        found = self.find(repo)
        kinds = {"branches": ("heads", found.branches), "tags": ("tags", found.tags)}
        answer: dict[str, Any] = {"converts": []}
        for name, (folder, refs) in kinds.items():
            answer[name] = [
                {"name": ref, "ref": f"refs/{folder}/{ref}", "targetCommit": commit}
                for ref, commit in refs.items()
            ]
        self.send_json(answer)

    def resolve(self, repo: str, revision: str, path: str) -> None:
        commit = self.find(repo, content=True).resolve(revision)
        stored = self.stored(commit, path)
        headers = {
            "X-Repo-Commit": commit.hash,
            "X-Linked-Etag": stored.etag,
            "X-Linked-Size": str(stored.size_bytes),
            "Accept-Ranges": "bytes",
        }
        if stored.lfs:
            link = f"/{repo}/{stored.sha256}/{self.hub.signature}/{quote(path)}"
            self.redirect(302, self.hub.cdn + link, headers)
        else:
            link = f"/api/resolve-cache/models/{repo}/{commit.hash}/{quote(path)}"
            self.redirect(307, link, headers)

    def small_file(self, repo: str, revision: str, path: str) -> None:
        commit = self.find(repo, content=True).resolve(revision)
        stored = self.stored(commit, path)
        self.send_file(stored, {"X-Repo-Commit": commit.hash, "ETag": stored.etag})

    def stored(self, commit: Commit, path: str) -> StoredFile:
        if path not in commit.files or self.hub.fault("drop", self.request_log):
            headers = {"X-Repo-Commit": commit.hash}
            raise _Refusal(404, "EntryNotFound", "Entry not found", **headers)
        return commit.files[path]

    def large_file(self, repo: str, sha256: str, signature: str, path: str) -> None:
        self.check_link(signature)
        for commit in self.hub.repos[repo].commits.values():
            stored = commit.files.get(path)
            if stored and stored.sha256 == sha256 and not self.hub.fault("drop", self.request_log):
                # The storage's own etag, which is not what the Hub calls the file.
                self.send_file(stored, {"ETag": f'"{sha256[:32]}"'})
                return
        raise _Refusal(404, None, "NoSuchKey")

    def check_link(self, signature: str) -> None:
        if self.request_log.token is not None:
            raise _Refusal(400, None, "Only one auth mechanism allowed")
        if signature != self.hub.signature:
            raise _Refusal(403, None, "Request has expired")

    # Pages: writing

    def create_repo(self) -> None:
        asked, user = json.loads(self.body), self.user()
        namespace = asked.get("organization") or user
        if namespace != user and user is not None:
            message = (
                f'You don\'t have the rights to create a model under the namespace "{namespace}"'
            )
            raise _Refusal(403, None, message)
        self.check_write(user)
        name = f"{namespace}/{asked['name']}"
        url = {"url": f"{self.hub.endpoint}/{name}", "name": name}
        if name in self.hub.repos:
            error = {**url, "error": "You already created this model repo"}
            self.send_json(error, 409)
            return
        # "private" is how releases before 1.0 say it.
        private = asked.get("private") or asked.get("visibility") == "private"
        self.hub.make_repo(name, bool(private))
        self.send_json(url)

    def validate_yaml(self) -> None:
        self.send_json({"errors": [], "warnings": []})

    def create_branch(self, repo: str, revision: str) -> None:
        found = self.find(repo, write=True)
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        if revision in found.branches:
            raise _Refusal(409, None, f"Reference already exists: refs/heads/{revision}")
        found.branches[revision] = found.resolve(start).hash
        self.send_json({})

    def create_tag(self, repo: str, revision: str) -> None:
        found = self.find(repo, write=True)
        found.tags[json.loads(self.body)["tag"]] = found.resolve(revision).hash
        self.send_json({})

    def preupload(self, repo: str, revision: str) -> None:
        commit = self.find(repo, write=True).resolve(revision)
        files = []
        for asked in json.loads(self.body)["files"]:
            path = asked["path"]
            lfs = path.endswith(LFS_SUFFIXES) or asked["size"] > REGULAR_LIMIT_BYTES
            mode = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            there = commit.files.get(path)
            files.append(mode | ({"oid": there.etag.strip('"')} if there else {}))
        self.send_json({"files": files})

    def lfs_batch(self, repo: str) -> None:
        self.find(repo, write=True)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"]}
            if self.hub.has_object(repo, asked["oid"]) is None:
                upload = f"{self.hub.cdn}/upload/{self.hub.signature}/{asked['oid']}"
                verify = f"{self.hub.endpoint}/{repo}.git/info/lfs/objects/verify"
                answer["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
            objects.append(answer)
        self.send_json({"transfer": "basic", "objects": objects})

    def upload(self, signature: str, sha256: str) -> None:
        self.check_link(signature)
        target, digest = self.hub.upload_path(sha256), hashlib.sha256()
        with target.open("wb") as file:
            for chunk in self.chunks:
                digest.update(chunk)
                file.write(chunk)
        if digest.hexdigest() != sha256:
            raise _Refusal(400, None, "XAmzContentSHA256Mismatch")
        self.hub.uploads[sha256] = target
        self.start(200, {"Content-Length": "0", "ETag": f'"{sha256[:32]}"'})

    def lfs_verify(self, repo: str) -> None:
        self.find(repo, write=True)
        asked = json.loads(self.body)
        there = self.hub.uploads.get(asked["oid"])
        if there is None or there.stat().st_size != asked["size"]:
            raise _Refusal(404, None, "The object is not there")
        self.send_json({})

    def commit(self, repo: str, revision: str) -> None:
        found = self.find(repo, write=True)
        if revision not in found.branches:
            raise _Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        changes: dict[str, StoredFile | None] = {}
        title, parent = "", None
        for line in self.body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                title = value["summary"]
                parent = value.get("parentCommit")
            elif key == "file":
                content = base64.b64decode(value["content"])
                changes[value["path"]] = StoredFile.store(value["path"], content)
            elif key == "lfsFile":
                changes[value["path"]] = self.uploaded(repo, value["path"], value["oid"])
            else:
                changes |= self.deleted(found.resolve(revision), key, value["path"])
        with self.hub.lock:
            if parent not in (None, found.branches[revision]):
                raise _Refusal(412, None, "A commit has happened since. Please refresh.")
            made = found.commit(changes, revision, title)
        url = f"{self.hub.endpoint}/{repo}/commit/{made}"
        self.send_json({"success": True, "commitOid": made, "commitUrl": url, "hookOutput": ""})

    def uploaded(self, repo: str, path: str, sha256: str) -> StoredFile:
        content = self.hub.has_object(repo, sha256)
        if content is None:
            raise _Refusal(400, None, f"LFS pointer pointed to a file that does not exist: {path}")
        return StoredFile.store(path, content)

    def deleted(self, commit: Commit, key: str, path: str) -> dict[str, StoredFile | None]:
        folder = path.rstrip("/") + "/"
        gone = [
            name
            for name in commit.files
            if (name.startswith(folder) if key == "deletedFolder" else name == path)
        ]
        if not gone:
            raise _Refusal(404, "EntryNotFound", f"A file with this name doesn't exist: {path}")
        return dict.fromkeys(gone)


def parse_range(header: str | None, size: int) -> tuple[int, int] | None:
    """The bytes [begin, end), which may be empty. None if there is no range, or more than one."""
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", header or "")
    if not found or found.group() == "bytes=-":
        return None
    first, last = found.groups()
    if not first:
        return max(0, size - int(last)), size
    return min(int(first), size), min(int(last) + 1, size) if last else size


def read_chunks(content: Content, begin: int, end: int, step: int = CHUNK_BYTES) -> Iterator[bytes]:
    if isinstance(content, bytes):
        for at in range(begin, end, step):
            yield content[at : min(at + step, end)]
        return
    with content.open("rb") as file:
        file.seek(begin)
        while begin < end and (chunk := file.read(min(step, end - begin))):
            begin += len(chunk)
            yield chunk


def enumerate_chunks(
    content: Content, begin: int, end: int, step: int
) -> Iterable[tuple[int, bytes]]:
    at = begin
    for chunk in read_chunks(content, begin, end, step):
        yield at, chunk
        at += len(chunk)


def lfs_pointer(sha256: str, size: int) -> bytes:
    version = "https://git-lfs.github.com/spec/v1"
    return f"version {version}\noid sha256:{sha256}\nsize {size}\n".encode()


def blob_info(stored: StoredFile) -> dict[str, Any]:
    info = {"size": stored.size_bytes, "blobId": stored.blob_id}
    return info | ({"lfs": {"sha256": stored.sha256, **stored.pointer}} if stored.lfs else {})


def tree_entries(commit: Commit, expand: bool) -> dict[str, dict[str, Any]]:
    """The tree's entry for each path: files and the folders that they are in."""
    last = {"lastCommit": {"id": commit.hash, "title": commit.title, "date": DATE}}
    more = last if expand else {}
    entries: dict[str, dict[str, Any]] = {}
    for path, stored in commit.files.items():
        lfs = {"lfs": {"oid": stored.sha256, **stored.pointer}} if stored.lfs else {}
        entry = {"type": "file", "oid": stored.blob_id, "size": stored.size_bytes, "path": path}
        entries[path] = entry | lfs | more
        for folder in [str(parent) for parent in Path(path).parents][:-1]:
            oid = hashlib.sha1(f"{commit.hash} {folder}".encode()).hexdigest()
            entries[folder] = {"type": "directory", "oid": oid, "size": 0, "path": folder} | more
    return entries
