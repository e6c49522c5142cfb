"""Whose turn it is, among those who wait."""

import random

from glm_jax.engine.fair_queue import Turns


def _order(turns, slots=1):
    """The order in which items run, each slot in turn being free again."""
    order, running = [], []
    while turns:
        if len(running) == slots:
            turns.drop(running.pop(0))
        number, item = turns.peek()
        assert turns.take(number) == item
        running.append(number)
        order.append(item)
    return order


def _waiting(items):
    """Items are texts of a client, a request, and more."""
    turns = Turns()
    for number, item in enumerate(items):
        turns.add(number, item, (item[0], item[1]))
    return turns


def test_one_request_is_first_in_first_out():
    assert _order(_waiting(["aa1", "aa2", "aa3"])) == ["aa1", "aa2", "aa3"]
    turns = Turns()
    for number in range(3):
        turns.add(number, str(number))
    turns.add(3, "urgent", is_urgent=True)
    assert len(turns) == 4
    assert _order(turns) == ["urgent", "0", "1", "2"]
    assert len(turns) == 0


def test_clients_take_turns_and_so_do_requests_of_each():
    items = ["ax1", "ax2", "ax3", "ay1", "bz1", "bz2"]
    for slots in (1, 2):
        assert _order(_waiting(items), slots) == ["ax1", "bz1", "ay1", "bz2", "ax2", "ax3"]


def test_who_has_fewest_running_goes_next():
    turns = _waiting(["ax1", "ax2", "ax3", "ax4", "ax5"])
    for _ in range(4):
        turns.take(turns.peek()[0])
    turns.add(10, "by1", ("b", "y"))
    turns.add(11, "by2", ("b", "y"))
    turns.add(12, "az1", ("a", "z"))
    assert [turns.take(turns.peek()[0]) for _ in range(4)] == ["by1", "by2", "az1", "ax5"]


def test_what_is_dropped_never_runs():
    draw = random.Random(0)
    items = [f"{draw.choice('abc')}{draw.choice('xy')}{i}" for i in range(60)]
    turns = _waiting(items)
    running, ran = [], []
    while turns:
        number, item = turns.peek()
        running.append(turns.take(number) and number)
        ran.append(item)
        turns.drop(draw.randrange(60))  # one that waits, runs or is gone
        assert len(turns) == len(set(turns._entries) - set(running))
    for number in range(60):
        turns.drop(number)
    assert not turns._entries
    assert not turns._running
    assert not turns._levels
    assert len(ran) == len(set(ran))


def test_lower_priorities_go_first_and_rounds_stay_within_each():
    turns = Turns()
    items = ["ax1", "ax2", "bx3", "ay4", "bx5"]
    for number, item in enumerate(items):
        turns.add(number, item, (item[0], item[1]), priority=-1 if item in ("ay4", "bx5") else 3)
    turns.add(5, "cx6", ("c", "x"), is_urgent=True, priority=3)
    turns.add(6, "cx7", ("c", "x"), is_urgent=True, priority=4)
    assert _order(turns) == ["ay4", "bx5", "cx6", "ax1", "bx3", "ax2", "cx7"]
    assert not turns._levels


def test_what_is_put_back_goes_before_all_of_its_priority_that_came_later():
    turns = _waiting(["ax1", "bx2", "ax3"])
    turns.add(3, "urgent", ("a", "x"), is_urgent=True)
    turns.add(4, "before", ("b", "x"), priority=-1)
    first = [turns.take(turns.peek()[0]) for _ in range(3)]
    assert first == ["before", "urgent", "ax1"]
    turns.put_back(0, "ax1 again")
    turns.put_back(3, "urgent again")
    turns.put_back(4, "before again")
    assert len(turns) == 5
    assert _order(turns) == ["before again", "ax1 again", "urgent again", "bx2", "ax3"]
    for number in range(5):
        turns.drop(number)
    assert not turns._entries
    assert not turns._running
