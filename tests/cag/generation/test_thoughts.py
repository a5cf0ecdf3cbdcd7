"""Thoughts and answers apart: in any pieces, by any tokens, in sessions as templates have them."""

import itertools

import pytest
import torch
from hybrids import FAMILIES
from hypothesis import given
from hypothesis import strategies as st
from thinkers import CHANNEL_TOKENS, CHANNELS, CHOOSES, OPENS, Forced
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from cag.engine import Engine
from cag.errors import UsageError
from cag.fresh import ask_fresh
from cag.generation.answer import Piece, joined
from cag.generation.generate import DEFAULT_MAX_TOKENS, THOUGHT_TOKENS, SamplingOptions
from cag.generation.scheduler import Scheduler
from cag.generation.thoughts import AnswerReader, ThoughtSplitter, read_answer, without_thoughts
from cag.model import LanguageModel
from cag.prompt import THOUGHTS, encode, lay_out, read_template
from cag.thinking import AnswerForm, read_thinking
from cag_store import Store
from tiny import tiny_config, tiny_tokenizer, write_tiny_model

THINK, HARMONY = THOUGHTS[0], THOUGHTS[3]
QUESTION = "When does the alpha gate open?"
MARKS_AND_TEXT = ["<think>", "</think>", "<th", "</th", "ink>", "\n", " ", "<", "a", "why?", "é"]


def split(text, cuts=(), **arguments):
    splitter = ThoughtSplitter(**arguments)
    edges = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    pieces = [splitter.split(text[a:b]) for a, b in itertools.pairwise(edges)]
    return joined([*pieces, splitter.split("", is_last=True)])


@pytest.mark.parametrize(
    ("text", "answer", "reasoning"),
    [
        ("<think>\nwell\n</think>\n\nseven", "\n\nseven", "\nwell\n"),
        ("\n <think>well</think>seven", "seven", "well"),
        ("<think></think>seven", "seven", ""),
        ("<think>a</think>b <think>c</think>", "b <think>c</think>", "a"),
        ("The tag <think> opens", "The tag <think> opens", ""),
        ("<thinking>", "<thinking>", ""),
        ("<think", "<think", ""),
        ("<think>no end </thi", "", "no end </thi"),
        ("  ", "  ", ""),
        ("", "", ""),
        ("[THINK]a[/THINK]b", "[THINK]a[/THINK]b", ""),  # not this model's
    ],
)
def test_thoughts_stand_at_the_beginning(text, answer, reasoning):
    assert split(text, marks=(THINK,)) == Piece(answer, reasoning)


@pytest.mark.parametrize(
    ("text", "answer", "reasoning"),
    [
        ("well</think>seven", "seven", "well"),
        ("\n<think>\nwell</think>seven", "seven", "\nwell"),  # which the prompt had opened already
        ("</think>seven", "seven", ""),
        ("seven", "", "seven"),
    ],
)
def test_thoughts_that_the_prompt_has_opened(text, answer, reasoning):
    assert split(text, marks=(THINK,), opened="</think>") == Piece(answer, reasoning)


def test_what_stands_before_answers_without_thoughts_is_no_part_of_them():
    form = {"marks": (HARMONY,), "opening": "<|channel|>final<|message|>"}
    assert split("<|channel|>final<|message|>seven", **form) == Piece("seven", "")
    assert split("<|channel|>analysis<|message|>well" + HARMONY[1] + "seven", **form) == Piece("seven", "well")


@given(
    parts=st.lists(st.sampled_from(MARKS_AND_TEXT), max_size=12),
    cuts=st.lists(st.integers(0, 60)),
    opened=st.sampled_from(["", "</think>"]),
    opening=st.sampled_from(["", "<think></think>\n", "<th"]),
)
def test_however_it_is_cut_the_parts_are_the_same(parts, cuts, opened, opening):
    text, form = "".join(parts), {"marks": (THINK,), "opened": opened, "opening": opening}
    whole = split(text, **form)
    assert split(text, cuts, **form) == whole
    assert split(text, range(len(text)), **form) == whole
    assert whole.text in text and whole.reasoning in text


