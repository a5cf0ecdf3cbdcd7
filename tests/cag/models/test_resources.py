import pytest

from cag.errors import InsufficientResources
from cag.models import resources


def test_too_little_disk_says_need_and_have(monkeypatch, tmp_path):
    monkeypatch.setattr(resources, "free_disk_bytes", lambda folder: 1_500_000_000)
    resources.require_disk(tmp_path, 1_500_000_000, "Pulling x")
    with pytest.raises(InsufficientResources, match=r"x needs 4\.00 GB of disk.*1\.50 GB free.*CAG_HOME") as caught:
        resources.require_disk(tmp_path, 4_000_000_000, "Pulling x")
    assert caught.value.facts["need_bytes"] == 4_000_000_000
    assert caught.value.facts["have_bytes"] == 1_500_000_000


def test_too_little_memory_says_need_and_have(monkeypatch):
    monkeypatch.setattr(resources, "available_memory_bytes", lambda: 500_000_000)
    resources.require_memory(500_000_000, "Converting x")
    with pytest.raises(InsufficientResources, match=r"needs 0\.60 GB of memory, 0\.50 GB"):
        resources.require_memory(600_000_000, "Converting x")


def test_free_disk_of_a_folder_that_does_not_exist_yet(tmp_path):
    assert resources.free_disk_bytes(tmp_path / "not" / "yet") > 0
