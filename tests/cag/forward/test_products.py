"""Linear layers of networks with their own forward: a sequence's rows have the same bits alone and in company."""

import pytest
import torch
from test_weights import HAS_OWN, OWN_PRODUCT
from torch import nn

from cag.forward import weights
from cag.forward.products import SequencesApart
from cag.forward.weights import CompiledLinear, PackedLinear, pack_network, use_products
from cag.machine.runtime import RuntimePlan
from cag_kernels import has_compiler

OWN = pytest.param(OWN_PRODUCT, marks=pytest.mark.skipif(not HAS_OWN, reason="no product of bfloat16 of ours"))
COUNTS = [[1] * 16, [1, 5, 2], [30, 25], [47, 1], [48, 1], [60, 1], [1, 400], [200, 90]]


@pytest.fixture(params=["plain", "transposed", "packed", OWN])
def network(request):
    """Two layers, of which the second adds a bias."""
    generator = torch.Generator().manual_seed(1)
    made = nn.Sequential(nn.Linear(64, 96, bias=False), nn.Linear(96, 80)).bfloat16()
    for parameter in made.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
        parameter.requires_grad = False
    if request.param == "packed":
        if not has_compiler():
            pytest.skip("llvmlite is not there")
        pack_network(made)
        assert all(isinstance(layer, PackedLinear) for layer in made)
    else:
        use_products(made, RuntimePlan("cpu", "bfloat16", 1, 1, request.param, {}, "for tests"))
        assert all(isinstance(layer, CompiledLinear) for layer in made) == (request.param == OWN_PRODUCT)
    return made


def dtype_of(network):
    return torch.float32 if isinstance(network[0], PackedLinear) else torch.bfloat16


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("each_a_row", [False, True])
def test_rows_have_the_same_bits_in_company(network, counts, each_a_row):
    """Side by side, or, where all have as many, each sequence a row of the batch."""
    if each_a_row:
        counts = [counts[0]] * len(counts)
    rows = torch.randn(sum(counts), 64, generator=torch.Generator().manual_seed(2)).to(dtype_of(network))
    alone = torch.cat([network(part[None])[0] for part in torch.split_with_sizes(rows, counts)])
    block = rows.view(len(counts), counts[0], 64) if each_a_row else rows[None]
    with SequencesApart(network)(counts, counts):
        together = network(block)
    assert torch.equal(together.reshape(alone.shape), alone)


def test_compiled_code_reads_a_weight_once_for_all_sequences(network, monkeypatch):
    num_rows = []
    for name in ("packed_linear", "dot_linear", "tile_linear"):
        multiply = getattr(weights, name)

        def counted(block, *others, multiply=multiply):
            num_rows.append(block.shape[-2])
            return multiply(block, *others)

        monkeypatch.setattr(weights, name, counted)
    with SequencesApart(network)([1] * 8, [1] * 8):
        network(torch.randn(1, 8, 64).to(dtype_of(network)))
    compiled = isinstance(network[0], PackedLinear | CompiledLinear)
    assert num_rows == ([8, 8] if compiled else [])
