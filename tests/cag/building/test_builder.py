"""Builds: resume, reuse, interruption, and every way a cache must not be answered from."""

import errno
import json
import shutil
from dataclasses import replace
from datetime import datetime
from functools import partial

import numpy as np
import pytest
from transformers.utils import chat_template_utils

import cag_store
from cag import prompt
from cag.building.builder import BuildOptions, build_cache
from cag.building.requirements import RESERVED_TOKENS
from cag.corpus import CorpusReport, Document, load_documents
from cag.corpus.document import text_sha256
from cag.engine import Engine
from cag.errors import BuildInterrupted, CacheMismatch, CacheNotFound, CorpusTooLarge, EmptyCorpus, UsageError
from cag.prefill import BLOCK_TOKENS
from cag_store.paths import blob_path
from tiny import CHATML, tiny_tokenizer, write_tiny_model


@pytest.fixture
def long_corpus(tmp_path):
    """Six documents, about five chunks of byte tokens."""
    folder = tmp_path / "long"
    folder.mkdir()
    for number in range(6):
        lines = [f"Line {line} of part {number} says {line * 7 + number}." for line in range(12)]
        (folder / f"part{number}.txt").write_text("\n".join(lines))
    return folder


def stored_objects(store_dir):
    """Every file of a store below chunks, manifests and refs, with its bytes."""
    return {
        path.relative_to(store_dir): path.read_bytes()
        for folder in ("chunks", "manifests", "refs")
        for path in (store_dir / folder).rglob("*")
        if path.is_file()
    }


def test_a_second_build_computes_nothing_and_gives_the_same_digest_of_chunks(tiny_engine, long_corpus):
    first = tiny_engine.build([long_corpus], name="a")
    second = tiny_engine.build([long_corpus], name="b")
    assert first.computed_tokens == first.num_tokens == second.reused_tokens
    assert second.computed_tokens == 0
    chunks = [tiny_engine.find(name)[1].chunks for name in "ab"]
    assert chunks[0] == chunks[1]


def test_an_update_of_nothing_reads_each_text_once_and_writes_none(tiny_engine, long_corpus, monkeypatch):
    tiny_engine.build([long_corpus], name="a")
    backend, calls = tiny_engine.store.backend, []
    for method in ("get", "put_if_absent"):
        original = getattr(backend, method)

        def counted(path, *rest, method=method, original=original):
            calls.append((method, path))
            return original(path, *rest)

        monkeypatch.setattr(backend, method, counted)
    tiny_engine.update("a", [long_corpus])
    texts = [blob_path(document.sha256) for document in tiny_engine.find("a")[1].documents]
    assert sorted(path for method, path in calls if path in texts) == sorted(texts)
    assert {method for method, path in calls if path in texts} == {"get"}


@pytest.mark.parametrize("codec", ["lossless", "int8"])
def test_an_update_of_nothing_opens_each_chunk_once(tiny_engine, long_corpus, monkeypatch, codec):
    first = tiny_engine.build([long_corpus], name="a", codec=codec)
    opened, original = [], tiny_engine.store.backend.get_start

    def counted(path, length):
        opened.append(path)
        return original(path, length)

    monkeypatch.setattr(tiny_engine.store.backend, "get_start", counted)
    before = tiny_engine.find("a")[1]
    again = tiny_engine.update("a", [long_corpus])
    assert opened == list(before.chunk_sizes)
    after = tiny_engine.find("a")[1]
    assert (after.chunks, after.fidelity, after.codec) == (before.chunks, before.fidelity, before.codec)
    assert (again.reused_tokens, again.computed_tokens, again.recomputed_tokens) == (first.num_tokens, 0, 0)


def test_an_appended_document_reuses_the_chunks_before_it(tiny_engine, long_corpus):
    before = tiny_engine.build([long_corpus], name="a")
    (long_corpus / "part9.txt").write_text("A late addition.")
    after = tiny_engine.update("a", [long_corpus])
    assert after.reused_tokens >= before.num_tokens - 2 * BLOCK_TOKENS
    assert after.reused_tokens % BLOCK_TOKENS == 0
    assert after.digest != before.digest


def test_update_keeps_the_order_of_known_documents_and_appends_new_ones(tiny_engine, long_corpus):
    tiny_engine.build([long_corpus], name="a")
    (long_corpus / "apart.txt").write_text("Sorts before all others.")
    report = tiny_engine.update("a", [long_corpus])
    ids = [entry.doc_id for entry in tiny_engine.find("a")[1].documents]
    assert ids == [*(f"part{number}.txt" for number in range(6)), "apart.txt"]
    assert report.reused_tokens > 0
    (long_corpus / "part3.txt").write_text("Changed.")
    changed = tiny_engine.update("a", [long_corpus])
    assert 0 < changed.reused_tokens < report.num_tokens / 2


