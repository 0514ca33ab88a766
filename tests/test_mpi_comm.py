import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parallel_case import assert_all_close

from longnet_hpc import comm as communication
from longnet_hpc.comm import RowGather, buffers, collectives
from longnet_hpc.comm.transport import decide_transport
from longnet_hpc.errors import CorpusError, LaunchError, ShapeError
from longnet_hpc.pattern import Pattern
from longnet_hpc.stream import SequenceStream

pytestmark = pytest.mark.mpi(min_size=2)


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dot(comm, a, b):
    """Inner product over all ranks."""
    return comm.allreduce((a * b).sum().item())


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 2**31), data=st.data())
def row_gather(comm, check, seed, data):
    size = comm.size
    rows = data.draw(st.lists(st.integers(0, 6), min_size=size, max_size=size))
    blocks = [
        [sorted(data.draw(st.tuples(st.integers(0, rows[s]), st.integers(0, rows[s])))) for _ in range(size)]
        for s in range(size)
    ]
    own = blocks[comm.rank]
    gather = RowGather(
        comm,
        [stop - start for start, stop in own],
        [start for start, _ in own],
        [blocks[s][comm.rank][1] - blocks[s][comm.rank][0] for s in range(size)],
    )
    check(gather, rows, blocks, seed)


def test_row_gather_delivers_the_blocks_in_rank_order(comm):
    def check(gather, rows, blocks, seed):
        offered = [normal(rows[s], 3, seed=seed + s) for s in range(comm.size)]
        expected = torch.cat([offered[s][slice(*blocks[s][comm.rank])] for s in range(comm.size)])
        assert_all_close(comm, [(gather.start(offered[comm.rank]).finish(), expected)], 0.0)

    row_gather(comm, check)


def test_row_gather_adjoint_satisfies_the_inner_product_identity(comm):
    def check(gather, rows, blocks, seed):
        x = normal(rows[comm.rank], 3, seed=seed + comm.rank)
        y = normal(sum(gather.recv_counts), 3, seed=seed + 100 + comm.rank)
        forward = gather.start(x).finish()
        adjoint = gather.finish_adjoint(gather.start_adjoint(y), torch.zeros_like(x))
        left, right = dot(comm, forward, y), dot(comm, x, adjoint)
        assert abs(left - right) <= 1e-12 * (1 + abs(left))

    row_gather(comm, check)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]
)
@pytest.mark.parametrize("shape", [(), (1,), (7, 5), (1000, 3), (0,)])
def test_sum_over_ranks_is_wide_in_rank_order_and_alike_everywhere(comm, dtype, shape):
    mine = normal(*shape, seed=comm.rank).to(dtype)
    expected = torch.zeros(shape, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    for rank in range(comm.size):
        expected = expected + normal(*shape, seed=rank).to(dtype).to(expected.dtype)
    total = communication.all_reduce_sum(comm, mine)
    assert total.dtype == dtype
    assert_all_close(comm, [(total.to(expected.dtype), expected.to(dtype).to(expected.dtype))], 0.0)
    assert torch.equal(mine, normal(*shape, seed=comm.rank).to(dtype))


def test_sum_over_ranks_is_split_into_buckets(comm, monkeypatch):
    monkeypatch.setattr(collectives, "BUCKET_BYTES", 40)
    mine = torch.arange(101, dtype=torch.float32) + comm.rank
    expected = sum(torch.arange(101, dtype=torch.float32) + rank for rank in range(comm.size))
    assert_all_close(comm, [(communication.all_reduce_sum(comm, mine), expected)], 0.0)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool])
def test_sum_over_ranks_of_another_kind_of_number_is_refused(comm, dtype):
    with pytest.raises(ShapeError, match="needs a floating dtype"):
        communication.all_reduce_sum(comm, torch.ones(3, dtype=dtype))


def test_gather_adjoint_adds_in_rank_order(comm):
    """The parts 1e8, 1, ..., -1e8 of float32 add up to 0 in rank order, and to something else in another."""
    counts = [1] * comm.size
    gather = RowGather(comm, counts, [0] * comm.size, counts)
    last = comm.size - 1
    mine = torch.full((comm.size, 1), {0: 1e8, last: -1e8}.get(comm.rank, 1.0))
    total = gather.finish_adjoint(gather.start_adjoint(mine), torch.zeros(1, 1))
    expected = torch.zeros(1, 1)
    for rank in range(comm.size):
        expected += {0: 1e8, last: -1e8}.get(rank, 1.0)
    assert_all_close(comm, [(total, expected)], 0.0)


def test_exchange_of_too_many_rows_is_refused_before_counts_wrap(comm, monkeypatch):
    monkeypatch.setattr(buffers, "MAX_COUNT", 4)
    counts, starts = [2] * comm.size, [0] * comm.size
    with pytest.raises(ShapeError, match=f"at most 4 rows, got 5 to send, {2 * comm.size} to receive"):
        buffers.start_alltoallv(comm, torch.zeros(5, 3), counts, starts, counts)


