import oracle
import pytest
import torch
from cases import Case, cases
from hypothesis import given, settings
from hypothesis import strategies as st
from parallel_case import assert_all_close, cut, own_slice

from longnet_hpc import Pattern, SequencePlan, dilated_attention, sequence_plan
from longnet_hpc.attention import BACKENDS, Backend
from longnet_hpc.attention.sums import GradientSum
from longnet_hpc.comm import groups_of
from longnet_hpc.comm.buffers import Pending
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
    ("dtype", "tolerance"),
    [(torch.float64, 1e-10), (torch.float32, 2e-5), (torch.bfloat16, 6e-2), (torch.float16, 1e-2)],
)
def test_result_equals_oracle_for_random_cases_and_uneven_slices(comm, dtype, tolerance):
    @settings(max_examples=200 if dtype.itemsize > 2 else 30, deadline=None, derandomize=True, database=None)
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
    """Count what rank needs from each other: per branch, each distinct (offset, position, kv head) a query sees."""
    owner = [r for r, length in enumerate(lengths) for _ in range(length)]
    group = case.heads // case.kv_heads
    rows = [0] * len(lengths)
    for w, r in zip(*case.pattern, strict=True):
        needed = set()
        for h in range(case.heads):
            grid = [p for p in range(case.seq) if (p % w) % r == h % r]
            for n in (p for p in grid if owner[p] == rank):
                for m in grid:
                    if m // w == n // w and owner[m] != rank and not (case.causal and m > n):
                        needed.add((h % r, m, h // group))
        for _, position, _ in needed:
            rows[owner[position]] += 1
    return [2 * count * case.batch * case.head_dim * itemsize for count in rows]


def test_bytes_received_are_exactly_those_needed(comm):
    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @given(case=cases(max_seq=40), cut_seed=st.integers(0, 2**31))
    def check(case, cut_seed):
        lengths = cut(case.seq, comm.size, cut_seed)
        plan = SequencePlan.build(Pattern.from_lists(*case.pattern), lengths[comm.rank], comm=comm)
        leaves = [own_slice(x, lengths, comm.rank).requires_grad_() for x in case.tensors(torch.float32)[:3]]
        before = plan.bytes_received
        out = plan.attention(*leaves, causal=case.causal)
        forward = plan.bytes_received - before
        out.sum().backward()
        backward = plan.bytes_received - before - forward
        needed = [brute_force_bytes(case, lengths, rank, 4) for rank in range(comm.size)]
        sent = [row[comm.rank] for row in needed]
        counted = comm.allgather((forward, backward, sum(needed[comm.rank]), sum(sent)))
        assert all(f == needs and b == gave for f, b, needs, gave in counted), counted

    check()


def test_slice_that_disagrees_raises_the_same_error_on_all_ranks(comm):
    x = torch.zeros(1 if comm.rank else 2, 4, 2, 4)
    with pytest.raises(ShapeError, match="rank 1 disagrees with rank 0: batch 1 is not 2"):
        dilated_attention(x, x, x, [8], [1], comm=comm)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: (x, x.clone().requires_grad_()), "gradient wanted True is not False"),
        (lambda x: (x, x.double()), "dtype torch.float64 is not torch.float32"),
    ],
)
def test_call_that_would_hang_or_garble_is_an_error_on_all_ranks(comm, change, words):
    x = change(torch.zeros(1, 4, 2, 4))[comm.rank > 0]
    with pytest.raises(ShapeError, match=words):
        dilated_attention(x, x, x, [8], [1], comm=comm)
    with pytest.raises(ShapeError, match="causal True is not False"):
        dilated_attention(*[torch.zeros(1, 4, 2, 4)] * 3, [8], [1], comm=comm, causal=comm.rank > 0)


def test_exchange_starts_before_the_computing_moves_during_it_and_ends_after_it(comm, monkeypatch):
    events = []

    def recorded(name, function):
        def call(*arguments, **options):
            events.append(name)
            return function(*arguments, **options)

        return call

    library = BACKENDS["library"]
    spy = Backend("spy", library.supports, recorded("forward", library.forward), recorded("backward", library.backward))
    monkeypatch.setitem(BACKENDS, "spy", spy)
    for name in ("test", "finish"):
        monkeypatch.setattr(Pending, name, recorded(name, getattr(Pending, name)))
    monkeypatch.setattr(sequence_plan.SpanExchange, "start", recorded("start", sequence_plan.SpanExchange.start))
    start_adjoint = sequence_plan.SpanExchange.start_adjoint
    monkeypatch.setattr(sequence_plan.SpanExchange, "start_adjoint", recorded("start adjoint", start_adjoint))
    leaves = [torch.randn(1, 16, 4, 8, requires_grad=True) for _ in range(3)]
    out = dilated_attention(*leaves, [4, 16 * comm.size], [1, 2], comm=comm, backend="spy")
    # One run of four segments and one piece, of 1 and 2 offsets; then the rows of others, again 2 offsets.
    assert events == ["start", *("forward", "test") * 3, "finish", *("forward", "test") * 2]
    events.clear()
    out.sum().backward()
    assert events == [*("backward",) * 2, "start adjoint", *("backward", "test") * 3, "finish"]


def test_argument_that_is_no_tensor_on_one_rank_raises_on_all_ranks(comm):
    x = torch.zeros(1, 4, 2, 4)
    with pytest.raises(ShapeError, match="must be tensors, got NoneType"):
        dilated_attention(None if comm.rank == 1 else x, x, x, [8], [1], comm=comm)


