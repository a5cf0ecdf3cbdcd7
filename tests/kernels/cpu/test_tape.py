"""A tape gives what its steps give one by one, as often as it is run and whoever runs it."""

import gc
import threading
import time
import weakref
from functools import cache

import pytest
import torch

from cag_kernels import pack_weight, packed_linear
from cag_kernels.cpu import tape as cpu_tape
from cag_kernels.cpu.attention.segments import cpu_attention
from cag_kernels.cpu.processor import has_compiler

pytestmark = pytest.mark.skipif(not has_compiler(), reason="needs llvmlite")


class Work:
    """A product, attention over what it gives as queries, and another product: each needs the step before."""

    def __init__(self, num_rows, seed=0):
        torch.manual_seed(seed)
        self.rows = torch.randn(num_rows, 64)
        self.weights = [pack_weight(torch.randn(192, 64)), pack_weight(torch.randn(80, 192))]
        self.keys, self.values = (torch.randn(3, 1100, 64).bfloat16() for _ in range(2))

    def steps(self):
        query = packed_linear(self.rows, self.weights[0]).view(3, -1, 64)
        out, lse = cpu_attention(query, self.keys, self.values, scale=0.1, offset=1100)
        return packed_linear(out.view(-1, 192), self.weights[1]), lse

    def recorded(self, repetitions=1, scratch=None):
        tape = cpu_tape.Tape(scratch)
        with tape.recording():
            for _ in range(repetitions):
                found = self.steps()
        return tape, found

    def check(self, tape, found):
        for part in found:
            part.fill_(torch.nan)
        tape.run()
        for part, expected in zip(found, self.steps(), strict=True):
            assert torch.equal(part, expected)


@pytest.mark.parametrize("num_threads", [1, 2, 3, 7])
@pytest.mark.parametrize("num_rows", [1, 14])
def test_it_gives_the_bits_of_its_steps_for_whatever_lies_in_their_memory(threads, num_threads, num_rows):
    threads(num_threads)
    work = Work(num_rows)
    tape, found = work.recorded()
    for _ in range(3):
        work.check(tape, found)
        work.rows.normal_()
        work.keys.copy_(torch.randn_like(work.rows.new_empty(work.keys.shape)))


def test_tapes_that_run_in_turn_have_scratch_in_common():
    scratch = cpu_tape.Scratch()
    works = [Work(num_rows, seed=num_rows) for num_rows in (3, 14, 5, 9)]
    recorded = [work.recorded(scratch=scratch) for work in works]
    for work, (tape, found) in [*zip(works, recorded, strict=True)] * 2:
        work.check(tape, found)


def test_scratch_in_common_is_little_more_than_the_most_of_it_and_goes_with_its_tapes():
    scratch = cpu_tape.Scratch()
    held = [scratch.take(count) for count in range(1000, 3000, 100)]
    assert all(memory.numel() >= count for memory, count in zip(held, range(1000, 3000, 100), strict=True))
    assert sum({memory.data_ptr(): memory.numel() for memory in held}.values()) <= 4 * 3000
    held.clear()
    assert scratch.take(10).numel() == 10


@pytest.mark.parametrize("num_threads", [1, 2, 7])
def test_any_part_of_it_runs_on_one_thread_or_on_all(threads, num_threads):
    threads(num_threads)
    work = Work(14)
    tape, found = work.recorded()
    spans = [(0, 1), (1, 1), (1, len(tape) - 2), (len(tape) - 2, None)]
    for alone in ([True] * 4, [False] * 4, [True, False, True, False]):
        for part in found:
            part.fill_(torch.nan)
        for (first, last), by_one in zip(spans, alone, strict=True):
            tape.run(first, last, alone=by_one)
        for part, expected in zip(found, work.steps(), strict=True):
            assert torch.equal(part, expected)


def test_steps_are_not_run_while_they_are_recorded_and_run_again_behind_it():
    work = Work(2)
    tape = cpu_tape.Tape()
    with tape.recording():
        out, _ = work.steps()
        out.zero_()
    assert out.count_nonzero() == 0
    num_steps = len(tape)
    assert num_steps >= 5  # a product of several rows may be two
    work.steps()
    assert len(tape) == num_steps
    tape.run()
    assert out.count_nonzero()


def test_what_another_thread_does_meanwhile_is_not_recorded():
    work, other = Work(3), Work(3, seed=1)
    expected, found = other.steps(), []
    num_steps = len(work.recorded()[0])
    tape = cpu_tape.Tape()
    with tape.recording():
        thread = threading.Thread(target=lambda: found.extend(other.steps()))
        thread.start()
        thread.join()
        work.steps()
    assert torch.equal(found[0], expected[0])
    assert len(tape) == num_steps


def test_a_tape_keeps_the_code_of_its_steps():
    """Two threads that are the first to need a step each compile it, and one of both results is forgotten."""
    tape, done = cpu_tape.Tape(), []
    owner = type("Code", (), {})()
    weakref.finalize(owner, done.append, "freed")
    step = cpu_tape.CompiledStep(1, owner)  # which is never run
    with tape.recording():
        step.alone(cpu_tape.new_call((0,), ()))
    del step, owner
    gc.collect()
    assert not done
    del tape
    gc.collect()
    assert done


def test_threads_that_play_first_have_one_player(monkeypatch):
    made = []
    barrier = threading.Barrier(4)
    monkeypatch.setattr(cpu_tape, "_compile_player", cache(lambda: time.sleep(0.05) or made.append(0)))

    def play():
        barrier.wait(60)
        cpu_tape._player()

    runners = [threading.Thread(target=play) for _ in range(4)]
    for runner in runners:
        runner.start()
    for runner in runners:
        runner.join(60)
    assert made == [0]


def test_threads_of_python_where_there_is_no_openmp_of_gnu(monkeypatch, threads):
    threads(3)
    monkeypatch.setattr(cpu_tape, "openmp_parallel", lambda: None)
    works = [Work(4, seed) for seed in range(4)]
    tapes = [work.recorded(repetitions=20) for work in works]
    runners = [threading.Thread(target=tape.run) for tape, _ in tapes]
    for runner in runners:
        runner.start()
    for runner in runners:
        runner.join(60)
        assert not runner.is_alive()
    for work, (_, found) in zip(works, tapes, strict=True):
        assert torch.equal(found[0], work.steps()[0])


def test_tapes_of_several_threads_at_once(threads):
    threads(2)
    works = [Work(4, seed) for seed in range(4)]
    tapes = [work.recorded(repetitions=20) for work in works]
    runners = [threading.Thread(target=lambda tape=tape: [tape.run() for _ in range(20)]) for tape, _ in tapes]
    for runner in runners:
        runner.start()
    for runner in runners:
        runner.join(60)
        assert not runner.is_alive()
    for work, (_, found) in zip(works, tapes, strict=True):
        assert torch.equal(found[0], work.steps()[0])


def test_an_empty_tape_runs_and_one_is_not_recorded_within_another():
    tape = cpu_tape.Tape()
    with tape.recording(), pytest.raises(AssertionError), cpu_tape.Tape().recording():
        pass
    tape.run()