def test_update_keeps_known_documents_whose_copies_and_namesakes_come_first(tiny_engine, tmp_path):
    english, german = tmp_path / "en", tmp_path / "de"
    for folder, name in ((english, "index.md"), (german, "faq.md"), (german, "index2.md")):
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(f"All of {name}. " * 30)
    before = tiny_engine.build([english, german], name="a")
    (english / "faq.md").write_text("Other questions.")
    (english / "a-copy.md").write_text((german / "index2.md").read_text())
    report = tiny_engine.update("a", [english, german])
    assert (report.added, report.changed, report.removed) == (("en/faq.md",), (), ())
    assert report.reused_tokens >= before.num_tokens - 2 * BLOCK_TOKENS


def test_update_says_which_titles_are_others(tiny_engine, tmp_path):
    file = tmp_path / "docs.jsonl"
    for title in ("Old", "New"):
        lines = [{"doc_id": "1", "title": "Stays", "text": "one"}, {"doc_id": "2", "title": title, "text": "two"}]
        file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        report = tiny_engine.build([file], name="a") if title == "Old" else tiny_engine.update("a", [file])
    assert report.changed == ("2",)


def test_documents_of_one_id_are_refused_before_anything_is_computed(tiny_engine, long_corpus):
    documents = load_documents(long_corpus)
    with pytest.raises(UsageError, match="2 documents have the id"):
        build_cache(tiny_engine.model, tiny_engine.store, "a", [*documents, documents[0]], BuildOptions())


def test_a_corpus_of_wrong_digests_is_answered_from(tiny_engine, long_corpus):
    documents = [replace(document, sha256="0" * 64) for document in load_documents(long_corpus)]
    build_cache(tiny_engine.model, tiny_engine.store, "a", documents, BuildOptions())
    with tiny_engine.open("a") as prefix:
        assert prefix.ask("Line?", max_tokens=2).usage.cached_tokens


def test_an_updated_cache_equals_one_built_at_once(tiny_engine, tiny_model_dir, long_corpus, tmp_path):
    """Reused chunks and chunks computed behind them give the very bytes of a build without reuse."""
    late = long_corpus / "part9.txt"
    tiny_engine.build([long_corpus], name="a")
    late.write_text("A late addition.")
    tiny_engine.update("a", [long_corpus])
    other = Engine.load(str(tiny_model_dir), store=tmp_path / "other")
    other.build([long_corpus], name="a")
    with tiny_engine.open("a") as updated, other.open("a") as whole:
        assert updated.manifest.chunks == whole.manifest.chunks
        for layer in range(2):
            for left, right in zip(updated.keys_values(layer), whole.keys_values(layer), strict=True):
                assert np.array_equal(left.numpy(), right.numpy())


@pytest.mark.parametrize("blocks_before", [0, 1, 3])
def test_an_interrupted_build_leaves_the_store_as_it_was_and_resumes(tiny_engine, long_corpus, tmp_path, blocks_before):
    small = tmp_path / "small"
    small.mkdir()
    (small / "one.txt").write_text("The old cache.")
    tiny_engine.build([small], name="a")
    old = tiny_engine.find("a")

    def interrupt(progress):
        if progress.stage == "prefill" and progress.done_tokens >= blocks_before * BLOCK_TOKENS:
            raise KeyboardInterrupt

    with pytest.raises(BuildInterrupted, match="interrupted"):
        tiny_engine.build([long_corpus], name="a", on_progress=interrupt)
    assert tiny_engine.find("a") == old
    resumed = tiny_engine.build([long_corpus], name="a")
    assert resumed.reused_tokens == blocks_before * BLOCK_TOKENS
    assert tiny_engine.store.verify("a").ok


@pytest.mark.parametrize("stage", ["prefill", "measure", "commit"])
def test_a_full_disk_is_a_typed_error_and_leaves_the_name_alone(
    tiny_engine, long_corpus, corpus_dir, stage, monkeypatch
):
    tiny_engine.build([corpus_dir], name="a")
    old = tiny_engine.find("a")
    import cag_store.backends.local as local

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    def fill_the_disk(progress):
        if progress.stage == stage:
            monkeypatch.setattr(local.os, "fsync", full)

    with pytest.raises(cag_store.errors.StoreFull, match="space"):
        tiny_engine.build([long_corpus], name="a", on_progress=fill_the_disk)
    monkeypatch.undo()
    assert tiny_engine.find("a") == old
    assert tiny_engine.store.verify("a").ok


def test_a_damaged_chunk_is_computed_again_by_the_next_build(tiny_engine, long_corpus, tmp_path):
    tiny_engine.build([long_corpus], name="a")
    chunk = tiny_engine.find("a")[1].chunks[1]
    path = next((tmp_path / "store" / "chunks").rglob(chunk.key))
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    assert not tiny_engine.store.verify("a").ok
    with tiny_engine.open("a") as prefix, pytest.raises(cag_store.errors.CorruptEntry):
        prefix.ask("Anything?", max_tokens=1)
    report = tiny_engine.build([long_corpus], name="a")
    assert report.reused_tokens == chunk.start
    assert tiny_engine.store.verify("a").ok


