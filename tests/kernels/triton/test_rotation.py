"""Keys turned by the Triton kernel against the torch reference in float64."""

import pytest
import torch

from cag_kernels.rotation import angles, move_keys_reference
from cag_kernels.triton.rotation import rotate
from oracle import assert_close, normal


@pytest.mark.parametrize("pairing", ["halves", "adjacent"])
@pytest.mark.parametrize("shape, num_pairs", [((3, 67, 64), 32), ((1, 1, 96), 48), ((2, 33, 80), 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_turned_keys(device, pairing, shape, num_pairs, dtype):
    keys = normal(shape[0], shape[1] + 4, shape[2] + 6, dtype=dtype)[:, 2:-2, 3:-3]
    distances = torch.arange(shape[1]) * 977 - 3
    frequencies = 10_000.0 ** (-torch.arange(num_pairs) / num_pairs)
    expected = move_keys_reference(keys.double(), distances, frequencies, pairing=pairing)
    plain = move_keys_reference(keys, distances, frequencies, pairing=pairing)
    tables = angles(distances, frequencies)
    found = rotate(keys.to(device), *(table.to(device) for table in tables), pairing)
    assert found.dtype == dtype
    assert_close([found], [expected], [plain])


def test_there_and_back_again(device):
    keys, frequencies = normal(2, 40, 64), 10_000.0 ** (-torch.arange(32) / 32)
    distances, turned = torch.full((40,), 1234), keys.to(device)
    for sign in (1, -1):
        tables = angles(sign * distances, frequencies)
        turned = rotate(turned, *(table.to(device) for table in tables), "halves")
    torch.testing.assert_close(turned.cpu(), keys, atol=2e-6, rtol=0)
