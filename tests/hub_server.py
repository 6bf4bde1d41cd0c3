"""A stand-in for the Hugging Face hub on the loopback interface, with its own repositories and no network.

    with HubServer() as hub:
        hub.add("owner/name", {"config.json": b"{}"})            # or a folder
        subprocess.run(command, env={**os.environ, **hub.environment(cache)})

It speaks the part of the hub's HTTP interface that huggingface_hub uses to look up, download and upload
files: information, trees, references, files with ranges, LFS uploads and commits. Private and gated
repositories, tokens without rights and connections that break are as on the hub.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

# Files of at least this size are uploaded as LFS objects.
LARGE = 1000
READ, WRITE = "hf_read", "hf_write"


@dataclasses.dataclass
class Repository:
    """The commits of a repository: {commit: {path: content}}, and its branches and tags."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=dict)
    refs: dict[str, str] = dataclasses.field(default_factory=dict)
    messages: list[str] = dataclasses.field(default_factory=list)

    def commit(self, files: Mapping[str, bytes], branch: str = "main", message: str = "") -> str:
        parts = [branch, str(len(self.commits)), *(f"{name}{_digest(files[name])}" for name in sorted(files))]
        commit = hashlib.sha1("".join(parts).encode()).hexdigest()
        self.commits[commit], self.refs[branch] = dict(files), commit
        self.messages.append(message)
        return commit


