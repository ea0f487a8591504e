"""The part of the Hugging Face hub's HTTP API by which a client writes files into a dataset.

What `huggingface_hub` asks when fsspec reads and writes `hf://datasets/…`: what a repository holds,
how files are to be sent, the bytes of large ones (Git LFS), and the commit that puts them in place.
A file is in the dataset only when a commit names it; of a large one all bytes must be there then.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

_API = r"/api/datasets/([^/]+/[^/]+)(?:/(revision|tree|preupload|commit)/([^/]+))?(?:/(.+))?"
_LARGE = (".parquet", ".bin", ".zst", ".gz")  # what a dataset's .gitattributes sends through LFS


class Refusal(Exception):
    """An answer that is no success, with the headers by which the client knows what it is."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status = HTTPStatus(status)
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})


@dataclass
class Hub:
    """What lies there, who may write, what was asked, and what is to go wrong.

    Args:
        token: whose owner may read and write everything.
        reader: a second token, that may only read.
        datasets: the files of each, by their paths.
        faults: by a word of a path (`commit`, `lfs`, …), the status to answer with.
    """

    token: str = "hf_writer"
    reader: str = "hf_reader"
    datasets: dict[str, dict[str, bytes]] = field(default_factory=dict)
    faults: dict[str, int] = field(default_factory=dict)
    passing: int = -1  # so many answers go wrong, and then none; -1: all
    requests: list[tuple[str, str]] = field(default_factory=list)  # (method, path)
    url: str = ""
    objects: dict[str, bytes] = field(default_factory=dict)  # of LFS, by their SHA-256
    commits: int = 0

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to take this for the hub, and to be let in."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": self.token,
            "HF_HUB_DISABLE_XET": "1",  # its storage is another protocol, not of the hub
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    @contextmanager
    def running(self) -> Iterator[Hub]:
        """The server, in a thread of this process."""
        handler = type("Handler", (_Handler,), {"hub": self})
        with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            self.url = f"http://127.0.0.1:{server.server_address[1]}"
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            try:
                yield self
            finally:
                server.shutdown()
                thread.join()

    # --- what is asked ---

    def files(self, name: str) -> dict[str, bytes]:
        """Of a dataset; the hub says of one that is absent and of one that is secret the same."""
        if name not in self.datasets:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return self.datasets[name]

    def info(self, name: str) -> dict[str, Any]:
        siblings = [{"rfilename": path} for path in self.files(name)]
        return {"id": name, "sha": f"{self.commits:040x}", "private": True, "siblings": siblings}

    def tree(self, name: str, below: str) -> list[dict[str, Any]]:
        files = self.files(name)
        prefix = f"{below}/" if below else ""
        inside = sorted(path for path in files if path.startswith(prefix))
        if below and not inside:
            raise Refusal(404, f"{below} does not exist on main", "EntryNotFound")
        entries = [_entry(path, files[path]) for path in inside if "/" not in path[len(prefix) :]]
        deeper = [path[len(prefix) :] for path in inside if "/" in path[len(prefix) :]]
        folders = sorted({prefix + path.partition("/")[0] for path in deeper})
        return [*({"type": "directory", "path": one, "oid": "0" * 40} for one in folders), *entries]

    def file(self, name: str, path: str) -> bytes:
        files = self.files(name)
        if path not in files:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        return files[path]

    # --- what is sent ---

    def preupload(self, name: str, asked: dict[str, Any]) -> dict[str, Any]:
        files = self.files(name)
        found = []
        for one in asked["files"]:
            path = one["path"]
            mode = "lfs" if path.endswith(_LARGE) else "regular"
            oid = _oid(path, files[path]) if path in files else None
            found.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": found}

    def batch(self, name: str, asked: dict[str, Any]) -> dict[str, Any]:
        self.files(name)
        objects = []
        for one in asked["objects"]:
            answer = {"oid": one["oid"], "size": one["size"]}
            if one["oid"] not in self.objects:
                href = f"{self.url}/objects/{one['oid']}"
                verify = f"{self.url}/datasets/{name}/verify"
                answer["actions"] = {"upload": {"href": href}, "verify": {"href": verify}}
            objects.append(answer)
        return {"transfer": "basic", "objects": objects}

    def put(self, oid: str, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != oid:
            raise Refusal(400, "the bytes are not those that were announced")
        self.objects[oid] = data

    def verify(self, asked: dict[str, Any]) -> None:
        if len(self.objects.get(asked["oid"], b"")) != asked["size"]:
            raise Refusal(404, "no such object")

    def commit(self, name: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
        files = dict(self.files(name))
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.objects:
                    raise Refusal(400, f"{value['path']}: its bytes were never sent")
                files[value["path"]] = self.objects[value["oid"]]
            elif line["key"] != "header":
                raise Refusal(400, f"this stand-in knows no {line['key']}")
        self.datasets[name] = files
        self.commits += 1
        oid = f"{self.commits:040x}"
        return {"commitUrl": f"{self.url}/datasets/{name}/commit/{oid}", "commitOid": oid}


def _entry(path: str, data: bytes) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": _git(data)}
    if path.endswith(_LARGE):
        sha256 = hashlib.sha256(data).hexdigest()
        found["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 134}
    return found


def _oid(path: str, data: bytes) -> str:
    """What tells the client that a file of it is there already."""
    return hashlib.sha256(data).hexdigest() if path.endswith(_LARGE) else _git(data)


def _git(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _card_problems(asked: dict[str, Any]) -> dict[str, Any]:
    """As the hub looks at a card's header before a commit."""
    found = re.match(r"^---\n(.*?)\n---\n", asked["content"], re.DOTALL)
    try:
        header = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError as error:
        raise Refusal(400, "Invalid YAML") from error
    warnings = [] if header else [{"message": "empty or missing yaml metadata in repo card"}]
    return {"errors": [], "warnings": warnings}


class _Handler(BaseHTTPRequestHandler):
    """Finds the part of the hub that a path asks for."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing on stderr: `Hub.requests` has it."""

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        try:
            self._may(path)
            found = self._route(path, body)
            if isinstance(found, bytes) and (part := self.headers.get("Range")):
                first, last = map(int, part.removeprefix("bytes=").split("-"))
                return self._send(206, found[first : last + 1])
            self._send(200, found if isinstance(found, bytes) else json.dumps(found).encode())
        except Refusal as refusal:
            error = json.dumps({"error": str(refusal)}).encode()
            self._send(refusal.status, error, refusal.headers)

    def _may(self, path: str) -> None:
        for word, status in self.hub.faults.items():
            if word in path.split("/") and self.hub.passing != 0:
                self.hub.passing -= 1
                raise Refusal(status, HTTPStatus(status).phrase)
        if path.startswith("/objects/"):
            return  # a signed URL, which takes no token
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token == self.hub.token:
            return
        if token and token != self.hub.reader:
            raise Refusal(401, "Invalid credentials in Authorization header")
        if not token:
            raise Refusal(401, "Invalid username or password.", "RepoNotFound")
        if self.command == "POST" and re.search("/(commit|preupload)/|/batch$", path):
            raise Refusal(403, "this token may only read")

    def _route(self, path: str, body: bytes) -> Any:
        if path == "/api/validate-yaml":
            return _card_problems(json.loads(body))
        if path.startswith("/objects/") and self.command == "PUT":
            return self.hub.put(path.rpartition("/")[2], body)
        if found := re.fullmatch(r"/datasets/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self.hub.batch(found[1], json.loads(body))
        if re.fullmatch(r"/datasets/[^/]+/[^/]+/verify", path):
            return self.hub.verify(json.loads(body))
        if found := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/main/(.+)", path):
            return self.hub.file(found[1], found[2])
        if found := re.fullmatch(_API, path):
            return self._of_dataset(*found.groups(default=""), body=body)
        raise Refusal(404, f"this stand-in has no {self.command} {path}")

    def _of_dataset(self, name: str, verb: str, revision: str, rest: str, *, body: bytes) -> Any:
        self.hub.files(name)
        if revision not in ("", "main"):
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        if verb in ("", "revision"):
            return self.hub.info(name)
        if verb == "tree":
            return self.hub.tree(name, rest)
        if verb == "preupload":
            return self.hub.preupload(name, json.loads(body))
        if verb == "commit":
            return self.hub.commit(name, [json.loads(line) for line in body.splitlines()])
        raise Refusal(404, f"this stand-in has no {verb}")

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
