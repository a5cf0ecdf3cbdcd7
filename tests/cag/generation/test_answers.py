"""Behind a cache: the same logits and answers as without one, every token accounted for, nothing copied."""

import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig, TopPLogitsWarper

from cag.corpus import load_documents
from cag.engine import Engine
from cag.errors import RequestTooLong, UsageError
from cag.fresh import ask_fresh
from cag.generation.generate import Sampler, SamplingOptions
from cag.model import LanguageModel
from cag.prefill import prefill
from cag.prompt import lay_out, question_ids
from cag.residency.buffers import HostBuffers
from cag.residency.load_plan import plan_load
from cag.residency.resident import ResidentPrefix
from cag_kernels import DensePrefix, has_compiler
from cag_store import Store
from tiny import tiny_config, write_tiny_model

QUESTION = "When does the alpha gate open?"


@pytest.fixture
def built(tiny_engine, corpus_dir):
    tiny_engine.build([corpus_dir], name="handbook")
    return tiny_engine


def fresh_layout(engine, corpus_dir):
    return lay_out(engine.model.tokenizer, engine.model.template, load_documents([corpus_dir]))


def test_reloaded_logits_equal_to_the_bit_those_of_a_session_that_never_left_memory(built, corpus_dir):
    model = built.model
    layout = fresh_layout(built, corpus_dir)
    state = model.new_state(capacity=len(layout.token_ids))
    prefill(model, state, layout.token_ids.tolist())
    in_memory = ResidentPrefix.from_tail(state.tail, layout.token_ids)
    suffix = question_ids(model.tokenizer, model.template, QUESTION)
    expected = model.forward(suffix, model.new_state(in_memory), num_logits=0)
    with built.open("handbook") as prefix:
        found = model.forward(suffix, model.new_state(prefix.resident), num_logits=0)
        assert prefix.token_ids.tolist() == layout.token_ids.tolist()
        for layer in range(len(model.kv_shapes)):
            for stored, computed in zip(prefix.keys_values(layer), in_memory.layer(layer), strict=True):
                assert torch.equal(stored, computed)
    assert torch.equal(found, expected)


def test_greedy_answers_equal_those_without_a_cache(built, corpus_dir):
    layout = fresh_layout(built, corpus_dir)
    with built.open("handbook") as prefix:
        for question in (QUESTION, "Who checks the valves?", "x"):
            cached = prefix.ask(question, max_tokens=12)
            computed = ask_fresh(built.model, layout, question, SamplingOptions(max_tokens=12))
            assert cached.token_ids == computed.token_ids
            assert computed.usage.cached_tokens == 0
            assert computed.usage.prompt_tokens == cached.usage.prompt_tokens


def test_matches_plain_transformers(built, corpus_dir, tiny_model_dir):
    """The whole path against transformers' own forward and attention, in the same precision."""
    from transformers import AutoModelForCausalLM

    layout = fresh_layout(built, corpus_dir)
    suffix = question_ids(built.model.tokenizer, built.model.template, QUESTION)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    ids = torch.tensor([layout.token_ids.tolist() + suffix])
    with torch.inference_mode():
        expected = plain(input_ids=ids).logits[0, -len(suffix) :]
    with built.open("handbook") as prefix:
        found = built.model.forward(suffix, built.model.new_state(prefix.resident), num_logits=0)
    assert (found - expected).abs().max() < 2e-4 * expected.abs().max()


def test_a_warm_question_computes_its_own_tokens_only(built):
    with built.open("handbook") as prefix:
        answer = prefix.ask(QUESTION, max_tokens=3)
        usage = answer.usage
        assert usage.cached_tokens == len(prefix.token_ids)
        assert usage.computed_tokens == len(question_ids(built.model.tokenizer, prefix.template, QUESTION))
        assert usage.cached_tokens + usage.computed_tokens == usage.prompt_tokens
        assert usage.completion_tokens == len(answer.token_ids) <= 3


