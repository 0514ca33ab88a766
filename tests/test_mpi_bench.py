"""Scaling runs under mpirun: the slowest rank counts, others rest, bytes are the least, wrong transfers are found."""

import json
import time

import pytest
import torch
from launching import slowness
from test_mpi_train import launch_of

from longnet_hpc import LongNetConfig
from longnet_hpc.comm import RowGather
from longnet_hpc.errors import ConfigError, StoppedError
from longnet_hpc.record import check_record
from longnet_hpc.scaling import bench_exchange, bench_steps
from longnet_hpc.scaling.bench import bench
from longnet_hpc.scaling.config import BenchConfig
from longnet_hpc.scaling.overlap import Overlap
from longnet_hpc.scaling.rounds import Rounds, rest_until_all, some_ranks
from longnet_hpc.scaling.waits import Wait, Waits
from longnet_hpc.sequence_plan import SequencePlan
from longnet_hpc.stopping import StopRequest
from longnet_hpc.trace import Trace, use
from longnet_hpc.trace_file import traced

pytestmark = pytest.mark.mpi(min_size=2)

MODEL = LongNetConfig(
    vocab_size=64, layers=2, embed_dim=32, heads=4, kv_heads=2, segment_lengths=(48, 1000), dilation_rates=(1, 4)
)


def run(comm, folder, **changes):
    """Return the records, on all ranks."""
    config = BenchConfig(**{"model": MODEL, "tokens": 400, "repeats": 2, "output": folder, **changes})
    records = bench(config, launch_of(comm))
    assert (len(records) > 0) == (comm.rank == 0)
    return comm.bcast(records)


@pytest.fixture
def rounds_taken(monkeypatch):
    """The number of ranks of each round that this rank takes."""
    taken = []
    take = Rounds.take

    def counted(self, work, *, timed):
        taken.append(self.launch.size)
        take(self, work, timed=timed)

    monkeypatch.setattr(Rounds, "take", counted)
    return taken


def counts(size):
    return [count for count in (1, 2, 4) if count < size] + [size]


@pytest.mark.parametrize(("sweep", "changes"), [("strong", {}), ("weak", {"interleave": False})])
def test_scaling_has_a_record_of_each_number_of_ranks(comm, shared_tmp_path, sweep, changes):
    records = run(comm, shared_tmp_path, sweep=sweep, **changes)
    for record, count in zip(records, counts(comm.size), strict=True):
        check_record(record)
        tokens = 400 * (count if sweep == "weak" else 1)
        assert record["what"]["config"]["point"] == {"ranks": count, "tokens": tokens}
        assert record["where"]["ranks"] == record["where"]["ranks_per_node"] == count
        assert record["check"]["passed"]
        assert record["results"]["tokens"] == tokens
        assert record["results"]["slowest_rank"] < count
        assert ("hidden_fraction" in record["results"]) == (count > 1)
    if sweep == "strong":
        losses = [record["results"]["loss_nats_per_token"] for record in records]
        assert losses == pytest.approx(losses[:1] * len(losses), rel=1e-5)
        assert "and that of 1 rank, 400 tokens" in records[-1]["check"]["name"]


