import math

from longnet_hpc.pattern import Branch
from longnet_hpc.scaling.waits import Flight, Wait, waits_of

FORWARD, BACK = (1, Branch(8, 2), (0, 1), False), (1, Branch(8, 2), (0, 1), True)


def test_waits_are_told_apart_by_when_the_source_had_started():
    """Rank 1 is idle from 10 on and has its rows at 16; rank 0 gives them to MPI at 14, as rank 1's clock tells."""
    first = [Flight(FORWARD, (), 4.0, math.inf, 4.5), Flight(BACK, (1,), 20.0, 21.0, 23.0)]
    second = [Flight(FORWARD, (0,), 9.0, 10.0, 16.0), Flight(BACK, (), 25.0, math.inf, 25.5)]
    assert waits_of([first, second], [0.0, 10.0]) == [Wait(0.0, 2.0), Wait(4.0, 2.0)]


def test_no_wait_where_the_device_had_something_to_do():
    flights = [[Flight(FORWARD, (), 0.0, math.inf, 1.0)], [Flight(FORWARD, (0,), 0.0, math.inf, 5.0)]]
    assert waits_of(flights, [0.0, 0.0]) == [Wait(0.0, 0.0)] * 2


def test_rank_later_than_the_whole_wait_is_late_for_all_of_it():
    flights = [[Flight(FORWARD, (), 7.0, math.inf, 7.0)], [Flight(FORWARD, (0,), 0.0, 1.0, 6.0)]]
    assert waits_of(flights, [0.0, 0.0])[1] == Wait(5.0, 0.0)
