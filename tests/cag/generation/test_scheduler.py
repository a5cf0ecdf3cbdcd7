"""Many answers at once: the tokens that each has alone, whoever joins and leaves; errors stay with theirs."""

import random
import threading
from itertools import pairwise

import pytest
import torch
from test_weights import HAS_OWN, OWN_PRODUCT
from transformers import Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen3Config

from cag import model as model_module
from cag.engine import Engine
from cag.errors import UsageError
from cag.generation.answer import joined
from cag.generation.generate import SHARED_BLOCK_TOKENS, WHOLE_BLOCK_TOKENS, SamplingOptions
from cag.generation.scheduler import MAX_STEP_ROWS, Scheduler
from cag.machine.runtime import RuntimePlan
from cag_kernels import has_compiler, has_dots, has_tiles
from tiny import write_tiny_model

SHARED = {"vocab_size": 258, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
SHARED |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "pad_token_id": 257, "eos_token_id": 257}
LAYER_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
CONFIGS = {
    "llama": lambda: LlamaConfig(**SHARED),
    "qwen3": lambda: Qwen3Config(**SHARED),
    "mistral": lambda: MistralConfig(**SHARED, sliding_window=70),
    "gemma3": lambda: Gemma3TextConfig(**SHARED, sliding_window=40, layer_types=LAYER_TYPES),
}
KINDS = {  # name -> (what is stored, what computes, how products are made)
    "float32": ("float32", "float32", "plain"),
    "packed": ("bfloat16", "float32", "packed"),
    "tiles": ("bfloat16", "bfloat16", "tiles"),
    "dots": ("bfloat16", "bfloat16", "dots"),
    "packed float16": ("float16", "float32", "packed"),
    "packed float32": ("float32", "float32", "packed"),
}
CHOSEN = [  # the last two with two architectures
    (kind, name) for name in CONFIGS for kind in list(KINDS)[: 6 if name in ("llama", "gemma3") else 4]
]
APART = OWN_PRODUCT if HAS_OWN else "float32"  # whose rows stay apart by construction, wherever the tests run
TEXTS = {"alpha": "The alpha gate opens at seven. Its code is 4711.\n", "beta": "The beta pump moves 30 litres.\n" * 9}
WORDS = ["gate", "pump", "who", "<|im_end|>", "ä€", "seven litres", "why not", "4711"]
LONG = "and " * (WHOLE_BLOCK_TOKENS // 4 + 20)


def engine_of(kind, config, root, monkeypatch):
    """A random model, and a cache of each text in `lossless` and `int8`."""
    stored, computes, product = KINDS[kind]
    if product == "tiles" and not has_tiles():
        pytest.skip("this processor has no tiles")
    if product == "dots" and (has_tiles() or not has_dots()):
        pytest.skip("this processor has other products, or none")
    if product != "plain" and not has_compiler():
        pytest.skip("llvmlite is not there")
    plan = RuntimePlan("cpu", computes, 1, 1, product, {}, "for tests")
    monkeypatch.setattr(model_module, "plan_runtime", lambda _device: plan)
    write_tiny_model(root / "model", config=config, dtype=getattr(torch, stored))
    engine = Engine.load(str(root / "model"), store=root / "store", device="cpu")
    for name, text in TEXTS.items():
        (root / f"{name}.txt").write_text(text)
        for codec in ("lossless", "int8"):
            engine.build([root / f"{name}.txt"], name=f"{name}-{codec}", codec=codec)
    return engine


@pytest.fixture
def engine(tmp_path, monkeypatch):
    return engine_of(APART, CONFIGS["llama"](), tmp_path, monkeypatch)


def question_of(chance):
    words = [chance.choice(WORDS) for _ in range(chance.choice([1, 3, 8, 25]))]
    return (LONG if chance.random() < 0.1 else "") + " ".join(words)


def play(engine, chance, num_requests):
    """Requests that join at random steps; some leave early. Pairs of what was asked and what came of it."""
    prefixes = [engine.open(f"{name}-{codec}") for name in TEXTS for codec in ("lossless", "int8")]
    scheduler, asked, live = Scheduler(engine.model), [], []
    left = num_requests
    while left or scheduler.num_requests:
        for _ in range(min(left, chance.choice([0, 0, 1, 1, 4]))):
            prefix, question = chance.choice(prefixes), question_of(chance)
            options = SamplingOptions(
                max_tokens=chance.choice([1, 4, 20, 40]), temperature=chance.choice([0.0, 0.0, 0.0, 1.5]), seed=left
            )
            stream = prefix.session().stream(question, options)
            request = stream.submit(scheduler, lambda _piece: None)
            asked.append((prefix, question, options, stream, request))
            live.append(request)
            left -= 1
        if live and chance.random() < 0.05:
            chance.choice(live).cancel()
        scheduler.step()
        owned = [one[3]._session._state.tail.pages for one in asked]
        engine.model.pages.check_integrity(owned)
    return scheduler, asked


@pytest.mark.parametrize(("kind", "architecture"), CHOSEN)
def test_answers_are_those_of_the_same_questions_asked_alone(kind, architecture, tmp_path, monkeypatch):
    engine = engine_of(kind, CONFIGS[architecture](), tmp_path, monkeypatch)
    engine.model.stop_ids = frozenset()  # long answers
    scheduler, asked = play(engine, random.Random(f"{kind} {architecture}"), 16)
    answers = [(one, one[3].finish(one[4])) for one in asked]
    whole = [(one, answer) for one, answer in answers if answer is not None]
    assert len(whole) >= 10
    assert scheduler.largest_batch > 2
    for (prefix, question, options, _, _), answer in whole:
        alone = prefix.ask(question, options)
        assert answer.token_ids == alone.token_ids
        assert answer.text == alone.text
        assert answer.usage == alone.usage
        assert answer.finish_reason == alone.finish_reason


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_answers_in_many_more_orders(seed, tmp_path, monkeypatch):
    chance = random.Random(seed)
    engine = engine_of(chance.choice(list(KINDS)), CONFIGS[chance.choice(list(CONFIGS))](), tmp_path, monkeypatch)
    for prefix, question, options, stream, request in play(engine, chance, 80)[1]:
        answer = stream.finish(request)
        assert answer is None or answer.token_ids == prefix.ask(question, options).token_ids


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_logits_of_a_row_in_company(kind, architecture, tmp_path, monkeypatch):
    """To the bit by tiles, by products of pairs and over packed weights. A library's products sum in another order."""
    engine = engine_of(kind, CONFIGS[architecture](), tmp_path, monkeypatch)
    model, prefix = engine.model, engine.open("beta-lossless").resident
    prefix.wait()
    lengths = [7, 1, 30, 12, 100]
    ids = [torch.arange(length) * 7 % 250 for length in lengths]

    def states():
        found = [model.new_session_state(prefix) for _ in ids]
        for index, state in enumerate(found):
            model.forward(list(range(3 + 40 * index)), state)
        return found

    together = model.forward_together(list(zip(ids, states(), strict=True)))
    alone = torch.cat([model.forward(part, state) for part, state in zip(ids, states(), strict=True)])
    bound = 1e-5 if kind == "float32" else 0.0
    assert (together - alone).abs().max() <= bound * alone.abs().max()


def test_ask_all_gives_the_answers_in_order(engine):
    questions = ["Who?", "When does the gate open?", "Why " * 30, "x"]
    with engine.open("alpha-int8") as prefix:
        together = prefix.ask_all(questions, max_tokens=9)
        assert [answer.token_ids for answer in together] == [
            prefix.ask(question, max_tokens=9).token_ids for question in questions
        ]


def test_a_session_goes_on_after_an_answer_in_company(engine):
    with engine.open("alpha-lossless") as prefix:
        scheduler, sessions = Scheduler(engine.model), [prefix.session() for _ in range(3)]
        options, texts = SamplingOptions(max_tokens=5), []
        for question in ("Who?", "And then?"):
            streams = [session.stream(f"{question} {index}", options) for index, session in enumerate(sessions)]
            requests = [stream.submit(scheduler, lambda _piece: None) for stream in streams]
            scheduler.run()
            texts.append([s.finish(request).token_ids for s, request in zip(streams, requests, strict=True)])
        for index in range(3):
            alone = prefix.session()
            for question, found in zip(("Who?", "And then?"), texts, strict=True):
                assert alone.ask(f"{question} {index}", options).token_ids == found[index]


def test_pieces_are_the_text_and_a_busy_session_is_refused(engine):
    with engine.open("alpha-lossless") as prefix:
        scheduler, session, pieces = Scheduler(engine.model), prefix.session(), []
        stream = session.stream("Who?", SamplingOptions(max_tokens=12))
        request = stream.submit(scheduler, pieces.append)
        with pytest.raises(UsageError, match="still running"):
            session.ask("And?")
        scheduler.run()
        assert joined(pieces).text.strip() == stream.finish(request).text


def test_one_failing_forward_or_listener_harms_nobody_else(engine, monkeypatch):
    forward, options = engine.model.choose_together, SamplingOptions(max_tokens=6)
    with engine.open("alpha-lossless") as prefix:
        streams = [prefix.session().stream(f"Who {index}?", options) for index in range(4)]
        broken = streams[2]._session._state

        def failing(chunks, **more):
            if any(state is broken and state.num_tail for _, state in chunks):  # its question is read
                raise MemoryError("no more pages")
            return forward(chunks, **more)

        def listener(_piece):
            raise OSError("nobody listens")

        monkeypatch.setattr(engine.model, "choose_together", failing)
        scheduler = Scheduler(engine.model)
        listeners = [lambda _piece: None, listener, lambda _piece: None, lambda _piece: None]
        requests = [stream.submit(scheduler, hear) for stream, hear in zip(streams, listeners, strict=True)]
        scheduler.run()
        monkeypatch.undo()
        with pytest.raises(OSError, match="nobody listens"):
            streams[1].finish(requests[1])
        with pytest.raises(MemoryError, match="pages"):
            streams[2].finish(requests[2])
        for index in (0, 3):
            assert streams[index].finish(requests[index]).token_ids == prefix.ask(f"Who {index}?", options).token_ids


def test_who_is_cancelled_leaves_at_the_next_step(engine):
    with engine.open("alpha-lossless") as prefix:
        scheduler, options = Scheduler(engine.model), SamplingOptions(max_tokens=50)
        streams = [prefix.session().stream("Who?", options) for _ in range(2)]
        requests = [stream.submit(scheduler, lambda _piece: None) for stream in streams]
        scheduler.step()
        scheduler.step()
        requests[0].cancel()
        assert scheduler.step() == 1
        assert requests[0].ended
        assert streams[0].finish(requests[0]) is None
        requests[1].cancel()
        assert scheduler.step() == 0


def step_sizes(engine):
    """Tokens of each who took part, step by step, of an answer beside a long prompt."""
    engine.model.stop_ids = frozenset()
    with engine.open("alpha-lossless") as prefix:
        scheduler, sizes = Scheduler(engine.model), []
        forward = engine.model.choose_together

        def counted(chunks, **more):
            sizes.append([len(tokens) for tokens, _ in chunks])
            return forward(chunks, **more)

        engine.model.choose_together = counted
        short = prefix.session().stream("Who?", SamplingOptions(max_tokens=30, speculate=False))
        long = prefix.session().stream("why " * 300, SamplingOptions(max_tokens=3))
        requests = [stream.submit(scheduler, lambda _piece: None) for stream in (short, long)]
        scheduler.run()
        assert all(request.error is None for request in requests)
    return sizes


def test_blocks_of_a_long_prompt_share_the_steps_of_answers(tmp_path, monkeypatch):
    """Where few rows have a forward of their own."""
    sizes = step_sizes(engine_of("packed", CONFIGS["llama"](), tmp_path, monkeypatch))
    blocks = [size for size in sizes if SHARED_BLOCK_TOKENS in size]
    assert len(blocks) >= 10
    assert all(len(size) == 2 for size in blocks)


def test_nobody_waits_for_more_than_a_block_of_a_long_prompt(tmp_path, monkeypatch):
    """Elsewhere steps with a long block alternate with steps of everybody else."""
    sizes = step_sizes(engine_of("float32", CONFIGS["llama"](), tmp_path, monkeypatch))
    blocks = [index for index, size in enumerate(sizes) if max(size) == WHOLE_BLOCK_TOKENS]
    assert len(blocks) >= 3
    assert all(len(sizes[index]) == 1 for index in blocks)
    assert all(later - earlier == 2 for earlier, later in pairwise(blocks))


def test_rows_of_a_step_are_bounded(engine):
    with engine.open("alpha-lossless") as prefix:
        scheduler, sizes = Scheduler(engine.model), []
        forward = engine.model.choose_together

        def counted(chunks, **more):
            sizes.append(sum(len(tokens) for tokens, _ in chunks))
            return forward(chunks, **more)

        engine.model.choose_together = counted
        streams = [prefix.session().stream("x" * 60, SamplingOptions(max_tokens=4)) for _ in range(9)]
        requests = [stream.submit(scheduler, lambda _piece: None) for stream in streams]
        scheduler.run()
        assert all(request.error is None for request in requests)
    assert max(sizes) <= MAX_STEP_ROWS


def test_a_shared_step_that_fails_is_logged_once(engine, monkeypatch, caplog):
    """However many answers and tokens it concerns; each is computed alone then."""
    forward = engine.model.choose_together

    def alone_only(chunks, **more):
        if len(chunks) > 1:
            raise RuntimeError("no memory for two")
        return forward(chunks, **more)

    monkeypatch.setattr(engine.model, "choose_together", alone_only)
    with engine.open("alpha-lossless") as prefix:
        scheduler, options = Scheduler(engine.model), SamplingOptions(max_tokens=4)
        streams = [prefix.session().stream("Who holds the omega key?", options) for _ in range(3)]
        requests = [stream.submit(scheduler, lambda _piece: None) for stream in streams]
        scheduler.run()
        answers = [stream.finish(request) for stream, request in zip(streams, requests, strict=True)]
    assert len({answer.token_ids for answer in answers}) == 1
    (record,) = caplog.records
    assert "no memory for two" in caplog.text
    assert "alone_only" in caplog.text  # where it was
    assert "omega" not in caplog.text
    assert record.getMessage() == "a step of 3 answers failed; each is computed alone"


def test_a_prefix_that_still_loads_holds_up_nobody(engine):
    """Who stands behind it joins when it is there."""
    with engine.open("alpha-lossless") as here, engine.open("beta-lossless") as arriving:
        here.resident.wait()
        arriving.resident.wait()
        arriving.resident._ready[-1].clear()
        scheduler, options = Scheduler(engine.model), SamplingOptions(max_tokens=4)
        streams = [prefix.session().stream("Who?", options) for prefix in (arriving, here)]
        late, soon = (stream.submit(scheduler, lambda _piece: None) for stream in streams)
        while not soon.ended:
            assert scheduler.step() == 1
        threading.Timer(0.05, arriving.resident._ready[-1].set).start()
        scheduler.run()  # nobody else is left: it computes as its layers arrive
        assert late.error is None
        assert streams[0].finish(late).token_ids == arriving.ask("Who?", options).token_ids


@pytest.mark.parametrize("kind", ["float32", "packed"])
def test_who_computes_as_its_layers_arrive_makes_way(kind, tmp_path, monkeypatch):
    """For those that can be answered at once, and for itself when it is cancelled. What it had computed leaves no
    trace."""
    engine = engine_of(kind, CONFIGS["llama"](), tmp_path, monkeypatch)
    with engine.open("alpha-lossless") as here, engine.open("beta-lossless") as arriving:
        here.resident.wait()
        arriving.resident.wait()
        rest = arriving.resident._ready[1:]
        for layer in rest:
            layer.clear()
        scheduler, options = Scheduler(engine.model), SamplingOptions(max_tokens=4)

        def asked(prefix):
            stream = prefix.session().stream("Who?", options)
            return stream, stream.submit(scheduler, lambda _piece: None)

        (stream, late), (_, gone) = asked(arriving), asked(arriving)
        stepping = threading.Thread(target=scheduler.run)
        stepping.start()
        timer = threading.Timer(5, lambda: [layer.set() for layer in rest])  # should nobody make way
        timer.start()
        _, soon = asked(here)
        soon.wait()
        gone.cancel()
        gone.wait()
        assert not arriving.resident.is_loaded
        assert not late.ended
        timer.function()
        timer.cancel()
        stepping.join()
        assert stream.finish(late).token_ids == arriving.ask("Who?", options).token_ids