def test_error_on_one_rank_raises_on_all_ranks(comm):
    x = torch.zeros(1, 4, 2, 4)
    with pytest.raises(PatternError, match="at least 1, got 0"):
        dilated_attention(x, x, x, [8], [0 if comm.rank == 1 else 1], comm=comm)


def test_plan_and_communicators_are_made_once_and_freed_with_their_communicator(comm):
    for _ in range(3):
        private = comm.Dup()
        plans = [SequencePlan.build(Pattern.from_lists([7, 50], [1, 2]), 12, comm=private) for _ in range(3)]
        assert plans[0] is plans[1] is plans[2]
        made = list(groups_of(private)._mine.values())
        assert made
        private.Free()
        assert all(not group for group in made)  # a freed communicator is COMM_NULL


def test_communicators_of_dropped_plans_are_freed_once_no_rank_needs_them(comm, monkeypatch):
    monkeypatch.setattr(sequence_plan, "MAX_PLANS", 2)
    private = comm.Dup()
    pattern = Pattern.from_lists([6], [1])

    def plan_of(number):
        """A plan whose one spanning segment is shared by the first ``number`` ranks."""
        lengths = [1] * (number - 1) + [6 * comm.size + 1 - number] + [6] * (comm.size - number)
        return SequencePlan.build(pattern, lengths[comm.rank], comm=private)

    x = torch.randn(1, plan_of(comm.size).local_len, 2, 4, requires_grad=True)
    out = plan_of(comm.size).attention(x, x, x, causal=True)
    if comm.rank:
        del out
    groups = groups_of(private)
    assert tuple(range(comm.size)) in groups._known
    for _ in range(3):
        for length in range(20, 24):  # local segments alone: nothing to exchange
            SequencePlan.build(pattern, 6 * length, comm=private)
    assert tuple(range(comm.size)) in groups._known  # on all ranks, since a backward pass to come may need it on one
    if comm.rank == 0:
        del out
    for length in range(30, 34):
        SequencePlan.build(pattern, 6 * length, comm=private)
    assert not groups._known
    private.Free()


def test_seconds_of_exchanges_are_counted(comm, monkeypatch):
    plan = SequencePlan.build(Pattern.from_lists([16 * comm.size], [1]), 16, comm=comm)
    x = torch.randn(1, 16, 2, 4)
    before = plan.seconds_tested, plan.seconds_waited
    plan.attention(x, x, x, causal=False)
    assert plan.seconds_tested > before[0]
    assert plan.seconds_waited > before[1]


@pytest.mark.mpi(min_size=3)
def test_gradients_of_many_ranks_are_summed_in_float32(comm):
    """256 + 1 is 257 in float32 and 256 in bfloat16."""
    plan = SequencePlan.build(Pattern.from_lists([2 * comm.size], [1]), 2, comm=comm)
    k = v = torch.zeros(1, 2, 1, 4, dtype=torch.bfloat16)
    ((_, exchange),) = plan.exchanges(1, 1, causal=False)
    rows = exchange.unpack(exchange.finish(exchange.start(k, v), k))
    part = {0: 0.0, 1: 256.0}.get(comm.rank, 1.0)
    grads = {offset: tuple(torch.full_like(x, part) for x in pair) for offset, pair in rows.items()}
    sums = GradientSum(k), GradientSum(v)
    exchange.finish_adjoint(exchange.start_adjoint(grads, k), k, *sums)
    if comm.rank == 0:
        assert all((total.total == 256.0 + comm.size - 2).all() for total in sums)


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


def test_exchange_adjoint_satisfies_the_inner_product_identity(comm):
    @settings(max_examples=40, deadline=None, derandomize=True, database=None)
    @given(case=cases(), cut_seed=st.integers(0, 2**31))
    def check(case, cut_seed):
        lengths = cut(case.seq, comm.size, cut_seed)
        plan = SequencePlan.build(Pattern.from_lists(*case.pattern), lengths[comm.rank], comm=comm)
        _, k, v, _ = (own_slice(x, lengths, comm.rank) for x in case.tensors(torch.float64))
        sums = GradientSum(k), GradientSum(v)
        left = 0.0
        for _, exchange in plan.exchanges(case.heads, case.kv_heads, causal=case.causal):
            rows = exchange.unpack(exchange.finish(exchange.start(k, v), k))
            grads = {offset: tuple(map(torch.randn_like, pair)) for offset, pair in rows.items()}
            left += sum((a * b).sum().item() for key in rows for a, b in zip(rows[key], grads[key], strict=True))
            exchange.finish_adjoint(exchange.start_adjoint(grads, k), k, *sums)
        dk, dv = (total.result() for total in sums)
        right = ((k * dk).sum() + (v * dv).sum()).item()
        left, right = comm.allreduce(left), comm.allreduce(right)
        assert abs(left - right) <= 1e-11 * (1 + abs(left))

    check()


def test_attention_over_ranks_is_one_graph(comm):
    plan = SequencePlan.build(Pattern.from_lists([8, 16 * comm.size], [1, 3]), 16, comm=comm)
    inputs = [torch.randn(1, 16, 4, 8, requires_grad=True) for _ in range(3)]
    compiled = torch.compile(lambda q, k, v: plan.attention(q, k, v, causal=True), fullgraph=True, backend="aot_eager")
    results = []
    for form in (lambda *x: plan.attention(*x, causal=True), compiled):
        out = form(*inputs)
        results.append((out.detach(), *torch.autograd.grad(out.square().sum(), inputs)))
    assert_all_close(comm, zip(*results, strict=True), 0.0)
