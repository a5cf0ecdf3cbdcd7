"""Triton's interpreter without the work that it repeats: half of the time of a kernel that calls functions.

The interpreter replaces the functions of `triton.language` when a kernel is launched, puts them back behind it, and in
between replaces them anew for each call of a function by the kernel. Here what is replaced already is left. The numpy
type of a type is found once. What is computed stays the same.
"""


def quicken() -> None:
    """Change the interpreter of this process, if it is there and has the parts that are known here."""
    try:
        import triton.language as tl
        from triton.runtime import interpreter

        patch, scope, numpy_type = interpreter._patch_lang, interpreter._LangPatchScope, interpreter._get_np_dtype
    except (ImportError, AttributeError):
        return
    replaced: set[str] = set()
    languages: dict[str, set[str]] = {}
    numpy_types: dict[str, object] = {}

    class LaunchScope(scope):
        """What a launch replaced, until it is put back."""

        def restore(self):
            super().restore()
            replaced.clear()

    def patch_once(function):
        module = function.__module__
        if module not in languages:
            there = function.__globals__.values()
            languages[module] = {language.__name__ for language in (tl, tl.core) if language in there}
        if languages[module] <= replaced:
            return scope()
        launch = patch(function)
        replaced.update(languages[module])
        return launch

    def known_type(of):
        name = of.scalar.name
        if name not in numpy_types:
            numpy_types[name] = numpy_type(of)
        return numpy_types[name]

    interpreter._LangPatchScope, interpreter._patch_lang = LaunchScope, patch_once
    interpreter._get_np_dtype = known_type
