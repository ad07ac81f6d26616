"""A hub id is downloaded and exported; the hub here is a small server that speaks its protocol."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """Model repositories as folders: /api/models/… lists them, /…/resolve/… serves their files."""

    repositories: dict[str, Path] = {}

    def log_message(self, *_: Any) -> None:
        pass

    def _send(self, body: bytes, **headers: str) -> None:
        self.send_response(200)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        for name, folder in self.repositories.items():
            files = {str(f.relative_to(folder)): f for f in folder.rglob("*") if f.is_file()}
            if path.startswith(f"/api/models/{name}"):
                listed = [{"type": "file", "path": n, "rfilename": n, "size": f.stat().st_size, "oid": "0"}
                          for n, f in files.items()]  # fmt: skip
                info = listed if "/tree/" in path else {"id": name, "sha": COMMIT, "siblings": listed}
                return self._send(json.dumps(info).encode(), **{"Content-Type": "application/json"})
            if path.startswith(f"/{name}/resolve/") and (f := files.get(path.split("/", 5)[5])):
                data = f.read_bytes()
                tag = hashlib.sha256(data).hexdigest()
                return self._send(data, **{"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT})
        self.send_response(404)
        self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET


@pytest.fixture
def hub(sample_llava):
    handler = type("Here", (Hub,), {"repositories": {"shapes/llava": sample_llava}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.slow
def test_a_hub_id_is_downloaded_its_size_told_first_and_exported(hub, tmp_path):
    # the hub's client reads its settings when it is imported
    env = {**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0",
           "HF_HUB_DISABLE_XET": "1", "RTP_LLM_CACHE": str(tmp_path / "cache")}  # fmt: skip
    command = [sys.executable, "-m", "rtp_llm.cli", "export", "--checkpoint", "shapes/llava"]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "bundle")], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    size = next(i for i, line in enumerate(lines) if line.startswith("shapes/llava: 3.4 MB to download"))
    assert size < next(i for i, line in enumerate(lines) if "tracing" in line)
    manifest = json.loads((tmp_path / "bundle/bundle.json").read_text())
    assert manifest["origin"]["checkpoint"] == "shapes/llava"
