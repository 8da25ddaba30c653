"""A small Hub of one's own: the part of its HTTP interface that publishing and loading a model use, kept in memory.

Paths and answers follow https://huggingface.co/docs/hub/api and what `huggingface_hub` asks for. A repository is a
list of commits; large files go to a store of their own by SHA-256 before the commit that names them.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_" + "WritesToTheTestHub" * 2
EXPIRED = "hf_" + "ExpiredOnTheTestHub" * 2
READ_ONLY = "hf_" + "ReadsFromTheTestHub" * 2

Files = dict[str, bytes]


def oid_of(files: Files, number: int) -> str:
    content = b"".join(name.encode() + hashlib.sha1(files[name]).digest() for name in sorted(files))
    return hashlib.sha1(b"%d" % number + content).hexdigest()


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repository:
    """Commits by their hash, and the names that stand for some of them."""

    private: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    heads: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pull_requests: list[str] = field(default_factory=list)

    def commit(self, name: str, files: Files) -> str:
        oid = oid_of(files, len(self.commits))
        self.commits[oid] = files
        self.heads[name] = oid
        return oid

    def oid(self, revision: str) -> str | None:
        known = {**self.heads, **self.tags}
        return known.get(revision, revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> Files:
        return self.commits[self.oid(revision)]


@dataclass
class Fault:
    """What happens instead of, or after, requests that fit; `times` of them, after `skip` others."""

    pattern: str
    times: int = 1
    skip: int = 0
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    drop: str | None = None  # "before" the request is looked at, or "after" it was done, its answer lost


class HubServer:
    """`with HubServer() as hub:` serves at `hub.url` until the end of the block."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large_files: Files = {}
        self.requests: list[str] = []
        self.faults: list[Fault] = []

    def __enter__(self) -> "HubServer":
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    def fault_for(self, request: str) -> Fault | None:
        for fault in self.faults:
            if re.search(fault.pattern, request):
                if fault.skip:
                    fault.skip -= 1
                elif fault.times:
                    fault.times -= 1
                    return fault
        return None

    def count(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, request)) for request in self.requests)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # an answer in two writes would wait for the client's acknowledgement, 40 ms

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self.handle_request()

    do_GET = do_POST = do_PUT = do_HEAD

    def answer(self, status: int, content: bytes | dict | list = b"", **headers: str) -> None:
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers.setdefault("Content_Type", "application/json")
        if self.lost:
            return self.hang_up()
        self.send_response(status)
        headers.setdefault("Content_Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
        return None

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def handle_request(self) -> None:
        url = urlsplit(self.path)
        path = [unquote(part) for part in url.path.split("/")[1:]]
        self.query = parse_qs(url.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request = f"{self.command} {url.path}"
        self.hub.requests.append(request)
        fault = self.hub.fault_for(request)
        self.lost = fault is not None and fault.drop == "after"
        if fault is not None and fault.drop == "before":
            return self.hang_up()
        if fault is not None and fault.status is not None:
            headers = {name.replace("-", "_"): value for name, value in fault.headers.items()}
            return self.answer(fault.status, {"error": "the server fails as it was told"}, **headers)
        self.token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.token == EXPIRED:
            return self.answer(
                401, {"error": "Invalid credentials"}, X_Error_Message="Invalid credentials in Authorization header"
            )
        if path[0] == "lfs" and self.command == "PUT":
            self.hub.large_files[path[1]] = self.body
            return self.answer(200)
        if path == ["api", "whoami-v2"]:
            return self.answer(200, {"name": "me", "type": "user"})
        if path == ["api", "validate-yaml"]:
            return self.answer(200, {"errors": [], "warnings": []})
        if self.command in ("POST", "PUT") and self.token != TOKEN:
            return self.answer(403 if self.token else 401, {"error": "no"}, X_Error_Message="You have no write access")
        if path == ["api", "repos", "create"]:
            return self.create()
        return self.of_repository(path)

    def create(self) -> None:
        wanted = json.loads(self.body)
        repo_id = f"{wanted['organization']}/{wanted['name']}"
        answer = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id}
        if repo_id in self.hub.repositories:
            return self.answer(409, answer)
        repository = self.hub.repositories[repo_id] = Repository(private=wanted.get("visibility") == "private")
        repository.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        return self.answer(200, answer)

    def of_repository(self, path: list[str]) -> None:
        if path[:2] == ["api", "models"]:
            repo_id, action, rest = "/".join(path[2:4]), path[4] if len(path) > 4 else "info", path[5:]
        elif path[1].endswith(".git"):
            repo_id, action, rest = f"{path[0]}/{path[1].removesuffix('.git')}", "lfs", []
        elif len(path) > 3:
            repo_id, action, rest = "/".join(path[:2]), path[2], path[3:]
        else:
            return self.answer(404, {"error": "this server does not have that"})
        repository = self.hub.repositories.get(repo_id)
        if repository is None or (repository.private and self.token not in (TOKEN, READ_ONLY)):
            return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        if action == "auth-check":
            may = self.token == TOKEN or (rest != ["write"] and self.token == READ_ONLY)
            refusal = {"X_Error_Message": "You have no write access"}
            return self.answer(200) if may else self.answer(403 if self.token else 401, {"error": "no"}, **refusal)
        if action == "lfs":
            return self.batch(repo_id)
        if action == "refs":
            refs = {"heads": repository.heads, "tags": repository.tags}
            named = {
                kind: [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": oid} for n, oid in of_kind.items()]
                for kind, of_kind in refs.items()
            }
            return self.answer(200, {"branches": named["heads"], "tags": named["tags"], "converts": []})
        if action == "branch":
            if rest[0] in repository.heads:
                return self.answer(409, {"error": "Reference already exists"})
            repository.heads[rest[0]] = repository.heads["main"]
            return self.answer(201, {})
        revision = rest[0] if rest else "main"
        oid = repository.oid(revision)
        if oid is None:
            return self.answer(404, {"error": "no such revision"}, X_Error_Code="RevisionNotFound")
        files = repository.commits[oid]
        if action == "tag":
            tag = json.loads(self.body)["tag"]
            if tag in repository.tags:
                return self.answer(409, {"error": "Tag reference exists already"})
            repository.tags[tag] = oid
            return self.answer(201, {})
        if action in ("info", "revision"):
            siblings = [{"rfilename": name} for name in sorted(files)]
            info = {"_id": "0", "id": repo_id, "modelId": repo_id, "sha": oid, "private": repository.private}
            return self.answer(200, {**info, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0})
        if action == "tree":
            return self.answer(200, [self.entry(name, files[name]) for name in sorted(files)])
        if action == "preupload":
            return self.preupload(files)
        if action == "commit":
            return self.commit(repository, repo_id, revision, oid)
        assert action == "resolve", path
        return self.resolve(files, "/".join(rest[1:]), oid)

    @staticmethod
    def is_large(name: str) -> bool:
        return name.endswith((".safetensors", ".mp4", ".png")) or "tfevents" in name

    def entry(self, name: str, content: bytes) -> dict:
        entry = {"type": "file", "path": name, "size": len(content), "oid": git_oid(content)}
        if self.is_large(name):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return entry

    def preupload(self, files: Files) -> None:
        answers = []
        for file in json.loads(self.body)["files"]:
            large = self.is_large(file["path"])
            answer = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if (content := files.get(file["path"])) is not None:
                answer["oid"] = hashlib.sha256(content).hexdigest() if large else git_oid(content)
            answers.append(answer)
        self.answer(200, {"files": answers})

    def batch(self, repo_id: str) -> None:
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.large_files:
                answer["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}
            objects.append(answer)
        self.answer(200, {"transfer": "basic", "objects": objects})

    def commit(self, repository: Repository, repo_id: str, revision: str, oid: str) -> None:
        lines = [json.loads(line) for line in self.body.splitlines()]
        if lines[0]["value"].get("parentCommit", oid) != oid:
            return self.answer(412, {"error": "A commit has happened since. Please refresh and try again."})
        files = dict(repository.commits[oid])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "deletedFile":
                del files[value["path"]]
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large_files[value["oid"]]
            else:
                files[value["path"]] = base64.b64decode(value["content"])
        answer = {"success": True}
        if "create_pr" in self.query:
            number = len(repository.pull_requests) + 1
            revision = f"refs/pr/{number}"
            repository.pull_requests.append(revision)
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo_id}/discussions/{number}"
        answer["commitOid"] = repository.commit(revision, files)
        answer["commitUrl"] = f"{self.hub.url}/{repo_id}/commit/{answer['commitOid']}"
        return self.answer(200, answer)

    def resolve(self, files: Files, name: str, oid: str) -> None:
        if name not in files:
            return self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=oid)
        content = files[name]
        etag = hashlib.sha256(content).hexdigest() if self.is_large(name) else git_oid(content)
        return self.answer(200, content, ETag=f'"{etag}"', X_Repo_Commit=oid, X_Linked_Size=str(len(content)))
