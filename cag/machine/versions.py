"""Versions of what runs here: in manifests, records of models, `cag doctor` and rows of benchmarks.

Names of distributions in, versions out.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable

ENGINE = "cag-engine"


def installed_version(distribution: str) -> str | None:
    """Its version, None where it is not installed; the engine's own also where it runs from a checkout."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        if distribution != ENGINE:
            return None
    import cag

    return cag.__version__


def installed_versions(distributions: Iterable[str]) -> dict[str, str]:
    """Python's version and those of the distributions that are installed."""
    found = {name: installed_version(name) for name in distributions}
    return {"python": platform.python_version()} | {name: version for name, version in found.items() if version}


def unmet_requirements() -> list[str] | None:
    """What the engine requires of other distributions and is not so here, as "numba>=0.62: not installed"; extras are
    nobody's duty. None where the engine runs from a checkout, of which nothing is recorded."""
    from packaging.requirements import Requirement

    try:
        required = importlib.metadata.requires(ENGINE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    unmet = []
    for requirement in map(Requirement, required):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = installed_version(requirement.name)
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            unmet.append(f"{requirement.name}{requirement.specifier}: {found or 'not installed'}")
    return unmet
