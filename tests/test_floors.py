"""What `make test-floors` installs, and what `make test` does, is what `pyproject.toml` allows."""

import re
import runpy
from pathlib import Path

import pytest

SCRIPT = runpy.run_path(str(Path(__file__).with_name("floors.py")))
floors, numbers, read_project = SCRIPT["floors"], SCRIPT["numbers"], SCRIPT["read_project"]
PINNED = dict(
    line.split("==") for line in (Path(__file__).parent.parent / "constraints.txt").read_text().splitlines() if line
)


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_tested_versions_are_not_below_the_floors():
    pinned = {normal(name): version for name, version in PINNED.items()}
    least = {normal(name): version for name, version in floors(read_project()).items()}
    assert set(least) - set(pinned) == {"bitsandbytes"}  # which `make test` goes without
    assert {name for name in least.keys() & pinned.keys() if numbers(pinned[name]) < numbers(least[name])} == set()


def test_the_highest_floor_counts_and_each_must_have_one():
    extras = {"gpu": ["triton>=3.6; sys_platform == 'linux'"], "dev": ["triton>=3.10", "moto[server]>=5.2"]}
    project = {"dependencies": ["torch>=2.11", "numpy>=1.26"], "optional-dependencies": extras}
    assert floors(project) == {"moto": "5.2", "numpy": "1.26", "triton": "3.10"}
    for wrong in ("numpy", "numpy>=1,<3", "numpy==1"):
        with pytest.raises(ValueError, match="least version"):
            floors({"dependencies": [wrong], "optional-dependencies": {}})
