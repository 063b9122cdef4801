"""
A Hub of models on a real socket: what the huggingface_hub client asks for to make repositories, to commit and to
download. Repositories, branches and commits are kept in memory, large files by their SHA-256.
"""

import base64
import hashlib
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from huggingface_hub import ModelCard, repocard
from huggingface_hub.repocard_data import model_index_to_eval_results
from huggingface_hub.utils import get_session, validate_repo_id

TOKEN = "hf_" + "TestTokenThatMustNotShowUpAnywhere"
USER = "user"
# Fields of a card's metadata that this package writes.
METADATA = {
    "tags": list,
    "datasets": list,
    "model-index": list,
    **dict.fromkeys(("base_model", "base_model_relation", "library_name", "pipeline_tag"), str),
    **dict.fromkeys(("license", "license_name", "license_link", "model_name"), str),
}


@dataclass
class Repository:
    """
    `commits`: id -> path -> contents; `branches`: name -> id, pull requests (`refs/pr/N`) too; `large`: the paths that
    came as large files; `messages`: id -> summary and description.
    """

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    large: set[str] = field(default_factory=set)
    messages: dict[str, tuple[str, str]] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        name = hashlib.sha1(f"{id(self)} {len(self.commits)}".encode()).hexdigest()
        self.commits[name] = files
        self.branches[branch] = name
        return name