def least_bytes(size, tokens, training):
    """Count, position by position, the most that one rank has to receive in a round."""
    cuts = [tokens * rank // size for rank in range(size + 1)]
    owner = [rank for rank in range(size) for _ in range(cuts[rank], cuts[rank + 1])]
    received = [0] * size
    for w, r in zip(MODEL.segment_lengths, MODEL.dilation_rates, strict=True):
        for key in range(tokens):
            of_segment = range(key - key % w, min(key - key % w + w, tokens))
            takers = {owner[query] for query in of_segment if query > key and (query - key) % r == 0} - {owner[key]}
            kv_heads = {head // 2 for head in range(4) if head % r == key % w % r}
            for taker in takers:
                received[taker] += len(kv_heads)
                received[owner[key]] += len(kv_heads) * training
    return max(received) * 2 * 8 * 4  # key and value, head_dim, float32


@pytest.mark.parametrize(
    ("sweep", "task", "layers"), [("strong", "train", 2), ("strong", "eval", 2), ("attention", "train", 1)]
)
def test_bytes_received_are_the_least(comm, shared_tmp_path, sweep, task, layers):
    (record,) = run(comm, shared_tmp_path, sweep=sweep, task=task, ranks=(comm.size,), batch_size=3)
    results = record["results"]
    least = 3 * layers * least_bytes(comm.size, 400, task == "train")
    assert (results["bytes_received"], results["bytes_received_minimum"]) == (least, least)


def test_loss_that_depends_on_the_number_of_ranks_is_reported(comm, shared_tmp_path, monkeypatch):
    """Wrong alike at once and in chunks, so that only another number of ranks can tell."""
    draw = bench_steps.StepsPoint._draw

    def other_tokens(self, its):
        inputs, targets = draw(self, its)
        return (inputs, targets) if self._launch.size == 1 else (inputs.flip(1), targets)

    monkeypatch.setattr(bench_steps.StepsPoint, "_draw", other_tokens)
    monkeypatch.setattr(bench_steps.StepsPoint, "_loss_in_chunks", lambda self: self._loss)
    with pytest.raises(ConfigError, match=f"results are wrong.*: {comm.size} ranks, 400 tokens$"):
        run(comm, shared_tmp_path, sweep="strong", ranks=(1, comm.size))
    run(comm, shared_tmp_path, sweep="weak", ranks=(1, comm.size))


@pytest.mark.parametrize("sweep", ["weak", "attention"])
def test_rows_that_arrive_damaged_are_reported(comm, shared_tmp_path, monkeypatch, sweep):
    damage(monkeypatch, "start", comm.rank == comm.size - 1)
    with pytest.raises(ConfigError, match=f"results are wrong, so their times mean nothing: {comm.size} ranks"):
        run(comm, shared_tmp_path, sweep=sweep, ranks=(comm.size,))


def damage(monkeypatch, method, here):
    """Change what this rank receives, if it is the one."""
    start = getattr(RowGather, method)

    def damaged(self, rows, **options):
        pending = start(self, rows, **options)
        finish = pending.finish

        def finish_damaged():
            received = finish()
            received.view(-1)[:64] += 3.0
            return received

        pending.finish = finish_damaged
        return pending

    if here:
        monkeypatch.setattr(RowGather, method, damaged)


def test_exchanges_deliver_what_was_sent_and_count_its_bytes(comm, shared_tmp_path):
    records = run(comm, shared_tmp_path, sweep="exchange", max_bytes=5000, warmup=0)
    operations = ["rows", "rows_back", "allgather", "alltoall", "sum", "mpi_allgather", "mpi_alltoall", "copy"]
    points = [record["what"]["config"]["point"] for record in records]
    assert points == [
        {"ranks": count, "operation": operation, "transport": "host", "bytes": size}
        for count in counts(comm.size)[1:]
        for operation in operations
        for size in (1024, 4096)
    ]
    for record, point in zip(records, points, strict=True):
        ranks, size, results = point["ranks"], point["bytes"], record["results"]
        most = {  # the last rank receives rows of all before it, the first one gradients of all after it
            "rows": (ranks - 1) * size,
            "rows_back": (ranks - 1) * size,
            "allgather": (ranks - 1) * size,
            "alltoall": (ranks - 1) * (-(-size // 256 // ranks) * 256),
            "sum": ranks * 4 * -(-size // 4 // ranks) + size,
            "mpi_allgather": (ranks - 1) * size,
            "mpi_alltoall": (ranks - 1) * (size // 256 // ranks) * 256,
            "copy": size,
        }
        assert results["bytes_received"] == most[point["operation"]]
        assert results["bytes_per_second"] == pytest.approx(most[point["operation"]] / results["seconds"])
        assert record["check"]["passed"]


WRONG = [("start", "rows allgather alltoall"), ("start_adjoint", "rows_back")]


@pytest.mark.parametrize(("method", "operations"), WRONG)
def test_exchange_that_delivers_something_else_is_reported(comm, shared_tmp_path, monkeypatch, method, operations):
    rank = 0 if method == "start_adjoint" else comm.size - 1
    damage(monkeypatch, method, comm.rank == rank)
    said = "; ".join(rf"{comm.size} ranks, {its} \(host\) of 1,024 bytes" for its in operations.split())
    with pytest.raises(ConfigError, match=f": {said}$"):
        run(comm, shared_tmp_path, sweep="exchange", max_bytes=1024, ranks=(comm.size,))


def test_sum_that_is_wrong_is_reported(comm, shared_tmp_path, monkeypatch):
    summed = bench_exchange.all_reduce_sum
    if comm.rank == comm.size - 1:
        monkeypatch.setattr(bench_exchange, "all_reduce_sum", lambda comm, x: summed(comm, x).roll(1))
    with pytest.raises(ConfigError, match=rf": {comm.size} ranks, sum \(host\) of 1,024 bytes$"):
        run(comm, shared_tmp_path, sweep="exchange", max_bytes=1024, ranks=(comm.size,))


def test_time_of_a_message_is_its_share_of_a_round(comm, shared_tmp_path, monkeypatch):
    monkeypatch.setattr(Rounds, "seconds", lambda self: [6.4, 5.0, 7.0])
    records = run(comm, shared_tmp_path, sweep="exchange", max_bytes=1 << 18, ranks=(comm.size,), warmup=0, repeats=1)
    seconds = [record["results"]["seconds"] for record in records[:5]]  # of rows, up to 64 and up to 4 MiB a round
    assert seconds == pytest.approx([0.1, 0.1, 0.1, 0.1, 0.4])


@pytest.mark.parametrize("interleave", [True, False])
def test_rounds_of_all_points_are_taken_in_turn(comm, shared_tmp_path, rounds_taken, interleave):
    run(comm, shared_tmp_path, ranks=(1, comm.size), interleave=interleave)
    if comm.rank == 0:
        assert rounds_taken == ([1, comm.size] * 3 if interleave else [1] * 3 + [comm.size] * 3)
    else:
        assert rounds_taken == [comm.size] * 3


def test_second_call_measures_only_what_is_not_there(comm, shared_tmp_path, rounds_taken):
    first = run(comm, shared_tmp_path, ranks=(comm.size,))
    rounds_taken.clear()
    assert run(comm, shared_tmp_path, ranks=(comm.size,)) == first
    assert not rounds_taken
    assert run(comm, shared_tmp_path, ranks=(1, comm.size))[1:] == first
    assert rounds_taken == ([1] * 3 if comm.rank == 0 else [])


def test_stop_of_one_rank_stops_all(comm, shared_tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        if comm.rank == comm.size - 1:
            enter = StopRequest.__enter__

            def stopped(self):
                self._signalled = True
                return enter(self)

            patch.setattr(StopRequest, "__enter__", stopped)
        with pytest.raises(StoppedError, match="left before 1 rank, 400 tokens"):
            run(comm, shared_tmp_path)
    assert not list(shared_tmp_path.iterdir())


def test_slowest_rank_counts_and_is_named(comm):
    launch, last = launch_of(comm), comm.size - 1

    def work():
        trace.open("compute", "work")
        time.sleep(0.05 if comm.rank == last else 0.001)
        trace.close()
        trace.open("wait", "for the last one")
        comm.Barrier()
        trace.close()
        if comm.rank == last:
            time.sleep(0.05)

    with use(Trace()) as trace:
        rounds = Rounds(launch)
        for timed in (False, True, True, True):
            rounds.take(work, timed=timed)
        results = rounds.results()
    assert comm.allgather(results) == [results] * comm.size
    assert len(rounds.seconds()) == 3
    assert 0.1 <= results["seconds_low"] <= results["seconds"] < 5
    assert results["slowest_rank"] == last
    assert results["compute_seconds"] >= 0.05
    assert 0.02 < results["slowest_rank_wait_seconds"] <= results["seconds"]
    assert results["compute_over_mean"] == pytest.approx(0.05 / ((0.05 + 0.001 * last) / comm.size), rel=0.5)


def test_wait_for_a_late_rank_is_told_apart_from_rows_on_their_way(comm):
    launch = launch_of(comm)
    x = torch.ones(1, 64, 4, 8)
    plan = SequencePlan.build(MODEL.pattern, 64, comm=comm)

    def work():
        if comm.rank == 0:
            time.sleep(0.1)
        plan.attention(x, x[:, :, :2], x[:, :, :2], causal=True)

    with use(Trace()):
        overlap = Overlap(Rounds(launch), plan)
        for _ in range(3):
            overlap.take(work, timed=True)
        options = {"layers": 1, "training": False}
        first, last = (overlap.results(MODEL, x[:, :, :2], slowest_rank=rank, **options) for rank in (0, comm.size - 1))
    assert last["exchange_waited_seconds"] > 0.05 > first["exchange_waited_seconds"]
    for results in (first, last):
        assert results["exchange_late_seconds"] > 0.05  # of the rank that waits most
        assert 0 <= results["exchange_exposed_seconds"] < 0.05
        assert 0 < results["exchange_driven_seconds"] < 0.05
        assert 0 <= results["exchange_under_way_seconds"] < 0.05
    assert plan.observer is None


def test_record_says_what_was_exposed_when_all_ranks_met(comm, monkeypatch):
    seen_by_rank = []

    def waits_of(seen):
        seen_by_rank.append(seen)
        return Waits([Wait(1.0, 2.0)] * len(seen), 3.0)

    monkeypatch.setattr("longnet_hpc.scaling.overlap.waits_of", waits_of)
    x = torch.ones(1, 64, 4, 8)
    plan = SequencePlan.build(MODEL.pattern, 64, comm=comm)
    with use(Trace()):
        overlap = Overlap(Rounds(launch_of(comm)), plan)

        def work():
            plan.attention(x, x[:, :, :2], x[:, :, :2], causal=True)
            overlap.computed()
            comm.Barrier()
            time.sleep(0.2)

        overlap.take(work, timed=True)
        over = time.perf_counter()
        results = overlap.results(MODEL, x[:, :, :2], layers=1, training=False, slowest_rank=0)
    wanted = {"late": 1.0, "under_way": 2.0, "exposed": 3.0}
    assert {name: results[f"exchange_{name}_seconds"] for name in wanted} == wanted
    assert results["hidden_fraction"] <= 1 - 3.0 / results["exchange_alone_seconds"]
    for its in seen_by_rank[0] if comm.rank == 0 else []:
        assert max(flight.finished for flight in its.flights) < its.computed < over - 0.1
    assert len(seen_by_rank) == (comm.rank == 0)


def test_launch_of_some_ranks_is_theirs_alone(comm):
    launch = launch_of(comm)
    with some_ranks(launch, [1, 2, comm.size]) as launch_of_some:
        for count in (1, 2, comm.size):
            its = launch_of_some(count)
            if comm.rank >= count:
                assert its is None
                continue
            assert (its.rank, its.size) == (comm.rank, count)
            assert (its.comm is None) == (count == 1)
            assert count == 1 or its.comm.allgather(comm.rank) == list(range(count))


def test_ranks_that_rest_leave_the_core_to_others(comm):
    launch = launch_of(comm)
    comm.Barrier()
    before = time.process_time()
    if comm.rank == 0:
        time.sleep(0.5)
    rest_until_all(launch)
    assert time.process_time() - before < 0.15 * slowness()


def test_trace_of_all_ranks_has_the_rounds_of_each(comm, shared_tmp_path):
    path = shared_tmp_path / "trace.json"
    with traced(path, launch_of(comm)):
        run(comm, shared_tmp_path, ranks=(1, comm.size))
    if comm.rank == 0:
        events = json.loads(path.read_text())["traceEvents"]
        rounds = [sum(its["name"] == "backward" and its["pid"] == rank for its in events) for rank in range(comm.size)]
        assert rounds == [6] + [3] * (comm.size - 1)
