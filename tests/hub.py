"""A stand-in for the hub: what huggingface_hub asks of it, answered over HTTP from folders."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


def _sum(text: bytes) -> str:
    return hashlib.sha1(text).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    """revisions: repository -> revision -> folder. discussions: repository -> a list of them.

    users: token -> what the hub says of whom it belongs to. pushed: repository -> file -> content.
    fault: status and text of the answer to a commit, in place of taking it.
    """

    revisions: dict[str, dict[str, Path]]
    discussions: dict[str, list[dict]]
    asked: list[str]
    users: dict[str, dict]
    pushed: dict[str, dict[str, bytes]]
    fault: list[tuple[int, str]]

    def log_message(self, *arguments):
        """Nothing is printed."""

    def do_GET(self):
        path = urlsplit(self.path).path
        self.asked.append(unquote(self.path))
        parts = [unquote(part) for part in path.strip("/").split("/")]
        if parts == ["api", "whoami-v2"]:
            user = self._user()
            return self._json(user) if user else self.send_error(401)
        if parts[:2] == ["api", "models"]:
            repo, rest = "/".join(parts[2:4]), parts[4:]
            if rest == ["discussions"]:
                found = self.discussions.get(repo, [])
                return self._json({"discussions": found, "count": len(found), "start": 0})
            revision = rest[1] if len(rest) > 1 else "main"
            folder = self._folder(repo, revision)
            if folder is None:
                return self.send_error(404)
            if rest[:1] == ["tree"]:
                return self._json([self._file(each) for each in sorted(folder.iterdir())])
            return self._json(self._info(repo, revision, folder))
        if len(parts) > 4 and parts[2] == "resolve":
            folder = self._folder("/".join(parts[:2]), parts[3])
            return self._send(folder / parts[4], _sum(str(folder).encode()))
        return self.send_error(404)

    do_HEAD = do_GET

    def do_POST(self):
        self.asked.append(unquote(self.path))
        content = self.rfile.read(int(self.headers["Content-Length"]))
        parts = urlsplit(self.path).path.strip("/").split("/")
        if self._user() is None:
            return self.send_error(401)
        if parts[1:] == ["validate-yaml"]:
            return self._json({"errors": [], "warnings": []})
        if parts[1:] == ["repos", "create"]:
            asked = json.loads(content)
            repo = f"{asked['organization']}/{asked['name']}"
            assert asked.get("visibility", "private") == "private" and asked.get("private", True)
            self.pushed.setdefault(repo, {})
            return self._json({"url": f"{self._address()}/{repo}"})
        repo = "/".join(parts[2:4])
        if parts[4] == "preupload":
            names = [each["path"] for each in json.loads(content)["files"]]
            told = {"uploadMode": "regular", "shouldIgnore": False}
            return self._json({"files": [{"path": name, **told} for name in names]})
        if self.fault:
            return self.send_error(*self.fault[0])
        for line in map(json.loads, content.splitlines()):
            if line["key"] == "file":
                sent = line["value"]
                self.pushed[repo][sent["path"]] = base64.b64decode(sent["content"])
        url = f"{self._address()}/{repo}/commit/{'0' * 40}"
        return self._json({"commitUrl": url, "commitOid": "0" * 40, "success": True})

    def _user(self):
        return self.users.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def _address(self):
        return f"http://127.0.0.1:{self.server.server_port}"

    def _folder(self, repo, revision):
        for name, folder in self.revisions.get(repo, {}).items():
            if revision in (name, _sum(str(folder).encode())):
                return folder
        return None

    def _file(self, path):
        content = path.read_bytes()
        return {"type": "file", "path": path.name, "size": len(content), "oid": _sum(content)}

    def _info(self, repo, revision, folder):
        files = [
            {"rfilename": each.name, "size": each.stat().st_size, "blobId": _sum(each.read_bytes())}
            for each in sorted(folder.iterdir())
        ]
        return {"id": repo, "sha": _sum(str(folder).encode()), "siblings": files}

    def _json(self, content):
        self._write(json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send(self, path, commit):
        if not path.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        content = path.read_bytes()
        return self._write(content, {"ETag": f'"{_sum(content)}"', "X-Repo-Commit": commit})

    def _write(self, content, headers):
        self.send_response(200)
        for name, value in {**headers, "Content-Length": len(content)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@contextmanager
def served(revisions, discussions=None):
    """Yields the address of a server of these repositories, and the list of what it is asked."""
    with server_of(revisions=revisions, discussions=discussions or {}) as (url, told):
        yield url, told["asked"]


@contextmanager
def server_of(**told):
    """Yields the address of a server, and what `_Handler` has as attributes."""
    told = {"revisions": {}, "discussions": {}, "users": {}, "pushed": {}, "fault": [], **told}
    told["asked"] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), told))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", told
    finally:
        server.shutdown()
        server.server_close()


def pull_request(number, author="SFconvertbot", status="open", title=None):
    """A discussion as the hub lists it."""
    return {
        "num": number,
        "title": title or "Adding `safetensors` variant of this model",
        "author": {"name": author},
        "status": status,
        "isPullRequest": True,
        "createdAt": "2023-05-01T10:00:00.000Z",
        "repo": {"name": "me/it", "type": "model"},
    }
