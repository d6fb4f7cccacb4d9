"""A small OpenAI-compatible server for tests. What it answers, and how it fails, are functions of the request."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, Any]
"""A status, and the JSON of the reply or a text."""


def choice(text: str | None, reason: str = "stop", **message: Any) -> Reply:
    """The reply to a chat: a text, and why it ended."""
    message = {"role": "assistant", "content": text, **message}
    return 200, {"choices": [{"message": message, "finish_reason": reason}], "usage": {"completion_tokens": 3}}


@dataclass
class ChatServer:
    """A server that runs.

    answer: returns the reply to the body of a chat. models: those that it lists.
    bodies: of all chats so far. keys: what their requests had as Authorization. most: how many were answered at one time.
    """

    answer: Callable[[dict[str, Any]], Reply]
    models: list[str] = field(default_factory=lambda: ["served"])
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    now: int = 0
    most: int = 0


@contextlib.contextmanager
def chat_server(answer: Callable[[dict[str, Any]], Reply], **options: Any) -> Generator[ChatServer]:
    """Runs a server until the context ends."""
    server, lock = ChatServer(answer, **options), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            self.reply(
                (200, {"data": [{"id": name} for name in server.models]}) if self.path == "/v1/models" else (404, "no")
            )

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                server.bodies.append(body)
                server.keys.append(self.headers.get("Authorization"))
                server.now += 1
                server.most = max(server.most, server.now)
            try:
                found = server.answer(body)
            finally:
                with lock:
                    server.now -= 1
            self.reply(found if self.path == "/v1/chat/completions" else (404, "no such path"))

        def reply(self, found: Reply) -> None:
            status, content = found
            data = (content if isinstance(content, str) else json.dumps(content)).encode()
            with contextlib.suppress(OSError):  # a test may not wait for the reply
                self.send_response(status)
                for name, value in server.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{http.server_port}/v1"
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
