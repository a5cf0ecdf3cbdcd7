"""Layers with windows hold the end of a prefix only: answers are those behind all of it, and inspection sees it."""

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, Gemma3TextConfig, MistralConfig

from cag.calibration import CalibrationOptions, calibrate
from cag.engine import Engine
from cag.forward.batch import BatchState, attend_on_device
from cag.forward.branches import BranchedState
from cag.forward.state import AttentionRule
from cag.generation.generate import SamplingOptions
from cag.model import LanguageModel
from cag.prompt import question_ids
from cag.residency.buffers import CodedBuffers, HostBuffers, storage_view
from cag.residency.host_copies import HostCopies
from cag.residency.load_plan import plan_load
from cag.residency.resident import ResidentPrefix
from cag.server.caches import ResidentCaches
from cag.server.tenants import OPERATOR, CacheKey, Tenants
from cag_kernels import QuantizedPrefix
from cag_store import Store
from cag_store.chunk_files import open_chunk
from cag_store.errors import CorruptEntry
from cag_store.paths import chunk_path
from tiny import tiny_config, write_tiny_model

QUESTION = "When does the gate open, and who has seen the key?"
OTHERS = ["Is the pump green?", "How often are valves checked, and by whom, and at which time of the day?", "Why?"]
SETTINGS = tiny_config(hidden_size=64, head_dim=32).to_dict()
SHARED = {
    key: SETTINGS[key]
    for key in (
        "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
        "max_position_embeddings", "eos_token_id", "bos_token_id", "pad_token_id",
    )
}  # fmt: skip
ONE_FULL = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]
CODECS = ["lossless", "int8", "int4"]


def gemma3(window=50):
    return Gemma3TextConfig(
        **SHARED, num_hidden_layers=4, sliding_window=window, layer_types=ONE_FULL, query_pre_attn_scalar=32
    )


CONFIGS = {
    "gemma3": gemma3,
    "mistral": lambda window=50: MistralConfig(**SHARED, num_hidden_layers=2, sliding_window=window),
    "gemma2": lambda window=50: Gemma2Config(
        **SHARED, num_hidden_layers=2, sliding_window=window, attn_logit_softcapping=5.0
    ),
}


def loaded_model(folder, config):
    """Random weights in bfloat16, so that there are codes to attend to."""
    directory = write_tiny_model(folder, config=config, dtype=torch.bfloat16)
    return LanguageModel.load(directory, model_id="tiny")


@pytest.fixture(scope="module", params=CONFIGS)
def model(request, tmp_path_factory, home_of_models):
    return loaded_model(tmp_path_factory.mktemp(request.param), CONFIGS[request.param]())


@pytest.fixture(autouse=True)
def in_codes(monkeypatch):
    """Codes stay codes, however quickly they are attended to."""
    monkeypatch.setattr(LanguageModel, "attends_to_codes", True)


@pytest.fixture
def documents(tmp_path):
    """About 2,300 tokens with what stands around them: a token is a byte."""
    path = tmp_path / "corpus" / "gates.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(f"Gate {number:02} opens at {number * 7:03}." for number in range(82)) + "\n")
    return [path.parent]


def whole(engine, prefix):
    """The same cache, all of it resident."""
    model = engine.model
    with engine.store.reader(prefix.manifest) as reader:
        plan = plan_load(reader, model.kv_shapes, model.kv_dtype, model.device, in_codes=True)
        resident = ResidentPrefix.load(plan)
        resident.wait()
    assert all(sum(s.num_tokens for s in layer) == resident.num_tokens for layer in resident._layers)
    return resident


def answered(model, resident, question, state):
    """Logits of a question's tokens, and of 6 steps behind them with the tokens that follow greedily."""
    logits = [model.forward(question_ids(model.tokenizer, model.template, question), state, num_logits=0)]
    for _ in range(6):
        logits.append(model.forward([int(logits[-1][-1].argmax())], state))
    return torch.cat(logits)


def first_tokens(resident):
    return [resident.num_tokens - sum(segment.num_tokens for segment in layer) for layer in resident._layers]


