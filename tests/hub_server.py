"""Run a Hub on loopback, in memory, with repositories, revisions, LFS, tokens, and faults on request.

It answers the requests of `huggingface_hub` for models, datasets and Spaces; names of the latter two begin with
datasets/ and spaces/. Tests control it by two more: `POST /_faults` with a list of faults replaces the earlier ones,
and `GET /_log` returns the requests since then.

A fault is a dictionary: `method` and `path` (a regular expression) select requests, `times` says how many of them fail
(1), `status` and `headers` are the answer. Status 0 cuts the connection after half of an upload or download.
Status -1 reads half of an upload, and waits until the faults are replaced.
"""

import base64
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

TOKENS = {"token-of-me": "me", "token-of-other": "other"}
_ID = r"(?P<repo>(?:datasets/|spaces/)?[^/]+/[^/]+)"
_LARGE = (".safetensors", ".bin", ".png", ".pt", ".pth", ".parquet", ".onnx")


class File(NamedTuple):
    """A file of a commit."""

    content: bytes
    is_lfs: bool

    @property
    def oid(self) -> str:
        if self.is_lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repository:
    """Commits by hash, and the names of some, such as `main`."""

    private: bool
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, File]) -> str:
        parts = [str(len(self.commits)), *(f"{path} {file.oid}" for path, file in sorted(files.items()))]
        commit = hashlib.sha1("\n".join(parts).encode()).hexdigest()
        self.commits[commit], self.names[branch] = files, commit
        return commit


class Refusal(Exception):
    """An answer with an error status."""

    def __init__(self, status: int, message: str, code: str | None = None, commit: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message}
        if code is not None:
            self.headers["X-Error-Code"] = code
        if commit is not None:
            self.headers["X-Repo-Commit"] = commit


class Cut(Exception):
    """Raised to close the connection."""


