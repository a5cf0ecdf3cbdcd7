"""Versions in manifests and rows, also where nothing of ours is installed."""

import importlib.metadata

import pytest

import cag
from cag.machine.versions import ENGINE, installed_version, installed_versions


@pytest.fixture
def nothing_installed(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)


def test_installed_versions_are_those_of_the_distributions():
    found = installed_versions(["torch", "no-such-distribution"])
    assert set(found) == {"python", "torch"}
    assert found["torch"] == importlib.metadata.version("torch")


@pytest.mark.usefixtures("nothing_installed")
def test_a_checkout_knows_its_own_version():
    assert installed_version(ENGINE) == cag.__version__
    assert installed_version("torch") is None
