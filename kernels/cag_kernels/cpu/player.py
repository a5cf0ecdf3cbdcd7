"""What each thread of a team runs to play a tape (`cpu.tape`): step by step, meeting the others behind each.

A thread that waits for others asks for what it is going to read. Knows the memory of a tape; not what its steps
compute.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping

from llvmlite import ir  # type: ignore[import-untyped]

from cag_kernels.cpu.emit import INT8, INT64, LINE_BYTES, POINTER, SECOND_CACHE, Emitter, Value, function_blocks
from cag_kernels.cpu.program import library_function
from cag_kernels.cpu.tape import STEP_FIELDS, Header, StepField
from cag_kernels.cpu.team import Entry, Share, call_library, team_value

SPINS = 4000  # looks at the meeting place before the core is offered to others: about 0.1 ms
MOST_AHEAD = 1 << 20  # bytes that a waiting thread asks for: half of the second cache of processors with tiles
_LINES_A_LOOK = 4


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
    stated = builder.load(emit.at(memory, Header.NUM_THREADS, INT64), typ=INT64)
    whole_team = team_value(emit, "omp_get_num_threads", stated)
    num_threads = builder.select(builder.icmp_signed("==", stated, emit.integer(0)), whole_team, stated)
    num_steps = builder.load(emit.at(memory, Header.NUM_STEPS, INT64), typ=INT64)
    steps = builder.load(emit.at(memory, Header.STEPS, INT64), typ=POINTER)
    ahead = _Ahead(emit)
    with emit.loop(emit.integer(0), num_steps, 1) as step:
        row = builder.mul(step.index, emit.integer(STEP_FIELDS))
        fields = {field: emit.at(steps, builder.add(row, emit.integer(field)), INT64) for field in StepField}
        entry, call = (builder.load(fields[field], typ=POINTER) for field in (StepField.ENTRY, StepField.CALL))
        is_shared = builder.icmp_signed("==", builder.load(fields[StepField.ALONE], typ=INT64), emit.integer(0))
        ticket, work, meet = function_blocks(function, "ticket", "work", "meet")
        builder.cbranch(is_shared, work, ticket)
        builder.position_at_end(ticket)
        place = builder.atomic_rmw("add", call, emit.integer(1), "monotonic")
        builder.cbranch(builder.icmp_signed("==", place, emit.integer(0)), work, meet)
        builder.position_at_end(work)
        builder.call(Entry(entry, step_type), [call])
        builder.branch(meet)
        builder.position_at_end(meet)
        following = builder.add(step.index, emit.integer(1))
        now = builder.add(builder.atomic_rmw("add", arrived, emit.integer(1), "acq_rel"), emit.integer(1))
        with emit.when(builder.icmp_signed("==", now, builder.mul(following, num_threads))):
            builder.store(emit.integer(0), call)
            builder.atomic_rmw("xchg", behind, following, "acq_rel")
        _emit_wait(emit, behind, following, ahead, fields)
    builder.ret_void()
    return module


class _Ahead:
    """How far a thread has asked for its share of what a later step reads."""

    def __init__(self, emit: Emitter) -> None:
        self._emit = emit
        self._rows, self._place, self._stop = (emit.variable(emit.integer(0)) for _ in range(3))

    def turn_to(self, fields: Mapping[StepField, Value]) -> None:
        """To the calling thread's share of the rows that a step of the tape names, unless it is them already."""
        emit, builder = self._emit, self._emit.builder
        address, count, row_bytes, step = (builder.load(fields[field], typ=INT64) for field in list(StepField)[3:])
        is_new = builder.icmp_signed("!=", address, builder.load(self._rows, typ=INT64))
        with emit.when(builder.and_(is_new, builder.icmp_signed("!=", address, emit.integer(0)))):
            share = Share(emit, count, step)
            first, stop = (
                builder.add(address, builder.mul(emit.minimum(builder.mul(unit, share.size), count), row_bytes))
                for unit in (share.first, share.stop)
            )
            most = builder.add(first, emit.integer(MOST_AHEAD))
            for variable, value in (
                (self._rows, address),
                (self._place, first),
                (self._stop, emit.minimum(stop, most)),
            ):
                builder.store(value, variable)

    def has_more(self) -> Value:
        """Whether there is something left to ask for."""
        place, stop = (self._emit.builder.load(variable, typ=INT64) for variable in (self._place, self._stop))
        return self._emit.builder.icmp_signed("<", place, stop)

    def ask(self) -> None:
        """For the next lines."""
        emit, builder = self._emit, self._emit.builder
        place = builder.load(self._place, typ=INT64)
        for line in range(_LINES_A_LOOK):
            emit.prefetch(emit.at(builder.inttoptr(place, POINTER), line * LINE_BYTES, INT8), near=SECOND_CACHE)
        builder.store(builder.add(place, emit.integer(_LINES_A_LOOK * LINE_BYTES)), self._place)


def _emit_wait(emit: Emitter, place: Value, number: Value, ahead: _Ahead, fields: Mapping[StepField, Value]) -> None:
    """Until a place in memory holds at least a number; who waits long offers its core to others between looks."""
    builder = emit.builder
    before = builder.block
    look, wait, ask, rest, behind = function_blocks(emit.function, "look", "wait", "ask", "rest", "behind")
    builder.branch(look)
    builder.position_at_end(look)
    looks = builder.phi(INT64)
    there = builder.load_atomic(place, "acquire", 8, typ=INT64)
    builder.cbranch(builder.icmp_signed("<", there, number), wait, behind)
    builder.position_at_end(wait)
    ahead.turn_to(fields)
    builder.cbranch(ahead.has_more(), ask, rest)
    builder.position_at_end(ask)
    ahead.ask()
    builder.branch(look)
    looks.add_incoming(looks, builder.block)
    builder.position_at_end(rest)
    _pause(emit)
    more = builder.add(looks, emit.integer(1))
    if library_function("sched_yield") is not None:
        with emit.when(builder.icmp_signed(">", more, emit.integer(SPINS))):
            call_library(emit, "sched_yield")
    looks.add_incoming(emit.integer(0), before)
    looks.add_incoming(more, builder.block)
    builder.branch(look)
    builder.position_at_end(behind)


def _pause(emit: Emitter) -> None:
    """Tell the processor that this is a loop that waits."""
    if platform.machine() in ("x86_64", "AMD64"):
        kind = ir.FunctionType(ir.VoidType(), [])
        emit.builder.call(emit.function.module.declare_intrinsic("llvm.x86.sse2.pause", fnty=kind), [])
