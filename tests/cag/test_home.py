"""Files of the engine's home are written whole or not at all."""

import os

import pytest

from cag import home
from cag.home import write_atomically


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_written_and_written_again(tmp_path):
    path = tmp_path / "new" / "folder" / "file"
    for data in (b"first", b"", b"second"):
        write_atomically(path, data)
        assert path.read_bytes() == data
    assert names(path.parent) == ["file"]


@pytest.mark.parametrize("fails", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failure_leaves_what_was_there_and_nothing_else(tmp_path, monkeypatch, fails, error):
    path = tmp_path / "file"
    write_atomically(path, b"before")

    def fail(*_):
        raise error

    monkeypatch.setattr(home.os if fails == "fsync" else home.Path, fails, fail)
    with pytest.raises(error):
        write_atomically(path, b"after")
    assert path.read_bytes() == b"before"
    assert names(tmp_path) == ["file"]


def test_a_folder_in_the_place_is_an_error_and_stays(tmp_path):
    (tmp_path / "file" / "inside").mkdir(parents=True)
    with pytest.raises(OSError):
        write_atomically(tmp_path / "file", b"data")
    assert names(tmp_path) == ["file"]


def test_who_may_read_a_plain_file_may_read_this_one(tmp_path):
    write_atomically(tmp_path / "file", b"data")
    (tmp_path / "plain").write_bytes(b"data")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_readers_see_one_whole_content(tmp_path, monkeypatch):
    """Until the last step the old one is there, and after it the new one."""
    path, seen = tmp_path / "file", []
    write_atomically(path, b"before")
    synced = os.fsync
    monkeypatch.setattr(home.os, "fsync", lambda number: (seen.append(path.read_bytes()), synced(number)))
    write_atomically(path, b"after")
    assert (seen, path.read_bytes()) == ([b"before"], b"after")
