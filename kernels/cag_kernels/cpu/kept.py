"""Machine code of functions that numba compiles, kept for later processes by what `cpu.program` keeps its own by.

numba's own cache looks at the file of a function only: when a function that it calls changes in another file, the old
code goes on. Here every source of this package counts, and what was kept is taken only whole, for the types it was
made for. The store has the like, as neither package knows the other. Knows numba's cache; nothing of what is computed.
"""

from __future__ import annotations

import contextlib
import importlib
import pickle
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

from cag_kernels.cpu.program import sources_digest

_caching: Any = importlib.import_module("numba.core.caching")  # untyped
_DIGEST_BYTES = 32


def keep_code(compiler: Any, function: Callable[..., Any]) -> Any:
    """Let numba's compiler of `function` (a dispatcher, or a C callback) keep its code where a folder for it can be
    written; returns the compiler, which has not compiled yet."""
    with contextlib.suppress(RuntimeError):
        compiler._cache = _KeptCode(function)
    return compiler


class _KeptCode(_caching.FunctionCache):  # type: ignore[misc]
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self._cache_file = _Files(self._cache_path, self._impl.filename_base, sources_digest())

    def load_overload(self, types: Any, context: Any) -> Any:
        """What was kept; None where there is none that is whole."""
        try:
            return super().load_overload(types, context)
        except Exception:  # whatever numba and pickle make of damaged files
            with contextlib.suppress(OSError):
                self.flush()
            return None

    def save_overload(self, types: Any, data: Any) -> None:
        """Without room for it, or where a damaged index could not be cleared, nothing is kept."""
        with contextlib.suppress(Exception):
            super().save_overload(types, data)


class _Files(_caching.IndexDataCacheFile):  # type: ignore[misc]
    """numba's files, the code behind a hash of it and of what it was made for."""

    def save(self, key: Any, data: Any) -> None:
        super().save(key, (key, data))

    def load(self, key: Any) -> Any:
        found = super().load(key)
        if found is not None and found[0] != key:
            raise ValueError("code for other types")
        return None if found is None else found[1]

    def _save_data(self, name: str, data: Any) -> None:
        content = self._dump(data)
        with self._open_for_write(self._data_path(name)) as stream:
            stream.write(sha256(content).digest() + content)

    def _load_data(self, name: str) -> Any:
        content = Path(self._data_path(name)).read_bytes()
        if sha256(content[_DIGEST_BYTES:]).digest() != content[:_DIGEST_BYTES]:
            raise ValueError("code that is not whole")
        return pickle.loads(content[_DIGEST_BYTES:])  # noqa: S301  as numba reads it, from where it keeps it
