"""RoPE whose frequencies depend on a sequence's length: each cache has one set of them, that of transformers at its
length, from its first token to the last of an answer."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config, PhimoeConfig

from cag.building.requirements import RESERVED_TOKENS
from cag.calibration import CalibrationOptions, model_basis
from cag.calibration.rotation import find_rotations
from cag.engine import Engine
from cag.errors import CacheMismatch, RequestTooLong, UnsupportedModel
from cag.fresh import ask_fresh
from cag.generation.generate import SamplingOptions
from cag.generation.scheduler import Scheduler
from cag.identity import check_fingerprints
from cag.model import LanguageModel
from cag.prefill import prefill
from cag.prompt import lay_out, question_ids
from cag.residency.resident import ResidentPrefix
from cag.short_model import for_length, short_model, with_rope
from cag.stores import open_store
from cag_kernels import has_compiler
from tiny import tiny_config, write_tiny_model

ORIGINAL, WINDOW = 2048, 8192
SHARED = {"vocab_size": 258, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
SHARED |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 257, "eos_token_id": 257}
SHARED |= {"max_position_embeddings": WINDOW}
QUESTION = "Which gate opens first, and who has its key?"
SENTENCE = "The alpha gate opens at seven, the beta pump moves thirty litres, and delta has code 4711.\n"


def longrope(pairs, **changes):
    """Factors as they are trained: near 1 for short sequences, large for slow pairs of long ones."""
    short = [1.0 + 0.05 * index for index in range(pairs)]
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": short,
        "long_factor": [1.0 + 3.0 * index for index in range(pairs)],
        "original_max_position_embeddings": ORIGINAL,
    } | changes


CONFIGS = {
    "phi3": lambda: Phi3Config(**SHARED, rope_parameters=longrope(8), original_max_position_embeddings=ORIGINAL),
    "phi4": lambda: Phi3Config(
        **SHARED,
        rope_parameters=longrope(4, partial_rotary_factor=0.5),
        original_max_position_embeddings=ORIGINAL,
    ),
    "llama": lambda: LlamaConfig(**SHARED, rope_parameters=longrope(8)),
}


of_one_kind = pytest.mark.parametrize("directory", ["phi4"], indirect=True)  # of those in `CONFIGS`


@pytest.fixture(scope="module", params=CONFIGS)
def directory(request, tmp_path_factory, home_of_models):
    """A random model with LongRoPE."""
    return write_tiny_model(tmp_path_factory.mktemp("model") / request.param, config=CONFIGS[request.param]())


@pytest.fixture(scope="module")
def model(directory):
    return LanguageModel.load(directory, model_id="longrope")


@pytest.fixture(scope="module")
def plain(directory):
    """transformers' own, which picks factors in each forward."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")


@pytest.fixture
def engine(model, tmp_path):
    return Engine(model, open_store(tmp_path / "store"))