def test_int8_states_its_measured_loss(tiny_engine, long_corpus):
    exact = tiny_engine.build([long_corpus], name="exact")
    coded = tiny_engine.build([long_corpus], name="coded", codec="int8")
    assert exact.fidelity.mean_kl == 0 == exact.fidelity.p95_kl
    assert exact.fidelity.top1 == 1
    assert coded.fidelity.num_probes == exact.fidelity.num_probes >= 256
    assert 0 < coded.fidelity.mean_kl < 0.1
    assert coded.stored_bytes < exact.stored_bytes
    manifest = tiny_engine.find("coded")[1]
    assert manifest.fidelity == coded.fidelity.to_json()
    with tiny_engine.open("coded") as prefix:
        assert prefix.ask("Anything?", max_tokens=4).usage.cached_tokens == coded.num_tokens


def other_engine(tmp_path, store, **changes):
    """The same random weights in a changed directory, on the same store."""
    directory = write_tiny_model(tmp_path / "changed", **changes)
    return Engine.load(str(directory), store=store)


@pytest.mark.parametrize(
    "part, changes",
    [("model", {"seed": 1}), ("chat template", {"chat_template": CHATML.replace("assistant\n", "assistant:\n")})],
)
def test_a_cache_of_another_model_or_template_is_refused(part, changes, tiny_engine, corpus_dir, tmp_path):
    tiny_engine.build([corpus_dir], name="a")
    other = other_engine(tmp_path, tiny_engine.store, **changes)
    with pytest.raises(CacheMismatch, match=part) as caught:
        other.open("a")
    assert caught.value.facts["part"] == part


def test_a_cache_of_another_tokenizer_is_refused(tiny_engine, tiny_model_dir, corpus_dir, tmp_path):
    tiny_engine.build([corpus_dir], name="a")
    directory = tmp_path / "changed"
    shutil.copytree(tiny_model_dir, directory)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["gate"])
    tokenizer.save_pretrained(directory)
    with pytest.raises(CacheMismatch, match="tokenizer"):
        Engine.load(str(directory), store=tiny_engine.store).open("a")


