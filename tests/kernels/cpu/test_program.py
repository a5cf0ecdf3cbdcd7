"""Machine code that is kept in files: found again by what it follows from, and made again where a file is not whole."""

import errno
import os
import subprocess
import sys
from ctypes import CFUNCTYPE, c_int64
from pathlib import Path

import pytest

from cag_kernels import has_compiler, has_dots, has_tiles

pytestmark = pytest.mark.skipif(not has_compiler(), reason="needs llvmlite")

if has_compiler():
    from llvmlite import ir

    from cag_kernels.cpu import program as cpu_program
    from cag_kernels.cpu.emit import INT64
    from cag_kernels.cpu.products.dot_linear import dot_linear_module
    from cag_kernels.cpu.products.tile_linear import tile_linear_module
    from cag_kernels.cpu.program import Program, library_function

emitted = []


def adding_module(number):
    """Module with `add`, which adds `number`; each emission is written down."""
    emitted.append(number)
    module = ir.Module(name="adding")
    function = ir.Function(module, ir.FunctionType(INT64, [INT64]), name="add")
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    builder.ret(builder.add(function.args[0], ir.Constant(INT64, number)))
    return module


def add(number, value):
    program = Program(adding_module, number)
    return CFUNCTYPE(c_int64, c_int64)(program.address("add"))(value)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The only place for code, for functions of this file too."""
    emitted.clear()
    monkeypatch.setattr(cpu_program, "_folders", lambda: iter([tmp_path / "code"]))
    monkeypatch.setattr(adding_module, "__module__", "cag_kernels.adding")
    return tmp_path / "code"


def test_code_is_emitted_once_for_each_of_its_arguments(folder):
    assert [add(5, 1), add(5, 2), add(7, 1), add(5, 3)] == [6, 7, 8, 8]
    assert emitted == [5, 7]
    assert len(list(folder.glob("adding_module-*.code"))) == 2


@pytest.mark.parametrize("damage", [lambda _: b"", lambda data: data[:-1], lambda data: data[:40] + b"x" + data[41:]])
def test_a_file_that_is_not_whole_is_made_again(folder, damage):
    add(5, 1)
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert add(5, 1) == 6
    assert emitted == [5, 5]
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("cag_kernels.cpu.program.library_function", lambda _: None),
        ("llvmlite.binding.get_default_triple", lambda: "another"),
        ("llvmlite.binding.get_host_cpu_name", lambda: "x86-64"),
        ("llvmlite.__version__", "0.1"),
    ],
)
def test_code_of_another_processor_compiler_or_team_is_another_file(folder, monkeypatch, name, found):
    before = cpu_program._file_name(adding_module, (5,))
    monkeypatch.setattr(name, found)
    assert cpu_program._file_name(adding_module, (5,)) not in (None, before)


def test_code_of_other_sources_is_not_taken_and_goes(folder, monkeypatch):
    add(5, 1)
    before = set(folder.iterdir())
    monkeypatch.setattr(cpu_program, "sources_digest", lambda: "0" * 64)
    assert add(5, 1) == 6
    assert emitted == [5, 5]
    assert len(set(folder.iterdir())) == 1
    assert not before & set(folder.iterdir())


def test_every_source_of_the_package_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu_program, "_PACKAGE", tmp_path)
    (tmp_path / "a.py").write_text("one")
    digests = {cpu_program.sources_digest.__wrapped__()}
    for name, text in (("a.py", "two"), ("inner/b.py", ""), ("a.py", "one")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        digests.add(cpu_program.sources_digest.__wrapped__())
    assert len(digests) == 4


def test_functions_of_elsewhere_are_not_kept(folder, monkeypatch):
    """Their sources are not among those that a file is named by."""
    monkeypatch.setattr(adding_module, "__module__", "elsewhere")
    assert [add(5, 1), add(5, 1)] == [6, 6]
    assert emitted == [5, 5]
    assert not folder.exists()


def test_without_a_place_to_write_code_is_emitted_each_time(folder):
    folder.write_text("in the way")
    assert [add(5, 1), add(5, 2)] == [6, 7]
    assert emitted == [5, 5]


def test_a_disk_that_is_full_is_left_as_it_was(folder, monkeypatch):
    write = Path.write_bytes

    def no_room_left(path, data):
        write(path, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", no_room_left)
    assert [add(5, 1), add(5, 2)] == [6, 7]
    assert emitted == [5, 5]
    assert list(folder.iterdir()) == []


@pytest.mark.skipif(not has_tiles() and not has_dots(), reason="no products of bfloat16")
def test_another_process_finds_the_code(folder):
    """What was emitted here runs there, calls of other libraries' functions included."""
    kind = "tile" if has_tiles() else "dot"
    Program(tile_linear_module if has_tiles() else dot_linear_module)
    script = f"""
import sys
from pathlib import Path
import torch
from cag_kernels import {kind}_linear
from cag_kernels.cpu import program as cpu_program
from cag_kernels.cpu.products import {kind}_linear as cpu_linear
cpu_program._folders = lambda: iter([Path(sys.argv[1])])
def never():
    raise AssertionError("emitted again")
never.__module__, never.__qualname__ = "cag_kernels.cpu.products.{kind}_linear", "{kind}_linear_module"
never.__name__ = "{kind}_linear_module"
cpu_linear.{kind}_linear_module = never
rows, weight = torch.ones(3, 64), torch.full((640, 64), 0.5).bfloat16()
assert torch.equal({kind}_linear(rows, weight), torch.full((3, 640), 32.0))
"""
    assert len(list(folder.iterdir())) == 1
    subprocess.run([sys.executable, "-c", script, str(folder)], check=True)


def test_only_the_functions_that_a_file_is_named_by_may_be_called():
    with pytest.raises(AssertionError):
        library_function("getpid")
