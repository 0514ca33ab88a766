import itertools

import pytest
import torch
from hypothesis import given, settings
from parallel_case import assert_all_close
from test_model import tokens
from test_stream import chunked_cases, model_of, stream_of, whole

from longnet_hpc import Pattern
from longnet_hpc.carry_store import RowStore
from longnet_hpc.comm import all_reduce_sum
from longnet_hpc.stream import SequenceStream
from longnet_hpc.sweep import GradientSweep, slice_of_chunk

pytestmark = pytest.mark.mpi(min_size=2)


def check_swept(comm, model, x, y, bounds, tolerance):
    stream = stream_of(model, x.shape[1], comm)
    sweep = GradientSweep(
        *(model, stream, RowStore(model.config.pattern, x.shape[1]), bounds),
        rank=comm.rank,
        size=comm.size,
    )
    while sweep.done < sweep.total:
        sweep.advance(lambda its: (x[:, its.start : its.stop], y[:, its.start : its.stop]))
    loss, expected = whole(model, x, y)
    scale = max(float(gradient.abs().max()) for gradient in expected)
    pairs = [(all_reduce_sum(comm, sweep.loss) / y.numel(), loss.double())]
    for parameter, right in zip(model.parameters(), expected, strict=True):
        own = torch.zeros_like(right) if parameter.grad is None else parameter.grad
        pairs.append((all_reduce_sum(comm, own) / scale, right / scale))
    assert_all_close(comm, pairs, tolerance)
    return stream


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_chunks_over_ranks_give_the_gradient_of_one_piece(comm, dtype, tolerance):
    @settings(max_examples=25, deadline=None, derandomize=True, database=None)
    @given(drawn=chunked_cases())
    def check(drawn):
        case, bounds = drawn
        model = model_of(case, dtype)
        check_swept(comm, model, tokens(case.seq), tokens(case.seq, seed=1), bounds, tolerance)

    check()


def test_bytes_of_carried_rows_are_those_counted_token_by_token(comm):
    seq, (batch, heads, kv_heads, head_dim), bounds = 61, (2, 4, 2, 8), (0, 1, 7, 25, 50, 61)
    branches = [(10, 1), (24, 3), (61, 7)]
    slices = [
        [slice_of_chunk(range(*ends), rank, comm.size) for rank in range(comm.size)]
        for ends in itertools.pairwise(bounds)
    ]

    def rows_left(rank, its_slices):
        """Count pairs of a token and a head that lie on the grid of a segment which goes on after the chunk."""
        stop = its_slices[-1].stop
        return sum(
            (position % w) % r == head % r
            for w, r in branches
            for position in its_slices[rank]
            for head in range(heads)
            if stop < seq and position // w == stop // w and stop % w
        )

    numbers = 2 * batch * head_dim  # of a row: keys and values
    forward = backward = 0
    for its in slices:
        left = [rows_left(rank, its) for rank in range(comm.size)]
        forward += (sum(left) - left[comm.rank]) * numbers * 2  # bfloat16, from each that has them
        backward += left[comm.rank] * (comm.size - 1) * numbers * 4  # float32, from all others

    stream = SequenceStream(Pattern.from_lists(*zip(*branches, strict=True)), seq, layers=1, comm=comm)
    store, received = RowStore(stream.pattern, seq), []
    own = [its[comm.rank] for its in slices]
    q, k, v = (torch.randn(batch, seq, count, head_dim).bfloat16() for count in (heads, kv_heads, kv_heads))
    for its in own:
        with torch.no_grad(), stream.next_chunk(len(its)) as plan:
            plan.of_layer(0).attention(*(x[:, its.start : its.stop] for x in (q, k, v)), causal=True)
        stream.settle()
        store.keep(stream.carries, plan.chunk)
    received.append(sum(carry.bytes_received for carry in stream.carries))
    for its, start in reversed([*zip(own, bounds[:-1], strict=True)]):
        leaves = [x[:, its.start : its.stop].clone().requires_grad_() for x in (q, k, v)]
        with stream.chunk_again(start, len(its), store) as plan:
            plan.of_layer(0).attention(*leaves, causal=True).sum().backward()
    store.close()
    received.append(sum(carry.bytes_received for carry in stream.carries) - received[0])
    answers = comm.allgather((received, [forward, backward]))
    assert [ours for ours, _ in answers] == [counted for _, counted in answers]
    assert sum(counted[0] for _, counted in answers) > 0
