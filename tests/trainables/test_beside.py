"""pytest tests/trainables/test_beside.py"""

import threading

import pytest

from trainables.beside import ahead, in_threads


def test_one_item_is_made_ahead_and_no_more():
    made, second = [], threading.Event()

    def items():
        for number in range(4):
            made.append(number)
            if number == 1:
                second.set()
            yield number

    found = ahead(items())
    assert next(found) == 0
    assert second.wait(10)  # made while nobody asks for it
    assert made == [0, 1]
    assert list(found) == [1, 2, 3]
    assert list(ahead(iter([]))) == []


def test_the_thread_begins_as_told_and_ends_with_whoever_asks():
    names = []

    def where():
        names.append(threading.current_thread().name)

    before = threading.active_count()
    found = ahead(iter(range(9)), where)
    next(found)
    assert names == ["ahead_0"]
    found.close()
    assert threading.active_count() == before


def test_errors_come_through():
    def items():
        yield 1
        raise OSError("lost")

    found = ahead(items())
    assert next(found) == 1
    with pytest.raises(OSError, match="lost"):
        next(found)
    with pytest.raises(ZeroDivisionError):
        list(in_threads(lambda n: 1 / n, iter([2, 0, 1]), 2))


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_work_is_done_side_by_side_and_comes_in_order(threads):
    meeting = threading.Barrier(max(threads, 1), timeout=10)

    def work(number):
        meeting.wait()  # goes on when as many are at work
        return number * 10, threading.current_thread() is threading.main_thread()

    found = list(in_threads(work, iter(range(6)), threads))
    assert found == [(number * 10, threads == 0) for number in range(6)]


def test_what_waits_is_bounded():
    drawn, goes_on = [], threading.Event()

    def items():
        for number in range(20):
            drawn.append(number)
            yield number

    found = in_threads(lambda number: goes_on.wait(10) and number, items(), 2)
    threading.Timer(0.3, goes_on.set).start()
    assert next(found) == 0
    assert len(drawn) <= 4
    assert list(found) == list(range(1, 20))
