"""What is found out about a cache and the model that is loaded before it is opened, beyond their fingerprints."""

import os
from dataclasses import replace

import pytest
from tokenizers import pre_tokenizers

from cag.engine import Engine
from cag.errors import CacheMismatch, ModelError
from tiny import write_tiny_model

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
SPACES_LOST = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), BYTES])


def read_otherwise(engine, model_dir, steps):
    """An engine whose tokenizer was made of the same files by another version of transformers."""
    other = Engine.load(str(model_dir), store=engine.store)
    other.model.tokenizer.backend_tokenizer.pre_tokenizer = steps
    assert other.model.fingerprints == engine.model.fingerprints
    return other


def forget_the_tokenizer(engine, name):
    """Let a cache be one that says nothing of what tokenized it."""
    manifest = engine.find(name)[1]
    layout = {key: value for key, value in manifest.layout.items() if key != "tokenizer"}
    engine.store.commit(name, replace(manifest, layout=layout))


@pytest.mark.parametrize("says", [True, False])
def test_a_prompt_of_other_tokens_is_refused(tiny_engine, tiny_model_dir, corpus_dir, says):
    tiny_engine.build([corpus_dir], name="here")
    if not says:
        forget_the_tokenizer(tiny_engine, "here")
    other = read_otherwise(tiny_engine, tiny_model_dir, SPACES_LOST)
    with pytest.raises(CacheMismatch, match="other tokens"):
        other.open("here")
    assert not other.store.backend.live_leases()
    other.update("here", [corpus_dir])
    other.open("here").close()
    with pytest.raises(CacheMismatch, match="other tokens"):
        tiny_engine.open("here")


def test_a_prompt_of_the_same_tokens_is_taken(tiny_engine, tiny_model_dir, corpus_dir):
    """By whatever tokenizer."""
    tiny_engine.build([corpus_dir], name="here")
    other = read_otherwise(tiny_engine, tiny_model_dir, pre_tokenizers.Sequence([BYTES]))
    with other.open("here") as prefix:
        assert prefix.ask("What?", max_tokens=2).usage.cached_tokens == len(prefix.token_ids)
    forget_the_tokenizer(tiny_engine, "here")
    tiny_engine.open("here").close()


def flip(path):
    content = bytearray(path.read_bytes())
    content[-2] ^= 0x40
    return bytes(content)


def test_weights_that_are_written_over_answer_nothing(tmp_path, corpus_dir):
    """Some of them are pages of their file: what is loaded is no model that anybody knows."""
    weights = write_tiny_model(tmp_path / "model") / "model.safetensors"
    engine = Engine.load(str(tmp_path / "model"), store=tmp_path / "store", dtype="float32")
    engine.build([corpus_dir], name="here")
    prefix = engine.open("here")
    os.utime(weights)
    engine.open("here").close()
    with weights.open("r+b") as stream:
        stream.write(flip(weights))
    for use in (
        prefix.session,
        lambda: engine.open("here"),
        lambda: engine.build([corpus_dir], name="x", system_text="Other."),
    ):
        with pytest.raises(ModelError, match="written over"):
            use()
    prefix.close()


def test_a_file_in_the_place_of_another_leaves_a_loaded_model_alone(tmp_path, corpus_dir):
    weights = write_tiny_model(tmp_path / "model") / "model.safetensors"
    engine = Engine.load(str(tmp_path / "model"), store=tmp_path / "store", dtype="float32")
    engine.build([corpus_dir], name="here")
    (tmp_path / "other").write_bytes(flip(weights))
    os.replace(tmp_path / "other", weights)
    engine.ask("here", "What?", max_tokens=2)
    with pytest.raises(CacheMismatch, match="model"):
        Engine.load(str(tmp_path / "model"), store=engine.store).open("here")