@given(parts=st.lists(st.sampled_from(MARKS_AND_TEXT), max_size=12), has_tokens=st.booleans())
def test_tokens_are_read_as_their_text_is_split(parts, has_tokens):
    """Marks of several plain tokens, and of one special token each; an answer may have them in its text."""
    text, tokenizer = "".join(parts), with_marks() if has_tokens else tiny_tokenizer()
    found = read_answer(tokenizer, AnswerForm(None, "", (THINK,)), encode(tokenizer, text, special=True))
    assert found == split(text, marks=(THINK,))


def with_marks():
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(THINK)})
    return tokenizer


def test_half_a_character_at_the_end_of_thoughts_stays_there():
    tokenizer = with_marks()
    ids = encode(tokenizer, "<think>caf", special=True) + encode(tokenizer, "é", special=False)[:1]
    ids += encode(tokenizer, "</think>7", special=True) + encode(tokenizer, "é", special=False)[:1]
    assert read_answer(tokenizer, AnswerForm(None, "", (THINK,)), ids) == Piece("7\ufffd", "caf\ufffd")


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        ("▁hello <0x0A> <0xE2> a ▁b", "hello\n\ufffda b"),
        ("<0xE2> <0x82> <0xAC> <0xE2> ▁a <0x0A>", "€\ufffd a\n"),
        ("a <0x0A> <0xE2> <0x82> ▁b <0x0A> <0xE2> a", "a\n\ufffd\ufffd b\n\ufffda"),
        ("a <0xC3> <0xA9> <0xE2>", "aé\ufffd"),
    ],
)
def test_bytes_that_are_no_text_take_nothing_back(tokens, text):
    """Where each byte has a token, as for Llama 2, Mistral and Gemma."""
    tokenizer = byte_fallback_tokenizer()
    reader = AnswerReader(tokenizer)
    pieces = [*map(reader.read, tokenizer.convert_tokens_to_ids(tokens.split())), reader.end()]
    assert joined(pieces) == Piece(text)


def byte_fallback_tokenizer():
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁hello", "a", "▁a", "▁b"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def test_marks_are_those_that_template_or_tokenizer_know():
    for tokenizer, marks in (
        (tiny_tokenizer(), ()),
        (tiny_tokenizer(CHOOSES), (THINK,)),
        (with_marks(), (THINK,)),
        (tiny_tokenizer(None), ()),
    ):
        assert read_thinking(tokenizer, read_template(tokenizer)).marks == marks


def test_answers_that_somebody_kept():
    assert without_thoughts("<think>a</think>\n\nb", (THINK,)) == "\n\nb"
    assert without_thoughts("<think> is a tag", (THINK,)) == "<think> is a tag"
    assert without_thoughts("<think>a</think>b", ()) == "<think>a</think>b"


def engine_of(directory, template, special=(), config=None):
    """A tiny model with a template, and a cache `handbook`."""
    tokenizer = tiny_tokenizer(template)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    config = config or tiny_config()
    config.vocab_size = len(tokenizer) + 1
    write_tiny_model(directory, chat_template=template, config=config)
    tokenizer.save_pretrained(directory)
    engine = Engine(LanguageModel.load(directory, model_id=str(directory)), Store.open(directory / "store"))
    (directory / "alpha.md").write_text("# Alpha\n\nThe alpha gate opens at seven in the morning.\n")
    engine.build([directory / "alpha.md"], name="handbook")
    return engine


@pytest.fixture(scope="module", params=[(CHOOSES, THINK), (OPENS, THINK), (CHOOSES, ())], ids=["qwen", "r1", "plain"])
def thinker(request, tmp_path_factory, home_of_models):
    return engine_of(tmp_path_factory.mktemp("thinker"), *request.param)


@pytest.fixture
def prefix(thinker):
    with thinker.open("handbook") as opened:
        yield opened


@pytest.fixture
def forced(thinker, monkeypatch):
    return Forced(monkeypatch, thinker.model)


def thoughts_of(prefix, text="well, it says seven"):
    """As the model of `prefix` writes them when it is asked to think."""
    opened = prefix.model.thinking.after.endswith("<think>\n")
    return ("" if opened else "<think>\n") + text + "\n</think>\n\n"