class HubServer:
    """The stand-in.

    Attributes:
      repositories: by 'models/OWNER/NAME' or 'datasets/OWNER/NAME'.
      requests: 'GET /path' of each request.
      sent: bytes of file contents that were sent, by path.
      break_after: if set, the connection breaks after this many bytes of the next larger file, once.
      stop_after: if set, the next larger file stops after this many bytes, until the client has gone.
      stopped: is set when that has happened.
      refuse_commits: number of commits that are refused before one is accepted.
      accepted: tokens whose accounts have accepted all licences.
    """

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.sent: dict[str, int] = {}
        self.break_after: int | None = None
        self.stop_after: int | None = None
        self.stopped = threading.Event()
        self.refuse_commits = 0
        self.accepted: set[str] = set()
        self.objects: dict[str, bytes] = {}

    def __enter__(self) -> HubServer:
        hub = self
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def add(
        self, name: str, files: Mapping[str, bytes] | Path, *, branch: str = "main", **options: bool
    ) -> str:
        """Adds a commit with exactly these files; 'datasets/OWNER/NAME' is a data set. Returns the commit."""
        if isinstance(files, Path):
            files = {
                path.relative_to(files).as_posix(): path.read_bytes()
                for path in sorted(files.rglob("*"))
                if path.is_file()
            }
        key = name if name.startswith("datasets/") else f"models/{name}"
        return self.repositories.setdefault(key, Repository(**options)).commit(files, branch)

    def environment(self, home: Path, token: str = "") -> dict[str, str]:
        """The variables with which a command uses this hub, and a cache of its own."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": token,
        }

    def files_read(self) -> set[str]:
        """The names of the files whose content was sent, without the repository."""
        return {re.sub(r"^/(?:datasets/)?[^/]+/[^/]+/resolve/[^/]+/", "", path) for path in self.sent}


@contextlib.contextmanager
def in_process(hub: HubServer, home: Path, token: str = "") -> Iterator[HubServer]:
    """Within this context, this process uses the hub; see `HubServer.environment`.

    Patches of a test have to be undone before these: use the fixture of a test file before `monkeypatch`.
    """
    from huggingface_hub import constants

    from pixart_jax.hub import downloads

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        patch.setenv("HF_TOKEN", token)
        downloads._found.cache_clear()
        yield hub
    downloads._found.cache_clear()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    do_GET = do_POST = do_PUT = do_HEAD

    def _answer(self) -> None:
        url = urllib.parse.urlparse(self.path)
        path = urllib.parse.unquote(url.path)
        self.hub.requests.append(f"{self.command} {path}")
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        if self.command == "PUT":
            self.hub.objects[path.rpartition("/")[2]] = body
            self._send(200, {})
            return
        if path == "/api/whoami-v2":
            if self._token in (READ, WRITE):
                self._send(200, {"name": "me", "type": "user", "auth": {"accessToken": {"role": "write"}}})
            else:
                self._error(401, "", "Invalid credentials in Authorization header")
        elif path == "/api/validate-yaml":
            self._send(200, {"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(.*))?", path):
            repository = self._open(f"{found[1]}/{found[2]}")
            if repository:
                self._api(repository, found[2], found[3] or "", body)
        elif found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/(.+)", path):
            repository = self._open(f"{found[1] or 'models/'}{found[2]}")
            if repository:
                self._file(repository, found[3], path)
        elif found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self._batch(json.loads(body))
        else:
            self._error(404, "", f"no such route: {path}")

    @property
    def _token(self) -> str:
        return (self.headers.get("authorization") or "").removeprefix("Bearer ")

    def _open(self, key: str) -> Repository | None:
        repository = self.hub.repositories.get(key)
        if self._token and self._token not in (READ, WRITE):
            self._error(401, "", "Invalid credentials in Authorization header")
            return None
        if repository is None or (repository.private and not self._token):
            # As the hub does, which does not tell private repositories from those that do not exist.
            status = 404 if self._token else 401
            self._error(status, "RepoNotFound" if self._token else "", "Repository not found")
            return None
        return repository

    def _commit_of(self, repository: Repository, rest: str) -> tuple[str | None, str]:
        """The commit and the path in REVISION/PATH; a revision may contain slashes."""
        for name, commit in (*repository.refs.items(), *((commit, commit) for commit in repository.commits)):
            if rest == name or rest.startswith(f"{name}/"):
                return commit, rest[len(name) + 1 :]
        self._error(404, "RevisionNotFound", "Revision not found")
        return None, ""

    def _api(self, repository: Repository, name: str, rest: str, body: bytes) -> None:
        action, _, after = rest.partition("/")
        if action in ("", "revision"):
            commit, _ = self._commit_of(repository, after or "main")
            if commit:
                files = repository.commits[commit]
                siblings = [{"rfilename": path, "size": len(content)} for path, content in files.items()]
                answer = {"id": name, "sha": commit, "private": repository.private, "siblings": siblings}
                self._send(200, {**answer, "gated": "auto" if repository.gated else False, "tags": []})
        elif action == "tree":
            commit, _ = self._commit_of(repository, after)
            if commit:
                self._send(200, [_entry(*each) for each in repository.commits[commit].items()])
        elif action == "refs":
            refs = [
                {"name": ref, "ref": f"refs/heads/{ref}", "targetCommit": commit}
                for ref, commit in repository.refs.items()
            ]
            self._send(200, {"branches": refs, "tags": [], "converts": []})
        elif self._token != WRITE:
            self._error(403, "", "Forbidden: you don't have the rights to write to this repository")
        elif action == "preupload":
            files = repository.commits.get(repository.refs.get(after, ""), {})
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["size"] >= LARGE else "regular",
                    "shouldIgnore": False,
                    "oid": _oid(files[file["path"]]) if file["path"] in files else None,
                }
                for file in json.loads(body)["files"]
            ]
            self._send(200, {"files": modes})
        elif action == "branch":
            repository.refs.setdefault(after, repository.refs["main"])
            self._send(200, {})
        elif action == "commit" and self.hub.refuse_commits:
            self.hub.refuse_commits -= 1
            self._error(400, "", "try again")
        elif action == "commit":
            self._store(repository, name, after, body)
        else:
            self._error(404, "", f"no such route: {rest}")

    def _store(self, repository: Repository, name: str, branch: str, body: bytes) -> None:
        files = dict(repository.commits.get(repository.refs.get(branch, ""), {}))
        message = ""
        for line in body.decode().splitlines():
            change = json.loads(line)
            value = change["value"]
            if change["key"] == "header":
                message = value["summary"]
            elif change["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif change["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif change["key"] == "deletedFile":
                files.pop(value["path"], None)
        commit = repository.commit(files, branch, message)
        url = f"{self.hub.endpoint}/{name}/commit/{commit}"
        self._send(200, {"success": True, "commitUrl": url, "commitOid": commit})

    def _batch(self, body: dict) -> None:
        objects = []
        for each in body["objects"]:
            answer = {"oid": each["oid"], "size": each["size"]}
            if each["oid"] not in self.hub.objects:
                answer["actions"] = {
                    "upload": {"href": f"{self.hub.endpoint}/lfs/{each['oid']}", "header": {}}
                }
            objects.append(answer)
        self._send(200, {"transfer": "basic", "objects": objects})

    def _create(self, body: dict) -> None:
        if self._token != WRITE:
            status = 403 if self._token == READ else 401
            self._error(status, "", "You don't have the rights to create a model" if status == 403 else "")
            return
        owner = body.get("organization") or "me"
        key = f"{body.get('type', 'model')}s/{owner}/{body['name']}"
        exists = key in self.hub.repositories
        if not exists:
            private = bool(body.get("private")) or body.get("visibility") == "private"
            self.hub.repositories[key] = Repository(private=private)
            self.hub.repositories[key].commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        url = f"{self.hub.endpoint}/{owner}/{body['name']}"
        self._send(409 if exists else 200, {"url": url, "name": f"{owner}/{body['name']}"})

    def _file(self, repository: Repository, rest: str, url: str) -> None:
        commit, path = self._commit_of(repository, rest)
        if commit is None:
            return
        if repository.gated and self._token not in self.hub.accepted:
            status = 403 if self._token else 401
            self._error(status, "GatedRepo", "Access to this repository is restricted")
            return
        content = repository.commits[commit].get(path)
        if content is None:
            self._error(404, "EntryNotFound", "Entry not found")
            return
        start, end, status = 0, len(content), 200
        if (asked := self.headers.get("Range")) and self.command == "GET":
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, end, status = int(first), min(int(last) + 1 if last else end, end), 206
        self.send_response(status)
        self.send_header("ETag", f'"{_oid(content)}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Accept-Ranges", "bytes")
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        if self.command != "GET":
            return
        part = content[start:end]
        stopped = False
        if self.hub.stop_after is not None and len(part) > self.hub.stop_after:
            part, self.hub.stop_after, stopped = part[: self.hub.stop_after], None, True
        if self.hub.break_after is not None and len(part) > self.hub.break_after:
            part, self.hub.break_after, self.close_connection = part[: self.hub.break_after], None, True
        self.hub.sent[url] = self.hub.sent.get(url, 0) + len(part)
        self.wfile.write(part)
        if stopped:
            self.wfile.flush()
            self.hub.stopped.set()
            with contextlib.suppress(OSError):
                self.rfile.read(1)
            self.close_connection = True

    def _error(self, status: int, code: str, message: str) -> None:
        self._send(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})

    def _send(self, status: int, value: object, headers: Mapping[str, str] | None = None) -> None:
        text = json.dumps(value).encode()
        self.send_response(status)
        for name, each in (headers or {}).items():
            if each:
                self.send_header(name, each)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)


def _oid(content: bytes) -> str:
    """As the hub: the hash of an LFS object, or of a Git blob."""
    return _digest(content) if len(content) >= LARGE else _blob(content)


def _entry(path: str, content: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": path, "size": len(content), "oid": _blob(content)}
    if len(content) >= LARGE:
        entry["lfs"] = {"oid": _digest(content), "size": len(content), "pointerSize": 130}
    return entry
