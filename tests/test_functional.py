import pytest
import torch
from parallel_case import assert_all_close, cut
from torch.nn import functional as F

from longnet_hpc import dilated_attention, scaled_dot_product_attention
from longnet_hpc.errors import ConfigError, LongNetError, ShapeError

WHOLE = {"segment_lengths": [64], "dilation_rates": [1]}
DILATED = {"segment_lengths": [8, 32], "dilation_rates": [1, 3]}


def normal(heads, seq=45, seed=0, dtype=torch.float64):
    return torch.randn(2, heads, seq, 8, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("arguments", [{}, {"is_causal": True}, {"scale": 0.7}])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_undilated_whole_segment_equals_torch_with_gradients(arguments, kv_heads):
    inputs = [normal(heads, seed=seed).requires_grad_() for seed, heads in enumerate((4, kv_heads, kv_heads))]
    arguments = {**arguments, "enable_gqa": kv_heads < 4}
    expected = F.scaled_dot_product_attention(*inputs, **arguments)
    actual = scaled_dot_product_attention(*inputs, **arguments, **WHOLE)
    torch.testing.assert_close(actual, expected)
    dout = normal(4, seed=9)
    torch.testing.assert_close(*(torch.autograd.grad(out, inputs, dout) for out in (actual, expected)))


def test_documents_are_the_mask_of_blocks_of_torch():
    q, k, v = (normal(4, seed=seed) for seed in range(3))
    document = torch.tensor([0] * 10 + [1] * 30 + [2] * 5)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=document[:, None] == document)
    torch.testing.assert_close(scaled_dot_product_attention(q, k, v, cu_seqlens=[0, 10, 40, 45], **WHOLE), expected)


def test_dilated_branches_are_those_of_dilated_attention():
    q, k, v = (normal(4, seed=seed) for seed in range(3))
    expected = dilated_attention(*(x.transpose(1, 2) for x in (q, k, v)), *DILATED.values(), causal=True)
    torch.testing.assert_close(
        scaled_dot_product_attention(q, k, v, is_causal=True, **DILATED).transpose(1, 2), expected
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_computes_in_the_dtype_that_torch_computes_in(dtype):
    inputs = [normal(4, seed=seed, dtype=dtype) for seed in range(3)]
    inputs[1] = inputs[1].to(torch.bfloat16 if dtype == torch.float32 else dtype)  # as rotated keys may be
    with torch.autocast("cpu", torch.bfloat16):
        expected = F.scaled_dot_product_attention(*inputs)
        actual = scaled_dot_product_attention(*inputs, **WHOLE)
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"attn_mask": torch.ones(9, 9, dtype=torch.bool)}, ConfigError, "attn_mask must be None: use is_causal"),
        ({"dropout_p": 0.1}, ConfigError, "dropout_p must be 0: the weights of dilated attention never exist, got 0.1"),
        ({"query": torch.zeros(4, 9, 8)}, ShapeError, "(batch, heads, seq, head_dim), got (4, 9, 8)"),
        ({"query": None}, ShapeError, "must be tensors, got NoneType"),
        ({"key": torch.zeros(1, 4, 7, 8)}, ShapeError, "of the same tokens"),
        ({"key": torch.zeros(1, 2, 9, 8), "value": torch.zeros(1, 2, 9, 8)}, ShapeError, "without enable_gqa"),
        ({"scale": 0.0}, ShapeError, "finite number above 0, got 0.0"),
        ({"cu_seqlens": [0, 5]}, LongNetError, "got 0 to 5"),
    ],
)
def test_what_cannot_be_honoured_is_one_clear_error(change, error, words):
    arguments = {**dict.fromkeys(("query", "key", "value"), torch.zeros(1, 4, 9, 8)), **DILATED, **change}
    with pytest.raises(error) as caught:
        scaled_dot_product_attention(**arguments)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.mpi(min_size=2)
def test_ranks_together_equal_one_process(comm):
    inputs = [normal(4, seed=seed) for seed in range(3)]
    lengths = cut(45, comm.size, 1)
    own = [x.split(lengths, 2)[comm.rank] for x in inputs]
    expected = scaled_dot_product_attention(*inputs, is_causal=True, **DILATED).split(lengths, 2)[comm.rank]
    actual = scaled_dot_product_attention(*own, is_causal=True, comm=comm, **DILATED)
    assert_all_close(comm, [(actual, expected)], 1e-10)


@pytest.mark.mpi(min_size=2)
def test_bad_argument_on_one_rank_raises_on_all(comm):
    x = torch.zeros(1, 4, 9, 8)
    with pytest.raises(ConfigError, match="dropout_p"):
        scaled_dot_product_attention(x, x, x, dropout_p=0.1 * comm.rank, comm=comm, **DILATED)
