"""Dependencies point one way: kernels, store <- cag <- bench. Read off the import statements of every file."""

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "cag_kernels": ROOT / "kernels" / "cag_kernels",
    "cag_store": ROOT / "store" / "cag_store",
    "cag": ROOT / "cag",
    "cag_bench": ROOT / "bench" / "cag_bench",
}
FORBIDDEN = {
    "cag_kernels": {"cag", "cag_store", "cag_bench", "transformers"},
    "cag_store": {"cag", "cag_kernels", "cag_bench", "torch", "transformers"},
    "cag": {"cag_bench"},
    "cag_bench": set(),
}
MOUNTS_BENCH = ROOT / "cag" / "cli"  # the CLI's one `bench` command
# The walk of the data through `cag/`: a module imports only what stands before it.
WALK = [
    "home", "errors", "machine", "stores", "models", "words", "corpus", "retrieval", "prompt", "thinking", "ngrams",
    "forward", "model_files", "starts", "short_model", "model", "identity", "prefill", "residency", "generation",
    "prefix", "fresh", "first_steps", "calibration", "building", "open_caches", "engine", "describe", "server", "cli",
    "__main__",
]  # fmt: skip
# The walk through those of its packages that are stages of their own.
WALKS = {
    "machine": ["versions", "imports", "memory_limits", "huge_pages", "runtime", "allocator"],
    "forward": [
        "recurrent", "waiting", "state", "branches", "turns", "step_cost", "weights", "products", "latent",
        "attention_hook", "mask_probe", "pages", "step_tensors", "batch", "choices", "decoder_layers", "recorded",
        "decoder", "replays", "device_decoder", "layer_probe", "recurrent_probe", "kernels_ahead", "rope",
    ],
    "residency": [
        "uploads", "host_copies", "buffers", "angles", "basis_tensors", "segment_tensors", "stream_decoding",
        "stream_buffers", "load_plan", "resident", "recurrent",
    ],
    "generation": ["answer", "sentences", "citations", "speculation", "thoughts", "generate", "scheduler", "session"],
    "building": [
        "probes", "fidelity", "key_errors", "ladder", "rungs", "snapshots", "chunks", "trials", "options",
        "requirements", "builder", "updates",
    ],
}  # fmt: skip


def imports(path: Path) -> set[tuple[str, bool]]:
    """(dotted name, only for type checking) of every import in a file."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {(alias.name, id(node) in typing_only) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found |= {(f"{node.module}.{alias.name}", id(node) in typing_only) for alias in node.names}
    return found


FILES = [(name, path) for name, folder in PACKAGES.items() for path in sorted(folder.rglob("*.py"))]


@pytest.mark.parametrize("package, path", FILES, ids=lambda value: getattr(value, "name", value))
def test_packages_import_in_one_direction(package, path):
    for module, _ in imports(path):
        top = module.split(".")[0]
        if top == "cag_bench" and path.is_relative_to(MOUNTS_BENCH):
            continue
        assert top not in FORBIDDEN[package], f"{path.relative_to(ROOT)} imports {module}"


@pytest.mark.parametrize("path", [path for name, path in FILES if name == "cag"], ids=lambda path: path.name)
def test_modules_import_only_what_stands_before_them(path):
    own = path.relative_to(PACKAGES["cag"]).with_suffix("").parts
    if own == ("__init__",):
        return
    for module, typing_only in imports(path):
        parts = module.split(".")[1:]
        if module.split(".")[0] != "cag" or not parts or typing_only:
            continue
        if parts[0] != own[0]:
            walk, theirs, ours = WALK, parts[0], own[0]
        elif parts[0] in WALKS and len(parts) > 1 and parts[1] != own[1]:
            walk, theirs, ours = WALKS[parts[0]], parts[1], own[1]
        else:
            continue
        assert walk.index(theirs) < walk.index(ours), f"{path.relative_to(ROOT)} imports {module}"


def test_walks_name_every_module():
    for folder, walk in {"": WALK, **WALKS}.items():
        found = {path.stem for path in (PACKAGES["cag"] / folder).iterdir() if path.suffix == ".py" or path.is_dir()}
        assert found - {"__init__", "__pycache__"} == set(walk), folder


@pytest.mark.parametrize("name", PACKAGES)
def test_all_names_what_is_exported(name):
    """What a package imports from its modules, or would when it is asked for; nothing where it only holds modules."""
    package = importlib.import_module(name)
    tree = ast.parse((PACKAGES[name] / "__init__.py").read_text())
    imported = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in PACKAGES
        for alias in node.names
    }
    versions = {"__version__"} & vars(package).keys()
    assert sorted(getattr(package, "__all__", [])) == sorted(imported | versions)
    for exported in imported:
        assert getattr(package, exported).__class__.__name__ != "module", exported


@pytest.mark.parametrize("package, path", FILES, ids=lambda value: getattr(value, "name", value))
def test_files_stay_small(package, path):
    assert len(path.read_text().splitlines()) <= 420


def test_every_error_has_a_row_in_the_table():
    import cag.errors
    import cag_store.errors

    def tree(cls):
        return {cls} | {leaf for child in cls.__subclasses__() for leaf in tree(child)}

    table = cag.errors.ERROR_TABLE
    for error in tree(cag.errors.CagError) | tree(cag_store.errors.StoreError):
        assert cag.errors.error_row(error("x")) in table.values()
        if error.__module__ in ("cag.errors", "cag_store.errors"):
            assert error in table, f"{error.__name__} has no row"
            assert error.__name__ in f"{cag.errors.__doc__}{cag_store.errors.__doc__}"
    usage = table[cag.errors.UsageError].exit_code  # the only one that is shared
    codes = [row.exit_code for row in table.values() if row.exit_code != usage]
    assert len(codes) == len(set(codes))
    assert len({row.code for row in table.values()}) == len(table)
