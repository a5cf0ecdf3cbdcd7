"""The runtime plan: measured once, kept, overridden by the environment; and what the model does with it."""

import json

import pytest
import torch

from cag import runtime
from cag.errors import UsageError
from cag.runtime import LARGE_ROWS, SMALL_ROWS, choose_device, plan_runtime

CPU = torch.device("cpu")


def measured(small, few, large, bf16_factor):
    """Figures as `_measure_cpu` takes them, for one and two threads: `small[0]` is one thread's."""
    figures = {}
    for dtype, factor in (("float32", 1.0), ("bfloat16", bf16_factor)):
        for threads in (1, 2):
            figures[f"plain/{dtype}/{threads}/{SMALL_ROWS}"] = small[threads - 1] * factor
            figures[f"transposed/{dtype}/{threads}/{SMALL_ROWS}"] = few[threads - 1] * factor
            figures[f"plain/{dtype}/{threads}/{LARGE_ROWS}"] = large[threads - 1] * factor
    return figures


@pytest.fixture
def two_cores(monkeypatch):
    monkeypatch.setattr(runtime, "usable_cores", lambda: 2)


def test_the_quickest_of_each_size_is_chosen(two_cores):
    plan = runtime._plan_from(measured(small=(9, 12), few=(5, 6), large=(100, 60), bf16_factor=2.5))
    assert (plan.compute_dtype, plan.threads_small, plan.threads_large) == ("float32", 1, 2)
    assert plan.product == "transposed"
    assert "2.50 times" in plan.reason
    plan = runtime._plan_from(measured(small=(9, 4), few=(9, 9), large=(100, 60), bf16_factor=0.5))
    assert (plan.compute_dtype, plan.threads_small, plan.product) == ("bfloat16", 2, "plain")
    figures = measured(small=(9, 4), few=(9, 9), large=(100, 60), bf16_factor=0.9)
    plan = runtime._plan_from(figures | {f"packed/float32/2/{SMALL_ROWS}": 2.0})
    assert (plan.compute_dtype, plan.threads_small, plan.product) == ("float32", 2, "packed")


def test_a_plan_is_measured_once_and_again_on_another_machine(cag_home, monkeypatch):
    monkeypatch.delenv("CAG_THREADS", raising=False)
    first = plan_runtime(CPU)
    assert first.measured_ms
    kept = json.loads((cag_home / "runtime.json").read_text())
    monkeypatch.setattr(runtime, "_measured_in_this_process", lambda: pytest.fail("measured again"))
    assert plan_runtime(CPU) == first
    kept["machine"]["processor"] = "another"
    (cag_home / "runtime.json").write_text(json.dumps(kept))
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        plan_runtime(CPU)
    (cag_home / "runtime.json").write_text("{broken")
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        plan_runtime(CPU)


def test_threads_from_the_environment(monkeypatch):
    monkeypatch.setenv("CAG_THREADS", "3")
    plan = plan_runtime(CPU)
    assert plan.threads_small == plan.threads_large == 3
    monkeypatch.setenv("CAG_THREADS", "many")
    with pytest.raises(UsageError, match="many"):
        plan_runtime(CPU)


@pytest.mark.parametrize("device", ["tpu", "meta", "nonsense"])
def test_unknown_devices_are_refused(device):
    with pytest.raises(UsageError):
        choose_device(device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_no_cuda_here():
    assert choose_device("auto") == CPU
    with pytest.raises(UsageError, match="no CUDA"):
        choose_device("cuda")
