"""The real models, end to end: answers, citations, and the same answers as plain transformers. `make test-slow`."""

import json
import os
from pathlib import Path

import pytest
import torch

from cag.engine import Engine
from cag.generation.generate import SamplingOptions
from cag.home import cag_home as user_home
from cag.prompt import question_ids
from cag_bench.text_metrics import containment, token_f1

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

HANDBOOK = Path(__file__).parents[2] / "examples" / "handbook"
QWEN = "qwen2.5-coder-1.5b-instruct"
SMOL = "smollm2-135m-instruct"
USER_HOME = user_home()
GREEDY = SamplingOptions(max_tokens=32)


@pytest.fixture
def cag_home(monkeypatch):
    """The user's own home: the models are there, or are pulled there."""
    monkeypatch.setenv("CAG_HOME", str(USER_HOME))
    monkeypatch.delenv("CAG_THREADS", raising=False)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """The default model on a store of its own."""
    os.environ["CAG_HOME"] = str(USER_HOME)
    return Engine.load(QWEN, store=tmp_path_factory.mktemp("store"))


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_sample_questions_are_answered_and_cited(engine):
    """Containment of the expected answer >= 0.85, the right document cited for >= 0.9 of the questions."""
    questions = read_jsonl(HANDBOOK / "questions.jsonl")
    engine.build([HANDBOOK / "docs"], name="handbook")
    contained, cited, misses = [], [], []
    with engine.open("handbook") as prefix:
        for item in questions:
            answer = prefix.ask(item["question"], GREEDY)
            contained.append(containment(answer.text, item["answers"]))
            cited.append(bool({c.doc_id for c in answer.citations} & set(item["doc_ids"])))
            assert answer.usage.cached_tokens == len(prefix.token_ids)
            if not (contained[-1] and cited[-1]):
                misses.append((item["qid"], item["answers"][0], answer.text, [c.doc_id for c in answer.citations]))
    print(f"containment {sum(contained) / 30:.3f}, cited {sum(cited) / 30:.3f}", *misses, sep="\n")
    assert sum(contained) / len(questions) >= 0.85
    assert sum(cited) / len(questions) >= 0.9


def test_squad_f1_is_no_lower_than_plain_transformers(engine, shared_data):
    """SQuAD tiny4k, first 24 questions, the same prompt: ours behind the reloaded cache, theirs on a DynamicCache."""
    from transformers import AutoModelForCausalLM, DynamicCache

    folder = shared_data / "dev" / "squad" / "tiny4k"
    questions = read_jsonl(folder / "questions.jsonl")[:24]
    engine.build([folder / "documents.jsonl"], name="squad")
    ours, theirs, answers = [], [], []
    with engine.open("squad") as prefix:
        for item in questions:
            answers.append(prefix.ask(item["question"], GREEDY).text)
            ours.append(token_f1(answers[-1], item["answers"]))
        ids, template = prefix.token_ids.tolist(), prefix.template
    model = engine.model
    directory = USER_HOME / "models" / QWEN
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=model.compute_dtype)
    torch.set_num_threads(model.plan.threads_large)
    with torch.inference_mode():
        cache = DynamicCache(config=plain.config)
        for start in range(0, len(ids), 512):
            plain(input_ids=torch.tensor([ids[start : start + 512]]), past_key_values=cache, logits_to_keep=1)
        same = 0
        for item, our_text in zip(questions, answers, strict=True):
            new = question_ids(model.tokenizer, template, item["question"])
            generated: list[int] = []
            while len(generated) < GREEDY.max_tokens:
                logits = plain(input_ids=torch.tensor([new]), past_key_values=cache, logits_to_keep=1).logits
                new = [int(logits[0, -1].argmax())]
                if new[0] in model.stop_ids:
                    break
                generated += new
            cache.crop(len(ids) - cache.get_seq_length())
            text = model.tokenizer.decode(generated).strip()
            theirs.append(token_f1(text, item["answers"]))
            same += text == our_text
    print(f"F1 ours {sum(ours) / 24:.3f}, plain transformers {sum(theirs) / 24:.3f}, {same} of 24 answers the same")
    assert sum(ours) >= sum(theirs) - 1e-9
    assert sum(ours) / 24 > 0.6


def test_smollm2_reloaded_logits_and_answers_are_bit_identical(tmp_path, shared_data):
    """Never left memory against built, stored, reloaded in a second engine: every logit of a question, every token."""
    folder = shared_data / "dev" / "squad" / "tiny2k"
    first = Engine.load(SMOL, store=tmp_path / "store")
    from cag.corpus import load_documents
    from cag.prefill import prefill
    from cag.prompt import lay_out
    from cag.residency.resident import ResidentPrefix

    first.build([folder / "documents.jsonl"], name="squad")
    model = first.model
    layout = lay_out(model.tokenizer, model.template, load_documents([folder / "documents.jsonl"]))
    state = model.new_state(capacity=len(layout.token_ids))
    prefill(model, state, layout.token_ids.tolist())
    memory = ResidentPrefix.from_tail(state.tail, layout.token_ids)
    second = Engine.load(SMOL, store=tmp_path / "store")
    with second.open("squad") as prefix:
        for item in read_jsonl(folder / "questions.jsonl")[:6]:
            suffix = question_ids(model.tokenizer, model.template, item["question"])
            expected = model.forward(suffix, model.new_state(memory), num_logits=0)
            found = second.model.forward(suffix, second.model.new_state(prefix.resident), num_logits=0)
            assert torch.equal(found, expected)
