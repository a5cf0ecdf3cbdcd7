"""What a server says of the memory that sessions of a model with recurrent layers hold."""

import pytest
from hybrids import FAMILIES

from cag.engine import Engine
from tiny import write_tiny_model

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    root = tmp_path_factory.mktemp("hybrid")
    model = write_tiny_model(root / "model", config=FAMILIES["qwen3_5_text"]())
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
