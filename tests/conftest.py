"""What all tests share: one quiet thread, no network, a cache home of their own."""

import os
import uuid
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

if not torch.cuda.is_available():
    # Triton's kernels run in its interpreter. It reads this when it is imported, which transformers does too. Nothing
    # of the product looks at it: on a CPU only tests of the kernels call Triton.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from hypothesis import HealthCheck, settings

import interpreting
from object_server import BUCKET, ENVIRONMENT, Proxy, s3_server

# No test depends on time: an example may be held still for seconds.
settings.register_profile("cag", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("cag")

REPOSITORY = Path(__file__).resolve().parent.parent

if os.environ.get("TRITON_INTERPRET") == "1":
    interpreting.quicken()


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
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def s3_port():
    """The port of a real S3 server that lives as long as the tests."""
    with s3_server() as port:
        yield port


@pytest.fixture
def s3_environment(s3_port, monkeypatch):
    """What the environment says when the server is used directly."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{s3_port}")


@pytest.fixture
def s3_url(s3_environment) -> str:
    """A prefix of its own."""
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture
def proxy(s3_port, s3_environment, monkeypatch):
    """The environment leads to a proxy before the server."""
    with Proxy(s3_port).serving() as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        yield proxy
