"""Caches of models with recurrent layers, from documents to answers: snapshots are built, found again, and proven."""

import json
from dataclasses import replace

import pytest
import torch
from hybrids import FAMILIES
from transformers import AutoModelForCausalLM

from cag.building import rungs
from cag.calibration import CalibrationOptions, calibrate
from cag.describe import describe_cache
from cag.engine import Engine
from cag.errors import BuildInterrupted, CacheMismatch
from cag.forward.state import Tail
from cag.model import LanguageModel
from cag_store import StateArray, Store
from cag_store.errors import CorruptEntry, EntryNotFound
from tiny import write_tiny_model

QUESTIONS = ("How many bar?", "And the other one?")


def model_of(family, directory):
    model = LanguageModel.load(write_tiny_model(directory, config=FAMILIES[family]()), model_id=family)
    model.stop_ids = frozenset()
    return model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_of("qwen3_5_text", tmp_path_factory.mktemp("model"))


@pytest.fixture
def documents(tmp_path):
    folder = tmp_path / "documents"
    folder.mkdir()
    for name in "abc":
        write(folder, name)
    return folder


def write(folder, name, bar=7):
    lines = [f"The {name} pump number {i} runs at {i * bar} bar." for i in range(10)]
    (folder / f"{name}.txt").write_text("\n".join(lines))


@pytest.fixture
def engine(model, tmp_path):
    return Engine(model, Store.open(tmp_path / "store"))


def answers(engine, name="pumps", questions=QUESTIONS):
    """Of one session, turn by turn, with all tokens that were read before each."""
    found = []
    with engine.open(name) as prefix:
        session, read = prefix.session(), prefix.token_ids.tolist()
        for question in questions:
            stream = session.stream(question, max_tokens=8)
            suffix = list(stream._generation.suffix_ids)
            answer = list(session.ask(question, max_tokens=8).token_ids)
            found.append((read + suffix, answer))
            read = read + suffix + answer[: len(answer) - len(session._unread)]
    return found


def snapshots(store, name="pumps"):
    return store.resolve(name)[1].states.snapshots


def all_bytes(store, name="pumps"):
    manifest = store.resolve(name)[1]
    return {path: store.backend.get(path, 1 << 30) for path in manifest.chunk_sizes}


@pytest.mark.parametrize("family", ["qwen3_5_text", "qwen3_next", "lfm2", "granitemoehybrid", "falcon_h1"])
def test_answers_are_those_of_plain_transformers(family, tmp_path, documents):
    engine = Engine(model_of(family, tmp_path / "model"), Store.open(tmp_path / "store"))
    report = engine.build([documents], name="pumps")
    assert report.fidelity.method == "bits"
    engine.store.verify("pumps").raise_first()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32, attn_implementation="eager")
    for before, answer in answers(engine):
        with torch.inference_mode():
            logits = plain.eval()(input_ids=torch.tensor([before + answer])).logits[0]
        assert answer == logits[len(before) - 1 : -1].argmax(-1).tolist()


def test_an_update_goes_on_behind_the_last_snapshot_before_the_change(engine, documents, tmp_path):
    first = engine.build([documents], name="pumps")
    places = [entry.num_tokens for entry in snapshots(engine.store)]
    assert places == [*range(512, first.num_tokens, 512), first.num_tokens]
    write(documents, "c", bar=9)
    write(documents, "d")
    report = engine.update("pumps", [documents])
    start = next(entry.start for entry in engine.find("pumps")[1].documents if entry.doc_id.startswith("c"))
    assert report.reused_tokens == max(place for place in places if place <= start)
    anew = Engine(engine.model, Store.open(tmp_path / "other"))
    anew.build([documents], name="pumps")
    assert all_bytes(engine.store) == all_bytes(anew.store)
    again = engine.update("pumps", [documents])
    assert again.computed_tokens == 0


def test_a_build_that_was_killed_goes_on_behind_a_snapshot(engine, documents):
    def interrupt(progress):
        if progress.stage == "prefill" and progress.done_tokens >= 1024:
            raise KeyboardInterrupt

    with pytest.raises(BuildInterrupted):
        engine.build([documents], name="pumps", on_progress=interrupt)
    report = engine.build([documents], name="pumps")
    assert report.reused_tokens == 1024


def test_chunks_without_their_snapshots_are_read_again(engine, documents, monkeypatch):
    """Also where these chunks have other last bits than are computed now: the store's are the cache's."""
    store_rows = Tail.store
    with monkeypatch.context() as patch:
        patch.setattr(
            Tail, "store", lambda self, layer, at, keys, values: store_rows(self, layer, at, keys + 1e-6, values)
        )
        engine.build([documents], name="pumps")
    chunks = [chunk.key for chunk in engine.find("pumps")[1].chunks]
    for entry in snapshots(engine.store)[1:]:
        engine.store.backend.delete(entry.path)
    report = engine.build([documents], name="pumps")
    assert report.reused_tokens == 512 and [chunk.key for chunk in engine.find("pumps")[1].chunks] == chunks
    engine.store.verify("pumps").raise_first()
    assert answers(engine)


