from pathlib import Path

import platformdirs

from cag.home import cag_home


def test_the_environment_decides(monkeypatch, tmp_path):
    monkeypatch.setenv("CAG_HOME", str(tmp_path / "here"))
    assert cag_home() == tmp_path / "here"
    monkeypatch.setenv("CAG_HOME", "~/there")
    assert cag_home() == Path.home() / "there"


def test_a_relative_home_is_made_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CAG_HOME", "models")
    assert cag_home() == tmp_path / "models"


def test_without_it_the_user_cache_directory(monkeypatch):
    monkeypatch.setenv("CAG_HOME", "")
    assert cag_home() == Path(platformdirs.user_cache_dir("cag", appauthor=False))
