"""A W&B server on loopback that keeps what it is told: runs, their history, views. It can refuse to save views."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import wandb

ENTITY = "somebody"
SECRET = "0123456789abcdef0123456789abcdef01234567"
USER = {
    **{"id": "1", "name": ENTITY, "username": ENTITY, "entity": ENTITY, "email": "", "admin": False, "flags": "{}"},
    **{"deletedAt": None, "apiKeys": {"edges": []}, "teams": {"edges": []}},
}


class WandbServer:
    """`views`: name -> what was saved last under it; `runs`: id -> how often it was opened; `history`: id -> records."""

    def __init__(self, refuses_views: bool = False) -> None:
        self.refuses_views = refuses_views
        self.views: dict[str, dict[str, Any]] = {}
        self.runs: dict[str, int] = {}
        self.history: dict[str, list[dict[str, Any]]] = {}
        self.saved = 0  # mutations of views
        self.asked = 0  # all requests
        self.unknown: list[str] = []  # operations that it has no answer for

    def __enter__(self) -> WandbServer:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def answer(self, query: str, told: dict[str, Any]) -> dict[str, Any]:
        """To a GraphQL document and its variables."""
        if "upsertView" in query:
            return self._save_view(told)
        if "allViews" in query:
            nodes = [view for name, view in self.views.items() if name == told["viewName"]]
            return {"data": {"project": {"allViews": {"edges": [{"node": node} for node in nodes]}}}}
        if "upsertBucket" in query:
            return {"data": {"upsertBucket": {"bucket": self._open_run(told), "inserted": self.runs[told["name"]] == 1}}}
        if "ProjectInternalId" in query:
            return {"data": {"project": {"id": "1", "internalId": "1"}}}
        if "GetProjects" in query:
            project = {"id": "1", "name": "tessera", "entityName": told["entity"], "createdAt": "", "isBenchmark": False}
            project["user"] = USER
            page = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
            return {"data": {"models": {"pageInfo": page, "edges": [{"node": project}]}}}
        if "createRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/files/{name}"} for name in told["files"]]
            return {"data": {"createRunFiles": {"runID": told["run"], "uploadHeaders": [], "files": files}}}
        if "viewer" in query:
            return {"data": {"viewer": USER, "serverInfo": {"cliVersionInfo": {}, "latestLocalVersionInfo": None}}}
        if re.search(r"\b(bucket|model|project)\(", query):  # asked for a run before it is opened: there is none
            return {"data": {"model": None, "project": None}}
        self.unknown.append(" ".join(query.split())[:200])
        return {"data": {}}

    def _save_view(self, told: dict[str, Any]) -> dict[str, Any]:
        if self.refuses_views:
            return {"errors": [{"message": "permission denied", "path": ["upsertView"]}], "data": None}
        self.saved += 1
        view = {"id": told.get("id") or f"view{len(self.views)}", "displayName": told["displayName"], "spec": told["spec"]}
        self.views[told["name"]] = view | {"type": told["type"]}
        project = {"id": "1", "name": told["projectName"], "entityName": told["entityName"]}
        answer = {**view, "name": told["name"], "type": told["type"], "description": "", "project": project}
        return {"data": {"upsertView": {"view": answer, "inserted": True}}}

    def _open_run(self, told: dict[str, Any]) -> dict[str, Any]:
        name = told["name"]
        self.runs[name] = self.runs.get(name, 0) + 1
        project = {"id": "1", "name": told["project"], "entity": {"id": "1", "name": ENTITY}}
        bucket = {"id": f"id-{name}", "name": name, "displayName": told.get("displayName"), "description": None, "config": "{}"}
        return {**bucket, "sweepName": None, "project": project, "historyLineCount": len(self.history.get(name, []))}

    def stream(self, run: str, told: dict[str, Any]) -> None:
        lines = told.get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
        self.history.setdefault(run, []).extend(map(json.loads, lines))


def _handler(server: WandbServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._reply({})

        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"] or 0))
            self._reply({})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            if self.path == "/graphql":
                told = json.loads(body)
                self._reply(server.answer(told["query"], told.get("variables") or {}))
                return
            if self.path.endswith("/file_stream"):
                server.stream(self.path.split("/")[-2], json.loads(body))
            self._reply({})

        def handle_one_request(self) -> None:
            server.asked += 1
            super().handle_one_request()

        def _reply(self, answer: dict[str, Any]) -> None:
            text = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler


@contextmanager
def at(url: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """W&B's library in this process talks to the server at `url`, with a key, and keeps its own files in `folder`."""
    for name, value in {"WANDB_BASE_URL": url, "WANDB_API_KEY": SECRET, "WANDB_MODE": "online"}.items():
        monkeypatch.setenv(name, value)
    for name in ("WANDB_DIR", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "HOME"):
        monkeypatch.setenv(name, str(folder))
    wandb.teardown()  # it remembers the environment of its first call
    try:
        yield
    finally:
        with suppress(ConnectionError):  # its own process may have been killed
            wandb.teardown()