class HubServer(ThreadingHTTPServer):
    """The server; `url` is for HF_ENDPOINT."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.faults: list[dict[str, Any]] = []
        self.log: list[list[Any]] = []
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fault(self, method: str, path: str) -> dict[str, Any] | None:
        """Return the fault for a request, and count it down."""
        with self.lock:
            for fault in self.faults:
                if fault["times"] and fault["method"] in ("*", method) and re.search(fault["path"], path):
                    fault["times"] -= 1
                    return fault
        return None


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else the body of an answer waits 40 ms behind its head
    server: HubServer

    def handle_request(self) -> None:
        url = urlsplit(self.path)
        self.path, self.is_recursive = url.path, "recursive=true" in url.query.lower()
        self.body, self.may_cut_answer = None, False
        try:
            if self.path.startswith("/_"):
                self._control()
                return
            fault = self.server.fault(self.command, self.path)
            if fault is not None:
                self._fail(fault)
            self.body = self._read()
            self._route()
        except Refusal as refusal:
            if self.body is None:
                self.body = self._read()  # the next request comes after it
            self._answer({"error": str(refusal)}, refusal.status, refusal.headers)
        except Cut:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing on stderr."""

    # Requests and answers

    def _length(self) -> int:
        return int(self.headers.get("Content-Length") or 0)

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(self._length())
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _note(self, status: int) -> None:
        if not self.path.startswith("/_"):
            self.server.log.append([self.command, self.path, status])

    def _answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        is_bytes = isinstance(content, bytes)
        data = content if is_bytes else json.dumps(content).encode()
        self._note(status)
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.may_cut_answer:
            self.wfile.write(data[: len(data) // 2])
            raise Cut
        self.wfile.write(data)

    def _fail(self, fault: dict[str, Any]) -> None:
        if fault["status"] > 0:
            refusal = Refusal(fault["status"], "a fault of the test")
            refusal.headers |= fault.get("headers", {})
            raise refusal
        if self.command == "GET":
            self.may_cut_answer = True
            return
        self.rfile.read(self._length() // 2)
        self._note(fault["status"])
        while fault["status"] < 0 and fault in self.server.faults:
            time.sleep(0.01)
        raise Cut

    def _control(self) -> None:
        self.body = self._read()
        if self.path == "/_log":
            self._answer(self.server.log)
            return
        self.server.faults = [{"times": 1, **fault} for fault in json.loads(self.body)]
        self.server.log.clear()
        self._answer({})

    # Permissions

    def _user(self) -> str | None:
        header = self.headers.get("Authorization")
        if header is None:
            return None
        user = TOKENS.get(header.removeprefix("Bearer "))
        if user is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return user

    def _readable(self, name: str) -> Repository:
        repository, user = self.server.repositories.get(name), self._user()
        if repository is None or (repository.private and user != name.split("/")[-2]):
            raise Refusal(401 if user is None else 404, "Repository not found", "RepoNotFound")
        return repository

    def _writable(self, name: str) -> Repository:
        repository, user = self._readable(name), self._user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        if user != name.split("/")[-2]:
            raise Refusal(403, f"{user} may not write to {name}")
        return repository

    def _commit_of(self, repository: Repository, revision: str) -> str:
        revision = unquote(revision)
        commit = repository.names.get(revision, revision)
        if commit not in repository.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # The requests

    def _route(self) -> None:
        api = rf"^/api/(?:models/|(?=datasets/|spaces/)){_ID}"
        for method, pattern, action in (
            ("POST", r"^/api/repos/create$", self._create),
            ("POST", r"^/api/validate-yaml$", self._validate),
            ("GET", r"^/api/whoami-v2$", self._whoami),
            ("POST", rf"{api}/preupload/(?P<revision>[^/]+)$", self._preupload),
            ("POST", rf"{api}/commit/(?P<revision>[^/]+)$", self._commit),
            ("POST", rf"{api}/branch/(?P<branch>[^/]+)$", self._branch),
            ("POST", rf"{api}/tag/(?P<revision>[^/]+)$", self._tag),
            ("GET", rf"{api}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?$", self._tree),
            ("POST", rf"{api}/paths-info/(?P<revision>[^/]+)$", self._paths),
            ("GET", rf"{api}(/revision/(?P<revision>[^/]+))?$", self._info),
            ("POST", rf"^/{_ID}\.git/info/lfs/objects/batch$", self._batch),
            ("POST", rf"^/{_ID}\.git/info/lfs/verify$", self._verify),
            ("PUT", r"^/lfs/(?P<oid>\w+)$", self._put),
            ("GET HEAD", rf"^/{_ID}/resolve/(?P<revision>[^/]+)/(?P<file>.+)$", self._resolve),
        ):
            match = re.match(pattern, self.path)
            if match and self.command in method.split():
                action(**match.groupdict())
                return
        raise Refusal(404, f"{self.command} {self.path} is not implemented", "EntryNotFound")

    def _json(self) -> Any:
        return json.loads(self.body)

    def _whoami(self) -> None:
        user = self._user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        self._answer({"type": "user", "name": user, "orgs": []})

    def _create(self) -> None:
        user, wanted = self._user(), self._json()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        owner = wanted.get("organization") or user
        if owner != user:
            raise Refusal(403, f"{user} may not create repositories of {owner}")
        kind = wanted.get("type", "model")
        if kind == "space" and wanted.get("sdk") not in ("gradio", "docker", "static"):
            raise Refusal(400, "sdk is required for a Space")
        name = f"{owner}/{wanted['name']}" if kind == "model" else f"{kind}s/{owner}/{wanted['name']}"
        if name in self.server.repositories:
            self._answer({"url": f"{self.server.url}/{name}", "error": "You already created this repository"}, 409)
            return
        repository = Repository(bool(wanted.get("private") or wanted.get("visibility") == "private"))
        repository.commit("main", {".gitattributes": File(b"*.safetensors filter=lfs\n", False)})
        self.server.repositories[name] = repository
        self._answer({"url": f"{self.server.url}/{name}", "name": name, "id": name})

    def _validate(self) -> None:
        text = self._json()["content"]
        if not re.match(r"---\n.+?\n---\n", text, flags=re.DOTALL):
            self._answer({"errors": [{"message": "no metadata"}], "warnings": []}, 400)
        else:
            self._answer({"errors": [], "warnings": []})

    def _preupload(self, repo: str, revision: str) -> None:
        repository = self._writable(repo)
        present = repository.commits[self._commit_of(repository, revision)]
        files = []
        for wanted in self._json()["files"]:
            path = wanted["path"]
            mode = "lfs" if path.endswith(_LARGE) else "regular"
            oid = present[path].oid if path in present else None
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._answer({"files": files})

    def _batch(self, repo: str) -> None:
        self._writable(repo)
        objects = []
        for wanted in self._json()["objects"]:
            one = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.server.large_files:
                one["actions"] = {
                    "upload": {"href": f"{self.server.url}/lfs/{wanted['oid']}"},
                    "verify": {"href": f"{self.server.url}/{repo}.git/info/lfs/verify"},
                }
            objects.append(one)
        self._answer({"transfer": "basic", "objects": objects})

    def _put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "the content is not that of the oid")
        self.server.large_files[oid] = self.body
        self._answer({})

    def _verify(self, repo: str) -> None:
        self._writable(repo)
        wanted = self._json()
        if len(self.server.large_files.get(wanted["oid"], b"")) != wanted["size"]:
            raise Refusal(404, "not uploaded")
        self._answer({})

    def _commit(self, repo: str, revision: str) -> None:
        repository = self._writable(repo)
        files = dict(repository.commits[self._commit_of(repository, revision)])
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.server.large_files:
                    raise Refusal(400, f"{value['path']} was not uploaded")
                files[value["path"]] = File(self.server.large_files[value["oid"]], True)
            elif entry["key"] == "deletedFile":
                files.pop(value["path"], None)
        commit = repository.commit(unquote(revision), files)
        self._answer({"success": True, "commitOid": commit, "commitUrl": f"{self.server.url}/{repo}/commit/{commit}"})

    def _branch(self, repo: str, branch: str) -> None:
        repository, branch = self._writable(repo), unquote(branch)
        if branch in repository.names:
            raise Refusal(409, "Reference already exists")
        start = (self._json() if self.body else {}).get("startingPoint", "main")
        repository.names[branch] = self._commit_of(repository, start)
        self._answer({})

    def _tag(self, repo: str, revision: str) -> None:
        repository = self._writable(repo)
        repository.names[self._json()["tag"]] = self._commit_of(repository, revision)
        self._answer({})

    def _info(self, repo: str, revision: str | None) -> None:
        repository = self._readable(repo)
        commit = self._commit_of(repository, revision or "main")
        files = [{"rfilename": path} for path in repository.commits[commit]]
        self._answer({"id": repo, "sha": commit, "private": repository.private, "siblings": files, "tags": []})

    def _tree(self, repo: str, revision: str, folder: str | None = None) -> None:
        repository = self._readable(repo)
        files = repository.commits[self._commit_of(repository, revision)]
        parent = "" if folder is None else f"{unquote(folder)}/"
        inside = {path: file for path, file in files.items() if path.startswith(parent)}
        folders = {path[: path.find("/", len(parent))] for path in inside if "/" in path[len(parent) :]}
        if not self.is_recursive:
            inside = {path: file for path, file in inside.items() if "/" not in path[len(parent) :]}
        entries = [{"type": "directory", "path": path, "oid": path, "size": 0} for path in sorted(folders)]
        self._answer([*entries, *(self._entry(path, file) for path, file in inside.items())])

    def _paths(self, repo: str, revision: str) -> None:
        repository = self._readable(repo)
        files = repository.commits[self._commit_of(repository, revision)]
        wanted = [path.strip("/") for path in self._json()["paths"]]
        folders = {path for path in wanted if any(name.startswith(f"{path}/") for name in files)}
        entries = [self._entry(path, files[path]) for path in wanted if path in files]
        self._answer([*entries, *({"type": "directory", "path": path, "oid": path, "size": 0} for path in folders)])

    def _entry(self, path: str, file: File) -> dict[str, Any]:
        entry = {"type": "file", "path": path, "size": len(file.content), "oid": file.oid}
        lfs = {"oid": file.oid, "size": len(file.content), "pointerSize": 130}
        return entry | ({"lfs": lfs} if file.is_lfs else {})

    def _resolve(self, repo: str, revision: str, file: str) -> None:
        repository = self._readable(repo)
        commit = self._commit_of(repository, revision)
        found = repository.commits[commit].get(unquote(file))
        if found is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", commit)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{found.oid}"'}
        if found.is_lfs:
            headers |= {"X-Linked-Etag": f'"{found.oid}"', "X-Linked-Size": str(len(found.content))}
        self._answer(found.content, 200, headers)


def code_blocks(card: str) -> list[str]:
    """Return the Python blocks of a model card."""
    return [part.partition("```")[0] for part in card.split("```python\n")[1:]]
