"""Tile products (AMX): what processor and system want of them, and the middle of a layer against a float64 oracle."""

import ctypes
import subprocess
import sys

import pytest
import torch

from cag_kernels import has_compiler, tile_linear
from cag_kernels.cpu.attention.segments import cpu_attention
from cag_kernels.linear import tile_mlp_reference
from cag_kernels.rows_reference import ACTIVATIONS

if has_compiler():
    from cag_kernels.cpu.products.tile_mlp import TileMlp, serves
    from cag_kernels.cpu.tape import Tape
    from cag_kernels.cpu.tiles import has_tiles
pytestmark = pytest.mark.skipif(
    not has_compiler() or not has_tiles(), reason="this processor has no tiles of bfloat16 (AMX)"
)

MLP = [
    (1, 64, 96, 64),
    (15, 576, 1536, 576),
    (16, 32, 32, 32),
    (17, 96, 160, 77),
    (40, 1056, 64, 1000),
    (128, 64, 96, 48),
]


def test_the_librarys_tiles_are_left_as_they_were(threads):
    """A library that configured tiles for itself finds its configuration again: its products keep their bits."""
    threads(1)
    left, right = torch.randn(200, 320).bfloat16(), torch.randn(320, 130).bfloat16()
    query, keys, values = (torch.randn(*shape, 64).bfloat16() for shape in ((4, 3), (2, 200), (2, 200)))
    before = left @ right
    for _ in range(3):
        cpu_attention(query, keys, values, scale=0.1, offset=200)
        assert torch.equal(left @ right, before)
        tile_linear(torch.randn(3, 64), torch.randn(64, 64).bfloat16())
        assert torch.equal(left @ right, before)


def test_permission_was_asked_for():
    """Linux gives a process tiles on request only; whoever runs tiles has asked."""
    permitted = ctypes.c_uint64()
    arch_prctl, get_permitted = 158, 0x1022
    assert ctypes.CDLL(None).syscall(arch_prctl, get_permitted, ctypes.byref(permitted)) == 0
    assert permitted.value >> 18 & 1


def test_code_from_a_file_asks_for_permission_too():
    """A process that finds its code made emits nothing, and yet no tile may be its first."""
    text = (
        "import torch; from cag_kernels.cpu.attention import segments as cpu; q = torch.ones(3, 1, 64).bfloat16();"
        "k = torch.ones(1, 70, 64).bfloat16(); print(cpu.cpu_attention(q, k, k, scale=0.1, offset=70)[0].sum().item())"
    )
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        assert abs(float(done.stdout) - 3 * 64) < 1e-3 * 3 * 64


def mlp_of(shape):
    """Rows and weights whose gates are in the range of a network's."""
    num_rows, in_features, size, out_features = shape
    generator = torch.Generator().manual_seed(sum(shape))
    rows = torch.randn(num_rows, in_features, generator=generator)
    gate_and_up = torch.randn(2 * size, in_features, generator=generator) * 2 * in_features**-0.5
    return rows, gate_and_up.bfloat16(), torch.randn(out_features, size, generator=generator).bfloat16()


@pytest.mark.parametrize("shape", MLP)
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_middle_of_a_layer_matches_the_oracle(shape, num_threads, activation, threads):
    threads(num_threads)
    rows, gate_and_up, down = mlp_of(shape)
    assert serves(gate_and_up, down)
    found = TileMlp(gate_and_up, down, activation)(rows)
    expected = tile_mlp_reference(rows.double(), gate_and_up, down, activation)
    plain = tile_mlp_reference(rows, gate_and_up, down, activation)
    # a gated number next to the middle of two bfloat16 is rounded to the other one by the least difference before it
    steps = 2.0**-8 * (rows.double().abs().amax() + 1) * down.double().abs().amax()
    assert found.dtype == torch.float32
    assert (found.double() - expected).abs().max() <= 2 * (plain.double() - expected).abs().max() + steps
    assert (found.double() - expected).norm() <= 1e-3 * expected.norm()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gates_of_any_size_and_no_number(activation):
    gate_and_up, down = torch.eye(32).repeat(2, 1).bfloat16(), torch.eye(32).bfloat16()
    values = [0.0, -0.0, 1e-30, -1e-30, 3.0, -3.0, 87.0, -87.0, -90.0, 200.0, -200.0, 1e4, -1e4]
    rows = torch.diag(torch.tensor(values + [1.0] * 19))
    expected = ACTIVATIONS[activation](rows.double()) * rows.double()
    mlp = TileMlp(gate_and_up, down, activation)
    assert torch.allclose(mlp(rows).double(), expected, rtol=2.0**-7, atol=1e-29)
    rows[5, 5] = torch.nan
    assert torch.isnan(mlp(rows)[5]).all()


@pytest.mark.parametrize("num_threads", [1, 2, 3, 5, 70])
def test_the_middle_of_a_layer_has_the_same_bits_recorded_by_any_threads_and_among_any_rows(num_threads, threads):
    rows, gate_and_up, down = mlp_of((40, 576, 1536, 576))
    mlp = TileMlp(gate_and_up, down)
    threads(1)
    expected = mlp(rows)
    threads(num_threads)
    assert torch.equal(mlp(rows), expected)
    for first, last in ((0, 1), (3, 19), (3, 20), (39, 40)):
        assert torch.equal(mlp(rows[first:last].contiguous()), expected[first:last])
    tape, out = Tape(), torch.empty_like(expected)
    with tape.recording():
        mlp.into(rows, out)
    for _ in range(3):
        out.fill_(torch.nan)
        tape.run()
        assert torch.equal(out, expected)


def test_the_middle_of_a_layer_refuses_what_it_does_not_compute():
    gate_and_up, down = torch.randn(128, 64).bfloat16(), torch.randn(64, 64).bfloat16()
    assert serves(gate_and_up, down)
    assert not serves(gate_and_up[:96], down)
    assert not serves(gate_and_up[:, :48], down)
    assert not serves(gate_and_up, down[:, :48])
    assert not serves(torch.randn(96, 64).bfloat16(), torch.randn(64, 48).bfloat16())
