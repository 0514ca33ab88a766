"""More than 2^31 elements on two ranks, really sent: no count wraps. By hand, since it takes up to 14 GiB of memory."""

import os
import resource
from itertools import pairwise

import pytest
import torch

from longnet_hpc import comm as communication
from longnet_hpc.comm import RowGather

pytestmark = [
    pytest.mark.mpi(min_size=2),
    pytest.mark.skipif("LONGNET_HPC_LARGE" not in os.environ, reason="set LONGNET_HPC_LARGE to send gigabytes"),
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore:The given buffer is not writable"),
]

WIDTH = 4099
ROWS = 2**31 // WIDTH + 3
"""Of bytes, more than 2^31 in all; neither is a multiple of a power of two."""
PERIOD = torch.randint(0, 256, (65521,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
"""Prime, so that what is 2^31 or 2^32 bytes away is something else."""
STEP = 512 * len(PERIOD)
MOST_BYTES = 24 << 30


def pieces(flat):
    """Yield parts of a flat tensor, each with what belongs there."""
    bounds = [*range(0, len(flat), STEP), len(flat)]
    pattern = PERIOD.repeat(512)
    for start, stop in pairwise(bounds):
        yield flat[start:stop], pattern[: stop - start]


def large(count):
    flat = torch.empty(count, dtype=torch.uint8)
    for part, content in pieces(flat):
        part.copy_(content)
    return flat


def holds_pattern(flat):
    return all(torch.equal(part, content) for part, content in pieces(flat))


@pytest.fixture(autouse=True)
def memory(comm):
    """All ranks together stay within the limit, shared pages counted more than once."""
    yield
    most = comm.allreduce(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    if comm.rank == 0:
        print(f"peak memory of all ranks so far: {most / 2**30:.1f} GiB")
    assert most < MOST_BYTES


def among_two(comm, test):
    """Let two ranks take a test, which the others wait for."""
    pair = comm.Split(comm.rank >= 2, key=comm.rank)
    if comm.rank < 2:
        test(pair)
    pair.Free()
    comm.Barrier()


def test_rows_of_more_than_2_to_the_31_bytes_arrive(comm):
    def test(pair):
        # Rank 1 gets all rows of rank 0, and rank 0 gets the last row of rank 1, which starts beyond 2^31 bytes.
        offered = large(ROWS * WIDTH).view(ROWS, WIDTH)
        assert offered.numel() > 2**31 + WIDTH
        sends = ([0, ROWS], [0, 0]) if pair.rank == 0 else ([1, 0], [ROWS - 1, 0])
        gather = RowGather(pair, *sends, [0, 1] if pair.rank == 0 else [ROWS, 0])
        received = gather.start(offered).finish()
        if pair.rank == 0:
            assert torch.equal(received[0], offered[-1])
        else:
            assert received.shape == offered.shape
            assert holds_pattern(received.view(-1))

    among_two(comm, test)


def test_gradients_of_more_than_2_to_the_31_bytes_come_back(comm):
    def test(pair):
        # Of two blocks of rows that rank 1 had from rank 0, the second begins beyond 2^31 bytes of the sum.
        counts = [0, ROWS] if pair.rank == 0 else [0, 0]
        gather = RowGather(pair, counts, [0, 0], [0, 0] if pair.rank == 0 else [ROWS, 0])
        received_grad = large(sum(gather.recv_counts) * WIDTH).view(-1, WIDTH)
        pending = gather.start_adjoint(received_grad)
        if pair.rank == 1:
            pending.finish()
            return
        total = gather.finish_adjoint(pending, torch.zeros(ROWS, WIDTH, dtype=torch.uint8))
        assert holds_pattern(total.view(-1))

    among_two(comm, test)


def test_sum_of_more_than_2_to_the_31_elements_is_right_at_both_ends(comm):
    def test(pair):
        mine = torch.zeros(2**31 + 11, dtype=torch.float8_e4m3fn)
        for place in (0, 2**30, 2**31 - 1, 2**31, -1):
            mine[place] = 1.5 + pair.rank
        total = communication.all_reduce_sum(pair, mine)
        del mine
        as_bytes = total.view(torch.uint8)
        for place in (0, 2**30, 2**31 - 1, 2**31, -1):
            assert total[place].float() == 4.0
        assert sum(int(part.count_nonzero()) for part in as_bytes.split(STEP)) == 5

    among_two(comm, test)


@pytest.mark.parametrize("way", ["broadcast", "gathered", "collected"])
def test_objects_of_more_than_2_to_the_31_bytes_arrive(comm, way):
    from mpi4py import MPI

    if MPI.Get_version() < (4, 0):
        pytest.skip("MPI 3 counts in 32 bits, and refuses them")

    def test(pair):
        owner = 1 if way == "collected" else 0
        value = large(2**31 + 11).numpy().tobytes() if pair.rank == owner else b"small"
        if way == "broadcast":
            theirs = communication.broadcast_object(pair, value)
        elif way == "gathered":
            theirs, other = communication.allgather_objects(pair, value)
            assert other == b"small"
        else:
            theirs = list(communication.collect_objects(pair, value))[-1] if pair.rank == 0 else None
            if pair.rank == 1:
                assert list(communication.collect_objects(pair, value)) == []
                return
        del value
        assert len(theirs) == 2**31 + 11
        assert holds_pattern(torch.frombuffer(theirs, dtype=torch.uint8))

    among_two(comm, test)
