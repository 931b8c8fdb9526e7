"""Files over HTTP as fast as this machine can, so that a benchmark does not measure its server.

    with file_server(directory) as url: ...

Processes that share a port, in which the kernel copies each file to its socket (`sendfile`). The last
part of a URL's path is the name of a file in the directory, whatever is before it: so it stands in for
an object store's GET and HEAD, which do not ask for a signature, and for the CDN behind a Hub.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

_PROCESSES = 2
_SLICE_S = 0.02  # of a connection's speed, sent at once


@contextmanager
def file_server(
    directory: Path, *, delay_s: float = 0, connection_bytes_per_s: float = 0
) -> Iterator[str]:
    """Yield the URL of a server for the files of a directory.

    delay_s: before each answer. connection_bytes_per_s: the most that one connection gets; 0 = all.
    """
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        free.bind(("127.0.0.1", 0))  # kept, so that nobody else gets the port
        port = free.getsockname()[1]
        command = (
            sys.executable, "-m", "tests.bench.file_server",
            str(directory), str(port), str(delay_s), str(connection_bytes_per_s),
        )  # fmt: skip
        servers = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(_PROCESSES)]
        try:
            for server in servers:
                assert server.stdout is not None
                server.stdout.readline()  # it listens
            yield f"http://127.0.0.1:{port}"
        finally:
            for server in servers:
                server.send_signal(signal.SIGKILL)
                server.wait()


class _Server(ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Nothing: clients close connections that they need no more."""

    def server_bind(self) -> None:
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        super().server_bind()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 1 << 16
    directory: Path
    delay_s: float
    connection_bytes_per_s: float

    def do_GET(self) -> None:
        if self.delay_s:
            time.sleep(self.delay_s)
        name = unquote(urlsplit(self.path).path).rpartition("/")[2]
        try:
            file = (self.directory / name).open("rb")
        except OSError:
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        with file:
            size = os.fstat(file.fileno()).st_size
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            begin = int(asked[1]) if asked else 0
            end = min(int(asked[2]) + 1, size) if asked and asked[2] else size
            self.send_response(206 if asked else 200)
            if asked:
                self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{size}")
            self.send_header("Content-Length", str(end - begin))
            self.send_header("Content-Type", "application/octet-stream")
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
            self.send_header("ETag", f'"{size:032x}"')
            self.end_headers()
            self.wfile.flush()
            if self.command != "HEAD":
                self._send(file.fileno(), begin, end)

    do_HEAD = do_GET

    def _send(self, fd: int, begin: int, end: int) -> None:
        speed = self.connection_bytes_per_s
        most = int(speed * _SLICE_S) if speed else end - begin
        started, sent = time.monotonic(), 0
        while begin < end:
            done = os.sendfile(self.connection.fileno(), fd, begin, min(most, end - begin))
            if not done:
                return
            begin, sent = begin + done, sent + done
            if speed:
                time.sleep(max(0.0, started + sent / speed - time.monotonic()))

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        """Nothing: a benchmark reads stderr."""


def _serve(directory: str, port: str, delay_s: str, connection_bytes_per_s: str) -> None:
    handler = type(
        "_Handler",
        (_Handler,),
        {
            "directory": Path(directory),
            "delay_s": float(delay_s),
            "connection_bytes_per_s": float(connection_bytes_per_s),
        },
    )
    with _Server(("127.0.0.1", int(port)), handler) as server:
        print("listening", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    _serve(*sys.argv[1:])
