import math

import pytest

from longnet_hpc.pattern import Branch
from longnet_hpc.scaling.waits import Flight, FlightsOfRound, Wait, hidden_fraction, on_first_clock, waits_of

FORWARD, BACK = (1, Branch(8, 2), (0, 1), False, 0), (1, Branch(8, 2), (0, 1), True, 0)


def seen(flights: list[list[Flight]], *computed: float) -> list[FlightsOfRound]:
    return [FlightsOfRound(its, when) for its, when in zip(flights, computed or (30.0, 30.0), strict=True)]


def test_waits_are_told_apart_by_when_the_source_had_started():
    """Rank 1 is idle from 0 on and has its rows at 6; rank 0 gives them to MPI at 4."""
    first = [Flight(FORWARD, (), 4.0, math.inf, 4.5), Flight(BACK, (1,), 20.0, 21.0, 23.0)]
    second = [Flight(FORWARD, (0,), -1.0, 0.0, 6.0), Flight(BACK, (), 15.0, math.inf, 15.5)]
    assert waits_of(seen([first, second])).of_rank == [Wait(0.0, 2.0), Wait(4.0, 2.0)]


def test_no_wait_where_the_device_had_something_to_do():
    flights = [[Flight(FORWARD, (), 0.0, math.inf, 1.0)], [Flight(FORWARD, (0,), 0.0, math.inf, 5.0)]]
    waits = waits_of(seen(flights))
    assert (waits.of_rank, waits.exposed) == ([Wait(0.0, 0.0)] * 2, 0.0)


def test_rank_later_than_the_whole_wait_is_late_for_all_of_it():
    flights = [[Flight(FORWARD, (), 7.0, math.inf, 7.0)], [Flight(FORWARD, (0,), 0.0, 1.0, 6.0)]]
    waits = waits_of(seen(flights))
    assert (waits.of_rank[1], waits.exposed) == (Wait(5.0, 0.0), 0.0)


def test_times_are_those_of_the_first_clock_even_if_another_runs_faster():
    """The own clock is 100 s ahead in the beginning and gains 10% in 10 s."""
    its = FlightsOfRound([Flight(FORWARD, (0,), 100.0, math.inf, 105.5)], 111.0)
    shared = on_first_clock(its, (100 * 10**9, 0), (111 * 10**9, 10 * 10**9))
    assert (shared.flights[0].started, shared.flights[0].idle_since) == (0.0, math.inf)
    assert math.isclose(shared.flights[0].finished, 5.0)
    assert math.isclose(shared.computed, 10.0)


def test_driving_exchanges_is_not_hidden_on_a_cpu():
    assert hidden_fraction(0.5, 0.4, 2.0, on_gpu=True) == 0.75
    assert hidden_fraction(0.5, 0.4, 2.0, on_gpu=False) == pytest.approx(0.55)


def layers(count: int, local: float, ahead: float, transfer: float) -> list[list[Flight]]:
    """Rank 1 needs rows of rank 0 in each layer, which rank 0 starts every 10; idle after ``local`` of the layer."""
    first, second, begin = [], [], -ahead
    for layer in range(count):
        key, there = (layer, Branch(8, 2), (0, 1), False, 0), 10.0 * layer + transfer
        first.append(Flight(key, (), 10.0 * layer, math.inf, 10.0 * layer))
        idle_since = begin + local if begin + local < there else math.inf
        second.append(Flight(key, (0,), begin, idle_since, max(there, begin + local)))
        begin = max(there, begin + local) + 1.0
    return [first, second]


def test_rows_under_way_are_exposed_once_where_each_layer_waits_for_the_same_late_rank():
    waits = waits_of(seen(layers(5, local=4.0, ahead=6.0, transfer=0.5), 41.0, 41.5))
    assert math.isclose(waits.of_rank[1].under_way, 5 * 0.5)
    assert math.isclose(waits.exposed, 0.5)


def test_rows_under_way_cost_nothing_where_the_rank_that_waited_is_not_the_last():
    waits = waits_of(seen(layers(5, local=4.0, ahead=6.0, transfer=0.5), 50.0, 41.5))
    assert math.isclose(waits.of_rank[1].under_way, 5 * 0.5)
    assert waits.exposed == 0.0


def test_rows_under_way_are_exposed_each_time_where_nobody_is_late():
    """Both go through layers at the same pace, and each waits for the rows of the other."""
    key = [(layer, Branch(8, 2), (0, 1), False, 0) for layer in range(5)]
    its = [[Flight(key[i], (1 - rank,), 3.0 * i, 3.0 * i + 1, 3.0 * i + 3) for i in range(5)] for rank in (0, 1)]
    waits = waits_of(seen(its, 15.0, 15.0))
    assert (waits.of_rank, waits.exposed) == ([Wait(0.0, 10.0)] * 2, 10.0)


def test_rank_with_two_sources_waits_for_the_later_one():
    """The third rank is idle from 1 on; rows of the second, late until 4, are there at 6, of the first long before."""
    key = (1, Branch(12, 2), (0, 1, 2), False, 0)
    flights = [
        [Flight(key, (), 0.0, math.inf, 0.0)],
        [Flight(key, (0,), 4.0, math.inf, 5.0)],
        [Flight(key, (0, 1), 0.5, 1.0, 6.0)],
    ]
    waits = waits_of([FlightsOfRound(its, when) for its, when in zip(flights, (3.0, 5.0, 7.0), strict=True)])
    assert waits.of_rank[2] == Wait(3.0, 2.0)
    assert waits.exposed == 2.0


def test_clocks_that_disagree_by_more_than_rows_take_hide_nothing():
    """The second clock is 0.1 behind; rows of 0.01 are on their way in each of 20 layers."""
    ranks = ([], [])
    for layer in range(20):
        key = (layer, Branch(8, 2), (0, 1), False, 0)
        for rank, behind in enumerate((0.0, 0.1)):
            begin = 1.01 * layer + 1.0 - behind
            ranks[rank].append(Flight(key, (1 - rank,), begin, begin, begin + 0.01))
    waits = waits_of(seen(list(ranks), 20.2, 20.1))
    assert math.isclose(waits.exposed, 0.2, rel_tol=0.51)
