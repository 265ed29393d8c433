"""A Hugging Face Hub of one model on this machine, whose line can break once in the middle of the weights."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0" * 40


class Hub(ThreadingHTTPServer):
    """Serves ``files`` (name to bytes) as the model owner/name.

    Args:
        files: name to content.
        breaks: name of a file whose transfer stops half-way, once.
    """

    daemon_threads = True

    def __init__(self, files: dict[str, bytes], breaks: str = ""):
        super().__init__(("127.0.0.1", 0), _Answer)
        self.files = files
        self.breaks = breaks
        self.sent: list[tuple[str, int]] = []  # file and first byte of every transfer

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def running(hub: Hub) -> Iterator[Hub]:
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class _Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        files = self.server.files
        if self.path.startswith("/api/models/owner/name"):
            siblings = [{"rfilename": name, "size": len(files[name]), "blobId": _tag(files[name])} for name in files]
            self._json({"id": "owner/name", "sha": COMMIT, "siblings": siblings})
        elif self.path.startswith(f"/owner/name/resolve/{COMMIT}/"):
            self._file(self.path.split(f"/resolve/{COMMIT}/")[1])
        else:
            self.send_error(404)

    def _json(self, content) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _file(self, name: str) -> None:
        content = self.server.files[name]
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if "Range" in self.headers:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        self.server.sent.append((name, start))
        if name == self.server.breaks:
            self.server.breaks = ""
            self.wfile.write(content[start : len(content) // 2])
            self.wfile.flush()
            self.close_connection = True
            return
        self.wfile.write(content[start:])


def _tag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