def test_transposed_buffers_are_refused_before_mpi_sees_them(comm):
    counts, starts = [1] * comm.size, [0] * comm.size
    with pytest.raises(ShapeError, match="contiguous"):
        buffers.start_alltoallv(comm, torch.zeros(3, 4).t(), counts, starts, counts)


def test_buffers_of_an_exchange_that_nobody_finishes_stay(comm):
    counts, starts = [1000] * comm.size, [0] * comm.size
    buffers.Pending.complete_all()
    pending = buffers.start_alltoallv(comm, torch.zeros(1000, 4), counts, starts, counts)
    assert pending in buffers.Pending._in_flight
    comm.Barrier()
    abandoned = id(pending)
    del pending
    (kept,) = [pending for pending in buffers.Pending._in_flight if id(pending) == abandoned]
    kept.finish()
    assert not buffers.Pending._in_flight


def send_from_the_first(comm, value):
    """Let the first rank send 4 MiB to all others, more than MPI sends before it is asked; return what came."""
    rows, sends, nothing = 1 << 16, comm.rank == 0, [0] * comm.size
    counts, expected = ([0, *[rows] * (comm.size - 1)], nothing) if sends else (nothing, [rows, *nothing[1:]])
    send = torch.full((rows if sends else 0, 16), value)
    return buffers.start_alltoallv(comm, send, counts, nothing, expected).finish()


def test_rank_that_gets_nothing_goes_on_before_others_have_taken_its_rows(comm):
    sends, own_comm = comm.rank == 0, comm.Dup()
    for number in range(buffers.MAX_LEFT):
        if not sends:
            comm.Recv(bytearray(1), 0, tag=number)  # the first rank has finished by then
        received = send_from_the_first(own_comm, float(number))
        for other in range(1, comm.size if sends else 0):
            comm.Send(bytes(1), other, tag=number)
        assert sends or (received == number).all()
    assert len(buffers.Pending._left) <= buffers.MAX_LEFT
    buffers.Pending.complete_all()
    assert not buffers.Pending._left
    assert not buffers.Pending._in_flight
    own_comm.Free()


def test_rank_that_sends_from_host_memory_stays_until_others_have_taken_it(comm, monkeypatch):
    """As long as its patience lasts; without, where MPI needs the core of the sender, they would wait for its nap."""
    monkeypatch.setattr(buffers, "_PATIENCE_BYTES_PER_SECOND", 1e6)
    own_comm = comm.Dup()
    own_comm.Barrier()
    begin = time.perf_counter()
    send_from_the_first(own_comm, 1.0)
    seconds = time.perf_counter() - begin
    has_left = bool(buffers.Pending._left)
    if comm.rank == 0:
        time.sleep(1)
    assert not any(comm.allgather(has_left))
    assert max(comm.allgather(seconds)) < 0.9
    buffers.Pending.complete_all()
    own_comm.Free()


class Kernels:
    """Stands for a GPU whose kernels are done when a test says so."""

    def __init__(self, done=False):
        self.done = done

    def query(self):
        return self.done

    def synchronize(self):
        self.done = True


class Soon(Kernels):
    """Is done when it was asked a few times."""

    def query(self):
        self.asked = getattr(self, "asked", 0) + 1
        return self.done or self.asked > 4


def start_when_ready(comm, rows):
    counts, starts = [len(rows)] * comm.size, [0] * comm.size
    return buffers.start_alltoallv(comm, rows, counts, starts, counts, when_ready=True)


def received_of(comm, rows_of):
    return torch.cat([rows_of(rank) for rank in range(comm.size)])


def test_exchanges_start_when_ready_in_the_order_in_which_they_were_made(comm, monkeypatch):
    kernels = [Kernels(), Kernels(done=True)]
    events = iter(kernels)
    monkeypatch.setattr(buffers, "_reached", lambda device: next(events, None))
    first, second = (start_when_ready(comm, torch.full((3, 2), 10.0 * comm.rank + number)) for number in range(2))
    assert not second.test()
    assert first._request is second._request is None
    kernels[0].done = True
    second.test()
    assert None not in (first._request, second._request)
    for number, pending in enumerate((first, second)):
        expected = received_of(comm, lambda rank, number=number: torch.full((3, 2), 10.0 * rank + number))
        assert torch.equal(pending.finish(), expected)


def test_finish_starts_all_exchanges_so_that_no_rank_waits_for_one_that_is_not_begun(comm, monkeypatch):
    monkeypatch.setattr(buffers, "_reached", lambda device: Soon(done=comm.rank % 2 == 0))
    flights = [start_when_ready(comm, torch.full((2, 1), float(number + comm.rank))) for number in range(3)]
    for number in range(3):
        expected = received_of(comm, lambda rank, number=number: torch.full((2, 1), float(number + rank)))
        assert torch.equal(flights[number].finish(), expected)
        assert all(flight._request is not None for flight in flights)


