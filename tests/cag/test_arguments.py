"""What a program passes to the engine by mistake is an error of usage, said before anything is done."""

from fractions import Fraction
from functools import partial

import numpy as np
import pytest

from cag.engine import Engine
from cag.errors import UsageError


@pytest.fixture(scope="module")
def engine(tiny_model_dir, tmp_path_factory):
    root = tmp_path_factory.mktemp("arguments")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CAG_HOME", str(root / "home"))
        engine = Engine.load(str(tiny_model_dir), store=root / "store", device="cpu")
    (root / "page.txt").write_text("The gate opens at seven.\n")
    engine.build([root / "page.txt"], name="gate")
    return engine


@pytest.mark.parametrize("wrong", [5, b"x", ["x"], object()], ids=["number", "bytes", "list", "object"])
def test_arguments_of_another_type_are_usage_errors(engine, tiny_model_dir, tmp_path, wrong):
    (tmp_path / "page.txt").write_text("The gate opens at eight.\n")
    build = partial(engine.build, [tmp_path / "page.txt"], name="new")
    load = partial(Engine.load, str(tiny_model_dir))
    calls = [
        lambda: build(system_text=wrong),
        lambda: build(max_kl="much" if wrong == 5 else wrong),
        lambda: build(ttl_s="long" if wrong == 5 else wrong),
        lambda: engine.build([wrong], name="new"),
        lambda: engine.export_cache("gate", wrong),
        lambda: engine.import_cache(wrong),
        lambda: load(store=wrong),
        lambda: load(adapter=wrong),
        lambda: load(dtype=wrong),
        lambda: load(device="nowhere" if wrong == 5 else wrong),
    ]
    for call in calls:
        with pytest.raises(UsageError):
            call()
    assert engine.store.names() == ["gate"]


@pytest.mark.parametrize("number", [np.float32, np.int64, Fraction])
def test_numbers_of_other_types_are_numbers(engine, tmp_path, number):
    """As programs have them that measure: found at the very end otherwise, where they are written down."""
    (tmp_path / "page.txt").write_text("The gate opens at eight.\n")
    report = engine.build([tmp_path / "page.txt"], name="new", codec="int8", max_kl=number(9), ttl_s=number(600))
    ref, manifest = engine.find("new")
    engine.store.remove("new")
    assert report.max_kl == manifest.build["max_kl"] == 9.0
    assert ref.expires_at is not None


def test_what_is_no_layer_and_no_list_is_said(engine):
    with engine.open("gate") as prefix:
        for layer in (-1, 2, "0", None):
            with pytest.raises(UsageError, match="layers 0 to 1"):
                prefix.keys_values(layer)
        for questions in (5, None, "one text"):
            with pytest.raises(UsageError, match="a list"):
                prefix.ask_all(questions)
    for paths in (5, None):
        with pytest.raises(UsageError, match="paths"):
            engine.build(paths, name="new")
