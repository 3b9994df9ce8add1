"""A webhook that tests listen with."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@contextmanager
def webhook(answers: list[int] | None = None) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A real HTTP server on loopback: its URL, and what it was told. `answers` are its next status
    codes; after them it says 200."""
    heard: list[dict[str, Any]] = []
    left = list(answers or [])

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            text = self.rfile.read(int(self.headers["Content-Length"]))
            status = left.pop(0) if left else 200
            if status == 200:
                heard.append(json.loads(text))
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/hook/s3cret", heard
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
