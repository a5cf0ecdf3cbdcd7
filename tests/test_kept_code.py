"""Machine code that numba made is taken by a later process only whole, and while all sources are as they were."""

import errno
import importlib.util
import os
import sys

import pytest

numba = pytest.importorskip("numba")

SOURCE = "def doubled(number):\n    return 2 * number\n"
BROKEN = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "a bit": lambda content: content[:-9] + bytes([content[-9] ^ 4]) + content[-8:],
    "another file": lambda content: b"what is this?" * 30,
}


@pytest.fixture(params=["cag_kernels.cpu.kept", "cag_store.codecs.kept_code"])
def kept_code(request):
    """Kernels and store know nothing of each other, so each has its own."""
    return pytest.importorskip(request.param)


@pytest.fixture
def doubled(kept_code, tmp_path, monkeypatch):
    """Compiles a function as a new process would: the dispatcher, and what it gives."""
    (tmp_path / "doubling.py").write_text(SOURCE)

    def compiled(*numbers):
        spec = importlib.util.spec_from_file_location("doubling", tmp_path / "doubling.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "doubling", module)  # what was kept is read by its module's name
        spec.loader.exec_module(module)
        dispatcher = kept_code.keep_code(numba.njit(module.doubled), module.doubled)
        assert [dispatcher(number) for number in numbers] == [2 * number for number in numbers]
        return sum(dispatcher.stats.cache_hits.values())

    return compiled


def files(folder, ending):
    return sorted((folder / "__pycache__").glob(f"*.{ending}"))


def test_code_is_taken_again(doubled):
    assert doubled(3, 1.5) == 0
    assert doubled(3, 1.5) == 2


def test_code_of_other_sources_is_not_taken(kept_code, doubled, monkeypatch):
    doubled(3)
    monkeypatch.setattr(kept_code, "sources_digest", lambda: "0" * 64)
    assert doubled(3) == 0
    assert doubled(3) == 1


@pytest.mark.parametrize("ending", ["nbi", "nbc"])
@pytest.mark.parametrize("damage", BROKEN)
def test_damaged_code_is_made_again(doubled, tmp_path, ending, damage):
    doubled(3)
    (path,) = files(tmp_path, ending)
    path.write_bytes(BROKEN[damage](path.read_bytes()))
    doubled(3)
    assert doubled(3) == 1


def test_code_for_other_types_is_not_taken(doubled, tmp_path):
    doubled(3, 1.5)
    first, second = files(tmp_path, "nbc")
    swapped = second.read_bytes()
    second.write_bytes(first.read_bytes())
    first.write_bytes(swapped)
    doubled(3, 1.5)


def test_without_a_place_to_write_code_is_made_each_time(kept_code, doubled, monkeypatch):
    def refused(function):
        raise RuntimeError("no locator")

    monkeypatch.setattr(kept_code, "_KeptCode", refused)
    assert [doubled(3), doubled(3)] == [0, 0]


@pytest.mark.parametrize("damage", [None, *BROKEN])
def test_a_full_disk_keeps_nobody_from_the_code(kept_code, doubled, tmp_path, monkeypatch, damage):
    """Nor does an index that cannot be read, nor cleared."""
    if damage is not None:
        doubled(3)
        (index,) = files(tmp_path, "nbi")
        index.write_bytes(BROKEN[damage](index.read_bytes()))

    def full(path, mode="r"):
        if "w" in mode:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return open(path, mode)

    with monkeypatch.context() as patch:
        patch.setattr(kept_code._caching, "open", full, raising=False)
        assert [doubled(3), doubled(3)] == [0, 0]
    doubled(3)
    assert doubled(3) == 1
