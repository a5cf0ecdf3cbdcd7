"""The runtime plan: measured once, kept, overridden by the environment; and what the model does with it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cag import engine
from cag.errors import UsageError
from cag.machine import runtime
from cag.machine.runtime import LARGE_ROWS, SMALL_ROWS, choose_device, free_memory_bytes, plan_runtime

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


@pytest.mark.parametrize(
    ("dtype", "product", "factor"), [("bfloat16", "tiles", 0.5), ("bfloat16", "dots", 0.5), ("float32", "packed", 2.0)]
)
def test_a_busy_moment_does_not_take_the_forward_of_few_rows_away(two_cores, dtype, product, factor):
    """Its product was measured while another process had a core, the others were not."""
    figures = measured(small=(9, 5), few=(6, 3), large=(100, 60), bf16_factor=factor)
    quickest = min(figures[f"{name}/{dtype}/2/{SMALL_ROWS}"] for name in ("plain", "transposed"))
    times = {f"{product}/{dtype}/1/{SMALL_ROWS}": 1.45 * quickest, f"{product}/{dtype}/2/{SMALL_ROWS}": 1.4 * quickest}
    plan = runtime._plan_from(figures | times)
    assert (plan.compute_dtype, plan.product, plan.threads_small) == (dtype, product, 2)
    far_behind = dict.fromkeys(times, 2.1 * quickest)
    plan = runtime._plan_from(figures | far_behind)
    assert (plan.compute_dtype, plan.product, plan.threads_small) == (dtype, "transposed", 2)


@pytest.fixture
def other_process(monkeypatch):
    """Goes on as if in a process that has measured nothing, and finds such figures if it does."""
    monkeypatch.delenv("CAG_THREADS", raising=False)

    def begin(figures=None, disturbed=0):
        def measure():
            assert figures is not None, "measured again"
            return runtime._Measured(runtime._plan_from(figures), 1 - disturbed, disturbed)

        monkeypatch.setattr(runtime, "_measured_in_this_process", measure)
        runtime._measured_here.clear()

    return begin


def test_the_first_processes_measure_and_the_least_times_count(cag_home, two_cores, other_process):
    """The first one had one of the two cores only, because another process was busy."""
    quiet = measured(small=(9, 5), few=(6, 3), large=(100, 60), bf16_factor=2.5)
    busy = measured(small=(9, 18), few=(6, 12), large=(100, 200), bf16_factor=2.5)
    other_process(busy)
    assert plan_runtime(CPU).threads_small == 1
    for figures in (quiet, busy):
        other_process(figures)
        for _ in range(2):  # once a process
            plan = plan_runtime(CPU)
            assert (plan.threads_small, plan.threads_large) == (2, 2)
            assert plan.measured_ms == {key: round(value, 3) for key, value in quiet.items()}
    other_process()
    assert plan_runtime(CPU) == plan
    assert json.loads((cag_home / "runtime.json").read_text())["measurements"] == 3


def test_who_waited_for_cores_does_not_settle_the_plan(cag_home, two_cores, other_process):
    """Three processes on a busy machine once settled on one thread, which halved the speed of all later ones."""
    quiet = measured(small=(9, 5), few=(6, 3), large=(100, 60), bf16_factor=2.5)
    busy = measured(small=(9, 18), few=(6, 12), large=(100, 200), bf16_factor=2.5)
    for _ in range(4):
        other_process(busy, disturbed=1)
        plan = plan_runtime(CPU)
        assert (plan.threads_small, plan.threads_large) == (2, 2)  # all cores, for as long as nothing better is known
        assert "other processes had the cores" in plan.reason
    for _ in range(runtime._NUM_MEASUREMENTS):
        other_process(quiet)
        assert plan_runtime(CPU).threads_small == 2
    other_process()
    assert plan_runtime(CPU).threads_small == 2


def test_a_machine_that_is_always_busy_is_measured_a_few_times_only(cag_home, two_cores, other_process):
    busy = measured(small=(9, 18), few=(6, 12), large=(100, 200), bf16_factor=2.5)
    for _ in range(runtime._MOST_MEASUREMENTS - 1):
        other_process(busy, disturbed=1)
        assert plan_runtime(CPU).threads_small == 2
    other_process(busy, disturbed=1)
    plan_runtime(CPU)
    other_process()
    assert plan_runtime(CPU).threads_small == 1


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="the system does not say who waited for cores")
def test_a_measurement_beside_other_processes_is_known_as_disturbed(monkeypatch):
    """Two processes on the one core that this one may use."""
    core = min(os.sched_getaffinity(0))
    other = subprocess.Popen(
        [sys.executable, "-c", f"import os; os.sched_setaffinity(0, {{{core}}})\nwhile True: pass"]
    )
    before = os.sched_getaffinity(0)

    def compute():
        begin = time.perf_counter()
        while time.perf_counter() < begin + 0.5:
            pass
        return runtime._plan_from(measured(small=(9, 5), few=(6, 3), large=(100, 60), bf16_factor=2.5))

    monkeypatch.setattr(runtime, "_measure_cpu", compute)
    try:
        os.sched_setaffinity(0, {core})
        found = runtime._measure()
    finally:
        os.sched_setaffinity(0, before)
        other.kill()
        other.wait()
    assert (found.undisturbed, found.disturbed) == (0, 1)


def test_a_plan_is_measured_anew_on_another_machine(cag_home, other_process):
    other_process(measured(small=(9, 5), few=(6, 3), large=(100, 60), bf16_factor=2.5))
    plan_runtime(CPU)
    kept = json.loads((cag_home / "runtime.json").read_text())
    for changed in ({**kept, "machine": {**kept["machine"], "processor": "another"}}, "{broken"):
        (cag_home / "runtime.json").write_text(changed if isinstance(changed, str) else json.dumps(changed))
        other_process(measured(small=(1, 2), few=(3, 4), large=(5, 6), bf16_factor=2.5))
        assert plan_runtime(CPU).threads_small == 1
        assert json.loads((cag_home / "runtime.json").read_text())["measurements"] == 1


def test_threads_from_the_environment(monkeypatch):
    monkeypatch.setenv("CAG_THREADS", "3")
    plan = plan_runtime(CPU)
    assert plan.threads_small == plan.threads_large == 3
    for wanted in ("many", "0", "99999"):  # a process gets no such number of threads
        monkeypatch.setenv("CAG_THREADS", wanted)
        with pytest.raises(UsageError, match=wanted):
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


def test_of_several_cuda_devices_the_first_one_is_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("cuda:0") == torch.device("cuda:0")
    with pytest.raises(UsageError, match="CUDA_VISIBLE_DEVICES=1 "):
        choose_device("cuda:1")


def test_what_torch_keeps_of_a_gpu_for_itself_is_free(monkeypatch):
    for name, found in (("mem_get_info", (3, 90)), ("memory_reserved", 50), ("memory_allocated", 8)):
        monkeypatch.setattr(torch.cuda, name, lambda _device, found=found: found)
    assert free_memory_bytes(torch.device("cuda")) == 3 + 42
    monkeypatch.setattr(runtime, "available_memory_bytes", lambda: 7)
    assert free_memory_bytes(torch.device("cpu")) == 7


def test_nothing_of_our_own_runs_while_the_machine_is_measured(tiny_model_dir, tmp_path, monkeypatch):
    """Loops that compile on a thread of ours once cost a core during the measurement, and the plan was a slow one."""
    order = []
    plan = engine.plan_runtime
    monkeypatch.setattr(engine, "plan_runtime", lambda device: order.append("measure") or plan(device))
    monkeypatch.setattr(engine, "warm_up", lambda: order.append("warm up"))
    engine.Engine.load(str(tiny_model_dir), store=tmp_path / "store", device="cpu")
    assert order == ["measure", "warm up"]
