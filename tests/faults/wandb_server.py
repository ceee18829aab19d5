"""A W&B server on loopback: as much of its protocol as a run needs, and ways to fail.

It answers what wandb 0.31 asks when it begins a run, streams its rows and ends it.
"""

import contextlib
import gzip
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

Failure = Literal["refuses", "is silent"]


class WandbServer(ThreadingHTTPServer):
    """Keeps the rows that it was sent, and tells a run that is resumed how far it came.

    rows: of all runs, in the order in which they came; it takes them to be one run's where it is asked for its state.
    unanswered: an operation that it never answers. released: set, it lets go of the requests that it holds.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.rows: list[dict[str, Any]] = []
        self.is_silent = False
        self.unanswered = ""
        self.released = threading.Event()

    @property
    def environment(self) -> dict[str, str]:
        """What leads a run here."""
        return {
            "WANDB_API_KEY": "0123456789" * 4,
            "WANDB_BASE_URL": f"http://127.0.0.1:{self.server_address[1]}",
        }

    def fail(self, how: Failure) -> None:
        """Answer nothing from here on: neither requests nor, where it refuses, connections."""
        self.is_silent = True
        if how == "refuses":
            self.shutdown()
            self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""

    def answer(self, path: str, body: str) -> dict[str, Any]:
        """What a request is answered, as JSON."""
        if path.endswith("/file_stream"):
            history = json.loads(body).get("files", {}).get("wandb-history.jsonl", {})
            self.rows += [json.loads(row) for row in history.get("content", [])]
            return {}
        if path != "/graphql":
            return {}
        asked = json.loads(body)
        variables = asked.get("variables") or {}
        if asked["operationName"] == "RunResumeStatus" and self.rows:
            project = {"id": "1", "name": variables.get("project"), "entity": {"id": "1", "name": "me"}}
            tail = json.dumps([json.dumps(self.rows[-1])])
            lines = {"historyLineCount": len(self.rows), "historyTail": tail, "eventsLineCount": 0, "eventsTail": "[]"}
            known = {"summaryMetrics": "{}", "config": "{}", "tags": [], "wandbConfig": '{"t": 1}', "logLineCount": 0}
            return {"data": {"model": {**project, "bucket": {"id": "1", "name": variables["name"], **lines, **known}}}}
        if asked["operationName"] == "UpsertBucket":
            project = {"id": "1", "name": variables.get("project"), "entity": {"id": "1", "name": "me"}}
            name = variables.get("name")
            bucket = {"id": "1", "name": name, "displayName": name, "config": "{}", "project": project}
            return {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}
        if asked["operationName"] == "CreateRunFiles":
            url = f"http://127.0.0.1:{self.server_address[1]}/upload"
            files = [{"name": name, "uploadUrl": f"{url}/{name}"} for name in variables["files"]]
            return {"data": {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files}}}
        return {"data": {}}


class _Handler(BaseHTTPRequestHandler):
    server: WandbServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        unanswered = self.server.unanswered
        if self.server.is_silent or (unanswered and f'"operationName":"{unanswered}"'.encode() in body):
            self.close_connection = True
            self.server.released.wait()
            return
        is_upload = self.path.startswith("/upload")
        answer = json.dumps({} if is_upload else self.server.answer(self.path, body.decode())).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_PUT = do_POST

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def wandb_server() -> Iterator[WandbServer]:
    """A server that answers, until it is told to fail."""
    with WandbServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.released.set()
            server.shutdown()
            thread.join()
