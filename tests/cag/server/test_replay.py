"""Turns that were held elsewhere: the prompt of a replay, and many threads with one tokenizer."""

import sys
import threading

import pytest

from cag.errors import UsageError
from cag.generation.generate import SamplingOptions
from cag.prompt import conversation_ids, encode, question_ids

TURNS = [("When?", "At seven."), ("Whose key?", " Nobody's. ")]


def test_a_replay_reads_what_the_template_renders(engine):
    model = engine.model
    ids = conversation_ids(model.tokenizer, model.template, TURNS, "Where?")
    messages = [{"role": "system", "content": "S"}]
    for question, answer in TURNS:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer.strip()}]
    messages.append({"role": "user", "content": "Where?"})
    rendered = model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered.endswith(model.tokenizer.decode(ids))
    assert model.tokenizer.decode(ids).startswith("When?<|im_end|>")
    assert conversation_ids(model.tokenizer, model.template, [], "Q") == question_ids(
        model.tokenizer, model.template, "Q"
    )


def test_a_replayed_session_goes_on_as_one_that_held_the_turns(engine):
    with engine.open("handbook") as prefix:
        short = SamplingOptions(max_tokens=12)
        held, replayed = prefix.session(), prefix.session()
        first = held.ask("When?", short)
        expected = held.ask("Why?", short)
        answer = replayed.ask("Why?", short, history=[("When?", first.text)])
        assert answer.text == expected.text
        assert answer.usage.prompt_tokens == expected.usage.prompt_tokens
        assert answer.usage.cached_tokens == prefix.resident.num_tokens
        assert replayed.turns == held.turns
        with pytest.raises(UsageError, match="turns of its own"):
            replayed.ask("Who?", history=[("When?", "At seven.")])


def test_threads_tokenize_side_by_side(engine):
    tokenizer, text = engine.model.tokenizer, "the <|im_end|> valve " * 20
    expected = {special: encode(tokenizer, text, special=special) for special in (True, False)}
    right = []

    def work(special):
        right.extend(encode(tokenizer, text, special=special) == expected[special] for _ in range(150))

    assert expected[True] != expected[False]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(number % 2 == 0,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert len(right) == 600
    assert all(right)