def test_an_answer_has_its_thoughts_in_a_field_of_their_own(prefix, forced):
    script = thoughts_of(prefix) + "At seven."
    forced.say(script)
    answer = prefix.ask(QUESTION, think=True)
    assert (answer.text, answer.reasoning, answer.finish_reason) == ("At seven.", "well, it says seven", "stop")
    num_tokens = len(encode(prefix.model.tokenizer, script, special=True))
    num_answer = len(encode(prefix.model.tokenizer, "\n\nAt seven.", special=True))
    assert (answer.usage.completion_tokens, answer.usage.reasoning_tokens) == (num_tokens, num_tokens - num_answer)
    assert answer.citations[0].doc_id == "alpha.md"
    assert answer.timings.ttft_s < answer.timings.answer_ttft_s < answer.timings.total_s
    assert answer.to_json()["reasoning"] == answer.reasoning


def test_thoughts_that_nobody_asked_for_are_apart_too(prefix, forced):
    forced.say("<think>\nhm\n</think>\n\nAt seven.", "At <think> seven.")
    answer, plain = prefix.ask(QUESTION), prefix.ask(QUESTION)
    assert (answer.text, answer.reasoning) == ("At seven.", "hm")
    assert (plain.reasoning, plain.usage.reasoning_tokens) == ("", 0)
    assert plain.timings.answer_ttft_s == plain.timings.ttft_s


def test_the_prefix_is_the_same_and_the_suffix_the_templates_own(prefix, forced):
    tokenizer = prefix.model.tokenizer
    forced.say("<think>a</think>b", "b")
    for think in (True, False):
        session = prefix.session()
        stream = session.stream(QUESTION, think=think)
        turn = [{"role": "user", "content": QUESTION}]
        rendered = tokenizer.apply_chat_template(
            turn, tokenize=False, add_generation_prompt=True, enable_thinking=think
        )
        suffix = tokenizer.decode(stream._generation.suffix_ids)
        if think or prefix.model.thinking.after != "<|im_end|>\n<|im_start|>assistant\n<think>\n":
            assert rendered.endswith(suffix)
        else:
            assert suffix.endswith("<think>\n\n</think>\n\n")  # of DeepSeek's, which has no such choice
        list(stream)
        assert stream.answer.usage.cached_tokens == prefix.resident.num_tokens


def test_thoughts_that_are_cut_off_leave_an_empty_answer(prefix, forced):
    forced.say(thoughts_of(prefix) + "At seven.")
    session = prefix.session()
    answer = session.ask(QUESTION, SamplingOptions(max_tokens=12, think=True))
    assert (answer.text, answer.finish_reason, answer.citations) == ("", "length", ())
    assert answer.reasoning and answer.reasoning in "well, it says seven"
    assert answer.usage.reasoning_tokens == answer.usage.completion_tokens == 12
    assert answer.timings.answer_ttft_s == 0
    assert session.turns == [(QUESTION, "")]


def test_stop_strings_end_answers_and_no_thoughts(prefix, forced):
    forced.say(thoughts_of(prefix, "it says seven.") + "At seven in the morning.")
    answer = prefix.ask(QUESTION, think=True, stop=" in", speculate=False)
    assert (answer.text, answer.reasoning, answer.finish_reason) == ("At seven", "it says seven.", "stop")


@pytest.mark.parametrize("stop", [" in", "even", "At", "."])
def test_what_a_stop_string_has_cut_is_seen_by_no_later_question(prefix, monkeypatch, stop):
    expect_turns_as_replayed(prefix, monkeypatch, stop)


@pytest.mark.parametrize("family", ["qwen3_5_text", "falcon_h1"])
def test_recurrent_layers_forget_what_was_cut_too(family, tmp_path, monkeypatch):
    engine = engine_of(tmp_path, CHOOSES, THINK, FAMILIES[family]())
    with engine.open("handbook") as prefix:
        expect_turns_as_replayed(prefix, monkeypatch, stop="even")


