"""A small hub on loopback that plays huggingface.co for the real client: what it holds, refuses, renames and breaks off.

    hub = Hub({"models/owner/name": Repo({"config.json": b"{}"})}); hub.endpoint; hub.log; hub.close()
"""
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote


@dataclass
class Repo:
    files: dict[str, bytes]                                 # of the branch main
    older: dict[str, dict[str, bytes]] = field(default_factory=dict)     # commit → its files
    needs: str | None = None                                # "licence" or "membership": whose token may read it
    moved: str | None = None                                # "owner/name" that it is called now
    status: int | None = None                               # answer everything with this
    breaks: int = 0                                         # so many transfers of each file end half-way

    @property
    def commit(self):
        return hashlib.sha1(json.dumps(sorted((name, hashlib.sha1(content).hexdigest()) for name, content in self.files.items())).encode()).hexdigest()

    def at(self, revision):
        """(commit, files) of a revision, or None."""
        if revision in ("main", self.commit):
            return self.commit, self.files
        return (revision, self.older[revision]) if revision in self.older else None

    def replace(self, files):
        """A new commit on main."""
        self.older[self.commit] = self.files
        self.files = files


TOKENS = {"hf_member": {"licence", "membership"}, "hf_stranger": set()}


class Hub:
    def __init__(self, repos):
        """repos: {"models/owner/name" or "datasets/owner/name": Repo}"""
        self.repos, self.log, self.transfers = repos, [], {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self):
                hub.answer(self)

            do_GET = do_HEAD

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request):
        path = unquote(request.path.partition("?")[0])
        self.log.append((request.command, path, request.headers.get("Range")))
        api = re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path)
        file = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if not api and not file:
            return send(request, 404)
        kind = api[1] if api else "datasets" if file and file[1] else "models"
        name, revision = (api[2], api[4] or "main") if api else (file[2], file[3])
        repo = self.repos.get(f"{kind}/{name}")
        given = (request.headers.get("Authorization") or "").removeprefix("Bearer ")
        if given and given not in TOKENS:
            return send(request, 401, {"X-Error-Message": "Invalid credentials in Authorization header"})
        if repo is None or (repo.needs == "membership" and "membership" not in TOKENS.get(given, ())):
            return send(request, 404 if given else 401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": f"Repository not found {given}"})
        if repo.status:
            return send(request, repo.status)
        if repo.moved:
            return send(request, 307, {"Location": request.path.replace(name, repo.moved)})
        if repo.at(revision) is None:
            return send(request, 404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": f"Invalid rev id: {revision}"})
        commit, files = repo.at(revision)
        if api and api[3] == "tree":
            tree = [{"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()} for path, content in files.items()]
            return send(request, 200, {}, json.dumps(tree).encode())
        if api:
            info = {"id": name, "sha": commit, "siblings": [{"rfilename": path} for path in files], "tags": [], "downloads": 0}
            return send(request, 200, {}, json.dumps(info).encode())
        if repo.needs == "licence" and "licence" not in TOKENS.get(given, ()):
            return send(request, 403 if given else 401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        if file[4] not in files:
            return send(request, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        self.transfer(request, repo, files[file[4]], commit)

    def transfer(self, request, repo, content, commit):
        start = int(request.headers["Range"].removeprefix("bytes=").rstrip("-")) if request.headers.get("Range") else 0
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        times = 0
        if request.command == "GET":
            times = self.transfers[request.path] = self.transfers.get(request.path, 0) + 1
        send(request, 206 if start else 200, headers, content[start:], half=0 < times <= repo.breaks)


def send(request, status, headers=(), body=b"", half=False):
    """The answer; with `half` the connection ends in the middle of its body."""
    request.send_response(status)
    for key, value in {"Content-Type": "application/json", **dict(headers), "Content-Length": str(len(body))}.items():
        request.send_header(key, value)
    request.end_headers()
    if request.command == "GET":
        request.wfile.write(body[:len(body) // 2] if half else body)
    if half:
        request.close_connection = True
