"""Importing transformers when it is first needed, whichever thread that is."""

from __future__ import annotations

from importlib import import_module


def import_transformers() -> None:
    """Behind this, `from transformers import ...` is safe in this thread; call it before where threads may be several.

    transformers puts another module in its place while it is imported. An import statement that waits for that on a
    second thread goes on with the first module, which has none of the names; `import_module` looks again.
    """
    import_module("transformers")
