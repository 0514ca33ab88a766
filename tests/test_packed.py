"""Packed documents: each is what it would be alone, on one rank and on many."""

import itertools

import numpy
import oracle
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from parallel_case import assert_all_close, cut, own_slice

from longnet_hpc import LongNet, LongNetConfig, Partition, SequencePlan, dilated_attention
from longnet_hpc.attention import branch as attention_branch
from longnet_hpc.errors import LongNetError, PartitionError, ShapeError
from longnet_hpc.partition import Run
from longnet_hpc.pattern import Branch, Pattern

PATTERN = (5, 17, 64), (1, 2, 3)


def bounds_of(lengths):
    return [0, *itertools.accumulate(lengths)]


def tensors(total, seed=0, batch=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, total, heads, 4, generator=generator, dtype=torch.float64) for heads in (4, 2, 2, 4)]


def each_alone(cu_seqlens, inputs, pattern, causal):
    """Return out, lse, dq, dk, dv of the oracle, document by document."""
    parts = [
        oracle.attention_with_gradients(*(x[:, start:stop] for x in inputs), *pattern, causal)
        for start, stop in itertools.pairwise(cu_seqlens)
        if start < stop
    ]
    return [torch.cat(of_all, 1) for of_all in zip(*parts, strict=True)]


def together(cu_seqlens, inputs, pattern, causal, **options):
    leaves = [x.clone().requires_grad_() for x in inputs[:3]]
    out, lse = dilated_attention(*leaves, *pattern, causal=causal, cu_seqlens=cu_seqlens, return_lse=True, **options)
    return [out.detach(), lse, *torch.autograd.grad(out, leaves, inputs[3])]


lengths = st.lists(st.one_of(st.integers(0, 3), st.integers(0, 40), st.just(17)), min_size=1, max_size=8).filter(any)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(lengths, st.lists(st.tuples(st.integers(1, 50), st.integers(1, 7)), min_size=1, max_size=3), st.booleans())
@example([0, 0, 1, 0, 64, 0], [(5, 1), (17, 2)], True)
def test_documents_equal_the_oracle_of_each_alone(lengths, branches, causal):
    cu_seqlens, pattern = bounds_of(lengths), tuple(zip(*branches, strict=True))
    inputs = tensors(cu_seqlens[-1], batch=2)
    torch.testing.assert_close(
        together(cu_seqlens, inputs, pattern, causal), each_alone(cu_seqlens, inputs, pattern, causal)
    )


@pytest.mark.parametrize("form", [torch.tensor, numpy.array, lambda x: torch.tensor(x, dtype=torch.int32)])
def test_boundaries_may_be_a_tensor_or_an_array(form):
    inputs = tensors(40)
    torch.testing.assert_close(
        together(form([0, 9, 9, 40]), inputs, PATTERN, True), together([0, 9, 9, 40], inputs, PATTERN, True)
    )


@pytest.mark.parametrize(
    ("cu_seqlens", "error", "words"),
    [
        ([0, 5, 41], PartitionError, "must lie from 0 to 40, the tokens of the sequence, got 0 to 41"),
        ([1, 40], PartitionError, "got 1 to 40"),
        ([0, 20, 10, 40], PartitionError, "one after another, got 10 after 20"),
        ([0], ShapeError, "at least 2 entries"),
        ([0, 2.5, 40], ShapeError, "list of integers"),
        (torch.zeros(2, 2), ShapeError, "list of integers"),
        (7, ShapeError, "list of integers"),
    ],
)
def test_boundaries_that_are_none_are_one_clear_error(cu_seqlens, error, words):
    with pytest.raises(error) as caught:
        together(cu_seqlens, tensors(40), PATTERN, True)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_chunk_of_a_sequence_is_not_of_packed_documents():
    with pytest.raises(PartitionError, match="a chunk of a sequence cannot be of packed documents"):
        SequencePlan.build(Pattern.from_lists([8], [1]), 8, start=8, cu_seqlens=[0, 16])


def test_model_with_a_plan_of_documents_equals_the_model_of_each():
    torch.manual_seed(0)
    config = LongNetConfig(
        vocab_size=17, layers=2, embed_dim=16, heads=4, segment_lengths=(8, 32), dilation_rates=(1, 3)
    )
    model, cu_seqlens = LongNet(config).double(), [0, 20, 21, 60]
    tokens = torch.randint(0, 17, (1, 60))
    plan = SequencePlan.build(config.pattern, 60, cu_seqlens=cu_seqlens)
    alone = [model(part) for part in tokens.split([20, 1, 39], 1)]
    torch.testing.assert_close(model(tokens, plan), torch.cat(alone, 1))
    assert not torch.allclose(model(tokens), torch.cat(alone, 1), atol=1e-3)


def test_equal_documents_are_one_call_of_a_kernel(monkeypatch):
    calls = []
    attend = attention_branch.attend
    monkeypatch.setattr(attention_branch, "attend", lambda *a, **o: calls.append(a) or attend(*a, **o))
    together(range(0, 801, 8), tensors(800), ([16], [1]), True)
    assert len(calls) == 1
    assert Partition((0, 800), tuple(range(0, 801, 8))).runs(Branch(16, 1), 0) == (Run(0, 8, 100, 0),)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("causal", [False, True])
def test_documents_that_span_ranks_equal_the_oracle(comm, causal):
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(0, 40, (6,), generator=generator).tolist()
        cu_seqlens = bounds_of([*lengths, 3, 17, 17])
        slices = cut(cu_seqlens[-1], comm.size, seed)
        inputs = tensors(cu_seqlens[-1], seed)
        own = [own_slice(x, slices, comm.rank) for x in inputs]
        actual = together(cu_seqlens, own, PATTERN, causal, comm=comm)
        expected = each_alone(cu_seqlens, inputs, PATTERN, causal)
        assert_all_close(
            comm, [(a, own_slice(b, slices, comm.rank)) for a, b in zip(actual, expected, strict=True)], 1e-10
        )


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        ([0, 8, 8 * 4], "disagrees with rank 0: digest of cu_seqlens"),
        (None, "disagrees with rank 0: documents 0 is not 3"),
        ([0, "x"], "must be a list of integers"),
    ],
)
def test_boundaries_that_differ_between_ranks_are_an_error_on_all(comm, theirs, words):
    x = torch.zeros(1, 4, 2, 4)
    cu_seqlens = theirs if comm.rank == 1 else [0, 4, 4 * comm.size]
    with pytest.raises(LongNetError, match=words):
        dilated_attention(x, x, x, [8], [1], comm=comm, cu_seqlens=cu_seqlens)
