import oracle
import pytest
import torch
from cases import Case, cases
from hypothesis import given, settings
from hypothesis import strategies as st
from parallel_case import assert_all_close, cut, own_slice

from longnet_hpc import Partition, Pattern, SequencePlan, dilated_attention
from longnet_hpc.errors import PatternError, ShapeError

pytestmark = pytest.mark.mpi(min_size=2)


def check_against_oracle(comm, case, lengths, dtype, tolerance):
    q, k, v, dout = case.tensors(dtype)
    leaves = [own_slice(x, lengths, comm.rank).requires_grad_() for x in (q, k, v)]
    out, lse = dilated_attention(*leaves, *case.pattern, causal=case.causal, comm=comm, return_lse=True)
    grads = torch.autograd.grad(out, leaves, own_slice(dout, lengths, comm.rank))
    expected = oracle.attention_with_gradients(q, k, v, dout, *case.pattern, case.causal)
    expected = [own_slice(x, lengths, comm.rank) for x in expected]
    assert_all_close(comm, zip((out.detach(), lse, *grads), expected, strict=True), tolerance)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5), (torch.bfloat16, 6e-2)]
)
def test_result_equals_oracle_for_random_cases_and_uneven_slices(comm, dtype, tolerance):
    @settings(max_examples=200 if dtype != torch.bfloat16 else 30, deadline=None, derandomize=True, database=None)
    @given(case=cases(), cut_seed=st.integers(0, 2**31))
    def check(case, cut_seed):
        check_against_oracle(comm, case, cut(case.seq, comm.size, cut_seed), dtype, tolerance)

    check()


def test_slices_of_one_token_and_none(comm):
    lengths = [0] * comm.size
    lengths[-1] = 1
    case = Case(2, 1, 4, 2, 3, (1, 4), (1, 2), True, seed=3)
    check_against_oracle(comm, case, lengths, torch.float64, 1e-10)


def brute_force_bytes(case, lengths, rank, itemsize):
    """Count what rank needs from others: per branch, each distinct (offset, position, kv head) that a query sees."""
    owner = [r for r, length in enumerate(lengths) for _ in range(length)]
    group = case.heads // case.kv_heads
    rows = 0
    for w, r in zip(*case.pattern, strict=True):
        needed = set()
        for h in range(case.heads):
            grid = [p for p in range(case.seq) if (p % w) % r == h % r]
            for n in (p for p in grid if owner[p] == rank):
                for m in grid:
                    if m // w == n // w and owner[m] != rank and not (case.causal and m > n):
                        needed.add((h % r, m, h // group))
        rows += len(needed)
    return 2 * rows * case.batch * case.head_dim * itemsize


def test_bytes_received_are_exactly_those_needed(comm):
    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @given(case=cases(max_seq=40), cut_seed=st.integers(0, 2**31))
    def check(case, cut_seed):
        lengths = cut(case.seq, comm.size, cut_seed)
        plan = SequencePlan.build(Pattern.from_lists(*case.pattern), lengths[comm.rank], comm=comm)
        before = plan.bytes_received
        plan.attention(*(own_slice(x, lengths, comm.rank) for x in case.tensors(torch.float32)[:3]), causal=case.causal)
        pairs = comm.allgather((plan.bytes_received - before, brute_force_bytes(case, lengths, comm.rank, 4)))
        assert all(counted == needed for counted, needed in pairs), pairs

    check()


def test_backward_sends_back_exactly_the_rows_that_were_sent(comm):
    lengths = Partition.even(96, comm.size)
    case = Case(1, 96, 4, 4, 4, (96,), (2,), False, seed=1)
    plan = SequencePlan.build(Pattern.from_lists(*case.pattern), len(lengths.slice_of(comm.rank)), comm=comm)
    leaves = [
        x[:, slice(*lengths.bounds[comm.rank : comm.rank + 2])].requires_grad_()
        for x in case.tensors(torch.float32)[:3]
    ]
    before = plan.bytes_received
    out = plan.attention(*leaves, causal=False)
    forward = plan.bytes_received - before
    out.sum().backward()
    backward = plan.bytes_received - before - forward
    assert comm.allreduce(forward) == comm.allreduce(backward) > 0


def test_slice_that_disagrees_raises_the_same_error_on_all_ranks(comm):
    x = torch.zeros(1 if comm.rank else 2, 4, 2, 4)
    with pytest.raises(ShapeError, match="rank 1 disagrees with rank 0: 1 is not 2"):
        dilated_attention(x, x, x, [8], [1], comm=comm)


def test_error_on_one_rank_raises_on_all_ranks(comm):
    x = torch.zeros(1, 4, 2, 4)
    with pytest.raises(PatternError, match="at least 1, got 0"):
        dilated_attention(x, x, x, [8], [0 if comm.rank == 1 else 1], comm=comm)


def test_plan_and_communicators_are_made_once_and_freed_with_their_communicator(comm):
    for _ in range(300):  # MPI libraries run out of communicators after about 2,000
        private = comm.Dup()
        plans = [SequencePlan.build(Pattern.from_lists([7, 50], [1, 2]), 12, comm=private) for _ in range(3)]
        assert plans[0] is plans[1] is plans[2]
        private.Free()


def test_same_bits_in_two_runs(comm):
    case = Case(1, 80, 4, 4, 8, (16, 80), (1, 3), False, seed=2)
    lengths = cut(case.seq, comm.size, 5)
    runs = []
    for _ in range(2):
        leaves = [own_slice(x, lengths, comm.rank).requires_grad_() for x in case.tensors(torch.float32)[:3]]
        out = dilated_attention(*leaves, *case.pattern, comm=comm)
        out.square().sum().backward()
        runs.append([out.detach(), *(x.grad for x in leaves)])
    assert_all_close(comm, zip(*runs, strict=True), 0.0)
