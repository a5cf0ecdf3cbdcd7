"""How the threads that run one call share out its units: each begins with a range of its own, and helps others then.

A thread whose range is known can ask memory for what it reads next, and finds it in its own cache. Emitted code; knows
OpenMP's team and a counter in memory, not what a unit is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from llvmlite import ir  # type: ignore[import-untyped]

from cag_kernels.cpu.emit import INT32, INT64, Emitter, Value, function_blocks
from cag_kernels.cpu.program import library_function

MAX_UNITS = 64  # one bit each of the counter says that somebody has taken it

_BIT = ir.IntType(1)


class Share:
    """Units of `count` things, `step` or a multiple of it each, and those of them that the calling thread begins with.

    As many units as threads can share out evenly. Where there is no OpenMP of GNU, the team counts as one thread.

    Attributes:
        size: things in a unit; the last one has fewer. num_units: at most `MAX_UNITS`.
        first, stop: the thread's own units are `[first, stop)`.
    """

    def __init__(self, emit: Emitter, count: Value, step: Value) -> None:
        builder, most = emit.builder, emit.integer(MAX_UNITS)
        number = team_value(emit, "omp_get_thread_num", emit.integer(0))
        team = emit.minimum(team_value(emit, "omp_get_num_threads", emit.integer(1)), most)
        number = emit.minimum(number, builder.sub(team, emit.integer(1)))
        even = builder.mul(builder.udiv(most, team), team)
        self.size = builder.mul(emit.rounded_up(count, builder.mul(even, step)), step)
        self.num_units = emit.rounded_up(count, self.size)
        following = builder.add(number, emit.integer(1))
        self.first, self.stop = (
            builder.udiv(builder.mul(self.num_units, place), team) for place in (number, following)
        )

    @contextmanager
    def units(self, emit: Emitter, counter: Value) -> Iterator[Value]:
        """Instructions for each unit that this thread takes: its own in order, then the last of those that are left.

        counter: address of int64, 0 before the call, for all threads of it.
        """
        builder, one, zero = emit.builder, emit.integer(1), emit.integer(0)
        own = builder.xor(_low_bits(emit, self.stop), _low_bits(emit, self.first))
        everything = _low_bits(emit, self.num_units)
        look, choose, work, done = function_blocks(emit.function, "look", "choose", "work", "done")
        builder.branch(look)
        builder.position_at_end(look)
        taken = builder.load_atomic(counter, "monotonic", 8, typ=INT64)
        free = builder.and_(everything, builder.not_(taken))
        builder.cbranch(builder.icmp_signed("==", free, zero), done, choose)
        builder.position_at_end(choose)
        mine = builder.and_(free, own)
        last = builder.sub(emit.integer(MAX_UNITS - 1), _count_zeros(emit, "ctlz", free))
        unit = builder.select(builder.icmp_signed("!=", mine, zero), _count_zeros(emit, "cttz", mine), last)
        bit = builder.shl(one, unit)
        before = builder.atomic_rmw("or", counter, bit, "monotonic")
        builder.cbranch(builder.icmp_signed("==", builder.and_(before, bit), zero), work, look)
        builder.position_at_end(work)
        yield unit
        builder.branch(look)
        builder.position_at_end(done)


@contextmanager
def tasks_taken(emit: Emitter, counter: Value, num_tasks: Value) -> Iterator[Value]:
    """Instructions for each task that this thread takes, the next one that is left until none is.

    counter: address of int64, 0 before the call, for all threads of it.
    """
    builder = emit.builder
    take, work, done = function_blocks(emit.function, "take", "work", "done")
    builder.branch(take)
    builder.position_at_end(take)
    task = builder.atomic_rmw("add", counter, emit.integer(1), "monotonic")
    builder.cbranch(builder.icmp_signed("<", task, num_tasks), work, done)
    builder.position_at_end(work)
    yield task
    builder.branch(take)
    builder.position_at_end(done)


def team_value(emit: Emitter, name: str, otherwise: Value) -> Value:
    """What a function of OpenMP says of the calling thread, int64; `otherwise` where no such library is loaded."""
    if library_function(name) is None:
        return otherwise
    return emit.builder.zext(call_library(emit, name), INT64)


def call_library(emit: Emitter, name: str) -> Value:
    """Call one of `LIBRARY_FUNCTIONS`, int32 without arguments."""
    module = emit.function.module
    known = module.globals.get(name) or ir.Function(module, ir.FunctionType(INT32, []), name=name)
    return emit.builder.call(known, [])


class Entry(ir.Value):  # type: ignore[misc]
    """A pointer as something to call: llvmlite's own do not say what they point to."""

    def __init__(self, pointer: Value, kind: ir.FunctionType) -> None:
        self.function_type = kind
        self.get_reference = pointer.get_reference


def _low_bits(emit: Emitter, count: Value) -> Value:
    """The lowest `count` bits of an int64, up to all of them."""
    builder = emit.builder
    some = builder.sub(builder.shl(emit.integer(1), builder.and_(count, emit.integer(MAX_UNITS - 1))), emit.integer(1))
    return builder.select(builder.icmp_signed(">=", count, emit.integer(MAX_UNITS)), emit.integer(-1), some)


def _count_zeros(emit: Emitter, name: str, bits: Value) -> Value:
    """Zeros below the lowest (`cttz`) or above the highest (`ctlz`) bit that is set; 64 where none is."""
    kind = ir.FunctionType(INT64, [INT64, _BIT])
    function = emit.function.module.declare_intrinsic(f"llvm.{name}.i64", fnty=kind)
    return emit.builder.call(function, [bits, ir.Constant(_BIT, 0)])
