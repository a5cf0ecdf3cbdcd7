"""What this machine computes best with: dtype and number of threads, chosen by a short measurement.

More threads can be slower than one on shared cores, and bfloat16 is slower than float32 on a processor without
instructions for it, so neither is guessed. The first few processes measure, and the least time of each counts. A
measurement beside which other work had the cores, which the operating system tells, says nothing of threads (one is
quickest while somebody else has the second core), and another process measures again. Products that bring a forward
of few rows of our own with them are taken unless they are far behind: how long a product takes by itself does not
show what that forward wins, and a busy moment should not change the bits of answers. What was measured is kept in
`<cag home>/runtime.json`, until the processor, the number of usable cores or torch changes. `CAG_THREADS` overrides
the number of threads.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from cag.errors import UsageError
from cag.home import cag_home, write_atomically
from cag.machine.memory_limits import available_memory_bytes
from cag_kernels import (
    dot_linear,
    dot_linear_serves,
    has_compiler,
    linear_without_packing,
    pack_weight,
    packed_linear,
    tile_linear,
    tile_linear_serves,
)

SMALL_ROWS = 15  # a question
LARGE_ROWS = 256  # a block of prefill
_MOST_THREADS = 256  # that may be asked for; ten thousand are more than a process gets
_MATRIX = (2048, 1536)
_NUM_MEASUREMENTS = 3  # processes that measure undisturbed
_MOST_MEASUREMENTS = 12  # processes that measure at all
_MAY_WAIT = 0.2  # of a measurement's time, waited for cores by all threads together, up to which it is undisturbed
# times the quickest product of the type that one of ours may take, and still be the one to take
_MAY_BE_BEHIND = {"tiles": 2.0, "dots": 2.0, "packed": 1.5}
_NUM_MATRICES = 6  # 75 MB in float32, so that weights come from memory as they do in a model


@dataclass(frozen=True)
class RuntimePlan:
    """How forwards run on one device.

    `threads_small` serves up to `LARGE_ROWS / 2` tokens a forward, `threads_large` more. `product` says how a
    question's rows meet a weight: "plain", "transposed" (`cag_kernels.linear_without_packing`), "packed"
    (`cag_kernels.packed_linear`, where float32 is computed), "tiles" (`cag_kernels.tile_linear`) or "dots"
    (`cag_kernels.dot_linear`). `measured_ms` holds, for "product/dtype/threads/rows", the milliseconds that led to the
    choice; empty where nothing had to be measured.
    """

    device: str
    compute_dtype: str
    threads_small: int
    threads_large: int
    product: str
    measured_ms: dict[str, float]
    reason: str

    def use_threads(self, num_tokens: int) -> None:
        """Let torch compute with the number of threads chosen for forwards of `num_tokens` tokens, from now on."""
        wanted = self.threads_large if num_tokens > LARGE_ROWS // 2 else self.threads_small
        if self.device == "cpu" and torch.get_num_threads() != wanted:
            torch.set_num_threads(wanted)


def choose_device(device: str = "auto") -> torch.device:
    """`auto` is the CUDA device where there is one, the CPU elsewhere.

    Raises:
        UsageError: a device that torch does not have here, or a CUDA device that is not the first one.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise UsageError(f"unknown device {device!r}.", hint="Use auto, cpu or cuda.") from error
    if chosen.type not in ("cpu", "cuda"):
        raise UsageError(f"device {device!r} is not supported.", hint="Use auto, cpu or cuda.")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("there is no CUDA device here.", hint="Use --device cpu.")
    if chosen.type == "cuda" and chosen.index:  # kernels are launched on each thread's current device
        hint = f"Set CUDA_VISIBLE_DEVICES={chosen.index} and use cuda."
        raise UsageError(f"device {device!r} is not the first CUDA device, the only one that is used.", hint=hint)
    return chosen