@pytest.mark.parametrize(
    "options",
    [{"codec": "int8"}, {"codec": "auto", "max_kl": 0.5}, {"codec": "int4", "max_kl": 0.004}],
    ids=["int8", "auto", "int4 by layers"],
)
def test_lossy_caches_keep_the_last_snapshot(engine, documents, options, monkeypatch):
    monkeypatch.setattr(rungs, "_WORTH", 1 << 60)  # no basis is made for so little
    report = engine.build([documents], name="pumps", force=True, **options)
    assert report.fidelity.method == "probes" and 0 < report.fidelity.mean_kl < 0.5
    (last,) = snapshots(engine.store)
    assert last.num_tokens == report.num_tokens
    engine.store.gc(grace_s=0)
    engine.store.verify("pumps").raise_first()
    assert answers(engine)
    assert engine.build([documents], name="pumps", force=True, **options).num_tokens == report.num_tokens


def test_sizes_count_snapshots(engine, documents):
    report = engine.build([documents], name="pumps")
    manifest, per_token = engine.find("pumps")[1], engine.model.kv_bytes_per_token
    size = engine.model.recurrent.num_bytes
    assert manifest.raw_bytes == report.num_tokens * per_token + size * len(manifest.states.snapshots)
    assert manifest.stored_bytes == sum(manifest.chunk_sizes.values()) + manifest.blob_bytes
    with engine.open("pumps") as prefix:
        assert prefix.resident.num_bytes >= report.num_tokens * per_token + size


def test_copies_and_gc_keep_snapshots(engine, documents, tmp_path):
    engine.build([documents], name="pumps")
    engine.store.gc(grace_s=0)
    there = Engine(engine.model, Store.open(tmp_path / "there"))
    copy = there.import_cache(engine.store, "pumps")
    assert copy.copied_bytes == engine.find("pumps")[1].stored_bytes
    there.store.verify("pumps").raise_first()
    assert answers(there) == answers(engine)
    assert there.import_cache(engine.store, "pumps").copied_bytes == 0
    engine.store.remove("pumps")
    engine.store.gc(grace_s=0)
    assert list(engine.store.backend.list("chunks")) == []


class TestHostile:
    """Whatever is missing, damaged or foreign is an error of its kind."""

    @pytest.fixture
    def built(self, engine, documents):
        engine.build([documents], name="pumps")
        return engine

    @pytest.fixture
    def last(self, built):
        return snapshots(built.store)[-1]

    def test_missing(self, built, last):
        built.store.backend.delete(last.path)
        with pytest.raises(EntryNotFound):
            built.open("pumps")
        assert not built.store.verify("pumps").ok

    @pytest.mark.parametrize("place", [0, 9, 400, -1])
    def test_damaged(self, built, last, place):
        data = bytearray(built.store.backend.get(last.path, 1 << 30))
        data[place] ^= 1
        built.store.backend.replace(last.path, bytes(data))
        with pytest.raises(CorruptEntry):
            built.open("pumps")
        (problem,) = built.store.verify("pumps").problems
        assert isinstance(problem, CorruptEntry)
        with pytest.raises(CorruptEntry):
            Engine(built.model, Store.in_memory()).import_cache(built.store, "pumps")

    def test_damage_is_mended_by_the_next_build(self, built, last, documents):
        built.store.backend.replace(last.path, b"x" * last.stored_bytes)
        report = built.build([documents], name="pumps")
        assert 0 < report.computed_tokens < 512
        built.store.verify("pumps").raise_first()

    def test_of_another_text(self, built, documents):
        text = (documents / "a.txt").read_text()
        (documents / "a.txt").write_text(text.replace("bar", "rpm"))  # as many tokens
        built.build([documents], name="other")
        other = built.find("other")[1].states
        self._commit(built, replace(built.find("pumps")[1], states=other))
        with pytest.raises(CorruptEntry, match="another text"):
            built.open("forged")
        assert not built.store.verify("forged").ok

    def test_of_other_shapes(self, built, last):
        stored = {
            name: StateArray(dtype, array[..., :1].copy()) for name, (dtype, array) in built.store.states(last).items()
        }
        built.store.backend.delete(last.path)
        entry = built.store.put_states(last.chunk, last.num_tokens, stored)
        manifest = built.find("pumps")[1]
        states = replace(manifest.states, snapshots=(*manifest.states.snapshots[:-1], entry))
        self._commit(built, replace(manifest, states=states))
        with pytest.raises(CacheMismatch) as caught:
            built.open("forged")
        assert caught.value.facts["part"] == "recurrent layers"

    def test_none(self, built):
        self._commit(built, replace(built.find("pumps")[1], states=None))
        with pytest.raises(CacheMismatch, match="recurrent"):
            built.open("forged")

    def test_for_a_model_without_recurrent_layers(self, built, monkeypatch):
        monkeypatch.setattr(built.model, "recurrent", None)
        with pytest.raises(CacheMismatch, match="recurrent"):
            built.open("pumps")

    def _commit(self, engine, manifest):
        json.loads(manifest.to_bytes())
        engine.store.commit("forged", manifest)


def test_a_basis_of_attention_layers(engine, documents):
    """Codec `transform` sees attention layers only, and gradients go through the others."""
    options = CalibrationOptions(
        joint_layers=1, num_windows=3, gradient_windows=2, window_tokens=96, least_step=-1280, step=-1280
    )
    with engine.store.build_lease():
        codec = calibrate(engine.model, engine.store, options=options).codec
        report = engine.build([documents], name="pumps", codec=codec)
    assert report.fidelity.mean_kl < 0.1
    assert answers(engine)


def test_what_a_session_takes_is_shown(engine, documents):
    engine.build([documents], name="pumps")
    shown = describe_cache(*engine.find("pumps"))
    assert shown["state_bytes"] == engine.model.recurrent.num_bytes > 0
