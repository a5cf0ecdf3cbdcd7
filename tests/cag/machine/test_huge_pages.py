"""Weights moved to huge pages: the same numbers in the same order, and never at the price of a slow start."""

from itertools import count

import pytest
import torch
from torch import nn

from cag.forward.weights import join_network
from cag.machine import huge_pages
from cag.machine.huge_pages import has_huge_pages, huge_memory, move_weights, whole_pages
from cag_store.scratch import HUGE_PAGE_BYTES

pytestmark = pytest.mark.skipif(not has_huge_pages(), reason="no huge pages on this system")


class Network(nn.Module):
    """Two layers whose first weights are joined, an embedding, and an output matrix that shares its weight."""

    def __init__(self, dtype=torch.bfloat16):
        super().__init__()
        self.embedding = nn.Embedding(50, 64, dtype=dtype)
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(64, 33, dtype=dtype) for name in ("gate_proj", "up_proj", "down_proj")})
            for _ in range(2)
        )
        self.head = nn.Linear(64, 50, bias=False, dtype=dtype)
        self.head.weight = self.embedding.weight
        join_network(self)


def weights(network):
    return [module.weight for module in network.modules() if isinstance(module, nn.Linear)]


def span(network):
    """First and last byte of the weights of linear layers."""
    places = [(p.data_ptr(), p.data_ptr() + p.nbytes) for p in weights(network)]
    return min(first for first, _ in places), max(last for _, last in places)


def test_numbers_and_what_is_shared_stay():
    network = Network()
    before = {name: parameter.clone() for name, parameter in network.named_parameters()}
    moved = move_weights(network)
    assert moved == sum(weight.nbytes for weight in weights(network))
    assert all(torch.equal(parameter, before[name]) for name, parameter in network.named_parameters())
    assert network.head.weight is network.embedding.weight
    for layer in network.layers:  # side by side still
        gate, up = layer["gate_proj"].weight, layer["up_proj"].weight
        assert gate.data_ptr() + gate.nbytes == up.data_ptr()
    first, last = span(network)
    assert first % HUGE_PAGE_BYTES == 0
    assert last - first <= moved


def test_what_is_not_contiguous_and_other_types_stay_what_they_are():
    network = nn.ModuleList([nn.Linear(32, 16), nn.Linear(5, 7).half(), nn.Embedding(4, 4)])
    network[0].weight = nn.Parameter(torch.randn(64, 16)[::2].t(), requires_grad=False)
    before = [(weight.clone(), weight.stride()) for weight in weights(network)]
    embedding = network[2].weight.data_ptr()
    assert move_weights(network)
    for weight, (numbers, stride) in zip(weights(network), before, strict=True):
        assert torch.equal(weight, numbers)
        assert weight.stride() == stride
    assert network[2].weight.data_ptr() == embedding  # only rows of it are read


def test_slow_pages_are_not_waited_for():
    network = Network()
    places = [weight.data_ptr() for weight in weights(network)]
    clock = count(step=0.3)  # seconds for each weight: within the grace once
    moved = move_weights(network, clock=lambda: next(clock))
    stayed = [before == weight.data_ptr() for before, weight in zip(places, weights(network), strict=True)]
    assert moved == sum(weight.nbytes for weight in weights(network)[:2])
    assert stayed == [False, False] + [True] * 5  # the first two are one memory


def test_nothing_is_moved_without_room_for_it(monkeypatch):
    network = Network()
    before = span(network)
    monkeypatch.setattr(huge_pages, "available_memory_bytes", lambda: 1000)
    assert move_weights(network) == 0
    assert span(network) == before


def test_memory_begins_with_a_whole_page_and_is_large_enough():
    memory = whole_pages(torch.frombuffer(huge_memory(3 * HUGE_PAGE_BYTES - 1), dtype=torch.uint8))
    assert memory.data_ptr() % HUGE_PAGE_BYTES == 0
    assert memory.numel() >= 3 * HUGE_PAGE_BYTES - 1