def free_memory_bytes(device: torch.device) -> int:
    """Memory of a device that this process can still take: on a GPU also what torch keeps there and nobody uses."""
    if device.type == "cpu":
        return available_memory_bytes()
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def plan_runtime(device: torch.device, *, measure_again: bool = False) -> RuntimePlan:
    """The plan for `device`, measured by the first processes on a machine; `measure_again` forgets what they found."""
    if device.type == "cuda":
        reason = "a CUDA device computes in the model's own 16-bit type"
        return RuntimePlan("cuda", "bfloat16", 1, 1, "plain", {}, reason)
    path = cag_home() / "runtime.json"
    machine = _machine_key()
    kept = None if measure_again else _read_plan(path, machine)
    if kept is not None and (kept.is_settled or path in _measured_here):
        return _with_environment(kept.described)
    found = _measure() if measure_again else _measured_in_this_process()
    found = found if kept is None else kept.with_another(found)
    _measured_here.add(path)
    _write_plan(path, machine, found)
    return _with_environment(found.described)


_measured_here: set[Path] = set()  # files that this process has added its measurement to


@dataclass(frozen=True)
class _Measured:
    """A plan, and how many processes have measured for it: undisturbed by others, and disturbed."""

    plan: RuntimePlan
    undisturbed: int
    disturbed: int

    @property
    def is_settled(self) -> bool:
        """Whether nobody measures any more."""
        return self.undisturbed >= _NUM_MEASUREMENTS or self.undisturbed + self.disturbed >= _MOST_MEASUREMENTS

    @property
    def described(self) -> RuntimePlan:
        """The plan. As long as there are none but disturbed measurements it has all cores, and says so: who had them
        meanwhile may be gone at once, and a process keeps its plan."""
        if self.undisturbed or self.is_settled:
            return self.plan
        reason = f"{self.plan.reason}, while other processes had the cores; all cores until it is known better"
        return replace(self.plan, threads_small=usable_cores(), threads_large=usable_cores(), reason=reason)

    def with_another(self, other: _Measured) -> _Measured:
        """The plan by the least times of both."""
        before = self.plan.measured_ms
        least = {key: min(value, before.get(key, value)) for key, value in other.plan.measured_ms.items()}
        undisturbed, disturbed = self.undisturbed + other.undisturbed, self.disturbed + other.disturbed
        return _Measured(_plan_from(least), undisturbed, disturbed)


@cache
def _measured_in_this_process() -> _Measured:
    return _measure()


def _measure() -> _Measured:
    started, waited = time.perf_counter(), _waited_for_cores_s()
    plan = _measure_cpu()
    waited, taken = _waited_for_cores_s() - waited, time.perf_counter() - started
    is_disturbed = waited > _MAY_WAIT * taken
    return _Measured(plan, int(not is_disturbed), int(is_disturbed))


def _waited_for_cores_s() -> float:
    """Seconds that this process's threads were ready and had no core, all together; 0 where the system does not say."""
    waited_ns = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(OSError, IndexError, ValueError):  # a thread that has ended, another system
            waited_ns += int(path.read_text().split()[1])
    return waited_ns / 1e9


