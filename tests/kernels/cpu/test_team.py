"""Units of a call: each is taken once, by whoever comes, and a thread begins with its own."""

import numpy as np
import pytest
import torch

from cag_kernels.cpu.processor import has_compiler

if has_compiler():
    from llvmlite import ir

    from cag_kernels.cpu.emit import INT64, POINTER, Emitter, function_blocks
    from cag_kernels.cpu.program import Program
    from cag_kernels.cpu.tape import CompiledStep, Reads, Tape, new_call
    from cag_kernels.cpu.team import MAX_UNITS, Share, team_value
    from cag_kernels.cpu.threads import openmp_parallel

pytestmark = pytest.mark.skipif(not has_compiler(), reason="needs llvmlite")

MAX_COUNT, MAX_THREADS = 5000, 128


def counting_step(first_thread_works=True):
    """A step whose units count their things up, one by one, and write down where the thread's own units are."""
    program = Program(counting_module, first_thread_works)
    return CompiledStep(program.address("count"), program)


def counting_module(first_thread_works):
    """Module with `count`, of a call that has the counter; how many things, and how many at least in a unit; then a
    number for each thing and, for each thread, its first unit, the one behind its last, the size of units and their
    number."""
    module = ir.Module(name="counting")
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [POINTER]), name="count")
    emit = Emitter(function, 1)
    builder, (call,) = emit.builder, function.args
    count, step = (builder.load(emit.at(call, place, INT64), typ=INT64) for place in (1, 2))
    share = Share(emit, count, step)
    number = team_value(emit, "omp_get_thread_num", emit.integer(0))
    own = emit.at(call, builder.add(emit.integer(3 + MAX_COUNT), builder.mul(number, emit.integer(4))), INT64)
    for place, value in enumerate((share.first, share.stop, share.size, share.num_units)):
        builder.store(value, emit.at(own, place, INT64))
    if not first_thread_works:
        work, leave = function_blocks(function, "work", "leave")
        builder.cbranch(builder.icmp_signed("==", number, emit.integer(0)), leave, work)
        builder.position_at_end(leave)
        builder.ret_void()
        builder.position_at_end(work)
    with share.units(emit, call) as unit:
        first = builder.mul(unit, share.size)
        stop = emit.minimum(builder.add(first, share.size), count)
        with emit.loop(first, stop, 1) as thing:
            builder.atomic_rmw(
                "add", emit.at(call, builder.add(thing.index, emit.integer(3)), INT64), emit.integer(1), "monotonic"
            )
    builder.ret_void()
    return module


def run(step, count, size, num_tasks=2):
    call = new_call((0, count, size, *[0] * (MAX_COUNT + 4 * MAX_THREADS)), ())
    step.shared(call, num_tasks)
    found = np.array(call)
    return found[3 : 3 + MAX_COUNT], found[3 + MAX_COUNT :].reshape(MAX_THREADS, 4)


@pytest.mark.parametrize("num_threads", [1, 2, 3, 7, 48, 65, 100])
def test_every_thing_is_counted_once_and_shares_are_even(threads, num_threads):
    threads(num_threads)
    step = counting_step()
    for count, size in ((1, 32), (31, 32), (33, 32), (576, 32), (577, 16), (3072, 32), (4999, 1)):
        counts, shares = run(step, count, size)
        assert (counts[:count] == 1).all()
        assert (counts[count:] == 0).all()
        used = shares[: num_threads if openmp_parallel() else 1]
        firsts, stops, sizes, numbers = (used[:, column].tolist() for column in range(4))
        assert sizes[0] % size == 0
        assert numbers[0] == -(-count // sizes[0]) <= MAX_UNITS
        most = stops[: min(len(used), MAX_UNITS)]
        assert [0, *most[:-1]] == firsts[: len(most)]
        assert most[-1] == numbers[0]
        units = np.subtract(most, firsts[: len(most)])
        assert units.max() - units.min() <= 1


def test_threads_without_a_team_take_units_as_they_come(threads, monkeypatch):
    threads(3)
    step = counting_step()
    monkeypatch.setattr("cag_kernels.cpu.threads.openmp_parallel", lambda: None)
    counts, shares = run(step, 1000, 8)
    assert (counts[:1000] == 1).all()
    assert shares[0].tolist() == [0, -(-1000 // shares[0][2]), shares[0][2], shares[0][3]]


@pytest.mark.skipif(has_compiler() and openmp_parallel() is None, reason="needs OpenMP of GNU: threads have numbers")
@pytest.mark.parametrize("num_threads", [2, 3, 7])
def test_what_one_thread_leaves_the_others_take(threads, num_threads):
    threads(num_threads)
    counts, shares = run(counting_step(first_thread_works=False), 640, 10)
    assert shares[0, 1] > shares[0, 0] == 0  # it had units of its own
    assert (counts[:640] == 1).all()


def test_a_step_knows_what_is_read_behind_it():
    step, tape = counting_step(), Tape()
    first, second = Reads(1 << 20, 64, 128, 32), Reads(1 << 21, 32, 64, 16)
    call = new_call((0, 1, 1, *[0] * (MAX_COUNT + 4 * MAX_THREADS)), ())
    with tape.recording():
        step.alone(call)
        step.shared(call, 2, first)
        step.alone(call)
        step.shared(call, 2, second)
        step.alone(call)
    nothing = (0, 0, 0, 1)
    assert [tuple(row[3:]) for row in tape._rows.tolist()] == [first, second, second, nothing, nothing]


@pytest.mark.parametrize("num_threads", [2, 5])
def test_what_is_asked_for_need_not_be_there(threads, num_threads):
    """Threads that wait ask for memory that is none: nothing happens."""
    threads(num_threads)
    step, tape = counting_step(), Tape()
    many, one = (new_call((0, count, 1, *[0] * (MAX_COUNT + 4 * MAX_THREADS)), ()) for count in (4000, 1))
    with tape.recording():
        for _ in range(20):
            step.shared(one, 2)  # a single unit: all but one thread wait
            step.shared(many, 2, Reads(64, 1 << 14, 1 << 12, 1))
    tape.run()
    assert (np.array(many)[3:4003] == 20).all()
    assert np.array(one)[3] == 20


def test_the_team_is_asked_in_its_threads(threads):
    threads(4)
    _, shares = run(counting_step(), 640, 10)
    assert torch.get_num_threads() == 4
    assert (shares[:, 3] > 0).sum() == (4 if openmp_parallel() else 1)
