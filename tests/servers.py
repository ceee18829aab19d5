"""Real servers on loopback: HTTP with ranges and faults to order."""

import contextlib
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal

import pytest

Fault = Literal["", "500", "429", "403", "cut", "wrong bytes", "hold"]


class FileServer(ThreadingHTTPServer):
    """Serves a folder.

    faults: what happens to the next GETs of a file, by its name: nothing, an answer of that status, a connection that
    is cut in the middle of the body, a changed byte, or half a body and no more before `released` is set.
    gets: (path, Range header or "") of each GET that was served, in order. has_ranges: whether ranges are honoured.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, folder: Path, has_ranges: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.has_ranges = folder, has_ranges
        self.faults: dict[str, deque[Fault]] = defaultdict(deque)
        self.gets: list[tuple[str, str]] = []
        self.released = threading.Event()

    def handle_error(self, request, client_address):
        """A client that was killed is no news."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def gets_of(self, name: str) -> int:
        return sum(path.endswith(name) for path, _ in self.gets)


class _Handler(BaseHTTPRequestHandler):
    server: FileServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self._answer(is_head=True)

    def do_GET(self):
        self._answer(is_head=False)

    def _answer(self, is_head):
        name = self.path.partition("?")[0].lstrip("/")
        path = self.server.folder / name
        if not is_head:
            self.server.gets.append((self.path, self.headers.get("Range", "")))
        faults = self.server.faults[Path(name).name]
        fault = faults.popleft() if faults and not is_head else None
        if fault in ("500", "429", "403") or not path.is_file():
            self._head(int(fault) if fault else 404, 0)
            return
        data, status = path.read_bytes(), 200
        if self.server.has_ranges and "Range" in self.headers:
            start, end = self.headers["Range"].removeprefix("bytes=").split("-")
            data, status = data[int(start) : int(end) + 1], 206
        if fault == "wrong bytes":
            data = bytes([data[0] ^ 1]) + data[1:]
        self._head(status, len(data))
        if is_head:
            return
        if fault in ("cut", "hold"):
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            if fault == "cut":
                self.close_connection = True
                return
            self.server.released.wait()
            data = data[len(data) // 2 :]
        self.wfile.write(data)

    def _head(self, status, length):
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def s3_bucket(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path, str], None]]:
    """An S3 server with an empty bucket, and the environment that leads clients to it.

    Yields what uploads all files below a folder, under a prefix.
    """
    moto = pytest.importorskip("moto.server", reason="needs moto[server]")
    boto3 = pytest.importorskip("boto3")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for variable, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(variable, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket=name)

    def upload(folder: Path, prefix: str) -> None:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                client.upload_file(str(path), name, f"{prefix}/{path.relative_to(folder)}")

    try:
        yield upload
    finally:
        client.close()
        server.stop()


@contextlib.contextmanager
def serving(folder: Path, has_ranges: bool = True) -> Iterator[FileServer]:
    with FileServer(folder, has_ranges) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.released.set()
            server.shutdown()
            thread.join()
