"""A sequence in chunks equals the same in one piece: loss, losses by token, gradients."""

import pytest
import torch
from cases import cases
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model import tokens

from longnet_hpc import LongNet, LongNetConfig
from longnet_hpc.carry_store import RowStore
from longnet_hpc.stream import SequenceStream
from longnet_hpc.sweep import GradientSweep


def model_of(case, dtype, **changes):
    torch.manual_seed(case.seed)
    config = LongNetConfig(
        vocab_size=17, layers=2, embed_dim=case.heads * 4, heads=case.heads, kv_heads=case.kv_heads,
        segment_lengths=case.segment_lengths, dilation_rates=case.dilation_rates, **changes,
    )  # fmt: skip
    return LongNet(config).to(dtype)


def stream_of(model, seq_len, comm=None):
    return SequenceStream(model.config.pattern, seq_len, layers=model.config.layers, comm=comm)


def whole(model, x, y, **options):
    """Return loss and gradients of one piece, a token."""
    loss = model.loss(x, y, **options) / y.numel()
    return loss.detach(), torch.autograd.grad(loss, list(model.parameters()))


def swept(model, x, y, bounds, store=None, **options):
    """Return loss and gradients of a sweep, a token."""
    seq_len = x.shape[1]
    model.zero_grad()
    sweep = GradientSweep(
        *(model, stream_of(model, seq_len), store or RowStore(model.config.pattern, seq_len), bounds),
        **options,
    )
    while sweep.done < sweep.total:
        sweep.advance(lambda its: (x[:, its.start : its.stop], y[:, its.start : its.stop]))
    return sweep.loss / y.numel(), [parameter.grad for parameter in model.parameters()]


def assert_same(actual, expected, tolerance):
    torch.testing.assert_close(actual[0].double(), expected[0].double(), rtol=tolerance, atol=0)
    scale = max(gradient.abs().max() for gradient in expected[1])
    for ours, right in zip(actual[1], expected[1], strict=True):
        torch.testing.assert_close(ours, right, rtol=0, atol=tolerance * float(scale))


@st.composite
def chunked_cases(draw):
    case = draw(cases(max_seq=60))
    return case, [0, *sorted(draw(st.sets(st.integers(1, max(1, case.seq - 1)), max_size=6)) - {case.seq}), case.seq]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_swept_gradient_equals_that_of_one_piece(dtype, tolerance):
    @settings(max_examples=40, deadline=None, derandomize=True, database=None)
    @given(drawn=chunked_cases())
    def check(drawn):
        case, bounds = drawn
        model = model_of(case, dtype)
        x, y = tokens(case.seq), tokens(case.seq, seed=1)
        assert_same(swept(model, x, y, bounds), whole(model, x, y), tolerance)

    check()
