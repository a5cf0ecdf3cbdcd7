"""The least versions that `pyproject.toml` allows, as constraints for pip: `python tests/floors.py > floors.txt`.

torch is left out, whose old releases are builds of gigabytes for GPUs, and flash-attn, which has no builds at all.
"""

import re
import tomllib
from itertools import chain
from pathlib import Path

LEFT_OUT = {"cag-engine", "flash-attn", "torch"}
FLOOR = re.compile(r"(?P<name>[\w-]+)(\[[^]]*\])?>=(?P<version>[\w.]+)")


def floors(project: dict) -> dict[str, str]:
    """The floor of each distribution; of one that extras ask for, too, the highest.

    Raises: ValueError: a requirement that has no floor, or more than one.
    """
    requirements = [*project["dependencies"], *chain.from_iterable(project["optional-dependencies"].values())]
    found: dict[str, str] = {}
    for requirement in requirements:
        text = requirement.partition(";")[0].strip()
        match = FLOOR.fullmatch(text)
        if match is not None:
            name, version = match["name"], match["version"]
            found[name] = max(found.get(name, "0"), version, key=numbers)
        elif not text.startswith("cag-engine["):
            raise ValueError(f"{requirement!r} states no least version as `name>=version`.")
    return {name: version for name, version in sorted(found.items()) if name not in LEFT_OUT}


def numbers(version: str) -> list[int]:
    """What versions are ordered by."""
    return [int(number) for number in version.split(".")]


def read_project() -> dict:
    """The table `project` of the repository's `pyproject.toml`."""
    return tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]


if __name__ == "__main__":
    for name, version in floors(read_project()).items():
        print(f"{name}=={version}")