@pytest.mark.parametrize("codec", CODECS)
def test_answers_are_those_behind_the_whole_prefix(model, tmp_path, documents, codec):
    engine = Engine(model, Store.open(tmp_path / "store"))
    report = engine.build(documents, name="gates", codec=codec)
    with engine.open("gates") as prefix:
        resident, complete = prefix.resident, whole(engine, prefix)
        resident.wait()
        assert 2048 + 50 < report.num_tokens < 2560
        assert first_tokens(resident) == [0 if rule.window is None else 2048 for rule in model.rules]
        assert isinstance(resident.segments(0)[0], QuantizedPrefix) == (codec != "lossless")
        for make_state in (model.new_state, model.new_session_state):
            found = answered(model, resident, QUESTION, make_state(resident))
            expected = answered(model, complete, QUESTION, make_state(complete))
            if codec == "lossless":  # what is left begins with a tile of 1,024 tokens: sums have the same order
                assert torch.equal(found, expected)
            torch.testing.assert_close(found, expected, rtol=0, atol=float(expected.abs().max()) * 1e-2)
        together = prefix.ask_all([QUESTION, *OTHERS], max_tokens=8)
        prefix.resident = complete
        assert [one.token_ids for one in together] == [
            one.token_ids for one in prefix.ask_all([QUESTION, *OTHERS], max_tokens=8)
        ]
        assert prefix.ask(QUESTION, max_tokens=8).token_ids == together[0].token_ids
        assert together[0].usage.cached_tokens == report.num_tokens


@pytest.mark.parametrize(
    ("window", "first"), [(1, 2048), (100, 2048), (600, 1536), (1500, 512), (2000, 0), (9000, 0)], ids=str
)
@pytest.mark.parametrize("codec", ["lossless", "int4"])
def test_windows_of_any_size(tmp_path, documents, window, first, codec):
    """Within a chunk, over several, and longer than the cache."""
    engine = Engine(loaded_model(tmp_path / "model", gemma3(window)), Store.open(tmp_path / "store"))
    engine.build(documents, name="gates", codec=codec)
    told = []
    with engine.open("gates", make_room=lambda manifest, num_bytes: told.append(num_bytes)) as prefix:
        assert told == [prefix.resident.num_bytes]
        prefix.resident.wait()
        assert first_tokens(prefix.resident) == [first, first, first, 0]
        model, complete = engine.model, whole(engine, prefix)
        held = [segment for layer in prefix.resident._layers for segment in layer]
        assert prefix.resident.num_bytes == sum(p.nbytes for s in held for p in s if torch.is_tensor(p))
        assert (prefix.resident.num_bytes < complete.num_bytes) == (first > 0)
        found = answered(model, prefix.resident, QUESTION, model.new_session_state(prefix.resident))
        expected = answered(model, complete, QUESTION, model.new_session_state(complete))
        torch.testing.assert_close(found, expected, rtol=0, atol=float(expected.abs().max()) * 1e-2)


def test_a_cache_of_one_chunk_is_whole(tmp_path, corpus_dir):
    engine = Engine(loaded_model(tmp_path / "model", gemma3(20)), Store.open(tmp_path / "store"))
    engine.build([corpus_dir / "omega.txt"], name="short")
    with engine.open("short") as prefix:
        prefix.resident.wait()
        assert prefix.resident.num_tokens < 512
        assert first_tokens(prefix.resident) == [0, 0, 0, 0]


@pytest.mark.parametrize("codec", CODECS)
def test_inspection_sees_all_tokens_of_all_layers(tmp_path, documents, codec):
    engine = Engine(loaded_model(tmp_path / "model", gemma3()), Store.open(tmp_path / "store"))
    engine.build(documents, name="gates", codec=codec)
    with engine.open("gates") as prefix:
        with engine.store.reader(prefix.manifest) as reader:
            decoded = [[torch.empty(2, reader.num_tokens, 32, dtype=torch.bfloat16) for _ in "kv"] for _ in range(4)]
            reader.load([tuple(map(storage_view, pair)) for pair in decoded])
        for layer, pair in enumerate(decoded):
            found = prefix.keys_values(layer)
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, pair, strict=True))
        held = prefix.resident.num_bytes
        assert held == sum(
            p.nbytes for layer in prefix.resident._layers for s in layer for p in s if torch.is_tensor(p)
        )


def test_damage_that_no_answer_sees_is_found_by_verify_and_by_inspection(tmp_path, documents):
    engine = Engine(loaded_model(tmp_path / "model", gemma3()), Store.open(tmp_path / "store"))
    engine.build(documents, name="gates")
    expected = engine.ask("gates", QUESTION, max_tokens=4)
    manifest = engine.find("gates")[1]
    chunks = [open_chunk(engine.store.backend, entry) for entry in manifest.chunks]

    def damage(chunk, position):
        path = engine.store.backend.root / chunk_path(chunk.entry.key)
        path.chmod(0o644)
        data = bytearray(path.read_bytes())
        data[chunk.offsets[position] + 40] ^= 1
        path.write_bytes(data)

    damage(chunks[1], 2)  # keys of layer 1, which sees the last 50 tokens
    with engine.open("gates") as prefix:
        assert prefix.ask(QUESTION, max_tokens=4).token_ids == expected.token_ids
        with pytest.raises(CorruptEntry, match="keys of layer 1"):
            prefix.keys_values(1)
        prefix.keys_values(0)
    assert not engine.store.verify("gates").ok
    damage(chunks[1], 2)
    assert engine.store.verify("gates").ok
    for chunk, position in ((chunks[1], 7), (chunks[-1], 2)):  # the layer that sees all, and the end
        damage(chunk, position)
        with pytest.raises(CorruptEntry, match=f"of layer {position // 2}"):
            engine.ask("gates", QUESTION, max_tokens=4)
        damage(chunk, position)


