"""A Hub of datasets on a real socket: what the clients ask for to read files, and nothing else."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "c" * 40


class DatasetHub(ThreadingHTTPServer):
    """`repositories`: name -> path -> contents. `sent`: bytes of each file that went out."""

    def __init__(self, repositories: dict[str, dict[str, bytes]]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories = repositories
        self.sent: dict[str, int] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def dataset_hub(repositories: dict[str, dict[str, bytes]]) -> Iterator[DatasetHub]:
    with DatasetHub(repositories) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or a body waits, after its headers, until the client has acknowledged them: 40 ms
    server: DatasetHub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[0] == "api" and parts[1] == "datasets":
            name, rest = "/".join(parts[2:4]), parts[4:]
            files = self.server.repositories.get(name)
            if files is None:
                return self.reply(404, b"", "RepoNotFound")
            if not rest or rest[0] == "revision":
                return self.reply(200, self.about(name, files))
            if rest[0] == "tree":
                return self.reply(200, self.listing("/".join(rest[2:]), files))
            paths = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
            return self.reply(200, json.dumps([self.entry(path, files[path]) for path in paths if path in files]))
        if parts[0] == "datasets" and parts[3] == "resolve":
            files, path = self.server.repositories.get("/".join(parts[1:3])), "/".join(parts[5:])
            if files is None:
                return self.reply(404, b"", "RepoNotFound")
            if path not in files:
                return self.reply(404, b"", "EntryNotFound")
            return self.reply(200, files[path], path=path)
        return self.reply(404, b"", "RepoNotFound")

    do_HEAD = do_POST = do_GET

    def about(self, name: str, files: dict[str, bytes]) -> str:
        return json.dumps({"id": name, "sha": COMMIT, "siblings": [{"rfilename": path} for path in files]})

    def entry(self, path: str, contents: bytes) -> dict[str, Any]:
        return {"type": "file", "path": path, "size": len(contents), "oid": hashlib.sha1(path.encode()).hexdigest()}

    def listing(self, folder: str, files: dict[str, bytes]) -> str:
        prefix = f"{folder}/" if folder else ""
        below = {path: path[len(prefix) :] for path in files if path.startswith(prefix)}
        entries = [self.entry(path, files[path]) for path, rest in below.items() if "/" not in rest]
        folders = {prefix + rest.split("/")[0] for rest in below.values() if "/" in rest}
        return json.dumps(
            entries + [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in folders]
        )

    def reply(self, status: int, contents: bytes | str, error: str = "", path: str = "") -> None:
        contents = contents.encode() if isinstance(contents, str) else contents
        etag, size = hashlib.sha1(path.encode()).hexdigest(), len(contents)
        asked = self.headers.get("Range")
        if asked and status == 200:
            first, last = (int(bound) if bound else None for bound in asked.removeprefix("bytes=").split("-"))
            last = size - 1 if last is None else min(last, size - 1)
            status, contents = 206, contents[first : last + 1]
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        if error:
            self.send_header("X-Error-Code", error)
        self.send_header("Content-Length", str(len(contents)))
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(contents)
            if path:
                self.server.sent[path] = self.server.sent.get(path, 0) + len(contents)
