from __future__ import annotations

import importlib.metadata
import subprocess

import pytest

from cag_bench.provenance import commit, load_average, versions


def git(folder, *arguments):
    settings = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", folder, *settings, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path):
    git(tmp_path, "init", "-q")
    (tmp_path / "provenance.py").write_text("1\n")
    return tmp_path


def test_a_clean_and_a_changed_tree(repository):
    git(repository, "add", ".")
    git(repository, "commit", "-q", "-m", "one")
    head = git(repository, "rev-parse", "HEAD")
    (repository / "results.jsonl").write_text("untracked files change no code\n")
    assert commit(repository) == head
    (repository / "provenance.py").write_text("2\n")
    assert commit(repository) == f"{head}-dirty"


def test_without_a_commit_of_this_code_the_version_is_given(repository, tmp_path_factory):
    version = f"v{importlib.metadata.version('cag-engine')}"
    assert commit(repository) == version
    (repository / "other.py").write_text("\n")
    git(repository, "add", "other.py")
    git(repository, "commit", "-q", "-m", "a repository that surrounds the installed code")
    assert commit(repository) == version
    assert commit(tmp_path_factory.mktemp("nowhere")) == version


def test_versions_name_what_computes():
    assert {"python", "torch", "transformers", "numpy"} <= versions().keys()


def test_load_average_has_three_spans():
    assert len(load_average()) == 3
