"""`cag serve`: what is said before it serves, and a whole life of the process."""

import json
import os
import re
import signal
import socket
import subprocess
import sys

import httpx
import pytest
from typer.testing import CliRunner

from cag.cli.commands import app
from cag.cli.serve import _is_loopback, serve
from cag.errors import CacheNotFound, UsageError


def test_a_taken_port_is_said_before_a_model_is_loaded(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UsageError, match="cannot listen"):
        serve(port=taken.getsockname()[1], store=tmp_path, model="nobody/nothing")


def test_an_unknown_preload_is_said_before_a_model_is_loaded(tmp_path):
    with pytest.raises(CacheNotFound):
        serve(port=0, store=tmp_path, preload=["nobody"], model="nobody/nothing")


def test_an_open_address_without_a_key_is_warned_of(tmp_path, capsys):
    for keys, warned in ([], True), (["sk-one"], False):
        with pytest.raises(CacheNotFound):
            serve(host="0.0.0.0", port=0, store=tmp_path, preload=["nobody"], api_key=keys)
        assert ("warning" in capsys.readouterr().err) is warned


@pytest.mark.parametrize("key", ["", " ", "two words", " padded", "schlüssel", "line\n"])
def test_a_key_that_opens_to_all_or_to_nobody_is_refused_and_not_told(tmp_path, key):
    with pytest.raises(UsageError, match="API key 2 is empty, or has other characters") as refused:
        serve(port=0, store=tmp_path, preload=["nobody"], api_key=["sk-one", key])
    assert "sk-one" not in str(refused.value)
    assert len(key) < 2 or key not in str(refused.value)


@pytest.mark.parametrize("key", ["", " ", "two words", "line\n"])
def test_the_key_of_the_environment_is_one_and_never_blank(tmp_path, monkeypatch, key):
    monkeypatch.setenv("CAG_API_KEY", key)
    result = CliRunner().invoke(app, ["serve", "--port", "0", "--store", str(tmp_path), "--preload", "nobody"])
    assert isinstance(result.exception, UsageError)
    assert "API key 1 is empty, or has other characters" in str(result.exception)


def test_a_bad_setting_names_its_option(tmp_path):
    with pytest.raises(UsageError, match="--max-resident-bytes: Input should be"):
        serve(port=0, store=tmp_path, preload=["nobody"], max_resident_bytes=0)


@pytest.mark.parametrize(
    ("host", "loopback"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False)]
)
def test_loopback(host, loopback):
    assert _is_loopback(host) is loopback


def test_each_record_of_the_log_has_its_time_and_level():
    """Ours and the server's as they were asked for, and of libraries the warnings."""
    said = [("cag.server.jobs", "info"), ("uvicorn.access", "info"), ("httpx", "info"), ("httpx", "warning")]
    code = "import logging.config; from cag.cli.serve import _logging; logging.config.dictConfig(_logging('INFO'))\n"
    code += "\n".join(f"logging.getLogger({name!r}).{level}('said')" for name, level in said)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    lines = re.findall(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (\S+) (\S+): said$", run.stderr, re.MULTILINE)
    assert lines == [("INFO", "cag.server.jobs"), ("INFO", "uvicorn.access"), ("WARNING", "httpx")]


@pytest.mark.slow
def test_it_says_its_address_serves_and_ends_with_the_signal(engine):
    command = ["serve", "--port", "0", "--json", "--preload", "handbook", "--store", str(engine.store.backend.root)]
    code = f"from cag.cli import main; main({command!r})"
    environment = {**os.environ, "CAG_API_KEY": "sk-one", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            facts = json.loads(process.stdout.readline())
            assert facts["preload"] == ["handbook"]
            headers = {"Authorization": "Bearer sk-one"}
            request = {"question": "When?", "max_tokens": 3}
            answer = httpx.post(f"{facts['url']}/v1/caches/handbook/ask", json=request, headers=headers, timeout=60)
            assert answer.json()["answer"] == engine.ask("handbook", "When?", max_tokens=3).text
            assert httpx.get(f"{facts['url']}/v1/models").status_code == 401
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
        finally:
            process.kill()