def test_waiting_counts_from_when_the_device_has_nothing_to_do(comm, monkeypatch):
    pace = {}

    class Busy(Kernels):
        def query(self):
            pace.setdefault("until", time.perf_counter() + 0.2)
            return time.perf_counter() > pace["until"]

    comm.Barrier()
    pending = start_when_ready(comm, torch.ones(1, 1)) if comm.rank else None
    if pending is None:  # comes late: the others are busy for 0.2 s of the 0.4 s that they wait
        time.sleep(0.4)
        start_when_ready(comm, torch.ones(1, 1)).finish()
    else:
        monkeypatch.setattr(buffers, "_reached", lambda device: Busy())
        pending.finish()
        assert 0.02 < pending.seconds_waited < 0.35
    comm.Barrier()


def test_rows_that_a_stream_keeps_wait_for_their_kernels_beside_other_collectives(comm, monkeypatch):
    """On the first rank they are not ready when all ranks meet in a collective of the same communicator."""
    stream = SequenceStream(Pattern.from_lists([16 * comm.size], [2]), 16 * comm.size, layers=1, comm=comm)
    (carry,) = stream.carries
    kernels = Kernels(done=comm.rank > 0)
    x = torch.arange(4.0).view(1, 4, 1, 1) + 4 * comm.rank
    with stream.next_chunk(4) as plan:
        crossing = plan.crossing(1, 1)
        monkeypatch.setattr(buffers, "_reached", lambda device: kernels)
        carry.keep(x, -x, crossing, 1)
        ranks = torch.empty(comm.size, dtype=torch.int64).numpy()
        comm.Iallgather(torch.tensor([comm.rank]).numpy(), ranks).Wait()
        assert ranks.tolist() == list(range(comm.size))
        kernels.done = True
        carry.settle()
    kept = carry.rows[0][:, 0, 0, 0, 0]
    assert kept[: 2 * comm.size].tolist() == [2.0 * row for row in range(2 * comm.size)]


def test_all_ranks_of_one_host_are_on_the_first_node_in_any_order(comm):
    backwards = comm.Split(0, key=-comm.rank)
    for order in (comm, backwards):
        assert communication.node_place(order) == (order.rank, order.size, True)
    backwards.Free()


def test_fact_that_differs_is_named_on_all_ranks(comm):
    assert communication.agree_on(comm, {"batch": 3}, comm.rank) == list(range(comm.size))
    with pytest.raises(ShapeError, match="rank 1 disagrees with rank 0: batch 3 is not 2"):
        communication.agree_on(comm, {"dtype": "any", "batch": 3 if comm.rank else 2}, None)
    with pytest.raises(CorpusError, match="of rank 1"):
        communication.agree_on(comm, {}, None, CorpusError("of rank 1") if comm.rank == 1 else None)


def test_transport_that_only_one_rank_is_told_is_an_error_on_all_ranks(comm):
    with pytest.raises(ShapeError, match="transport direct is not staged"):
        decide_transport(comm, "direct" if comm.rank else "staged")
    with pytest.raises(LaunchError, match="got 'magic'"):
        decide_transport(comm, "magic" if comm.rank == 1 else "staged")


def test_transport_decision_is_told_once_on_rank_0(comm, caplog):
    with caplog.at_level("INFO", logger="longnet_hpc"):
        decide_transport(comm, "staged")
    assert [record.getMessage() for record in caplog.records] == ["device memory travels staged: forced"][comm.rank :]


def test_tensor_that_requires_grad_is_sent_detached(comm):
    x = torch.full((2, 2), float(comm.rank), requires_grad=True)
    pending = buffers.start_alltoallv(comm, x, [2] * comm.size, [0] * comm.size, [2] * comm.size)
    assert not pending._sendbuf.requires_grad
    received = pending.finish()
    assert received[:, 0].tolist() == [float(rank) for rank in range(comm.size) for _ in range(2)]


def test_error_of_the_lowest_failing_rank_is_raised_everywhere(comm):
    with pytest.raises(CorpusError, match="damaged on rank 1"), communication.agreed(comm):
        if comm.rank >= 1:
            raise CorpusError(f"damaged on rank {comm.rank}")


def test_agreement_lets_good_ranks_pass_and_defects_through(comm):
    with communication.agreed(comm):
        pass
    communication.agree(comm, None)
    assert communication.allgather_objects(comm, comm.rank) == list(range(comm.size))
    assert communication.broadcast_object(comm, comm.rank, root=1) == 1


def test_groups_are_created_in_rounds_and_freed(comm):
    groups = communication.Groups(comm)
    pairs = [(rank, rank + 1) for rank in range(comm.size - 1)]
    groups.ensure([*pairs, tuple(range(comm.size))])
    groups.ensure(pairs)
    for pair in pairs:
        if comm.rank in pair:
            assert groups[pair].allgather(comm.rank) == list(pair)
    whole = groups[tuple(range(comm.size))]
    mine = [made for made in groups._mine.values() if made is not whole]
    groups.keep_only([tuple(range(comm.size))])
    assert mine or comm.size == 2
    assert all(not made for made in mine)  # a freed communicator is COMM_NULL
    assert whole.allgather(comm.rank) == list(range(comm.size))
    groups.free()
    assert not whole
