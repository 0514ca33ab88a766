"""Attention of the last tokens over the keys of the whole sequence, against the definition."""

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longnet_hpc import Pattern
from longnet_hpc.continued import continued_attention
from longnet_hpc.errors import ShapeError
from longnet_hpc.grids import token_grids
from longnet_hpc.pattern import Branch


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 7)), min_size=1, max_size=3),
    st.sampled_from([(4, 2), (5, 1), (3, 3)]),
    st.integers(1, 45),
    st.integers(1, 45),
    st.booleans(),
    st.sampled_from(["auto", "reference"]),
)
def test_last_rows_are_those_of_the_definition(branches, heads, seq, new, cache_of_heads, backend):
    torch.manual_seed(seq)
    new = min(new, seq)
    q = torch.randn(2, seq, heads[0], 4, dtype=torch.float64)
    k, v = torch.randn(2, 2, seq, heads[1], 4, dtype=torch.float64)
    if cache_of_heads:  # as a cache lies in memory, heads before tokens
        k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    lists = [list(values) for values in zip(*branches, strict=True)]
    wanted, _ = oracle.attention(q, k, v, *lists, True, 0.6)
    got = continued_attention(q[:, seq - new :], k, v, Pattern.from_lists(*lists), softmax_scale=0.6, backend=backend)
    torch.testing.assert_close(got, wanted[:, seq - new :])


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 9)), min_size=1, max_size=4),
    st.sampled_from([(8, 2), (12, 2), (6, 3), (5, 1), (4, 4)]),
    st.integers(1, 90),
)
def test_one_token_is_the_last_row_of_the_definition(branches, heads, seq):
    torch.manual_seed(seq)
    q = torch.randn(2, seq, heads[0], 4, dtype=torch.float64)
    k, v = torch.randn(2, 2, seq, heads[1], 4, dtype=torch.float64)
    lists = [list(values) for values in zip(*branches, strict=True)]
    wanted, _ = oracle.attention(q, k, v, *lists, True, 0.6)
    got = continued_attention(q[:, -1:], k, v, Pattern.from_lists(*lists), softmax_scale=0.6)
    torch.testing.assert_close(got, wanted[:, -1:])


@pytest.mark.parametrize("rate", [1, 2, 4, 8, 16])
def test_one_token_takes_one_kernel_a_branch_where_rate_and_shared_heads_divide(rate):
    for position in range(1000, 1020):
        assert len(token_grids(Branch(512, rate), position, 32, 8)) == 1


def test_one_token_takes_few_kernels_a_branch_where_they_do_not_divide():
    assert max(len(token_grids(Branch(512, 6), position, 32, 8)) for position in range(1000, 1020)) == 2


def test_one_token_reads_no_key_outside_its_grid():
    k, v = torch.full((2, 1, 1000, 2, 4), torch.nan)
    for x in (k, v):
        x[:, 900::3, 0] = 1.0  # 999 lies on the grid of head 0
    out = continued_attention(torch.ones(1, 1, 2, 4), k, v, Pattern.from_lists([300], [3]))
    torch.testing.assert_close(out[0, 0], torch.tensor([[1.0] * 4, [0.0] * 4]))


@pytest.mark.parametrize(
    ("q_shape", "k_shape", "words"),
    [
        ((1, 5, 2, 4), (1, 3, 2, 4), "5|3"),
        ((1, 2, 2, 4), (2, 3, 2, 4), "batch"),
        ((1, 2, 3, 4), (1, 3, 2, 4), "divide"),
    ],
)
def test_shapes_that_do_not_fit_are_an_error(q_shape, k_shape, words):
    with pytest.raises(ShapeError, match=words):
        continued_attention(torch.ones(q_shape), torch.ones(k_shape), torch.ones(k_shape), Pattern.from_lists([8], [1]))


def test_a_gradient_that_is_wanted_is_an_error():
    q, k = torch.ones(1, 1, 1, 4, requires_grad=True), torch.ones(1, 4, 1, 4)
    with pytest.raises(ShapeError, match="no gradient"):
        continued_attention(q, k, k, Pattern.from_lists([8], [1]))
    with torch.no_grad():
        continued_attention(q, k, k, Pattern.from_lists([8], [1]))