def test_an_update_behind_a_cache_of_which_the_end_is_resident(tmp_path, documents):
    """What is reused is read whole: blocks that follow are computed behind all of it."""
    engine = Engine(loaded_model(tmp_path / "model", gemma3()), Store.open(tmp_path / "store"))
    more = documents[0] / "keys.md"
    engine.build(documents, name="gates")
    with engine.open("gates") as prefix:
        prefix.ask(QUESTION, max_tokens=2)
        more.write_text("Nobody has seen the omega key since Tuesday.\n" * 12)
        report = engine.update("gates", documents)
    assert report.recomputed_tokens < report.num_tokens
    updated = engine.ask("gates", QUESTION, max_tokens=8)
    fresh = Engine(engine.model, Store.open(tmp_path / "fresh"))
    fresh.build(documents, name="gates")
    keys, other_keys = ([chunk.key for chunk in made.find("gates")[1].chunks] for made in (engine, fresh))
    assert keys == other_keys
    assert fresh.ask("gates", QUESTION, max_tokens=8).token_ids == updated.token_ids


def test_layers_that_share_segments_stay_whole_where_one_needs_it(tmp_path, documents, monkeypatch):
    """`transform`: groups of two layers; the second group has the layer that sees all."""
    engine = Engine(loaded_model(tmp_path / "model", gemma3()), Store.open(tmp_path / "store"))
    model, options = (
        engine.model,
        CalibrationOptions(
            joint_layers=2, num_windows=9, corpus_windows=2, window_tokens=160, least_step=-1280, step=-800
        ),
    )
    with engine.store.build_lease():
        engine.build(documents, name="gates", codec=calibrate(model, engine.store, (), options).codec)
    with engine.open("gates") as prefix:
        assert first_tokens(prefix.resident) == [2048, 2048, 0, 0]
        answer, complete = prefix.ask(QUESTION, max_tokens=8), whole(engine, prefix)
        expected = [complete.layer(layer) for layer in range(4)]
        for layer, pair in enumerate(expected):
            assert all(map(torch.equal, prefix.keys_values(layer), pair))
        prefix.resident = complete
        assert prefix.ask(QUESTION, max_tokens=8).token_ids == answer.token_ids
    monkeypatch.setattr(model, "decodes_streams", True)  # as a GPU does, here by torch's operations
    engine.host_copies = HostCopies(1 << 30)
    for tier in ("disk", "memory"):
        with engine.open("gates") as prefix:
            assert prefix.ask(QUESTION, max_tokens=8).token_ids == answer.token_ids
            assert prefix.resident.tier == tier
            for layer, pair in enumerate(expected):
                (segment,) = prefix.resident.segments(layer)
                assert segment.num_tokens == len(prefix.token_ids) - first_tokens(prefix.resident)[layer]
                assert all(torch.equal(a, b[:, -segment.num_tokens :]) for a, b in zip(segment, pair, strict=True))
                assert all(map(torch.equal, prefix.keys_values(layer), pair))


@pytest.mark.parametrize("codec", CODECS)
def test_what_is_sent_to_a_device_is_as_small(tmp_path, documents, codec):
    """Pinned copies and device memory, as a GPU has them, on the CPU."""
    engine = Engine(loaded_model(tmp_path / "model", gemma3()), Store.open(tmp_path / "store"))
    engine.build(documents, name="gates", codec=codec)
    model, cpu = engine.model, torch.device("cpu")
    with engine.open("gates") as prefix, engine.store.reader(prefix.manifest) as reader:
        prefix.resident.wait()
        firsts = first_tokens(prefix.resident)
        shapes = reader.coded_shapes(firsts)
        if shapes is not None:
            sent = CodedBuffers(shapes, torch.bfloat16, cpu, through_host=True)
        else:
            sizes = [(2, reader.num_tokens - first, 32) for first in firsts]
            sent = HostBuffers(HostBuffers.of(sizes, torch.bfloat16, cpu)._device, through_host=True)
        reader.load(sent.views(), sent.arrived, first_tokens=firsts)
        again = ResidentPrefix.promote(sent.host_copy(), plan_load(reader, model.kv_shapes, torch.bfloat16, cpu))
        assert sent.host_copy().num_bytes < 0.5 * whole(engine, prefix).num_bytes
        for layer, expected in enumerate(prefix.resident._layers):
            for mine, theirs in zip(again.segments(layer), expected, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True) if torch.is_tensor(a))
            assert all(map(torch.equal, again.layer(layer), prefix.keys_values(layer)))


