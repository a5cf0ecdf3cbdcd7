"""Machine code of emitted modules, made once and found again by later processes.

Emitting and compiling what a question needs takes the better part of a second, which `cag ask` would pay each time. So
the code is kept in a file under a name that says all that it follows from: the emitting function and its arguments,
every source of this package, the processor, LLVM, and which functions of other libraries there are to call. A file
that is not whole is made again. Knows LLVM and files, not what is computed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from functools import cache
from hashlib import sha256
from pathlib import Path

import llvmlite  # type: ignore[import-untyped]
import llvmlite.binding as llvm  # type: ignore[import-untyped]
import platformdirs
from llvmlite import ir

LIBRARY_FUNCTIONS = ("omp_get_thread_num", "omp_get_num_threads", "sched_yield")  # what emitted code may call
_PACKAGE = Path(__file__).parents[1]  # all of `cag_kernels`
_DIGEST_BYTES = 32
_OPTIMIZATION = 3


class Program:
    """Machine code of the module that `build(*arguments)` emits, alive as long as this object.

    The module must follow from the arguments, whose `repr` tells them apart, from this package and from the processor
    alone: no address, and nothing that is measured.
    """

    def __init__(self, build: Callable[..., ir.Module], *arguments: object) -> None:
        for name in LIBRARY_FUNCTIONS:
            if (address := library_function(name)) is not None:
                llvm.add_symbol(name, address)
        self._machine = _target_machine()
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), self._machine)
        self._engine.add_object_file(llvm.ObjectFileRef.from_data(_object_code(build, arguments)))
        self._engine.finalize_object()

    def address(self, name: str) -> int:
        """Where a function of the module starts."""
        return int(self._engine.get_function_address(name))


@cache
def library_function(name: str) -> int | None:
    """The address of one of `LIBRARY_FUNCTIONS`, if the process has loaded it."""
    assert name in LIBRARY_FUNCTIONS, name
    try:
        return ctypes.cast(getattr(ctypes.CDLL(None), name), ctypes.c_void_p).value
    except (AttributeError, OSError, TypeError):
        return None


def _target_machine() -> llvm.TargetMachine:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    cpu, features = llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()
    return llvm.Target.from_default_triple().create_target_machine(cpu=cpu, features=features, opt=_OPTIMIZATION)


def _object_code(build: Callable[..., ir.Module], arguments: tuple[object, ...]) -> bytes:
    name = _file_name(build, arguments)
    if name is not None and (kept := _read(name)) is not None:
        return kept
    module = llvm.parse_assembly(str(build(*arguments)))
    module.verify()
    code: bytes = _target_machine().emit_object(module)
    if name is not None:
        _keep(name, code)
    return code


def _file_name(build: Callable[..., ir.Module], arguments: tuple[object, ...]) -> str | None:
    """Where the code is kept; None where it cannot be, as the sources are unknown that it follows from."""
    sources = sources_digest() if build.__module__.partition(".")[0] == _PACKAGE.name else None
    if sources is None:
        return None
    processor = llvm.get_default_triple(), llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()
    compiler = llvmlite.__version__, llvm.llvm_version_info, _OPTIMIZATION
    callable_ones = [name for name in LIBRARY_FUNCTIONS if library_function(name) is not None]
    facts = build.__module__, build.__qualname__, arguments, processor, compiler, callable_ones
    return f"{build.__name__}-{sources[:16]}-{sha256(repr(facts).encode()).hexdigest()[:32]}.code"


@cache
def sources_digest() -> str | None:
    """Of all sources of this package; None where they are no files."""
    digest = sha256()
    paths = sorted(_PACKAGE.rglob("*.py"))
    for path in paths:
        name = path.relative_to(_PACKAGE).as_posix()
        digest.update(f"{name} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest() if paths else None


def _folders() -> Iterator[Path]:
    """Where code is kept: beside that of Python, or in the user's cache where this is not ours to write."""
    yield _PACKAGE / "__pycache__"
    yield platformdirs.user_cache_path("cag", appauthor=False) / "code"


def _read(name: str) -> bytes | None:
    for folder in _folders():
        with contextlib.suppress(OSError):
            data = (folder / name).read_bytes()
            if len(data) > _DIGEST_BYTES and sha256(data[_DIGEST_BYTES:]).digest() == data[:_DIGEST_BYTES]:
                return data[_DIGEST_BYTES:]
    return None


def _keep(name: str, code: bytes) -> None:
    """Write the file at once, and remove what other sources of the same function left; without a place, do nothing."""
    build, sources, _ = name.rsplit("-", 2)
    for folder in _folders():
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            _write(folder / name, sha256(code).digest() + code)
            for other in folder.glob(f"{build}-*.code"):
                if not other.name.startswith(f"{build}-{sources}-"):
                    other.unlink(missing_ok=True)
            return


def _write(path: Path, data: bytes) -> None:
    """All at once, or nothing."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
