"""Upload of a finished run to a Hub, played by a server on loopback."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from datasets import load_dataset
from huggingface_hub import HfApi
from scripted_endpoint import Endpoint

from benchmarks.synthesis.scripted_teacher import fact_document
from clara_hf.program import UsageError
from clara_hf.synthesis import outputs


ROOT = Path(__file__).resolve().parents[2]


class Hub:
    """Takes what `create_commit` sends; files are kept by name. `refuse`: everything is answered 403."""

    def __init__(self, refuse: bool = False):
        self.files: dict[str, bytes] = {}
        self.created: dict = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"] or 0))
                reply = {"error": "not yours"} if refuse else hub.reply(self.path, body)
                data = json.dumps(reply).encode()
                self.send_response(403 if refuse else 200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def reply(self, path: str, body: bytes) -> dict:
        if path == "/api/repos/create":
            self.created = json.loads(body)
            return {"url": f"{self.url}/datasets/someone/scp-data", "id": "1"}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if "/preupload/" in path:
            modes = {"uploadMode": "regular", "shouldIgnore": False}
            return {"files": [{"path": file["path"], **modes} for file in json.loads(body)["files"]]}
        assert path == "/api/datasets/someone/scp-data/commit/main", path
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        commit = {"commitOid": "0" * 40, "commitUrl": f"{self.url}/datasets/someone/scp-data/commit/{'0' * 40}"}
        return {"success": True, **commit}


def push(tmp_path: Path, hub: Hub) -> subprocess.CompletedProcess:
    lines = [json.dumps({"text": fact_document(number)}) for number in range(3)]
    (tmp_path / "docs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    # The client reads the Hub's address when it is imported.
    hub_settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_test", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    with Endpoint() as endpoint:
        arguments = ["--corpus", str(tmp_path / "docs.jsonl"), "--out", str(tmp_path / "scp"), "--model", "scripted"]
        arguments += ["--base-url", endpoint.url, "--push_to_hub", "someone/scp-data", "--validation_share", "0"]
        return subprocess.run(
            [sys.executable, "recipes/synthesize.py", *arguments],
            cwd=ROOT,
            env={**os.environ, **hub_settings, "HF_HOME": str(tmp_path / "home")},
            capture_output=True,
            text=True,
            timeout=300,
        )


@pytest.mark.slow
def test_a_finished_run_is_uploaded_with_a_card_that_loads_its_data(tmp_path):
    with Hub() as hub:
        done = push(tmp_path, hub)
    assert done.returncode == 0, done.stderr
    assert (
        hub.url in done.stdout
        and hub.created["type"] == "dataset"
        and "private" in (hub.created.get("visibility"), hub.created.get("private") and "private")
    )
    assert sorted(hub.files) == [
        "README.md",
        "passages.jsonl",
        "rejected.jsonl",
        "report.html",
        "scp.jsonl",
        "stats.json",
    ]
    assert hub.files["scp.jsonl"] == (tmp_path / "scp" / "scp.jsonl").read_bytes()
    card = hub.files["README.md"].decode()
    assert "of 3 passages" in card and "| model | scripted |" in card and "{" not in card.partition("```")[0]
    # The folder as a data set: the card's front matter names the one file that is data.
    (tmp_path / "copy").mkdir()
    for name, content in hub.files.items():
        (tmp_path / "copy" / name).write_bytes(content)
    data = load_dataset(str(tmp_path / "copy"), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(data) == 9 and set(data["data_type"]) == {"qa", "paraphrase"}


def test_a_hub_that_cannot_be_reached_is_one_sentence(tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise NoConnection("Connection refused")

    class NoConnection(Exception):
        """HTTP libraries have their own errors, which are no OSError."""

    monkeypatch.setattr(HfApi, "create_repo", unreachable)
    with pytest.raises(UsageError, match="not uploaded .Connection refused"):
        outputs.push(tmp_path, "someone/scp-data", (), {})


def test_an_upload_without_a_token_is_refused_before_the_work(monkeypatch):
    monkeypatch.setattr(outputs, "get_token", lambda: None)
    with pytest.raises(UsageError, match="HF_TOKEN"):
        outputs.check_name("someone/scp-data")


@pytest.mark.slow
def test_a_refused_upload_leaves_the_data_and_is_one_sentence(tmp_path):
    with Hub(refuse=True) as hub:
        done = push(tmp_path, hub)
    assert done.returncode == 2 and "not uploaded" in done.stderr and "Traceback" not in done.stderr
    assert "hf_test" not in done.stderr and (tmp_path / "scp" / "scp.jsonl").is_file()