@pytest.mark.parametrize("codec", CODECS)
def test_steps_in_buckets_and_rows_on_a_device(tmp_path, documents, codec):
    """As a GPU runs them: all sessions over pieces that end with the prefix, and rows with places of their own."""
    engine = Engine(loaded_model(tmp_path / "model", gemma3()), Store.open(tmp_path / "store"))
    engine.build(documents, name="gates", codec=codec)
    model = engine.model
    with engine.open("gates") as prefix:
        complete = whole(engine, prefix)
        expected = answered(model, complete, QUESTION, model.new_session_state(complete))
        states = [model.new_session_state(prefix.resident) for _ in range(2)]
        for state, count in zip(states, (3, 9), strict=True):
            model.forward([7] * count, state)
            state.begin(2)
        batch = BatchState(states, [2, 2])
        batch.upload(torch.zeros(4, dtype=torch.long), [3], model.device)
        query = torch.randn(4, 4, 32, generator=torch.Generator().manual_seed(0))
        for layer, rule in enumerate(model.rules):
            masks = {"scale": rule.scale, "window": rule.window, "softcap": rule.softcap}
            (group,) = batch.groups
            apart = batch._group_before(group, layer, query, masks)
            segments, positions = prefix.resident.segments(layer), batch.tensors.positions
            rows = attend_on_device(prefix.resident.num_tokens, segments, query, positions, masks)
            for mine, theirs in zip(rows, apart, strict=True):
                torch.testing.assert_close(mine[1], theirs[1], rtol=0, atol=1e-2)
                torch.testing.assert_close(mine[0], theirs[0], rtol=0, atol=2e-2)
        model.run_in_steps(capture=False)
        found = answered(model, prefix.resident, QUESTION, model.new_session_state(prefix.resident))
        torch.testing.assert_close(found, expected, rtol=0, atol=float(expected.abs().max()) * 2e-2)


@pytest.mark.parametrize("codec", CODECS)
def test_branches_behind_the_end_are_those_behind_all(tmp_path, documents, codec):
    engine = Engine(loaded_model(tmp_path / "model", gemma3()), Store.open(tmp_path / "store"))
    engine.build(documents, name="gates", codec=codec)
    with engine.open("gates") as prefix:
        complete, model = whole(engine, prefix), engine.model
        found, expected = (
            model.forward_branches([[1, 2, 3], [9] * 60], resident, [2, 62]) for resident in (prefix.resident, complete)
        )
    torch.testing.assert_close(found, expected, rtol=0, atol=float(expected.abs().max()) * 1e-2)


def test_branches_see_pieces_as_one(documents):
    """Pieces that a window hides in part or wholly, against the same keys in one piece."""
    from cag_kernels import DensePrefix

    chance = torch.Generator().manual_seed(3)
    keys, values = (torch.randn(2, 90, 16, generator=chance) for _ in "kv")
    pieces = [DensePrefix(keys[:, a:b], values[:, a:b]) for a, b in ((30, 50), (50, 85), (85, 90))]
    query, own = (torch.randn(heads, 11, 16, generator=chance) for heads in (4, 2))
    for window in (None, 4, 9, 31, 70):
        found = []
        for layer in ((DensePrefix(keys[:, 30:], values[:, 30:]),), tuple(pieces)):
            prefix = ResidentPrefix([layer], np.arange(90))
            prefix.mark_loaded()
            state = BranchedState(prefix, [4, 7])
            found.append(state.attend(0, query, own, own, scale=0.25, window=window))
        torch.testing.assert_close(found[0], found[1])


def test_what_is_held_counts_against_the_servers_limit(tmp_path, documents):
    engine = Engine(loaded_model(tmp_path / "model", gemma3()), Store.open(tmp_path / "store"))
    report = engine.build(documents, name="gates")
    limit = report.raw_bytes // 2
    caches = ResidentCaches(Tenants(engine, frozenset(), None).find, max_bytes=limit)
    with caches.use(CacheKey(OPERATOR, "gates")) as use:
        answer = use.prefix.ask(QUESTION, SamplingOptions(max_tokens=2))
        assert caches.num_bytes == use.prefix.resident.num_bytes <= limit
        assert answer.usage.cached_tokens == report.num_tokens
    caches.close()


@pytest.mark.parametrize(
    ("window", "num_tokens", "first"), [(None, 9, 0), (1, 9, 9), (2, 9, 8), (9, 9, 1), (10, 9, 0), (99, 9, 0)]
)
def test_the_first_token_that_anything_behind_a_prefix_sees(window, num_tokens, first):
    rule = AttentionRule(1.0, window)
    assert rule.first_seen(num_tokens) == first
    seen = [j for j in range(num_tokens) if window is None or num_tokens - j < window]
    assert (seen[0] if seen else num_tokens) == first
