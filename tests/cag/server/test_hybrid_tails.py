"""What a server says of the memory that sessions of a model with recurrent layers hold."""

import pytest
import torch
from chats import QUESTIONS, asked, conversation, counts, text
from hybrids import FAMILIES
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from cag.engine import Engine
from tiny import write_tiny_model

pytestmark = pytest.mark.anyio


def let_speak_in_letters(model):
    """Other bytes are not chosen: a text of any bytes does not become the tokens again that it was."""
    weights = load_file(model / "model.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(model)
    is_letter = [tokenizer.decode([token]).isalpha() for token in range(len(weights["lm_head.weight"]))]
    weights["lm_head.weight"][~torch.tensor(is_letter)] = 0
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    root = tmp_path_factory.mktemp("hybrid")
    model = write_tiny_model(root / "model", config=FAMILIES["qwen3_5_text"]())
    let_speak_in_letters(model)
    engine = Engine.load(str(model), store=root / "store", device="cpu")
    (root / "pumps.txt").write_text("\n".join(f"The pump number {i} runs at {i * 7} bar." for i in range(9)))
    engine.build([root / "pumps.txt"], name="pumps")
    return engine


async def tail_bytes(client):
    lines = (await client.get("/metrics")).text.splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("cag_tail_bytes ")))


async def test_states_of_open_sessions_are_counted_with_their_pages(serving, engine):
    async with serving() as served:
        sessions = [(await served.client.post("/v1/caches/pumps/sessions")).json() for _ in range(3)]
        states = engine.model.recurrent.num_bytes
        for number, session in enumerate(sessions, start=1):
            place = f"/v1/sessions/{session['id']}"
            answer = await served.client.post(f"{place}/ask", json={"question": "How?", "max_tokens": 4})
            assert answer.status_code == 200, answer.text
            assert await tail_bytes(served.client) - engine.model.pages.num_bytes == number * states > 0
        await served.client.delete(place)
        assert await tail_bytes(served.client) - engine.model.pages.num_bytes == 2 * states


async def test_a_conversation_is_found_whole_or_read_anew(serving, engine):
    """Layers that cannot go back: what goes on is found, another way is read from its beginning."""
    num_prefix = engine.find("pumps")[1].num_tokens
    async with serving(conversation_bytes=0) as served:
        expected, turns = await conversation(served.client, QUESTIONS, model="pumps")
        other = await asked(served.client, turns[:1], "Where is the pump?", model="pumps")
        assert counts(other)[0] == num_prefix
    async with serving() as served:
        found, _ = await conversation(served.client, QUESTIONS, model="pumps")
        another = await asked(served.client, turns[:1], "Where is the pump?", model="pumps")
        assert (await asked(served.client, turns[:1], "Where is the pump?", model="pumps"))["usage"] == another["usage"]
    assert [text(one) for one in found] == [text(one) for one in expected]
    assert text(another) == text(other)
    assert counts(another)[0] == num_prefix
    for later, earlier in zip(found[1:], found, strict=False):
        assert counts(later)[0] > counts(earlier)[1]