def expect_turns_as_replayed(prefix, monkeypatch, stop):
    """A third question behind two answers that were cut, as behind the texts of those."""
    session = prefix.session()
    with monkeypatch.context() as patch:
        Forced(patch, prefix.model).say(*["At seven in the morning."] * 2)
        for question in ("When?", "Really?"):
            assert session.ask(question, stop=stop).finish_reason == "stop"
    replayed = prefix.session().stream("And why?", history=session.turns, max_tokens=6)
    stream = session.stream("And why?", max_tokens=6)
    assert session._read + stream._generation.suffix_ids == replayed._generation.suffix_ids
    assert prefix.model.recurrent or session._read
    for answered in (stream, replayed):
        list(answered)
    assert stream.answer.token_ids == replayed.answer.token_ids


@pytest.mark.parametrize("speculate", [False, True])
def test_streams_and_drafts_and_company_give_the_same(prefix, forced, speculate):
    script = thoughts_of(prefix, "The alpha gate opens at seven") + "The alpha gate opens at seven."
    forced.say(*[script] * 6)
    options = SamplingOptions(think=True, speculate=speculate)
    alone = prefix.ask(QUESTION, options)
    pieces = joined(prefix.stream(QUESTION, options).pieces())
    assert (pieces.text.strip(), pieces.reasoning.strip()) == (alone.text, alone.reasoning)
    assert "".join(prefix.stream(QUESTION, options)).strip() == alone.text
    together = prefix.ask_all([QUESTION] * 3, options)
    assert {(answer.text, answer.reasoning, answer.token_ids) for answer in together} == {
        (alone.text, alone.reasoning, alone.token_ids)
    }


def test_the_path_without_a_cache_does_the_same(prefix, forced, thinker):
    script = thoughts_of(prefix) + "At seven."
    forced.say(script, script)
    layout = lay_out(thinker.model.tokenizer, thinker.model.template, prefix._load_documents())
    fresh = ask_fresh(thinker.model, layout, QUESTION, SamplingOptions(think=True))
    cached = prefix.ask(QUESTION, think=True)
    assert (fresh.text, fresh.reasoning, fresh.usage.reasoning_tokens, fresh.usage.prompt_tokens) == (
        cached.text,
        cached.reasoning,
        cached.usage.reasoning_tokens,
        cached.usage.prompt_tokens,
    )


def rendered_ids(prefix, turns, question):
    """The whole conversation by the template itself; a document never speaks for it here."""
    tokenizer = prefix.model.tokenizer
    before, middle = prefix.template.before, prefix.template.middle
    system = tokenizer.decode(prefix.token_ids.tolist()).removeprefix(before).removesuffix(middle)
    messages = [{"role": "system", "content": system}]
    for asked, answer in turns:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    messages.append({"role": "user", "content": question})
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def plain_answer(model, ids, num_tokens):
    """What transformers says behind them."""
    network = AutoModelForCausalLM.from_pretrained(model.model_id, dtype=torch.float32)
    found, ids = [], list(ids)
    with torch.inference_mode():
        while len(found) < num_tokens:
            token = int(network(input_ids=torch.tensor([ids + found])).logits[0, -1].argmax())
            if token in model.stop_ids:
                break
            found.append(token)
    return found


def test_later_turns_are_those_of_the_template(prefix, monkeypatch):
    """Greedy tokens of a third question behind two answers with thoughts, against transformers over its template's
    rendering, which drops them."""
    tokenizer = prefix.model.tokenizer
    session = prefix.session()
    turns = [("When?", "At seven."), ("Who says so?", "The handbook, <think> or not.")]
    with monkeypatch.context() as patch:
        Forced(patch, prefix.model).say(*(thoughts_of(prefix) + answer for _, answer in turns))
        for asked, _ in turns:
            session.ask(asked, think=True, max_tokens=200)
    assert session.turns == turns
    stream = session.stream("And why?", max_tokens=8, think=True)
    ids = rendered_ids(prefix, turns, "And why?")
    behind = [*prefix.token_ids.tolist(), *session._read, *stream._generation.suffix_ids]
    assert tokenizer.decode(behind) == tokenizer.decode(ids)
    assert session.num_cached_tokens == len(prefix.token_ids) + len(session._read)
    list(stream)
    assert stream._generation.token_ids == plain_answer(prefix.model, behind, 8)


