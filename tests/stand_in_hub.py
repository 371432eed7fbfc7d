"""A stand-in for the Hugging Face hub on this machine, for HF_ENDPOINT: models and datasets from folders.

It answers what huggingface_hub, transformers and datasets ask when they load something, as the hub does: a branch has a
commit, an old name is redirected to the new one, and large files lie at another address.
"""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".parquet")
VERBS = ("resolve", "revision", "tree")


def digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def listed(folder: Path, path: Path) -> dict:
    """A file or a folder inside, as the hub lists it."""
    kind, content = ("directory", b"") if path.is_dir() else ("file", path.read_bytes())
    return {
        "type": kind,
        "path": path.relative_to(folder).as_posix(),
        "oid": digest(content),
        "size": len(content),
    }


def found(branches: dict[tuple[str, str, str], Path], kind: str, name: str, revision: str) -> tuple[Path, str] | str:
    """Folder and commit of a branch, which may be asked for by its commit; or what is not found."""
    here = {at: folder for (*of, at), folder in branches.items() if of == [kind, name]}
    commits = {at: digest(f"{kind} {name} {at}".encode()) for at in here}
    for at, folder in here.items():
        if revision in (at, commits[at]):
            return folder, commits[at]
    return "RevisionNotFound" if here else "RepoNotFound"


@contextlib.contextmanager
def serve(branches: dict[tuple[str, str, str], Path], old_names: dict[str, str]) -> Iterator[tuple[str, list[str]]]:
    """The hub's address while it is open, and what it has been asked, such as "GET /api/models/gpt2".

    A branch is ("models" or "datasets", name, revision), and its files are those of a folder.
    """
    asked = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # which keeps a connection for the next request

        def do_GET(self):
            hub, elsewhere = servers
            address = urlsplit(self.path)
            asked.append(f"{self.command} {unquote(address.path)}")
            parts = [unquote(part) for part in address.path.removeprefix("/api").strip("/").split("/")]
            kind = parts.pop(0) if parts[0] in ("models", "datasets") else "models"
            cut = next((place for place, part in enumerate(parts) if part in VERBS), len(parts))
            name = "/".join(parts[:cut])
            verb, revision, *inside = parts[cut:] or ("revision", "main")
            if name in old_names:
                return self.answer(307, Location=self.path.replace(name, old_names[name], 1))
            branch = found(branches, kind, name, revision)
            if isinstance(branch, str):  # without a login, what is missing might as well be private
                return self.answer(401 if branch == "RepoNotFound" else 404, X_Error_Code=branch)
            folder, commit = branch
            path = folder.joinpath(*inside)
            if not (path.is_file() if verb == "resolve" else path.is_dir()):
                return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            if verb == "resolve":
                content = path.read_bytes()
                if self.server is hub and path.suffix in LARGE:
                    linked = {"X_Linked_Size": len(content), "X_Linked_ETag": f'"{digest(content)}"'}
                    where = f"http://127.0.0.1:{elsewhere.server_port}{self.path}"
                    return self.answer(302, Location=where, X_Repo_Commit=commit, **linked)
                return self.answer(200, content, ETag=f'"{digest(content)}"', X_Repo_Commit=commit)
            if verb == "tree":
                deep = parse_qs(address.query).get("recursive") == ["true"]
                answer = [listed(folder, one) for one in sorted(path.rglob("*") if deep else path.iterdir())]
            else:
                answer = {"id": name, "sha": commit, "siblings": []}
            return self.answer(200, json.dumps(answer).encode(), Content_Type="application/json")

        do_HEAD = do_GET

        def answer(self, status: int, content: bytes = b"", **headers):
            self.send_response(status)
            for header, value in {**headers, "Content_Length": len(content)}.items():
                self.send_header(header.replace("_", "-"), str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_):
            """Says nothing: the test prints what it needs."""

    servers = [ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in range(2)]
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{servers[0].server_port}", asked
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
