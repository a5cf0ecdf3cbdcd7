"""Codecs chosen and refused by what they lose: auto, bounds, interruption, updates of lossy caches."""

import os
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from cag.building.builder import build_cache
from cag.building.ladder import DEFAULT_MAX_KL
from cag.building.options import BuildOptions
from cag.building.rungs import LADDER, basis_bytes
from cag.corpus import load_corpus
from cag.engine import Engine
from cag.errors import BuildInterrupted, FidelityMissed, UnsupportedModel, UsageError
from cag.prefill import BLOCK_TOKENS
from cag_store.errors import UnencodableArray
from tiny import own_weight, tiny_config, write_tiny_model

LOSSY = [codec["id"] for codec in LADDER]


@pytest.fixture
def corpus(tmp_path):
    """Six documents, about five chunks of byte tokens."""
    folder = tmp_path / "long"
    folder.mkdir()
    for number in range(6):
        lines = [f"Line {line} of part {number} says {line * 7 + number}." for line in range(12)]
        (folder / f"part{number}.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A home of bases for all tests of this file: the tiny model is calibrated once."""
    return tmp_path_factory.mktemp("bases-home")


@pytest.fixture
def engine(tiny_engine, bases, monkeypatch):
    monkeypatch.setenv("CAG_HOME", str(bases))
    return tiny_engine


def state_of(engine, name="a"):
    """What the name means, and every ref and manifest of the store."""
    root = engine.store.backend.root
    files = {path: path.read_bytes() for folder in ("refs", "manifests") for path in (root / folder).rglob("*.json")}
    return engine.find(name), files


def collect_garbage(engine):
    """As gc does it after the hour of grace."""
    assert engine.store.gc(grace_s=0.0).removed


def chunks_of(engine, name="a"):
    return engine.find(name)[1].chunks


def test_auto_takes_the_smallest_within_its_bound(engine, corpus):
    """Against every codec of the ladder built on its own."""
    named = {codec: engine.build([corpus], name=codec, codec=codec) for codec in ["lossless", *LOSSY, "transform"]}
    loss = sorted(report.fidelity.mean_kl for report in named.values())
    for max_kl in (0.0, *loss, 2 * loss[-1]):
        chosen = engine.build([corpus], name="a", codec="auto", max_kl=max_kl)
        within = {codec: report for codec, report in named.items() if report.fidelity.mean_kl <= max_kl}
        assert chosen.fidelity.mean_kl <= max_kl
        assert chosen.stored_bytes <= min(report.stored_bytes for report in within.values())
        assert chosen.codec["id"] in ("transform", "int4") or chosen.codec == named[chosen.codec["id"]].codec
        if chosen.codec == named[chosen.codec["id"]].codec:
            assert chosen.stored_bytes == named[chosen.codec["id"]].stored_bytes
            assert chosen.fidelity.mean_kl == named[chosen.codec["id"]].fidelity.mean_kl


def test_the_choice_is_explained_in_report_and_manifest(engine, corpus):
    report = engine.build([corpus], name="a", codec="auto")
    manifest = engine.find("a")[1]
    choice = report.codec_choice
    assert manifest.build["codec_choice"] == choice
    assert manifest.build["max_kl"] == choice["max_kl"] == report.max_kl == DEFAULT_MAX_KL
    assert choice["codec"] == report.codec == dict(manifest.codec)
    assert "\n" not in choice["reason"]
    assert choice["reason"].startswith(f"auto chose {report.codec['id']}")
    assert {"lossless", *LOSSY, "transform"} == {trial["codec"]["id"] for trial in choice["tried"]}
    (chosen,) = [trial for trial in choice["tried"] if trial["codec"] == report.codec]
    assert (chosen["stored_bytes"], chosen["mean_kl"]) == (manifest.stored_bytes, report.fidelity.mean_kl)
    assert report.search_s > 0
    with engine.open("a") as prefix:
        assert prefix.ask("Anything?", max_tokens=2).usage.cached_tokens == report.num_tokens


def test_int4_keeps_wide_keys_where_they_are_needed(engine, corpus):
    """With a bound between `int4` alone and all keys in 8 bits, named or searched; the second layer attends sharply."""
    attention = engine.model.network.model.layers[1].self_attn
    with torch.no_grad():
        for projection in (attention.q_proj, attention.k_proj):
            own_weight(projection).mul_(6)
    layers = list(range(len(engine.model.kv_shapes)))
    plain = engine.build([corpus], name="plain", codec="int4")
    wide = engine.build([corpus], name="wide", codec={"id": "int4", "wide_key_layers": layers})
    assert wide.fidelity.mean_kl < plain.fidelity.mean_kl
    bound = (wide.fidelity.mean_kl + plain.fidelity.mean_kl) / 2
    named = engine.build([corpus], name="named", codec="int4", max_kl=bound)
    assert named.codec["id"] == "int4"
    assert named.codec["wide_key_layers"] == [1]
    assert named.fidelity.mean_kl <= bound
    assert plain.stored_bytes < named.stored_bytes <= wide.stored_bytes
    with engine.open("named") as prefix:
        assert prefix.ask("Which line?").usage.cached_tokens == named.num_tokens
    updated = engine.update("named", [corpus])
    assert updated.codec == named.codec
    searched = engine.build([corpus], name="searched", codec="auto", max_kl=bound)
    assert searched.stored_bytes <= named.stored_bytes
    forced = engine.build([corpus], name="forced", codec="int4", max_kl=bound, force=True)
    assert forced.codec == plain.codec
    with pytest.raises(FidelityMissed, match="codec int4 has"):
        engine.build([corpus], name="none", codec="int4", max_kl=wide.fidelity.mean_kl / 100)


def test_a_small_cache_is_not_worth_a_basis(engine, tmp_path):
    (tmp_path / "one.txt").write_text("The old gate opens at seven in the morning.")
    report = engine.build([tmp_path / "one.txt"], name="a", codec="auto")
    ids = {trial["codec"]["id"] for trial in report.codec_choice["tried"]}
    worth = report.raw_bytes >= 4 * basis_bytes(engine.model, 6)
    assert ("transform" in ids) == worth


def test_a_short_text_is_judged_at_as_many_positions_as_any(engine, tmp_path):
    (tmp_path / "one.txt").write_text("The old gate opens at seven in the morning.")
    for codec in ("auto", "int8", "lossless"):
        report = engine.build([tmp_path / "one.txt"], name="a", codec=codec, max_kl=10.0)
        assert report.fidelity.num_probes >= 256
        assert not report.fidelity.warnings
        assert (codec == "auto") == bool(report.codec_choice and len(report.codec_choice["tried"]) > 1)


def test_a_few_words_stay_lossless_and_the_report_says_why(engine, corpus):
    first = engine.build([corpus / "part1.txt"], name="a", codec="auto", max_kl=10.0)
    assert first.codec["id"] != "lossless"
    (corpus / "part1.txt").write_text("x")
    updated = engine.update("a", [corpus / "part1.txt"])
    built = engine.build([corpus / "part1.txt"], name="b", codec="auto", max_kl=10.0)
    for report in (updated, built):
        assert report.codec["id"] == "lossless"
        assert [trial["codec"]["id"] for trial in report.codec_choice["tried"]] == ["lossless"]
        assert f"so short a text has {report.fidelity.num_probes}" in report.codec_choice["reason"]
        assert report.fidelity.num_probes < 256
        assert not report.fidelity.warnings


def test_a_named_codec_on_a_few_words_is_kept_with_a_warning(engine, tmp_path):
    (tmp_path / "one.txt").write_text("x")
    report = engine.build([tmp_path / "one.txt"], name="a", codec="int8", max_kl=10.0)
    assert report.codec["id"] == "int8"
    (warning,) = report.to_json()["warnings"]
    assert f"at {report.fidelity.num_probes} positions, not at 256 or more" in warning


def test_a_loss_that_was_measured_at_few_positions_is_measured_again(engine, tmp_path):
    """As caches of short texts have it that were built when these were asked less."""
    (tmp_path / "one.txt").write_text("The old gate opens at seven in the morning.")
    report = engine.build([tmp_path / "one.txt"], name="a", codec="auto", max_kl=10.0)
    manifest = engine.find("a")[1]
    engine.store.commit("a", replace(manifest, fidelity={**manifest.fidelity, "num_probes": 10}))
    collect_garbage(engine)
    assert engine.update("a", [tmp_path / "one.txt"]).fidelity == report.fidelity


@pytest.mark.parametrize("codec", [*LOSSY, "transform"])
def test_a_named_codec_over_its_bound_is_refused_and_the_store_is_as_it_was(engine, corpus, tmp_path, codec):
    (tmp_path / "old.txt").write_text("The old cache.")
    engine.build([tmp_path / "old.txt"], name="a")
    before = state_of(engine)
    with pytest.raises(FidelityMissed, match=codec) as caught:
        engine.build([corpus], name="a", codec=codec, max_kl=1e-12)
    assert state_of(engine) == before
    assert caught.value.facts["mean_kl"] > caught.value.facts["max_kl"] == 1e-12
    assert "--force" in caught.value.hint
    forced = engine.build([corpus], name="a", codec=codec, max_kl=1e-12, force=True)
    assert forced.fidelity.mean_kl == caught.value.facts["mean_kl"]
    assert engine.find("a")[1].build["forced"] is True
    assert engine.store.verify("a").ok


@pytest.mark.parametrize("codec", LOSSY)
def test_a_named_codec_that_cannot_hold_the_values_says_so(engine, corpus, codec):
    with torch.no_grad():
        own_weight(engine.model.network.model.layers[1].self_attn.k_proj, 0).mul_(1e38)
    with pytest.raises(UnencodableArray, match=f"'{codec}'.*use 'lossless'"):
        engine.build([corpus], name="a", codec=codec, max_kl=1.0)
    assert engine.store.names() == []
    assert engine.build([corpus], name="a").fidelity.method == "bits"


def test_a_loss_that_is_no_number_is_an_error(engine, corpus):
    with torch.no_grad():
        own_weight(engine.model.network.lm_head, 0).fill_(float("nan"))
    with pytest.raises(UnsupportedModel, match="not numbers"):
        engine.build([corpus], name="a", codec="int8")
    assert engine.store.names() == []


def test_a_named_codec_is_kept_where_lossless_is_smaller(tiny_model_dir, tmp_path):
    """Of so few tokens `int4` keeps most exact, in 16 bits each, and has scales besides."""
    engine = Engine.load(str(tiny_model_dir), store=tmp_path / "store", device="cpu", dtype="bfloat16")
    (tmp_path / "a.txt").write_text("It is so.")
    documents = load_corpus([tmp_path / "a.txt"]).documents
    options = BuildOptions(codec="int4", system_text="x", closing_text="x", max_kl=10.0)
    report = build_cache(engine.model, engine.store, "a", documents, options)
    assert report.codec["id"] == "int4"
    lossless = build_cache(engine.model, engine.store, "b", documents, replace(options, codec="lossless"))
    assert report.stored_bytes > lossless.stored_bytes


def test_a_bound_that_is_kept_is_no_matter(engine, corpus):
    assert engine.build([corpus], name="a", codec="lossless", max_kl=0.0).fidelity.mean_kl == 0
    free = engine.build([corpus], name="a", codec="int8")
    bound = engine.build([corpus], name="b", codec="int8", max_kl=free.fidelity.mean_kl)
    assert chunks_of(engine, "a") == chunks_of(engine, "b")
    assert free.max_kl is None
    assert bound.max_kl == free.fidelity.mean_kl


@pytest.mark.parametrize("max_kl", [-0.1, float("nan"), float("inf"), pytest.param(10**400, id="huge")])
def test_a_bound_is_a_number_from_zero_on(max_kl):
    with pytest.raises(UsageError, match="max_kl"):
        BuildOptions(codec="auto", max_kl=max_kl)


@pytest.mark.parametrize("stage, times", [("prefill", 3), ("encode", 1), ("encode", 8), ("measure", 2), ("commit", 1)])
def test_an_interrupted_search_leaves_the_store_as_it_was_and_resumes(engine, corpus, tmp_path, stage, times):
    (tmp_path / "old.txt").write_text("The old cache.")
    engine.build([tmp_path / "old.txt"], name="a")
    before, seen = state_of(engine), []

    def interrupt(progress):
        seen.append(progress.stage)
        if seen.count(stage) == times:
            raise KeyboardInterrupt

    with pytest.raises(BuildInterrupted):
        engine.build([corpus], name="a", codec="auto", on_progress=interrupt)
    assert state_of(engine) == before
    resumed = engine.build([corpus], name="a", codec="auto")
    computed = (times - 1) * BLOCK_TOKENS if stage == "prefill" else resumed.num_tokens
    assert resumed.reused_tokens == computed
    assert engine.store.verify("a").ok
    whole = engine.build([corpus], name="b", codec="auto")
    assert (chunks_of(engine, "a"), resumed.fidelity) == (chunks_of(engine, "b"), whole.fidelity)


@pytest.mark.parametrize("codec", ["int8", "transform"])
def test_an_updated_lossy_cache_equals_one_built_at_once(engine, tiny_model_dir, corpus, tmp_path, codec):
    """What is behind reused chunks is computed behind exact values, so no loss adds up."""
    engine.build([corpus], name="a", codec=codec)
    (corpus / "part9.txt").write_text("A late addition. " * 40)
    updated = engine.update("a", [corpus])
    assert updated.reused_tokens >= 4 * BLOCK_TOKENS
    assert updated.recomputed_tokens == 0
    other = Engine.load(str(tiny_model_dir), store=tmp_path / "other")
    at_once = other.build([corpus], name="a", codec=codec)
    assert chunks_of(engine) == chunks_of(other)
    assert updated.fidelity == at_once.fidelity


def test_a_lossy_cache_whose_exact_chunks_are_gone_is_computed_again_and_says_so(engine, corpus):
    first = engine.build([corpus], name="a", codec="int8")
    before = chunks_of(engine)
    collect_garbage(engine)
    (corpus / "part9.txt").write_text("A late addition. " * 40)
    updated = engine.update("a", [corpus])
    assert updated.reused_tokens == 0
    kept = first.num_tokens // BLOCK_TOKENS * BLOCK_TOKENS
    assert updated.recomputed_tokens == kept - BLOCK_TOKENS * (chunks_of(engine)[: kept // BLOCK_TOKENS] != before[:-1])
    assert engine.store.verify("a").ok


def test_an_unchanged_lossy_cache_needs_no_exact_chunks(engine, corpus):
    first = engine.build([corpus], name="a", codec="auto")
    collect_garbage(engine)
    old = engine.find("a")[1]
    again = engine.update("a", [corpus])
    new = engine.find("a")[1]
    assert (again.computed_tokens, again.reused_tokens) == (0, first.num_tokens)
    assert (new.chunks, new.fidelity, new.codec) == (old.chunks, old.fidelity, old.codec)
    assert new.build["codec_choice"] == old.build["codec_choice"]


def test_an_unchanged_cache_with_a_damaged_chunk_is_computed_again(engine, corpus):
    engine.build([corpus], name="a", codec="int8")
    collect_garbage(engine)
    path = next((engine.store.backend.root / "chunks").rglob(chunks_of(engine)[1].key))
    data = bytearray(path.read_bytes())
    data[-50] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    report = engine.update("a", [corpus])
    assert report.computed_tokens == report.num_tokens
    assert engine.store.verify("a").ok


def test_an_update_keeps_a_searched_codec_within_its_bound_and_searches_again_beyond(engine, corpus):
    first = engine.build([corpus], name="a", codec="auto", max_kl=10.0)
    (corpus / "part9.txt").write_text("A late addition. " * 40)
    kept = engine.update("a", [corpus])
    assert kept.codec == first.codec
    assert "the codec of the cache before" in kept.codec_choice["reason"]
    assert len(kept.codec_choice["tried"]) == 1
    manifest = engine.find("a")[1]
    tight = manifest.build | {"max_kl": 0.0}
    engine.store.commit("a", replace(manifest, build=tight))
    (corpus / "part9.txt").write_text("Another addition. " * 40)
    searched = engine.update("a", [corpus])
    assert searched.codec["id"] == "lossless"
    assert searched.fidelity.mean_kl == 0 == searched.max_kl


def test_an_update_over_a_named_codecs_bound_is_refused_unless_forced(engine, corpus):
    engine.build([corpus], name="a", codec="int8", max_kl=1e-12, force=True)
    before = state_of(engine)
    (corpus / "part9.txt").write_text("A late addition. " * 40)
    with pytest.raises(FidelityMissed):
        engine.update("a", [corpus])
    assert state_of(engine) == before
    assert engine.update("a", [corpus], force=True).max_kl == 1e-12


def test_an_update_over_the_bound_widens_keys_as_a_build_does(engine, corpus):
    """`int4` by its name: what it was within the bound of a text is not what it is for good."""
    attention = engine.model.network.model.layers[1].self_attn
    with torch.no_grad():
        for projection in (attention.q_proj, attention.k_proj):
            own_weight(projection).mul_(6)
    first = engine.build([corpus], name="a", codec="int4", max_kl=10.0)
    (corpus / "part9.txt").write_text("A late addition. " * 40)
    kl = {}
    for layers in ((), (1,), (0, 1)):
        codec = first.codec | {"wide_key_layers": list(layers)}
        kl[layers] = engine.build([corpus], name="tried", codec=codec).fidelity.mean_kl
    manifest, bound = engine.find("a")[1], (kl[()] + kl[(1,)]) / 2
    assert kl[(1,)] < bound < kl[()]
    engine.store.commit("a", replace(manifest, build=manifest.build | {"max_kl": bound}))
    updated = engine.update("a", [corpus])
    assert (updated.codec["wide_key_layers"], updated.fidelity.mean_kl) == ([1], kl[(1,)])
    at_once = engine.build([corpus], name="b", codec="int4", max_kl=bound)
    assert (at_once.codec, chunks_of(engine, "b")) == (updated.codec, chunks_of(engine))
    collect_garbage(engine)
    assert engine.update("a", [corpus]).computed_tokens == 0  # what was found is kept, not searched again
    written_out = engine.find("tried")[1]
    engine.store.commit("tried", replace(written_out, build=written_out.build | {"max_kl": kl[(0, 1)] / 100}))
    with pytest.raises(FidelityMissed, match="8-bit keys in layers 0, 1"):
        engine.update("tried", [corpus])


def test_an_update_under_another_model_takes_the_basis_of_that_one(engine, corpus, tmp_path):
    before = engine.build([corpus], name="a", codec="transform")
    other = write_tiny_model(tmp_path / "other", config=tiny_config(num_hidden_layers=1))
    other = Engine.load(str(other), store=engine.store, device="cpu")
    updated = other.update("a", [corpus])
    assert updated.codec["id"] == "transform"
    assert updated.codec["basis"] != before.codec["basis"]
    assert other.update("a", [corpus]).codec == updated.codec
    with other.open("a") as prefix:
        assert prefix.ask("Which line?", max_tokens=2).usage.cached_tokens == updated.num_tokens


def test_trials_leave_nothing_behind_but_chunks_for_gc(engine, corpus):
    engine.build([corpus], name="a", codec="auto")
    hours_ago = time.time() - 7200
    for path in (engine.store.backend.root / "chunks").rglob("*"):
        os.utime(path, (hours_ago, hours_ago))
    engine.store.gc()
    left = {path.name for path in (engine.store.backend.root / "chunks").rglob("*") if path.is_file()}
    assert left == {chunk.key for chunk in chunks_of(engine)}
    assert engine.store.verify("a").ok


def test_what_is_measured_is_what_the_store_gives_back(engine, corpus):
    report = engine.build([corpus], name="a", codec="int8")
    exact = engine.build([corpus], name="exact")
    assert exact.fidelity.method == "bits"
    assert exact.fidelity.num_probes == report.fidelity.num_probes >= 256
    with engine.open("a") as coded, engine.open("exact") as prefix:
        errors = [
            np.abs(left.float().numpy() - right.float().numpy()).max()
            for layer in range(2)
            for left, right in zip(coded.keys_values(layer), prefix.keys_values(layer), strict=True)
        ]
    assert 0 < max(errors) < 0.2
    assert report.fidelity.mean_kl > 0