def test_the_prefix_is_shared_and_never_copied_or_changed(built):
    with built.open("handbook") as prefix, built.open("handbook") as again:
        assert again.resident is prefix.resident
        before = [tensor.clone() for layer in range(2) for tensor in prefix.keys_values(layer)]
        pointers = [tensor.data_ptr() for layer in range(2) for tensor in prefix.keys_values(layer)]
        sessions = [prefix.session() for _ in range(3)]
        for session in sessions:
            session.ask(QUESTION, SamplingOptions(max_tokens=4))
        tail_bytes = sessions[0]._state.tail.num_bytes
        assert tail_bytes < prefix.resident.num_bytes
        after = [tensor for layer in range(2) for tensor in prefix.keys_values(layer)]
        assert [tensor.data_ptr() for tensor in after] == pointers
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_turns_stand_behind_each_other(built):
    """The second answer equals one computed over the whole conversation at once."""
    model = built.model
    with built.open("handbook") as prefix:
        session = prefix.session()
        first = session.ask(QUESTION, SamplingOptions(max_tokens=6))
        cached_before = session.num_cached_tokens
        second = session.ask("And who?", SamplingOptions(max_tokens=6))
        assert second.usage.cached_tokens == cached_before
        assert second.usage.cached_tokens >= len(prefix.token_ids) + first.usage.computed_tokens
        from cag.prompt import next_question_ids

        ids = prefix.token_ids.tolist() + question_ids(model.tokenizer, prefix.template, QUESTION)
        ids += [*first.token_ids, *next_question_ids(model.tokenizer, prefix.template, "And who?")]
        state = model.new_state()
        token, expected = int(prefill(model, state, ids).argmax()), []
        while token not in model.stop_ids and len(expected) < 6:
            expected.append(token)
            token = int(model.forward([token], state)[-1].argmax())
        assert list(second.token_ids) == expected
        assert session.turns == [(QUESTION, first.text), ("And who?", second.text)]


def test_an_abandoned_stream_leaves_the_session_usable(built):
    with built.open("handbook") as prefix:
        session = prefix.session()
        stream = iter(session.stream(QUESTION, SamplingOptions(max_tokens=30)))
        next(stream)
        with pytest.raises(UsageError, match="still running"):
            session.ask("Another?")
        stream.close()
        answer = session.ask("Another?", SamplingOptions(max_tokens=2))
        assert answer.usage.cached_tokens > len(prefix.token_ids)


def test_a_stream_is_read_once_and_behind_what_it_was_made_for(built):
    with built.open("handbook") as prefix:
        session = prefix.session()
        first, second = session.stream(QUESTION), session.stream("And who?")
        list(first)
        with pytest.raises(UsageError, match="has begun since"):
            list(second)
        with pytest.raises(UsageError, match="read before"):
            list(first)
        assert len(session.turns) == 1
        usage = session.ask("And who?", SamplingOptions(max_tokens=2)).usage
        assert usage.cached_tokens > len(prefix.token_ids)


def test_token_ids_cannot_be_written_to(built):
    with built.open("handbook") as prefix, pytest.raises(ValueError, match="read-only"):
        prefix.token_ids[0] = 0


def test_stream_gives_the_text_of_the_answer(built):
    with built.open("handbook") as prefix:
        stream = prefix.stream(QUESTION, max_tokens=20)
        with pytest.raises(UsageError, match="not complete"):
            _ = stream.answer
        text = "".join(stream)
        assert text.strip() == stream.answer.text == prefix.ask(QUESTION, max_tokens=20).text


def test_stop_strings_end_the_answer_and_are_never_shown(built):
    with built.open("handbook") as prefix:
        whole = prefix.ask(QUESTION, max_tokens=24).text
        stop = whole[4:6]
        pieces = list(prefix.stream(QUESTION, max_tokens=24, stop=(stop,)))
        cut = prefix.ask(QUESTION, max_tokens=24, stop=stop)
        assert "".join(pieces).strip() == cut.text == whole[: whole.index(stop)].strip()
        assert cut.finish_reason == "stop"


def test_sampling_is_repeatable_with_a_seed_and_differs_without(built):
    with built.open("handbook") as prefix:
        options = {"max_tokens": 16, "temperature": 2, "top_p": 0.95}
        assert prefix.ask(QUESTION, seed=1, **options).text == prefix.ask(QUESTION, seed=1, **options).text
        assert len({prefix.ask(QUESTION, seed=seed, **options).text for seed in range(4)}) > 1


@pytest.mark.parametrize("spread", [0.0, 1.0, 8.0])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.95])
def test_what_is_sampled_among_is_what_transformers_samples_among(spread, top_p):
    logits = spread * torch.randn(3000, generator=torch.Generator().manual_seed(4)) + torch.arange(3000) * 1e-4
    sampler = Sampler(SamplingOptions(temperature=0.7, top_p=top_p, seed=3), torch.device("cpu"))
    expected = TopPLogitsWarper(top_p)(None, logits[None] / 0.7)[0].softmax(0)
    likely, ids = sampler._nucleus((logits / 0.7).softmax(0))
    assert set(ids.tolist()) == set(expected.nonzero()[:, 0].tolist())
    torch.testing.assert_close(likely / likely.sum(), expected[ids])
    assert {sampler(logits) for _ in range(50)} <= set(ids.tolist())