def test_a_cache_of_another_adapter_is_refused(tiny_engine, tiny_model_dir, corpus_dir, tmp_path):
    peft = pytest.importorskip("peft")
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    network = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    adapted = peft.get_peft_model(network, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    tiny_engine.build([corpus_dir], name="plain")
    with_adapter = Engine.load(str(tiny_model_dir), store=tiny_engine.store, adapter=tmp_path / "adapter")
    with pytest.raises(CacheMismatch, match="adapter"):
        with_adapter.open("plain")
    report = with_adapter.build([corpus_dir], name="adapted")
    assert report.reused_tokens == 0
    with pytest.raises(CacheMismatch, match="adapter"):
        tiny_engine.open("adapted")


def test_weights_changed_in_place_make_the_cache_foreign(tiny_model_dir, corpus_dir, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(tiny_model_dir, directory)
    engine = Engine.load(str(directory), store=tmp_path / "store")
    engine.build([corpus_dir], name="a")
    weights = directory / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CacheMismatch, match="model"):
        Engine.load(str(directory), store=tmp_path / "store").open("a")


def test_unknown_names_and_empty_corpora(tiny_engine, corpus_dir, tmp_path):
    with pytest.raises(CacheNotFound, match="nothing"):
        tiny_engine.open("nothing")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(EmptyCorpus):
        tiny_engine.build([empty], name="a")
    tiny_engine.build([corpus_dir], name="old")
    for build in (partial(tiny_engine.build, name="a"), partial(tiny_engine.update, "old")):
        with pytest.raises(EmptyCorpus):
            build(CorpusReport((), (), (), ()))
    with pytest.raises(cag_store.errors.InvalidName):
        tiny_engine.build([empty], name="a/b")


@pytest.mark.parametrize("ttl_s", [0, -1, float("nan"), float("inf"), 1e30])
def test_an_expiry_that_is_none_is_refused_before_anything_is_computed(tiny_engine, corpus_dir, ttl_s):
    with pytest.raises(UsageError, match="ttl_s"):
        tiny_engine.build([corpus_dir], name="a", ttl_s=ttl_s, on_progress=pytest.fail)


def test_a_corpus_beyond_the_window_says_by_how_much(tiny_engine, tmp_path):
    (tmp_path / "huge.txt").write_text("word " * 2000)
    with pytest.raises(CorpusTooLarge) as caught:
        tiny_engine.build([tmp_path / "huge.txt"], name="a")
    over = caught.value.facts["num_tokens"] - (8192 - RESERVED_TOKENS)
    assert f"{over} more than fit" in str(caught.value)
    assert "several caches" in caught.value.hint


@pytest.mark.parametrize("texts", [["word " * 2_000_000], ["word " * 2000] * 1000], ids=["one", "many"])
def test_a_corpus_far_beyond_the_window_is_not_read_to_its_end(tiny_engine, monkeypatch, texts):
    read = []
    tokenize = prompt.encode
    monkeypatch.setattr(prompt, "encode", lambda *args, **kind: read.append(len(args[1])) or tokenize(*args, **kind))
    documents = [
        Document(str(number), "Title", "/d", f"{number} {text}", text_sha256(text)) for number, text in enumerate(texts)
    ]
    with pytest.raises(CorpusTooLarge, match="more than 32768 tokens, many more than fit") as caught:
        build_cache(tiny_engine.model, tiny_engine.store, "a", documents, BuildOptions())
    assert caught.value.facts["num_tokens"] == 4 * 8192
    assert sum(read) < 20 * caught.value.facts["num_tokens"]


def test_system_text_is_part_of_the_prefix_and_kept_by_update(tiny_engine, corpus_dir):
    tiny_engine.build([corpus_dir], name="a", system_text="Answer like a pirate.")
    tiny_engine.update("a", [corpus_dir])
    with tiny_engine.open("a") as prefix:
        text = tiny_engine.model.tokenizer.decode(prefix.token_ids.tolist())
    assert "Answer like a pirate." in text


def test_the_manifest_says_what_a_user_must_know(tiny_engine, corpus_dir):
    documents = load_documents([corpus_dir])
    report = build_cache(tiny_engine.model, tiny_engine.store, "a", documents, BuildOptions())
    manifest = tiny_engine.find("a")[1]
    assert [entry.doc_id for entry in manifest.documents] == [document.doc_id for document in documents]
    assert manifest.num_tokens == report.num_tokens == manifest.chunks[-1].start + manifest.chunks[-1].num_tokens
    assert manifest.raw_bytes == report.num_tokens * tiny_engine.model.kv_bytes_per_token
    assert manifest.versions["torch"]
    json.dumps(report.to_json())


def test_a_codec_nobody_knows_is_refused_before_anything_is_computed(tiny_engine, corpus_dir):
    with pytest.raises(cag_store.errors.UnknownCodec, match="lossless"):
        tiny_engine.build([corpus_dir], name="a", codec="zip")
    with pytest.raises((cag_store.errors.UnknownCodec, UsageError)):
        tiny_engine.build([corpus_dir], name="a", codec={"id": "int8", "nonsense": 1})


@pytest.mark.parametrize(
    ("codec", "error"),
    [
        ({"id": "int4", "wide_key_layers": [0, 2]}, UsageError),
        ({"id": "transform", "basis": "ab" * 32, "joint_layers": 2, "step": 0}, cag_store.errors.EntryNotFound),
    ],
)
def test_a_codec_that_cannot_be_this_models_is_refused_before_anything_is_computed(
    tiny_engine, corpus_dir, monkeypatch, codec, error
):
    monkeypatch.setattr("cag.building.chunks.prefill", lambda *_, **__: pytest.fail("computed"))
    with pytest.raises(error):
        tiny_engine.build([corpus_dir], name="a", codec=codec)


def test_an_update_keeps_the_day_of_the_first_build(tmp_path, corpus_dir, monkeypatch):
    """Some templates name the day, as Llama 3.2's and gpt-oss's do: then nothing of yesterday's could be used."""
    dated = "{{ 'Today: ' + strftime_now('%d %b %Y') + '\n' }}" + CHATML
    directory = write_tiny_model(tmp_path / "model", chat_template=dated)

    def engine_of(day):
        class Today(datetime):
            @classmethod
            def now(cls, tz=None):
                return datetime(2026, 11, day, tzinfo=tz)

        monkeypatch.setattr(chat_template_utils, "datetime", Today)
        return Engine.load(str(directory), store=tmp_path / "store", device="cpu")

    engine = engine_of(1)
    first = engine.build([corpus_dir], name="gates")
    assert "01 Nov 2026" in engine.model.template.before
    engine = engine_of(2)
    assert "02 Nov 2026" in engine.model.template.before
    with engine.open("gates") as prefix:
        assert "01 Nov 2026" in prefix.template.before
        assert prefix.ask("Who?", max_tokens=2).usage.cached_tokens == first.num_tokens
    (corpus_dir / "zz.md").write_text("# More\n\nThe gamma door is new.\n")
    report = engine.update("gates", [corpus_dir])
    assert report.reused_tokens > 0
    assert engine.build([corpus_dir], name="gates").reused_tokens == 0  # a build of its own has its own day