def some_ids(count, seed=3):
    return torch.randint(0, 250, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.inference_mode()
def expected_logits(plain, ids, count=1):
    return plain(input_ids=torch.tensor([ids]), use_cache=False, logits_to_keep=count).logits[0].float()


def expected_answer(plain, ids, count):
    """Greedy tokens, each by a forward of everything."""
    ids = list(ids)
    for _ in range(count):
        ids.append(int(expected_logits(plain, ids)[-1].argmax()))
    return ids[-count:]


def assert_close(found, expected):
    assert float((found - expected).norm() / expected.norm()) < 2e-5


def behind_a_prefix(model, ids, num_prefix):
    """Logits of the last token, as a question's behind a resident prefix."""
    state = model.new_state(capacity=num_prefix)
    prefill(model, state, ids[:num_prefix])
    session = model.new_session_state(ResidentPrefix.from_tail(state.tail, torch.tensor(ids[:num_prefix]).numpy()))
    for start in range(num_prefix, len(ids), 48):
        logits = model.forward(ids[start : start + 48], session)
    return logits[-1]


def test_each_length_is_read_by_its_own_frequencies(model, plain):
    assert (model.window_tokens, model.short.window_tokens) == (WINDOW, ORIGINAL)
    assert (model.rope["factors"], model.short.rope["factors"]) == ("long", "short")
    assert model.short.short is None
    for length in (5, 700, ORIGINAL, ORIGINAL + 1, ORIGINAL + 90):
        chosen = for_length(model, length)
        assert (chosen is model.short) == (length <= ORIGINAL)
        ids = some_ids(length)
        found = behind_a_prefix(chosen, ids, max(1, length - 60))
        assert_close(found, expected_logits(plain, ids)[-1])


def test_a_question_that_crosses_the_border_finds_keys_of_its_own_frequencies(model, plain):
    """What transformers gets wrong with a cache of the short ones."""
    ids = some_ids(ORIGINAL + 40)
    expected = expected_logits(plain, ids)[-1]
    assert_close(behind_a_prefix(model, ids, ORIGINAL - 40), expected)
    wrong = behind_a_prefix(model.short, ids, ORIGINAL - 40)
    assert float((wrong - expected).norm() / expected.norm()) > 0.02


def write(folder, **texts):
    folder.mkdir(parents=True, exist_ok=True)
    for name, repeats in texts.items():
        (folder / f"{name}.txt").write_text(f"Of {name}.\n" + SENTENCE * repeats)
    return folder


@of_one_kind
def test_answers_are_those_of_transformers_on_both_sides(engine, plain, tmp_path):
    for name, repeats in (("short", 2), ("long", 20)):
        engine.build([write(tmp_path / name, text=repeats)], name=name)
        manifest = engine.find(name)[1]
        assert manifest.kv.rope["factors"] == name
        with engine.open(name) as prefix:
            assert prefix.model is (engine.model.short if name == "short" else engine.model)
            prompt = prefix.token_ids.tolist() + question_ids(prefix.model.tokenizer, prefix.template, QUESTION)
            answer = prefix.ask(QUESTION, max_tokens=4)
            assert list(answer.token_ids) == expected_answer(plain, prompt, 4)
            assert answer.usage.cached_tokens == prefix.resident.num_tokens
            sampling = SamplingOptions(max_tokens=24, temperature=1.0, seed=7)  # shows other logits sooner
            sampled, documents = prefix.ask(QUESTION, sampling), prefix._load_documents()
        layout = lay_out(engine.model.tokenizer, engine.model.template, documents)
        assert ask_fresh(engine.model, layout, QUESTION, sampling).token_ids == sampled.token_ids


@of_one_kind
def test_the_longest_prefix_with_short_factors_leaves_room_for_its_question(engine, tmp_path):
    engine.build([write(tmp_path / "one", text=1)], name="one")
    path, missing = tmp_path / "one" / "text.txt", ORIGINAL - RESERVED_TOKENS - engine.find("one")[1].num_tokens
    for name, added, factors in (("at", missing, "short"), ("over", missing + 1, "long")):
        path.write_text(f"Of text.\n{SENTENCE}".rstrip("\n") + "x" * added + "\n")
        report = engine.build([path], name=name)
        assert report.num_tokens == ORIGINAL - RESERVED_TOKENS + (name == "over")
        assert engine.find(name)[1].kv.rope["factors"] == factors


@of_one_kind
def test_a_session_with_short_factors_ends_at_their_window(engine, tmp_path):
    engine.build([write(tmp_path / "short", text=2)], name="short")
    with engine.open("short") as prefix:
        session, room = prefix.session(), ORIGINAL - prefix.resident.num_tokens
        with pytest.raises(RequestTooLong, match=f"window of {ORIGINAL}"):
            session.ask("x" * room)
        answer = session.ask("x" * (room - 200), max_tokens=1000)
        assert answer.usage.prompt_tokens + len(answer.token_ids) <= ORIGINAL


@of_one_kind
def test_sessions_of_both_share_a_scheduler(engine, plain, tmp_path):
    engine.build([write(tmp_path / "short", text=2)], name="short")
    engine.build([write(tmp_path / "long", text=20)], name="long")
    questions = [QUESTION, "Who?", "What does the pump move, and how much of it?"]
    with engine.open("short") as short, engine.open("long") as long:
        alone = [[prefix.ask(text, max_tokens=9).token_ids for text in questions] for prefix in (short, long)]
        scheduler = Scheduler(engine.model)
        streams = [[prefix.stream(text, max_tokens=9) for text in questions] for prefix in (short, long)]
        pairs = [
            (stream, stream.submit(scheduler, lambda _: None)) for both in zip(*streams, strict=True) for stream in both
        ]
        scheduler.run()
        for stream, request in pairs:
            stream.finish(request)
        assert [[stream.answer.token_ids for stream in part] for part in streams] == alone
        assert scheduler.largest_batch == len(questions)
    assert engine.model.pages is engine.model.short.pages


@of_one_kind
def test_update_across_the_border_computes_everything_again(engine, plain, tmp_path):
    folder = write(tmp_path / "texts", a=2, b=2)
    engine.build([folder], name="texts", codec="int8")
    for repeats, factors, reused in ((20, "long", 0), (21, "long", RESERVED_TOKENS), (2, "short", None)):
        write(folder, b=repeats)
        report = engine.update("texts", [folder])
        manifest = engine.find("texts")[1]
        assert manifest.kv.rope["factors"] == factors
        if reused is not None:
            assert (report.reused_tokens > 0) == bool(reused)
        with engine.open("texts") as prefix:
            prompt = prefix.token_ids.tolist() + question_ids(prefix.model.tokenizer, prefix.template, "Who?")
            assert prefix.ask("Who?", max_tokens=1).token_ids[0] == expected_answer(plain, prompt, 1)[0]


@of_one_kind
def test_a_cache_is_not_opened_with_other_frequencies(engine, tmp_path):
    engine.build([write(tmp_path / "long", text=20)], name="long")
    manifest = engine.find("long")[1]
    check_fingerprints("long", manifest, engine.model)
    with pytest.raises(CacheMismatch) as raised:
        check_fingerprints("long", manifest, engine.model.short)
    assert raised.value.facts["part"] == "RoPE configuration"
    other = {**manifest.kv.rope, "parameters": {**manifest.kv.rope["parameters"], "short_factor": [1.0] * 8}}
    nameless = {key: value for key, value in manifest.kv.rope.items() if key != "factors"}
    for rope in (other, nameless):
        foreign = replace(manifest, kv=replace(manifest.kv, rope=rope))
        with pytest.raises(CacheMismatch, match="RoPE configuration"):
            check_fingerprints("long", foreign, engine.model)
    engine.build([write(tmp_path / "short", text=2)], name="short")
    of_one_set = copy.copy(engine.model)
    of_one_set.short = None
    with pytest.raises(CacheMismatch, match="RoPE configuration"):
        Engine(of_one_set, engine.store).open("short")
    assert with_rope(engine.model, json.loads(json.dumps(engine.model.short.rope))) is engine.model.short


def test_keys_are_turned_back_by_the_frequencies_of_their_model(model):
    found = []
    for one in (model, model.short):
        rotations, of_layers = find_rotations(one)
        assert set(of_layers) == {0} and len(rotations) == 1
        expected = one.network.model.rotary_emb.inv_freq.double().tolist()
        assert rotations[0].inverse_frequencies == tuple(expected)
        found.append(expected)
    assert found[0] != found[1]
    options = CalibrationOptions()
    assert model_basis.basis_path(model, options) != model_basis.basis_path(model.short, options)


@of_one_kind
def test_padded_steps_take_the_frequencies_of_their_cache(directory, plain):
    model = LanguageModel.load(directory, model_id="longrope")
    model.run_in_steps(capture=False)
    model.short = short_model(model)
    for length in (700, ORIGINAL + 30):
        chosen, ids = for_length(model, length), some_ids(length)
        assert_close(behind_a_prefix(chosen, ids, length - 40), expected_logits(plain, ids)[-1])


@pytest.mark.skipif(not has_compiler(), reason="llvmlite is not there")
@pytest.mark.parametrize("kind", ["phi3", "llama"])
def test_the_quick_forward_turns_by_the_same_frequencies(kind, tmp_path):
    directory = write_tiny_model(tmp_path / kind, config=CONFIGS[kind](), dtype=torch.bfloat16)
    model = LanguageModel.load(directory, model_id=kind)
    assert model.decoder is not None and model.short.decoder is not model.decoder
    for length in (700, ORIGINAL + 30):
        chosen, ids, found = for_length(model, length), some_ids(length), []
        for decoder in (chosen.decoder, None):
            chosen.decoder = decoder
            found.append(behind_a_prefix(chosen, ids, length - 40))
        assert float((found[0] - found[1]).norm() / found[1].norm()) < 0.02
    loaded = LanguageModel.load(directory, model_id=kind)  # no start was kept that knows one set only
    assert loaded.short is not None and loaded.rope == model.rope


def test_dynamic_frequencies_never_change_within_the_window(tmp_path):
    parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    config = tiny_config(max_position_embeddings=512, rope_parameters=parameters)
    directory = write_tiny_model(tmp_path / "dynamic", config=config)
    model = LanguageModel.load(directory, model_id="dynamic")
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    assert model.short is None and model.window_tokens == 512 and "factors" not in model.rope
    ids = some_ids(512)
    for length in (100, 512):
        assert_close(behind_a_prefix(model, ids[:length], length - 60), expected_logits(plain, ids[:length])[-1])


def test_longrope_whose_window_is_the_original_one_has_short_factors(tmp_path):
    config = LlamaConfig(**SHARED | {"max_position_embeddings": ORIGINAL}, rope_parameters=longrope(8))
    directory = write_tiny_model(tmp_path / "model", config=config)
    model = LanguageModel.load(directory, model_id="short")
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    assert model.short is None and "factors" not in model.rope
    ids = some_ids(ORIGINAL)
    assert_close(behind_a_prefix(model, ids, ORIGINAL - 60), expected_logits(plain, ids)[-1])


def test_another_kind_of_dependence_on_the_length_is_refused(tmp_path):
    """Phi-3.5-MoE scales its angles by one of two numbers, and picks it in each forward."""
    parameters = longrope(8, short_mscale=1.1, long_mscale=1.3)
    config = PhimoeConfig(**SHARED, num_local_experts=2, rope_parameters=parameters)
    directory = write_tiny_model(tmp_path / "phimoe", config=config)
    with pytest.raises(UnsupportedModel, match="phimoe uses longrope"):
        LanguageModel.load(directory, model_id="phimoe")
