import pytest
import torch
from hypothesis import given, settings
from parallel_case import assert_all_close
from test_model import tokens
from test_stream import chunked_cases, model_of, stream_of, whole

from longnet_hpc.carry_store import RowStore
from longnet_hpc.comm import all_reduce_sum
from longnet_hpc.sweep import GradientSweep

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
