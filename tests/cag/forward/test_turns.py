"""Turns: one at a time, answers before builds, and builds get on. Order is kept by events, never by time."""

import threading
from types import SimpleNamespace

import pytest

from cag.errors import BuildInterrupted
from cag.forward.turns import ForwardTurns
from cag.machine.runtime import RuntimePlan

CPU = RuntimePlan("cpu", "float32", 1, 1, "plain", {}, "a test")


class Worker:
    """A thread that takes turns, notes them, and stays in each until it is let go."""

    def __init__(self, turns, name, log, *, polite, num_turns=1, num_pauses=0, check=lambda: None):
        self.inside = threading.Semaphore(0)
        self._go = threading.Semaphore(0)
        self.error = None
        self._turns, self._name, self._log, self._polite, self._check = turns, name, log, polite, check
        self._num_turns, self._num_pauses = num_turns, num_pauses
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self):
        if not self._polite:
            self._take_turns()
            return
        try:
            with self._turns.giving_way(self._check):
                self._take_turns()
        except BuildInterrupted as error:
            self.error = error

    def _take_turns(self):
        for _ in range(self._num_turns):
            with self._turns.turn(1):
                self._stay()
                for _ in range(self._num_pauses):
                    self._turns.pause(1)
                    self._stay()

    def _stay(self):
        self._log.append(self._name)
        self.inside.release()
        assert self._go.acquire(timeout=60)

    def until_inside(self):
        assert self.inside.acquire(timeout=60)

    def go(self, count=1):
        self._go.release(count)

    def join(self):
        self.thread.join(60)
        assert not self.thread.is_alive()


@pytest.fixture
def turns():
    return ForwardTurns(CPU)


def until(condition):
    ready = threading.Event()
    while not condition():
        ready.wait(0.001)


@pytest.mark.parametrize("num_pauses", [0, 1])
def test_who_waits_goes_before_the_next_piece_of_a_build(turns, num_pauses, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("cag.forward.turns.time", SimpleNamespace(perf_counter=lambda: now[0]))
    log = []
    build = Worker(turns, "build", log, polite=True, num_turns=2 - num_pauses, num_pauses=num_pauses)
    build.until_inside()
    answer = Worker(turns, "answer", log, polite=False)
    until(lambda: turns._num_waiting == 1)
    now[0] += 5.0  # a piece so long that the build is owed no turn before the answer's thread has woken
    build.go()
    answer.until_inside()
    answer.go()
    build.until_inside()
    build.go()
    build.join()
    answer.join()
    assert log == ["build", "answer", "build"]


def test_one_at_a_time_whoever_they_are(turns):
    inside, most = [0], [0]

    def work(polite):
        for _ in range(200):
            with turns.turn(1):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                if polite:
                    inside[0] -= 1
                    turns.pause(1)
                    inside[0] += 1
                inside[0] -= 1

    def politely():
        with turns.giving_way(lambda: None):
            work(True)

    threads = [threading.Thread(target=politely if number % 2 else lambda: work(False)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (most[0], turns._is_taken, turns._num_waiting, turns._num_owed) == (1, False, 0, 0)


def test_while_somebody_answers_a_build_waits_as_long_as_its_last_piece_took_and_then_goes_first(turns, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("cag.forward.turns.time", SimpleNamespace(perf_counter=lambda: now[0]))
    log = []
    with turns.answering():
        build = Worker(turns, "build", log, polite=True, num_turns=2)
        build.until_inside()
        now[0] += 5.0
        build.go()
        until(lambda: not turns._is_taken)
        for _ in range(3):
            with turns.turn(1):
                log.append("answer")
                now[0] += 1.0
        assert log == ["build", "answer", "answer", "answer"]
        now[0] += 5.0
        turns.wake()
        build.until_inside()
        answer = Worker(turns, "answer", log, polite=False)
        build.go()
        answer.until_inside()
        answer.go()
    assert log[-2:] == ["build", "answer"]
    build.join()
    answer.join()


def test_a_build_goes_at_once_when_nobody_answers_any_more(turns, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("cag.forward.turns.time", SimpleNamespace(perf_counter=lambda: now[0]))
    build = Worker(turns, "build", [], polite=True, num_turns=2)
    build.until_inside()
    now[0] = 1e6
    with turns.answering():
        build.go()
        until(lambda: not turns._is_taken)
        assert not build.inside.acquire(blocking=False)
    build.until_inside()
    build.go()
    build.join()


@pytest.mark.parametrize("num_pauses", [0, 1])
def test_what_a_check_raises_ends_a_wait_and_takes_no_turn_from_anybody(turns, num_pauses, monkeypatch):
    now, stopped = [100.0], []
    monkeypatch.setattr("cag.forward.turns.time", SimpleNamespace(perf_counter=lambda: now[0]))

    def check():
        if stopped:
            raise BuildInterrupted("stopped")

    build = Worker(turns, "build", [], polite=True, num_turns=2, num_pauses=num_pauses, check=check)
    build.until_inside()
    answer = Worker(turns, "answer", [], polite=False)
    until(lambda: turns._num_waiting == 1)
    now[0] += 5.0  # as above
    build.go()
    answer.until_inside()
    stopped.append(True)
    turns.wake()
    build.join()
    assert isinstance(build.error, BuildInterrupted)
    assert (turns._is_taken, turns._num_owed) == (True, 0)
    answer.go()
    answer.join()
    assert not turns._is_taken


def test_a_turn_that_was_owed_and_is_not_wanted_any_more_is_the_next_ones(turns):
    stopped = []

    def check():
        if stopped:
            raise BuildInterrupted("stopped")

    first, second = [Worker(turns, name, [], polite=False) for name in ("first", "second")]
    until(lambda: turns._num_waiting == 1)
    build = Worker(turns, "build", [], polite=True, check=check)
    until(lambda: turns._num_owed == 1)
    stopped.append(True)
    for answer in (first, second):
        answer.go()
    first.join()
    second.join()
    build.join()
    assert isinstance(build.error, BuildInterrupted)
    assert (turns._is_taken, turns._num_owed) == (False, 0)


def test_pauses_are_for_those_who_give_way_on_a_cpu(turns):
    with turns.turn(1):
        turns.pause(1)
    turns.pause(1)
    on_gpu = ForwardTurns(RuntimePlan("cuda", "bfloat16", 1, 1, "plain", {}, "a test"))
    with on_gpu.giving_way(lambda: None), on_gpu.turn(1):
        on_gpu.pause(1)
        assert on_gpu._is_taken
