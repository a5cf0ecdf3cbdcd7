"""Forwards take turns, and those in the background let the others go first."""

import threading

import torch

from cag.turns import ForwardTurns

WAIT_S = 60


def test_one_at_a_time():
    turns, inside, most = ForwardTurns(), [], []

    def work():
        for _ in range(200):
            with turns:
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert len(most) == 800 and max(most) == 1


def test_nobody_waits_and_nothing_is_given_away():
    turns = ForwardTurns()
    with turns.in_background(), turns:
        assert not turns.give_way()
    with turns:
        assert not turns.give_way()


def test_the_background_gives_way_to_all_that_wait_and_goes_on_behind_them():
    turns, order = ForwardTurns(), []
    began, others = threading.Event(), [threading.Event() for _ in range(2)]

    def background():
        with turns.in_background(), turns:
            began.set()
            while not turns.give_way():
                pass
            order.append("background")

    def foreground(event):
        began.wait(WAIT_S)
        with turns:
            order.append("foreground")
        event.set()

    threads = [threading.Thread(target=background)]
    threads += [threading.Thread(target=foreground, args=(event,)) for event in others]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert sorted(order) == ["background", "foreground", "foreground"]
    assert order[0] == "foreground"


def test_a_forward_in_front_gives_no_way():
    turns, entered = ForwardTurns(), threading.Event()

    def other():
        entered.set()
        with turns:
            pass

    with turns:
        thread = threading.Thread(target=other)
        thread.start()
        entered.wait(WAIT_S)
        assert not turns.give_way()
    thread.join(WAIT_S)


def test_the_number_of_threads_comes_back():
    turns, before = ForwardTurns(), torch.get_num_threads()
    began = threading.Event()

    def other():
        began.wait(WAIT_S)
        with turns:
            torch.set_num_threads(before + 1)

    thread = threading.Thread(target=other)
    thread.start()
    try:
        with turns.in_background(), turns:
            torch.set_num_threads(before)
            began.set()
            while not turns.give_way():
                pass
            assert torch.get_num_threads() == before
    finally:
        thread.join(WAIT_S)
        torch.set_num_threads(before)
