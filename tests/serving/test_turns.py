"""Turns: one thread at a time, whoever waited longest first."""

import threading
import time

from parscale_adapt.serving.turns import Turns


def wait_for_waiting(turns, count):
    while len(turns._waiting) < count:
        time.sleep(0.001)


def test_one_at_a_time_in_the_order_of_waiting():
    turns, order, inside = Turns(), [], []

    def work(name):
        with turns.mine():
            inside.append(name)
            assert inside == [name]
            order.append(name)
            inside.remove(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in range(5)]
    with turns.mine():
        for index, thread in enumerate(threads):
            thread.start()
            wait_for_waiting(turns, index + 1)
    for thread in threads:
        thread.join()
    assert order == list(range(5))


def test_a_holder_passes_on_to_all_who_wait_and_comes_back():
    turns, order = Turns(), []

    def work(name):
        with turns.mine():
            order.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("a", "b")]
    with turns.mine():
        turns.pass_on()  # nobody waits: it goes on
        for index, thread in enumerate(threads):
            thread.start()
            wait_for_waiting(turns, index + 1)
        turns.pass_on()
        order.append("holder")
    for thread in threads:
        thread.join()
    assert order == ["a", "b", "holder"]


def test_an_error_gives_the_turn_back():
    turns = Turns()
    try:
        with turns.mine():
            raise KeyError
    except KeyError:
        pass
    with turns.mine():
        assert not turns._waiting
