"""Where the Triton kernels run: in the interpreter on the CPU, natively on a CUDA device under the marker `gpu`."""

import importlib.util

import pytest
import torch

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*.py"]

NATIVE = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")],
)


@pytest.fixture(params=["cpu", NATIVE])
def device(request) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Fresh memory is full of NaN or of large integers, so that what a kernel does not write shows."""
    fresh = torch.empty

    def poisoned(*args, **kwargs):
        memory = fresh(*args, **kwargs)
        return memory.fill_(torch.nan if memory.is_floating_point() else 0x55)

    monkeypatch.setattr(torch, "empty", poisoned)
