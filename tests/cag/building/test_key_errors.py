"""Which layers' keys are hurt: the estimate against the divergence itself, and against damage put there."""

import pytest
import torch

from cag.building.chunks import PrefixChunks
from cag.building.key_errors import key_errors, most_hurt, moved_weights
from cag.building.probes import Branch
from cag_store import codec_from_config

TOKENS = [(7 * number) % 250 for number in range(600)]
BRANCHES = [Branch("continuation", tuple(range(40)), tuple(range(1, 41))) for _ in range(6)]


def test_the_estimate_is_the_divergence_of_the_weights_for_small_errors():
    torch.manual_seed(0)
    query, keys = torch.randn(4, 5, 16), torch.randn(2, 70, 16)
    decoded = keys + 0.02 * torch.randn_like(keys)
    expected = 0.0
    for head in range(4):
        scores, other = (query[head] @ side[head // 2].T * 0.25 for side in (keys, decoded))
        log_p, log_q = scores.log_softmax(-1), other.log_softmax(-1)
        expected += float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    assert float(moved_weights(query, keys, decoded, 0.25)) == pytest.approx(expected, rel=0.05)


@pytest.fixture
def chunks(tiny_engine):
    ids = torch.tensor(TOKENS).numpy()
    found = PrefixChunks(tiny_engine.model, tiny_engine.store, ids, tiny_engine.model.new_state(capacity=len(ids)))
    found.compute(lambda _: None)
    return found


def test_the_layer_that_was_damaged_is_found(chunks):
    def decoded(layer):
        keys = chunks.state.tail.keys[layer][:, : len(TOKENS)].clone()
        return keys + 0.1 * layer * torch.randn_like(keys)

    errors = key_errors(chunks.model, chunks.resident, BRANCHES, decoded)
    assert errors[0] == 0 < errors[1]
    assert most_hurt(errors, 1) == [1]
    assert most_hurt([0.1, 3.0, 0.2, 3.0], 3) == [1, 2, 3]


def test_decoded_keys_are_those_that_a_reader_gets(chunks):
    codec = codec_from_config("int4").config()
    before = [keys.clone() for keys in chunks.state.tail.keys]
    found = [chunks.decoded_keys(codec, layer) for layer in range(len(before))]
    assert all(torch.equal(*pair) for pair in zip(before, chunks.state.tail.keys, strict=True))
    context, entries = chunks.context(codec), []
    with chunks.store.build_lease():
        for start in range(0, len(TOKENS), context.chunk_tokens):
            entries.append(chunks.put(context, entries[-1].key if entries else "", start))
        chunks.load(entries, context)
    for layer, keys in enumerate(chunks.state.tail.keys):
        assert torch.equal(keys[:, : len(TOKENS)], found[layer])
