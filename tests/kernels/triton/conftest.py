"""Where the Triton kernels run: natively under the marker `gpu`, in the interpreter where there is no CUDA device."""

import importlib.util
import os

import pytest
import torch

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*.py"]

INTERPRETED = pytest.param(
    "cpu", marks=pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="Triton compiles here")
)
NATIVE = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")],
)


@pytest.fixture(params=[INTERPRETED, NATIVE])
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