def _with_environment(plan: RuntimePlan) -> RuntimePlan:
    wanted = os.environ.get("CAG_THREADS")
    if not wanted:
        return plan
    most = max(_MOST_THREADS, 4 * usable_cores())
    if not wanted.isdigit() or not 1 <= int(wanted) <= most:
        raise UsageError(f"CAG_THREADS is {wanted!r}; it must be a number from 1 to {most}.")
    facts = asdict(plan) | {"threads_small": int(wanted), "threads_large": int(wanted), "reason": "set by CAG_THREADS"}
    return RuntimePlan(**facts)


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor_name() -> str:
    """The processor's model name, as the operating system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _machine_key() -> dict[str, object]:
    return {
        "processor": processor_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": usable_cores(),
        "torch": torch.__version__,
        "version": 9,
    }


def _thread_candidates() -> list[int]:
    cores = usable_cores()
    return sorted({1, cores} | {2**power for power in range(1, cores.bit_length()) if 2**power <= cores})


def _measure_cpu() -> RuntimePlan:
    before = torch.get_num_threads()
    measured: dict[str, float] = {}
    for dtype in ("float32", "bfloat16"):
        matrices = [torch.ones(_MATRIX, dtype=getattr(torch, dtype)) for _ in range(_NUM_MATRICES)]
        block = {rows: torch.ones(rows, _MATRIX[1], dtype=matrices[0].dtype) for rows in (SMALL_ROWS, LARGE_ROWS)}
        for threads in _thread_candidates():
            torch.set_num_threads(threads)
            for rows, product in ((SMALL_ROWS, "plain"), (SMALL_ROWS, "transposed"), (LARGE_ROWS, "plain")):
                multiply = linear_without_packing if product == "transposed" else torch.nn.functional.linear
                key = f"{product}/{dtype}/{threads}/{rows}"
                measured[key] = _time_products(multiply, block[rows], matrices)
    own = (("tiles", tile_linear, tile_linear_serves), ("dots", dot_linear, dot_linear_serves))
    for name, own_product, serves in own:
        for threads in _thread_candidates() if serves(matrices[0]) else ():
            torch.set_num_threads(threads)
            key = f"{name}/bfloat16/{threads}/{SMALL_ROWS}"
            measured[key] = _time_products(own_product, block[SMALL_ROWS].float(), matrices)
    if has_compiler():
        packed = [pack_weight(matrix) for matrix in matrices]
        for threads in _thread_candidates():
            torch.set_num_threads(threads)
            key = f"packed/float32/{threads}/{SMALL_ROWS}"
            measured[key] = _time_products(packed_linear, block[SMALL_ROWS].float(), packed)
    torch.set_num_threads(before)
    return _plan_from(measured)


def _time_products(product: Callable[[torch.Tensor, Any], Any], block: torch.Tensor, weights: list[Any]) -> float:
    """Milliseconds of the best of a few rounds of products with all of `weights`."""

    def products() -> None:
        for weight in weights:
            product(block, weight)

    with torch.inference_mode():
        return min(_seconds(products) for _ in range(5 if block.shape[0] == SMALL_ROWS else 2)) * 1e3


def _seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _plan_from(measured: dict[str, float]) -> RuntimePlan:
    """The quicker dtype over both sizes, and for each size its product and the quickest number of threads for it."""

    def best(dtype: str, rows: int) -> tuple[float, int, str]:
        """Milliseconds, threads and product."""
        return min(
            (
                (milliseconds, int(threads), product)
                for key, milliseconds in measured.items()
                for product, of, threads, num_rows in [key.split("/")]
                if of == dtype and int(num_rows) == rows
            ),
            key=lambda found: (found[0] / _MAY_BE_BEHIND.get(found[2], 1.0), found[1], found[2]),
        )

    def cost(dtype: str) -> float:
        return best(dtype, SMALL_ROWS)[0] * best(dtype, LARGE_ROWS)[0]

    dtype = min(("float32", "bfloat16"), key=cost)
    ratio = (cost("bfloat16") / cost("float32")) ** 0.5
    _, threads_small, product = best(dtype, SMALL_ROWS)
    return RuntimePlan(
        device="cpu",
        compute_dtype=dtype,
        threads_small=threads_small,
        threads_large=best(dtype, LARGE_ROWS)[1],
        product=product,
        measured_ms={key: round(value, 3) for key, value in measured.items()},
        reason=f"measured: bfloat16 takes {ratio:.2f} times as long as float32",
    )


def _read_plan(path: Path, machine: dict[str, object]) -> _Measured | None:
    """What is kept for this machine."""
    try:
        kept = json.loads(path.read_text())
        counts = int(kept["measurements"]), int(kept["disturbed"])
        return _Measured(RuntimePlan(**kept["plan"]), *counts) if kept["machine"] == machine else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_plan(path: Path, machine: dict[str, object], found: _Measured) -> None:
    counts = {"measurements": found.undisturbed, "disturbed": found.disturbed}
    text = json.dumps({"machine": machine, **counts, "plan": asdict(found.plan)}, indent=1)
    with suppress(OSError):  # a read-only home: the measurement is made again next time
        write_atomically(path, text.encode())
