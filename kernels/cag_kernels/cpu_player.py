"""What each thread of a team runs to play a tape (`cpu_tape`): step by step, meeting the others behind each.

Knows the memory of a tape; not what its steps compute.
"""

from __future__ import annotations

import ctypes
import platform
from functools import cache

from llvmlite import ir  # type: ignore[import-untyped]

from cag_kernels.cpu_emit import INT32, INT64, POINTER, Emitter, Value, function_blocks
from cag_kernels.cpu_tape import STEP_FIELDS, Header, StepField

SPINS = 4000  # looks at the meeting place before the core is offered to others: about 0.1 ms


class _Entry(ir.Value):  # type: ignore[misc]
    """A pointer as something to call: llvmlite's own do not say what they point to."""

    def __init__(self, pointer: Value, kind: ir.FunctionType) -> None:
        self.function_type = kind
        self.get_reference = pointer.get_reference


def player_module() -> ir.Module:
    """Module with `play`, of one pointer to the header of a tape: what each thread of a team runs.

    Whoever arrives last behind a step sets its counter back, so that its call may be used by the next step, and lets
    the others go on.
    """
    module = ir.Module(name="tape")
    step_type = ir.FunctionType(ir.VoidType(), [POINTER])
    function = ir.Function(module, step_type, name="play")
    emit = Emitter(function, 1)
    builder, (memory,) = emit.builder, function.args
    arrived, behind = (emit.at(memory, place, INT64) for place in (Header.ARRIVED, Header.BEHIND))
    num_threads = _team_size(emit, builder.load(emit.at(memory, Header.NUM_THREADS, INT64), typ=INT64))
    num_steps = builder.load(emit.at(memory, Header.NUM_STEPS, INT64), typ=INT64)
    steps = builder.load(emit.at(memory, Header.STEPS, INT64), typ=POINTER)
    with emit.loop(emit.integer(0), num_steps, 1) as step:
        row = builder.mul(step.index, emit.integer(STEP_FIELDS))
        fields = [emit.at(steps, builder.add(row, emit.integer(field)), INT64) for field in StepField]
        entry, call = (builder.load(field, typ=POINTER) for field in fields[:2])
        is_shared = builder.icmp_signed("==", builder.load(fields[2], typ=INT64), emit.integer(0))
        ticket, work, meet = function_blocks(function, "ticket", "work", "meet")
        builder.cbranch(is_shared, work, ticket)
        builder.position_at_end(ticket)
        place = builder.atomic_rmw("add", call, emit.integer(1), "monotonic")
        builder.cbranch(builder.icmp_signed("==", place, emit.integer(0)), work, meet)
        builder.position_at_end(work)
        builder.call(_Entry(entry, step_type), [call])
        builder.branch(meet)
        builder.position_at_end(meet)
        following = builder.add(step.index, emit.integer(1))
        now = builder.add(builder.atomic_rmw("add", arrived, emit.integer(1), "acq_rel"), emit.integer(1))
        with emit.when(builder.icmp_signed("==", now, builder.mul(following, num_threads))):
            builder.store(emit.integer(0), call)
            builder.atomic_rmw("xchg", behind, following, "acq_rel")
        _emit_wait(emit, behind, following)
    builder.ret_void()
    return module


def _team_size(emit: Emitter, stated: Value) -> Value:
    """How many threads meet: as the tape states, or all of the OpenMP team where it states 0."""
    size = _library_function("omp_get_num_threads")
    if size is None:
        return stated
    builder = emit.builder
    found = builder.zext(_call_library(emit, size, ir.FunctionType(INT32, [])), INT64)
    return builder.select(builder.icmp_signed("==", stated, emit.integer(0)), found, stated)


def _emit_wait(emit: Emitter, place: Value, number: Value) -> None:
    """Until a place in memory holds at least a number; who waits long offers its core to others between looks."""
    builder = emit.builder
    before = builder.block
    look, wait, behind = function_blocks(emit.function, "look", "wait", "behind")
    builder.branch(look)
    builder.position_at_end(look)
    looks = builder.phi(INT64)
    there = builder.load_atomic(place, "acquire", 8, typ=INT64)
    builder.cbranch(builder.icmp_signed("<", there, number), wait, behind)
    builder.position_at_end(wait)
    _pause(emit)
    more = builder.add(looks, emit.integer(1))
    give_way = _library_function("sched_yield")
    if give_way is not None:
        with emit.when(builder.icmp_signed(">", more, emit.integer(SPINS))):
            _call_library(emit, give_way, ir.FunctionType(INT32, []))
    looks.add_incoming(emit.integer(0), before)
    looks.add_incoming(more, builder.block)
    builder.branch(look)
    builder.position_at_end(behind)


def _pause(emit: Emitter) -> None:
    """Tell the processor that this is a loop that waits."""
    if platform.machine() in ("x86_64", "AMD64"):
        kind = ir.FunctionType(ir.VoidType(), [])
        emit.builder.call(emit.function.module.declare_intrinsic("llvm.x86.sse2.pause", fnty=kind), [])


def _call_library(emit: Emitter, address: int, kind: Value) -> Value:
    return emit.builder.call(_Entry(emit.builder.inttoptr(ir.Constant(INT64, address), POINTER), kind), [])


@cache
def _library_function(name: str) -> int | None:
    """The address of a function that the process has loaded, if it has."""
    try:
        return ctypes.cast(getattr(ctypes.CDLL(None), name), ctypes.c_void_p).value
    except (AttributeError, OSError, TypeError):
        return None
