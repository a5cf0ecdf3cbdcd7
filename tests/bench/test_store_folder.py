from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from cag_bench.store_folder import store_folder

RUN = """
import sys, time
from pathlib import Path
from cag_bench.store_folder import store_folder
with store_folder(None, Path(sys.argv[1])) as folder:
    (folder / "chunk").write_text("bytes")
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_ended_leaves_no_store(tmp_path, number):
    with subprocess.Popen(
        [sys.executable, "-c", RUN, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(number)
        code = process.wait(30)
    assert code == (143 if number == signal.SIGTERM else -signal.SIGINT)
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_was_named_is_kept_and_the_signal_is_as_before(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with store_folder(tmp_path / "kept", tmp_path) as folder:
        folder.mkdir()
    with store_folder(None, tmp_path / "out") as temporary:
        assert temporary.parent == tmp_path / "out"
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["kept", "out"]
    assert not temporary.exists()
    assert signal.getsignal(signal.SIGTERM) is before