class ModelHub(ThreadingHTTPServer):
    """
    Attributes:
        repositories: by owner/name.
        requests: method and path of each, in order.
        cut_uploads: after how many bytes the connection of an upload is cut, one number for each upload to cut.
        cut_commits: `before` or `after` the commit is made, one for each commit whose connection is cut; or `refuse`.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.cut_uploads: list[int] = []
        self.cut_commits: list[str] = []

    def validate(self, card: ModelCard) -> None:
        """`card.validate()`; before huggingface_hub 2 it asks huggingface.co, whatever ENDPOINT is."""
        session = get_session()

        def post(url: str, **arguments: Any) -> Any:
            return session.post(self.url + urlsplit(url).path, **arguments)

        with patch.object(repocard, "get_session", lambda: SimpleNamespace(post=post)):
            card.validate()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Connections that are cut on purpose are not reported."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def files(self, name: str, branch: str = "main") -> dict[str, bytes]:
        repository = self.repositories[name]
        return repository.commits[repository.branches[branch]]

    def num_commits(self, name: str) -> int:
        """Without the first, empty one."""
        return len(self.repositories[name].commits) - 1


@contextmanager
def model_hub() -> Iterator[ModelHub]:
    with ModelHub() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class _Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = "", body: Any = None):
        self.status, self.code, self.message, self.body = status, code, message, body


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or a body waits, after its headers, until the client has acknowledged them: 40 ms
    server: ModelHub

    def log_message(self, *_: Any) -> None:
        pass

    def handle_request(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        try:
            self.route(parts)
        except _Refused as refused:
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            body = {"error": refused.message} if refused.body is None else refused.body
            self.close_connection = True  # what was sent may not have been read
            self.reply(body, refused.status, {name: value for name, value in headers.items() if value})

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def route(self, parts: list[str]) -> None:
        if parts == ["api", "whoami-v2"]:
            self.require_token()
            self.reply({"name": USER, "type": "user", "auth": {"accessToken": {"role": "write"}}})
        elif parts == ["api", "repos", "create"]:
            self.create_repository()
        elif parts == ["api", "validate-yaml"]:
            self.validate_card()
        elif parts[:2] == ["api", "models"]:
            self.model_api("/".join(parts[2:4]), parts[4:])
        elif parts[0] == "lfs":
            self.large_file(parts[1])
        elif parts[2:] == ["info", "lfs", "objects", "batch"]:
            self.large_file_batch()
        elif len(parts) > 4 and parts[2] == "resolve":
            self.resolve(self.repository("/".join(parts[:2])), parts[3], "/".join(parts[4:]))
        else:
            raise _Refused(404)

    # --- Repositories ---

    def model_api(self, name: str, rest: list[str]) -> None:
        repository = self.repository(name)
        action, arguments = (rest[0], rest[1:]) if rest else ("revision", ["main"])
        if action == "branch":
            self.create_branch(repository, arguments[0])
        elif action == "preupload":
            self.preupload(repository, arguments[0])
        elif action == "commit":
            self.commit(name, repository, arguments[0])
        elif action == "revision":
            commit, files = self.revision(repository, arguments[0])
            siblings = [{"rfilename": path} for path in files]
            facts = {"id": name, "sha": commit, "private": repository.private, "siblings": siblings, "tags": []}
            self.reply({**facts, "_id": "0", "modelId": name})
        elif action == "tree":
            self.tree(repository, arguments[0], "/".join(arguments[1:]))
        elif action == "refs":
            branches = [
                {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": commit}
                for branch, commit in repository.branches.items()
            ]
            self.reply({"branches": branches, "converts": [], "tags": []})
        else:
            raise _Refused(404)

    def create_repository(self) -> None:
        self.require_token()
        wanted = self.json()
        name = f"{wanted.get('organization') or USER}/{wanted['name']}"
        if name.split("/")[0] != USER:
            raise _Refused(403, message=f"You don't have the rights to create a model under {name.split('/')[0]}")
        if name in self.server.repositories:
            raise _Refused(409, body={"url": f"{self.server.url}/{name}"})
        private = wanted.get("private", wanted.get("visibility") == "private")
        repository = self.server.repositories[name] = Repository(bool(private))
        repository.commit("main", {".gitattributes": b""})
        self.reply({"url": f"{self.server.url}/{name}", "name": name})

    def create_branch(self, repository: Repository, branch: str) -> None:
        self.require_token()
        start = self.json().get("startingPoint", "main")
        if branch in repository.branches:
            raise _Refused(409, message="Reference already exists")
        repository.branches[branch] = self.revision(repository, start)[0]
        self.reply({})

    def tree(self, repository: Repository, revision: str, folder: str) -> None:
        _, files = self.revision(repository, revision)
        prefix = f"{folder}/" if folder else ""
        if folder and not any(path.startswith(prefix) for path in files):
            raise _Refused(404, "EntryNotFound")
        self.reply([self.entry(repository, path, files[path]) for path in files if path.startswith(prefix)])

    def entry(self, repository: Repository, path: str, contents: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(contents), "oid": git_hash(contents)}
        if path in repository.large:
            entry["lfs"] = {"oid": sha256(contents), "size": len(contents), "pointerSize": 134}
        return entry

    # --- Uploading ---

    def validate_card(self) -> None:
        """As far as it is known what the Hub checks: the metadata as written, before any client reads them."""
        try:
            block = repocard.REGEX_YAML_BLOCK.search(self.json()["content"])
            data = yaml.safe_load(block.group(2)) if block else {}
            for name, kind in METADATA.items():
                if not isinstance(data.get(name, kind()), kind):
                    raise ValueError(f"{name} must be a {kind.__name__}")
            for name in [*data.get("datasets", []), *([data["base_model"]] if "base_model" in data else [])]:
                validate_repo_id(name)
            if "model-index" in data:
                name, results = model_index_to_eval_results(data["model-index"])
                if not name or not all(isinstance(result.metric_value, (int, float)) for result in results):
                    raise ValueError("model-index: a name and numbers")
        except Exception as error:
            raise _Refused(400, body={"errors": [{"message": repr(error)}]}) from error
        self.reply({"errors": [], "warnings": [] if data else [{"message": "empty or missing yaml metadata"}]})

    def preupload(self, repository: Repository, revision: str) -> None:
        self.require_token()
        _, files = self.revision(repository, revision)
        answers = []
        for file in self.json()["files"]:
            path, found = file["path"], files.get(file["path"])
            large = path.endswith(".safetensors") or b"\0" in base64.b64decode(file["sample"])
            oid = None if found is None else sha256(found) if path in repository.large else git_hash(found)
            mode = "lfs" if large else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.reply({"files": answers})

    def large_file_batch(self) -> None:
        self.require_token()
        objects = []
        for wanted in self.json()["objects"]:
            target = f"{self.server.url}/lfs/{wanted['oid']}"
            actions = {"upload": {"href": target}, "verify": {"href": target}}
            known = wanted["oid"] in self.server.objects
            objects.append({**wanted, **({} if known else {"actions": actions})})
        self.reply({"transfer": "basic", "objects": objects})

    def large_file(self, oid: str) -> None:
        """Takes the file (PUT), or says whether it has arrived whole (POST)."""
        if self.command == "POST":
            self.require_token()
            wanted = self.json()
            if len(self.server.objects.get(wanted["oid"], b"")) != wanted["size"]:
                raise _Refused(422, message="not uploaded")
            return self.reply({})
        if self.headers.get("Authorization"):
            raise _Refused(400, message="a token on its way to the storage")
        if self.server.cut_uploads:
            self.rfile.read(self.server.cut_uploads.pop(0))
            return self.cut()
        contents = self.body()
        if sha256(contents) != oid:
            raise _Refused(422, message="another SHA-256")
        self.server.objects[oid] = contents
        return self.reply({})

    def commit(self, name: str, repository: Repository, branch: str) -> None:
        self.require_token()
        lines = [json.loads(line) for line in self.body().splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        when = self.server.cut_commits.pop(0) if self.server.cut_commits else None
        if when == "before":
            return self.cut()
        if when == "refuse":
            raise _Refused(403, message="Forbidden")
        parent, files = self.revision(repository, branch)
        if header.get("parentCommit", parent) != parent:
            raise _Refused(412, message="A commit has happened since. Please refresh and try again.")
        files = dict(files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
                repository.large.discard(value["path"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
                repository.large.add(value["path"])
            elif line["key"] == "deletedFile":
                if value["path"] not in files:
                    raise _Refused(400, message=f"There is no {value['path']} to delete")
                del files[value["path"]]
        answer = {}
        if parse_qs(urlsplit(self.path).query).get("create_pr") == ["1"]:
            number = 1 + sum(name.startswith("refs/pr/") for name in repository.branches)
            branch, answer = f"refs/pr/{number}", {"pullRequestUrl": f"{self.server.url}/{name}/discussions/{number}"}
        commit = repository.commit(branch, files)
        repository.messages[commit] = (header["summary"], header["description"])
        if when == "after":
            return self.cut()
        url = f"{self.server.url}/{name}/commit/{commit}"
        return self.reply({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": "", **answer})

    # --- Downloading ---

    def resolve(self, repository: Repository, revision: str, path: str) -> None:
        commit, files = self.revision(repository, revision)
        headers = {"X-Repo-Commit": commit}
        if path not in files:
            raise _Refused(404, "EntryNotFound", "Entry not found")
        contents, status = files[path], 200
        etag = sha256(contents) if path in repository.large else git_hash(contents)
        headers |= {"ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if asked := self.headers.get("Range"):
            first = int(asked.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {first}-{len(contents) - 1}/{len(contents)}"
            status, contents = 206, contents[first:]
        self.reply(contents, status, headers)

    # --- What they share ---

    def repository(self, name: str) -> Repository:
        repository = self.server.repositories.get(name)
        if repository is None or (repository.private and not self.has_token()):
            raise _Refused(404 if self.has_token() else 401, "RepoNotFound", "Repository not found")
        return repository

    def revision(self, repository: Repository, name: str) -> tuple[str, dict[str, bytes]]:
        commit = repository.branches.get(name, name)
        if commit not in repository.commits:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {name}")
        return commit, repository.commits[commit]

    def has_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def require_token(self) -> None:
        if not self.has_token():
            raise _Refused(401, message="Invalid username or password.")

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def json(self) -> dict[str, Any]:
        return json.loads(self.body() or b"{}")

    def cut(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def reply(self, body: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        contents = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(contents)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(contents)


def sha256(contents: bytes) -> str:
    return hashlib.sha256(contents).hexdigest()


def git_hash(contents: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(contents) + contents).hexdigest()
