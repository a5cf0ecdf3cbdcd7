"""A tiny engine for every test of the engine: random weights, a real store, a cache home of its own."""

import pytest

from tiny import write_tiny_model

TEXTS = {
    "alpha.md": "# Alpha\n\nThe alpha gate opens at seven in the morning. Its code is 4711.\n",
    "beta.txt": "The beta pump moves 30 litres a minute and is painted green.\n",
    "gamma/delta.md": "# Delta\n\nDelta valves are checked every 14 days by the night crew.\n",
    "omega.txt": "Nobody has seen the omega key since Tuesday.\n",
}


@pytest.fixture(autouse=True)
def cag_home(tmp_path_factory, monkeypatch):
    """No test touches the user's own cache home."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("CAG_HOME", str(home))
    monkeypatch.setenv("CAG_THREADS", "1")
    return home


@pytest.fixture(scope="module")
def home_of_models(tmp_path_factory):
    """The same for models that several tests share: they are loaded before a test has a home."""
    home = tmp_path_factory.mktemp("home-of-models")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CAG_HOME", str(home))
        patch.setenv("CAG_THREADS", "1")
        yield home


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory):
    """A Hugging Face directory with a random Llama and a ChatML template."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture
def corpus_dir(tmp_path):
    """Four short documents in two formats and two folders."""
    for name, text in TEXTS.items():
        path = tmp_path / "corpus" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "corpus"


@pytest.fixture
def tiny_engine(tiny_model_dir, tmp_path):
    """An engine over the tiny model with an empty store."""
    from cag.engine import Engine

    return Engine.load(str(tiny_model_dir), store=tmp_path / "store", device="cpu")
