"""The Hub's interface on loopback, for models and data sets: what huggingface_hub calls to create, upload to, list and
download a repository. Real HTTP, for processes with the settings of [`environment_of`]; everything is in memory."""

import base64
import hashlib
import json
import os
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml


TOKEN = "hf_tokenOfTheTestsWhichNoFileAndNoLogMayHold"
LFS_ENDINGS = (".safetensors", "tokenizer.json", ".png", ".lance", ".bin", ".pt")


@dataclass
class Repository:
    """Branches of a repository: the newest commit of each, a commit being files by path."""

    private: bool = False
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        name = hashlib.sha1(f"{id(self)}{branch}{len(self.commits)}{sorted(files)}".encode()).hexdigest()
        self.commits[name], self.branches[branch] = files, name
        return name

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches.get(revision, revision)]


class HubServer(ThreadingHTTPServer):
    """Repositories by name (`user/model`, `datasets/user/data`), LFS objects by digest, and `log`, all requests.

    `cuts` uploads lose their connection half-way; while `full` is set, none is taken, and none for `closed` names.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.cuts, self.full, self.closed, self.log = 0, False, set(), []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def add(self, name: str, folder=None, **options) -> Repository:
        """A repository with the files of a folder, made without HTTP."""
        paths = [path for path in folder.rglob("*") if path.is_file()] if folder is not None else []
        repository = self.repositories[name] = Repository(**options)
        repository.commit("main", {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths})
        return repository


def environment_of(server: HubServer, home, token: str | None = TOKEN, offline: bool = False) -> dict[str, str]:
    """The environment of a process that knows no Hub but `server`, with its caches in `home`."""
    names = ("HF_", "HUGGING", "PYTHON", "XDG_")
    environment = {name: text for name, text in os.environ.items() if not name.startswith(names)}
    environment |= {"HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}
    return environment | ({"HF_TOKEN": token} if token else {}) | ({"HF_HUB_OFFLINE": "1"} if offline else {})


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def answer(self, value=None, status=200, headers=None, body=None):
        body = json.dumps({} if value is None else value).encode() if body is None else body
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status, code, message):
        self.answer({"error": message}, status, {"X-Error-Code": code, "X-Error-Message": message})

    def handle_call(self):
        path = unquote(urlsplit(self.path).path)
        self.server.log.append(f"{self.command} {path}")
        length = int(self.headers.get("Content-Length") or 0)
        if self.command == "PUT" and self.server.cuts > 0:
            self.server.cuts -= 1
            self.rfile.read(length // 2)
            self.close_connection = True
            return
        body = self.rfile.read(length)
        for methods, pattern, function in ROUTES:
            if self.command in methods and (found := re.fullmatch(pattern, path)):
                named = found.groupdict()
                if "repo" in named:
                    named["repo"] = named["repo"].removeprefix("models/")
                return getattr(self, function)(body, **named)
        self.refuse(404, "NotFound", f"no such place: {path}")

    do_GET = do_HEAD = do_POST = do_PUT = handle_call

    @property
    def is_known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repository(self, repo, revision=None, writes=False):
        """The repository, if the caller may see it; else the answer has been given."""
        found = self.server.repositories.get(repo)
        if found is None or (found.private and not self.is_known):
            return self.refuse(404 if self.is_known else 401, "RepoNotFound", "Repository not found")
        if writes and not self.is_known:
            return self.refuse(401, "Unauthorized", "Invalid username or password.")
        if found.gated and not writes:
            return self.refuse(403, "GatedRepo", f"Access to {repo} is restricted: ask for access.")
        if revision is not None and revision not in found.branches and revision not in found.commits:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    # Creating and uploading

    def whoami(self, body):
        if not self.is_known:
            return self.refuse(401, "Unauthorized", "Invalid username or password.")
        self.answer({"name": "me", "type": "user", "orgs": []})

    def create(self, body):
        asked = json.loads(body)
        if not self.is_known:
            return self.refuse(401, "Unauthorized", "Invalid username or password.")
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        key = f"datasets/{name}" if asked.get("type") == "dataset" else name
        place = {"url": f"{self.server.url}/{key}", "name": name, "id": name}
        if key in self.server.repositories:
            return self.answer(place, 409)
        private = asked.get("visibility") == "private" or asked.get("private") is True
        repository = self.server.repositories[key] = Repository(private)
        repository.commit("main", {".gitattributes": b""})
        self.answer(place)

    def validate(self, body):
        """Those of the Hub's rules that what our cards hold can break."""
        found = re.match(r"---\r?\n(.*?)\r?\n---", json.loads(body)["content"], re.DOTALL)
        metadata = (yaml.safe_load(found[1]) if found else None) or {}
        texts = ("license", "library_name", "pipeline_tag", "base_model_relation")
        wrong = [
            f'"{name}" must be a {wanted.__name__}'
            for name, wanted in (*((name, str) for name in texts), ("tags", list), ("model-index", list))
            if name in metadata and not isinstance(metadata[name], wanted)
        ]
        if metadata.get("base_model_relation", "adapter") not in ("adapter", "finetune", "quantized", "merge"):
            wrong.append('"base_model_relation" is unknown')
        for model in metadata.get("model-index", []):
            if not model.get("name") or not all(row["metrics"] for row in model["results"]):
                wrong.append('"model-index" needs names and metrics')
        self.answer({"errors": [{"message": text} for text in wrong], "warnings": []}, 400 if wrong else 200)

    def branch(self, body, repo, branch):
        if (found := self.repository(repo, writes=True)) is None:
            return
        if branch in found.branches:
            return self.answer({}, 409)
        found.branches[branch] = found.branches["main"]
        self.answer()

    def preupload(self, body, repo, revision):
        if self.repository(repo, revision, writes=True) is None:
            return
        paths = [file["path"] for file in json.loads(body)["files"]]
        modes = ["lfs" if path.endswith(LFS_ENDINGS) else "regular" for path in paths]
        rows = zip(paths, modes, strict=True)
        self.answer({"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in rows]})

    def batch(self, body, repo):
        if self.repository(repo, writes=True) is None:
            return
        if repo in self.server.closed:
            return self.refuse(507, "Full", "no space for the upload")
        objects = []
        for wanted in json.loads(body)["objects"]:
            if wanted["oid"] not in self.server.objects:
                places = {name: {"href": f"{self.server.url}/{name}/{wanted['oid']}"} for name in ("upload", "verify")}
                wanted = {**wanted, "actions": places}
            objects.append(wanted)
        self.answer({"transfer": "basic", "objects": objects})

    def upload(self, body, oid):
        if self.server.full:
            return self.refuse(507, "Full", "no space for the upload")
        if hashlib.sha256(body).hexdigest() != oid:
            return self.refuse(400, "Digest", f"what came is not {oid}")
        self.server.objects[oid] = body
        self.answer()

    def verify(self, body, oid):
        is_whole = len(self.server.objects.get(oid, b"")) == json.loads(body)["size"]
        self.answer({}, 200 if is_whole else 404)

    def commit(self, body, repo, revision):
        if (found := self.repository(repo, revision, writes=True)) is None:
            return
        files = dict(found.files(revision))
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            elif line["key"] == "deletedFolder":
                files = {path: data for path, data in files.items() if not path.startswith(value["path"])}
        oid = found.commit(revision, files)
        self.answer({"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{repo}/commit/{oid}"})

    # Listing and downloading

    def info(self, body, repo, revision="main"):
        if (found := self.repository(repo, revision)) is not None:
            siblings = [{"rfilename": path} for path in found.files(revision)]
            sha = found.branches.get(revision, revision)
            self.answer({"id": repo, "sha": sha, "private": found.private, "siblings": siblings, "tags": []})

    def refs(self, body, repo):
        if (found := self.repository(repo)) is not None:
            branches = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in found.branches.items()
            ]
            self.answer({"branches": branches, "tags": [], "converts": []})

    def tree(self, body, repo, revision, folder=None):
        if (found := self.repository(repo, revision)) is None:
            return
        inside = f"{folder.strip('/')}/" if folder and folder.strip("/") else ""
        paths = [path for path in found.files(revision) if path.startswith(inside)]
        if inside and not paths:
            return self.refuse(404, "EntryNotFound", f"{folder} does not exist")
        is_recursive = re.search(r"recursive=true", self.path, re.IGNORECASE)
        rows = entries(found.files(revision), inside)
        self.answer([row for row in rows if is_recursive or "/" not in row["path"].removeprefix(inside)])

    def paths_info(self, body, repo, revision):
        if (found := self.repository(repo, revision)) is not None:
            given = body.decode()
            paths = (
                json.loads(given)["paths"] if given.startswith("{") else re.findall(r"paths=([^&]*)", unquote(given))
            )
            rows = entries(found.files(revision), "")
            self.answer([row for row in rows if row["path"] in [path.strip("/") for path in paths]])

    def resolve(self, body, repo, revision, path):
        if (found := self.repository(repo, revision)) is None:
            return
        files, sha = found.files(revision), found.branches.get(revision, revision)
        if path not in files:
            message = f"{path} does not exist"
            headers = {"X-Error-Code": "EntryNotFound", "X-Error-Message": message, "X-Repo-Commit": sha}
            return self.answer({"error": message}, 404, headers)
        data, status = files[path], 200
        headers = {"ETag": f'"{digest(data)}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if asked := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            size, status = len(data), 206
            first = int(asked[1]) if asked[1] else max(0, size - int(asked[2]))
            last = min(int(asked[2]), size - 1) if asked[1] and asked[2] else size - 1
            data, headers["Content-Range"] = data[first : last + 1], f"bytes {first}-{last}/{size}"
        self.answer(body=data, status=status, headers={"Content-Type": "application/octet-stream", **headers})


def digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def entries(files: dict[str, bytes], inside: str) -> list[dict]:
    """Rows of a listing: the files in `inside`, and the folders that they are in."""
    paths = [path for path in files if path.startswith(inside)]
    folders = {
        path[: found.start()] for path in paths for found in re.finditer("/", path) if found.start() > len(inside)
    }
    rows = [{"type": "directory", "path": path, "size": 0, "oid": digest(path.encode())} for path in sorted(folders)]
    rows += [{"type": "file", "path": path, "size": len(files[path]), "oid": digest(files[path])} for path in paths]
    for row, path in zip(rows[len(folders) :], paths, strict=True):
        if path.endswith(LFS_ENDINGS):
            sha = hashlib.sha256(files[path]).hexdigest()
            row["lfs"] = {"oid": sha, "sha256": sha, "size": len(files[path]), "pointerSize": 130}
    return rows


API = "/api/(?P<repo>(?:models|datasets)/[^/]+/[^/]+)"
REPO = "/(?P<repo>(?:datasets/)?[^/]+/[^/]+)"
REVISION = "(?P<revision>[^/]+)"
ROUTES = [
    (("GET",), "/api/whoami-v2", "whoami"),
    (("POST",), "/api/repos/create", "create"),
    (("POST",), "/api/validate-yaml", "validate"),
    (("POST",), f"{API}/branch/(?P<branch>.+)", "branch"),
    (("POST",), f"{API}/preupload/{REVISION}", "preupload"),
    (("POST",), f"{REPO}\\.git/info/lfs/objects/batch", "batch"),
    (("PUT",), "/upload/(?P<oid>.+)", "upload"),
    (("POST",), "/verify/(?P<oid>.+)", "verify"),
    (("POST",), f"{API}/commit/{REVISION}", "commit"),
    (("GET",), API, "info"),
    (("GET",), f"{API}/revision/{REVISION}", "info"),
    (("GET",), f"{API}/refs", "refs"),
    (("GET",), f"{API}/tree/{REVISION}(?P<folder>/.*)?", "tree"),
    (("POST",), f"{API}/paths-info/{REVISION}", "paths_info"),
    (("GET", "HEAD"), f"{REPO}/resolve/{REVISION}/(?P<path>.+)", "resolve"),
]


@contextmanager
def hub_server():
    """A running [`HubServer`]."""
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
