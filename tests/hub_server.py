"""A Hub on this machine that has data sets: as much of its protocol as the libraries `datasets` and `huggingface_hub` need to read them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Generator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal, cast
from urllib.parse import unquote, urlsplit

import datasets.config
import huggingface_hub
import pytest

COMMIT = "0" * 40
"""The revision of every data set."""


class Hub(ThreadingHTTPServer):
    """Serves what lies in directory/org/set as the data set org/set. `sent` is how many bytes of each of its files were sent.

    `fault` is what goes wrong with every file: it is "busy", it is "cut" while it is sent, or it is "short", so that its second half
    does not come, from the end of a line on.
    """

    def __init__(self, directory: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.directory, self.sent = directory, dict[str, int]()
        self.fault: Literal["busy", "cut", "short"] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    @property
    def hub(self) -> Hub:
        return cast("Hub", self.server)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        found = re.fullmatch(
            r"(/api)?/datasets/([^/]+/[^/]+)(?:/(revision|tree|resolve)/[^/]+/?(.*))?",
            unquote(urlsplit(self.path).path),
        )
        folder, kind = (self.hub.directory / found[2], found[3]) if found else (Path("none"), None)
        place = folder / (found[4] or "") if found else folder
        if kind == "resolve" and place.is_file():
            self._send_file(str(place.relative_to(folder)), place.read_bytes())
        elif kind == "tree" and place.is_dir():
            files = place.rglob("*") if "recursive=true" in self.path else place.iterdir()
            self._send([self._entry(folder, file) for file in sorted(files)])
        elif kind in (None, "revision") and folder.is_dir():
            self._send({"_id": found and found[2], "id": found and found[2], "sha": COMMIT, "siblings": [], "tags": []})
        else:
            missing = "RepoNotFound" if kind in (None, "revision") else "EntryNotFound"
            self._send({"error": "not found"}, 404, {"X-Error-Code": missing})

    def _entry(self, folder: Path, file: Path) -> dict[str, Any]:
        kind = {"type": "directory"} if file.is_dir() else {"type": "file", "size": file.stat().st_size}
        return kind | {"path": str(file.relative_to(folder)), "oid": "1" * 40}

    def _send_file(self, path: str, content: bytes) -> None:
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(path.encode()).hexdigest()}"'}
        fault = self.hub.fault if self.command == "GET" else None
        if fault == "busy":
            self._send({"error": "busy"}, 429)
            return
        if fault == "short":
            content = content[: content.rfind(b"\n", 0, len(content) // 2) + 1]
        part, status = content, 200
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, stop = int(found[1]), min(int(found[2] or len(content)) + 1, len(content))
            headers["Content-Range"] = f"bytes {first}-{stop - 1}/{len(content)}"
            part, status = content[first:stop], 206
        if fault == "cut":
            headers["Content-Length"], part = str(len(part)), part[:1]
            self.close_connection = True
        if self.command == "GET":  # counted before whoever asked has it, and may look
            self.hub.sent[path] = self.hub.sent.get(path, 0) + len(part)
        self._send(part, status, headers)

    def _send(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, header in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, header)
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(ConnectionError):
                self.wfile.write(body)


@contextlib.contextmanager
def serving(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[Hub]:
    """Runs a Hub whose data sets are in a directory. The libraries use it, with empty caches of their own beside these."""
    hub = Hub(directory)
    files, sets = "/{repo_id}/resolve/{revision}/{filename}", "/datasets/{repo_id}/resolve/{revision}/{path}"
    cache = str(directory / "cache")
    of_hub = {"HF_HUB_OFFLINE": False, "ENDPOINT": hub.url, "HF_HUB_CACHE": cache}
    for module, settings in (
        (huggingface_hub.constants, of_hub | {"HUGGINGFACE_CO_URL_TEMPLATE": hub.url + files}),
        (datasets.config, {"HF_HUB_OFFLINE": False, "HF_ENDPOINT": hub.url, "HUB_DATASETS_URL": hub.url + sets}),
        (datasets.config, {"HF_DATASETS_CACHE": str(directory / "tables")}),
    ):
        for name, value in settings.items():
            monkeypatch.setattr(module, name, value)
    huggingface_hub.HfFileSystem.clear_instance_cache()
    threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        huggingface_hub.HfFileSystem.clear_instance_cache()
