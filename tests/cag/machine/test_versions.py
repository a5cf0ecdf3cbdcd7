"""Versions in manifests and rows, also where nothing of ours is installed."""

import importlib.metadata

import pytest

import cag
from cag.machine.versions import ENGINE, installed_version, installed_versions, unmet_requirements


@pytest.fixture
def nothing_installed(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    monkeypatch.setattr(importlib.metadata, "requires", missing)


def test_installed_versions_are_those_of_the_distributions():
    found = installed_versions(["torch", "no-such-distribution"])
    assert set(found) == {"python", "torch"}
    assert found["torch"] == importlib.metadata.version("torch")


@pytest.mark.usefixtures("nothing_installed")
def test_a_checkout_knows_its_own_version():
    assert installed_version(ENGINE) == cag.__version__
    assert installed_version("torch") is None
    assert unmet_requirements() is None


def test_what_is_missing_or_too_old_is_named(monkeypatch):
    required = [
        "torch>=2.11",
        "numba>=0.62",
        "lxml>=6",
        "tzdata; sys_platform == 'none'",
        "peft>=0.18; extra == 'adapters'",
    ]
    found = {"torch": "2.13.0+cpu", "numba": None, "lxml": "5.4"}
    monkeypatch.setattr(importlib.metadata, "requires", {ENGINE: required}.get)
    monkeypatch.setattr("cag.machine.versions.installed_version", found.__getitem__)
    assert unmet_requirements() == ["numba>=0.62: not installed", "lxml>=6: 5.4"]