def test_sampled_answers_wait_for_no_import_of_transformers():
    """It is none that threads may begin at the same time: those that come second find it without its names."""
    code = (
        "import sys, torch; from cag.generation.generate import Sampler, SamplingOptions;"
        "sys.modules['transformers'] = None;"
        "Sampler(SamplingOptions(temperature=1.0, top_p=0.5, seed=1), torch.device('cpu'))(torch.zeros(9))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_temperature_that_no_number_can_be_divided_by_is_greedy(built):
    with built.open("handbook") as prefix:
        greedy = prefix.ask(QUESTION, max_tokens=6)
        assert prefix.ask(QUESTION, max_tokens=6, temperature=1e-42).token_ids == greedy.token_ids


@pytest.mark.parametrize(
    "bad",
    [
        {"max_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"seed": 2**64},
        {"stop": ""},
        {"max_tokens": 2.5},
        {"max_tokens": "3"},
        {"max_tokens": True},
        {"temperature": "hot"},
        {"temperature": None},
        {"top_p": None},
        {"seed": 1.5},
        {"stop": None},
        {"stop": 5},
        {"stop": ["a", 5]},
        {"stop": ["a", ""]},
        {"speculate": "no"},
        {"think": "low"},
    ],
)
def test_bad_sampling_options_are_refused_by_name(bad):
    (name,) = bad
    with pytest.raises(UsageError, match=f"^{name} is .*; it must be "):
        SamplingOptions(**bad)


def test_numbers_of_numpy_are_numbers():
    options = SamplingOptions(max_tokens=np.int64(3), temperature=np.float32(0.5), seed=np.uint64(2**63))
    assert (options.max_tokens, options.temperature) == (3, 0.5)


def test_sampling_is_given_in_one_way(built):
    with built.open("handbook") as prefix:
        session = prefix.session()
        assert session.ask(QUESTION, max_tokens=2).usage.completion_tokens == 2
        assert len("".join(session.stream(QUESTION, max_tokens=1))) > 0
        for ask in (prefix.ask, prefix.stream, session.ask):
            with pytest.raises(UsageError, match="or as keywords"):
                ask(QUESTION, SamplingOptions(max_tokens=2), max_tokens=3)
            with pytest.raises(UsageError, match="one `SamplingOptions`"):
                ask(QUESTION, {"max_tokens": 2})


@pytest.mark.parametrize("question", [None, 5, b"Who?", ["Who?"]])
def test_a_question_that_is_no_text_is_refused(built, question):
    with built.open("handbook") as prefix, pytest.raises(UsageError, match="must be text"):
        prefix.ask(question)


@pytest.mark.parametrize(
    "history",
    [None, 5, "abc", [1], [("a",)], [("a", 5)], ("a", "b"), {"a": "b"}, [{"role": "user", "content": "Who?"}]],
)
def test_a_history_that_is_no_pairs_of_texts_is_refused(built, history):
    """The last one has two keys a message, which would have passed for a question and its answer."""
    with built.open("handbook") as prefix, pytest.raises(UsageError, match="history"):
        prefix.session().ask(QUESTION, history=history)


def test_what_is_no_time_and_no_text_is_refused(built):
    with built.open("handbook") as prefix:
        with pytest.raises(UsageError, match="started_at"):
            prefix.ask(QUESTION, started_at="now")
        for question, answer in ((QUESTION, None), (5, "text")):
            with pytest.raises(UsageError, match="must be texts"):
                prefix.cite(question, answer)


def test_questions_that_are_one_text_are_refused(built):
    with built.open("handbook") as prefix, pytest.raises(UsageError, match="a list of texts"):
        prefix.ask_all(QUESTION)


def test_an_empty_question_and_one_beyond_the_window_are_refused(built):
    with built.open("handbook") as prefix:
        with pytest.raises(UsageError, match="empty"):
            prefix.ask("  ")
        with pytest.raises(RequestTooLong, match="window"):
            prefix.ask("x" * 9000)


@pytest.mark.parametrize("history", [(), [("x" * 200_000, "Yes.")]])
def test_of_a_question_far_beyond_the_window_the_beginning_is_tokenized(built, history, monkeypatch):
    lengths, tokenize = [], type(built.model.tokenizer).__call__
    monkeypatch.setattr(
        type(built.model.tokenizer),
        "__call__",
        lambda self, text, **options: lengths.append(len(text)) or tokenize(self, text, **options),
    )
    with built.open("handbook") as prefix, pytest.raises(RequestTooLong, match="window"):
        prefix.session().ask("x" * 200_000, history=history)
    assert max(lengths) <= 16 * built.model.window_tokens


def test_a_closed_prefix_cannot_be_asked(built):
    prefix = built.open("handbook")
    prefix.close()
    prefix.close()
    with pytest.raises(UsageError, match="closed"):
        prefix.ask(QUESTION)


def test_a_prefix_that_is_closed_while_it_loads_stops_loading(built, monkeypatch):
    """And the end of the process waits for no more than that: its threads are no daemons, which would be cut off in
    compiled code."""
    arrived, go_on, threads = threading.Event(), threading.Event(), []

    def first_layer_waits(self, layer):
        threads.append(threading.current_thread())
        arrived.set()
        assert go_on.wait(60)

    monkeypatch.setattr(HostBuffers, "arrived", first_layer_waits)
    prefix = built.open("handbook")
    assert arrived.wait(60)
    prefix.close()
    go_on.set()
    prefix.resident.wait_quietly()
    with pytest.raises(UsageError, match="while it was loading"):
        prefix.resident.wait()
    assert [thread.daemon for thread in threads] == [False]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral-window", "gemma3"])
def test_other_architectures_match_plain_transformers(kind, tmp_path):
    """Sliding windows included: logits of a question behind a prefix, against transformers' own attention."""
    from transformers import AutoModelForCausalLM, Gemma3TextConfig, Qwen2Config, Qwen3Config

    from cag.model import LanguageModel

    settings = tiny_config().to_dict()
    shared = {key: settings[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    shared |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 8192}
    shared |= {"eos_token_id": 257, "bos_token_id": 256, "pad_token_id": 257}
    config = {
        "llama": lambda: tiny_config(),
        "qwen2": lambda: Qwen2Config(**shared),
        "qwen3": lambda: Qwen3Config(**shared),
        "mistral-window": lambda: MistralConfig(**shared, sliding_window=50),
        "gemma3": lambda: Gemma3TextConfig(**shared, sliding_window=50, query_pre_attn_scalar=16),
    }[kind]()
    directory = write_tiny_model(tmp_path / "model", config=config)
    model = LanguageModel.load(directory, model_id=kind)
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    ids = torch.randint(0, 250, (700,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.inference_mode():
        expected = plain(input_ids=torch.tensor([ids])).logits[0, 650:]
    state = model.new_state(capacity=650)
    prefill(model, state, ids[:650])
    import numpy as np

    resident = ResidentPrefix.from_tail(state.tail, np.asarray(ids[:650]))
    found = model.forward(ids[650:], model.new_state(resident), num_logits=0)
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()


@pytest.fixture
def bfloat16_engine(tmp_path):
    """A random model in bfloat16 whose heads are as wide as codes in memory want them."""
    config = tiny_config(hidden_size=64, head_dim=32)
    directory = write_tiny_model(tmp_path / "model", config=config)
    network = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    network.save_pretrained(directory)
    model = LanguageModel.load(directory, model_id="tiny")
    return Engine(model, Store.open(tmp_path / "store"))


@pytest.mark.skipif(not has_compiler(), reason="llvmlite is not there")
@pytest.mark.parametrize(("codec", "at_least"), [("int8", 1.7), ("int4", 2.5)])
def test_a_prefix_in_codes_takes_the_bytes_of_its_codec(bfloat16_engine, corpus_dir, codec, at_least):
    engine, model = bfloat16_engine, bfloat16_engine.model
    report = engine.build([corpus_dir], name="handbook", codec=codec)
    suffix = question_ids(model.tokenizer, model.template, QUESTION)
    with engine.open("handbook") as prefix:
        prefix.resident.wait()
        assert report.raw_bytes / prefix.resident.num_bytes > at_least
        dense = ResidentPrefix(
            [(DensePrefix(*prefix.keys_values(layer)),) for layer in range(len(model.kv_shapes))], prefix.token_ids
        )
        dense.mark_loaded()
        with engine.store.reader(prefix.manifest) as reader:
            loaded = ResidentPrefix.load(plan_load(reader, model.kv_shapes, model.kv_dtype, model.device))
            for layer in range(len(model.kv_shapes)):
                assert all(map(torch.equal, loaded.layer(layer), dense.layer(layer)))
        found = model.forward(suffix, model.new_state(prefix.resident), num_logits=0)
        expected = model.forward(suffix, model.new_state(dense), num_logits=0)
        answer = prefix.ask(QUESTION, max_tokens=4)
    torch.testing.assert_close(found, expected, rtol=0, atol=float(expected.abs().max()) * 0.02)
    assert answer.usage.cached_tokens == report.num_tokens


@pytest.mark.parametrize("codec", [{"id": "int8", "group_tokens": 8}, {"id": "int4", "group_channels": 8}])
def test_codes_in_groups_that_no_kernel_takes_are_decoded(bfloat16_engine, corpus_dir, codec):
    report = bfloat16_engine.build([corpus_dir], name="handbook", codec=codec)
    with bfloat16_engine.open("handbook") as prefix:
        prefix.resident.wait()
        assert prefix.resident.num_bytes == report.raw_bytes
        assert prefix.ask(QUESTION, max_tokens=2).usage.cached_tokens == report.num_tokens
