"""What all tests share: one quiet thread, no network, a cache home of their own."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of third-party data sets, or a skip that says where it was looked for."""
    folder = Path(os.environ.get("CAG_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"shared data sets are not at {folder}; set CAG_SHARED_DATA")
    return folder


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tensors of tests are tiny: one thread is the quickest and makes results repeatable."""
    import torch

    torch.set_num_threads(1)