def test_a_turn_in_whose_thoughts_nobody_waited_was_not_asked(prefix, forced):
    forced.say(thoughts_of(prefix) + "At seven.", "never said", "At seven.", "At seven.")
    session, other = prefix.session(), prefix.session()
    pieces = session.stream(QUESTION, think=True).pieces()
    while not next(pieces).reasoning.strip():
        pass
    pieces.close()
    assert (session.num_cached_tokens, session.turns) == (len(prefix.token_ids), [])
    cancelled = session.stream(QUESTION, think=True)
    scheduler = Scheduler(prefix.model)
    request = cancelled.submit(scheduler, lambda _piece: None)
    scheduler.step()
    request.cancel()
    scheduler.run()
    assert cancelled.finish(request) is None
    assert session.ask(QUESTION).usage.prompt_tokens == other.ask(QUESTION).usage.prompt_tokens


def test_a_replayed_conversation_reads_as_one_that_was_held(prefix, forced):
    """Also where a client kept what models write around the answer."""
    forced.say(thoughts_of(prefix) + "At seven.", *["Because."] * 2)
    held = prefix.session()
    held.ask("When?", think=True)
    expected = held.stream("And why?", think=True)
    suffix = [*held._read, *expected._generation.suffix_ids]
    list(expected)
    for kept in ("At seven.", "<think>well</think>\n\nAt seven."):
        replayed = prefix.session().stream("And why?", think=True, history=[("When?", kept)])
        assert replayed._generation.suffix_ids == suffix


def test_room_for_thoughts_where_nobody_says_how_much():
    assert SamplingOptions().max_tokens == SamplingOptions(max_tokens=None).max_tokens == DEFAULT_MAX_TOKENS
    assert SamplingOptions(think=True).max_tokens == DEFAULT_MAX_TOKENS + THOUGHT_TOKENS
    assert SamplingOptions(think=True, max_tokens=9).max_tokens == 9


def test_channels_of_answers_and_thoughts(tmp_path, monkeypatch):
    """The token that ends a message of thoughts is the one that ends an answer elsewhere."""
    engine = engine_of(tmp_path, CHANNELS, CHANNEL_TOKENS)
    model = engine.model
    assert model.tokenizer.convert_tokens_to_ids("<|end|>") in model.stop_ids
    forced = Forced(monkeypatch, model)
    thoughts = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>"
    forced.say(f"{thoughts}At seven.", "<|channel|>final<|message|>At seven.", "At seven.")
    with engine.open("handbook") as prefix:
        session = prefix.session()
        thought, at_once, plain = (session.ask(QUESTION, think=think) for think in (True, True, False))
        assert [answer.text for answer in (thought, at_once, plain)] == ["At seven."] * 3
        assert [answer.reasoning for answer in (thought, at_once, plain)] == ["hm", "", ""]
        said = model.tokenizer.decode([*session._read, *session._unread])
    assert "analysis" not in said
    assert said.count("<|start|>assistant<|channel|>final<|message|>At seven.") == 3


@pytest.mark.parametrize("family", ["qwen3_5_text", "falcon_h1"])
def test_recurrent_layers_forget_thoughts_too(family, tmp_path, monkeypatch):
    """They go back to the beginning of the question."""
    engine = engine_of(tmp_path, CHOOSES, THINK, FAMILIES[family]())
    with engine.open("handbook") as prefix:
        session = prefix.session()
        stale = session.stream("Who says so?", think=True)
        with monkeypatch.context() as patch:
            Forced(patch, prefix.model).say(thoughts_of(prefix) + "At seven.", thoughts_of(prefix) + "I do.")
            session.ask("When?", think=True)
            with pytest.raises(UsageError, match="has begun since"):  # as many tokens are kept as before
                list(stale)
            session.ask("Who says so?", think=True)
        stream = session.stream("And why?", max_tokens=6, think=True)
        behind = [*prefix.token_ids.tolist(), *session._read, *stream._generation.suffix_ids]
        turns = [("When?", "At seven."), ("Who says so?", "I do.")]
        assert prefix.model.tokenizer.decode(behind) == prefix.model.tokenizer.decode(
            rendered_ids(prefix, turns, "And why?")
        )
        list(stream)
        assert stream._generation.token_ids == plain_answer(prefix.model, behind, 6)
