"""A sequence in chunks equals the same in one piece: loss, losses by token, gradients."""

import pytest
import torch
from cases import cases
from hypothesis import given, settings
from hypothesis import strategies as st
from streamed import STREAMED_CASES, streamed_attention
from test_model import tokens

from longnet_hpc import LongNet, LongNetConfig
from longnet_hpc.carry_store import RowStore
from longnet_hpc.chunk import carried_bytes, chunk_bounds
from longnet_hpc.errors import PartitionError
from longnet_hpc.stream import SequenceStream
from longnet_hpc.sweep import GradientSweep, slice_of_chunk


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


def streamed_losses(model, x, y, bounds):
    """Return the loss of each token, chunk by chunk."""
    stream, losses = stream_of(model, x.shape[1]), []
    for its in map(slice, bounds[:-1], bounds[1:]):
        with stream.next_chunk(its.stop - its.start) as plan:
            losses.append(model.token_losses(x[:, its], y[:, its], plan))
    return torch.cat(losses, 1), stream


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(drawn=chunked_cases())
def test_losses_by_token_equal_those_of_one_piece(drawn):
    case, bounds = drawn
    model = model_of(case, torch.float64)
    x, y = tokens(case.seq), tokens(case.seq, seed=1)
    losses, stream = streamed_losses(model, x, y, bounds)
    torch.testing.assert_close(losses, model.token_losses(x, y), rtol=1e-9, atol=1e-9)
    assert stream.position == case.seq


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(drawn=chunked_cases(), dropout=st.sampled_from([0.1, 0.5]), activation_checkpointing=st.booleans())
def test_swept_gradient_with_dropout_equals_that_of_one_piece(drawn, dropout, activation_checkpointing):
    case, bounds = drawn
    model = model_of(case, torch.float64, dropout=dropout).train()
    model.activation_checkpointing = activation_checkpointing
    x, y = tokens(case.seq), tokens(case.seq, seed=1)
    assert_same(swept(model, x, y, bounds, dropout_seed=5), whole(model, x, y, dropout_seed=5), 1e-9)


@pytest.mark.parametrize("name", STREAMED_CASES)
def test_rows_in_a_file_give_the_same_as_in_memory(tmp_path, name):
    batch, seq, heads, kv_heads, *pattern, bounds = STREAMED_CASES[name]
    generator = torch.Generator().manual_seed(3)
    q, k, v, dout = (
        torch.randn((batch, seq, count, 4), generator=generator) for count in (heads, kv_heads, kv_heads, heads)
    )
    in_memory = streamed_attention(q, k, v, dout, pattern, bounds)
    in_file = streamed_attention(q, k, v, dout, pattern, bounds, scratch=tmp_path / "rows.h5")
    assert (tmp_path / "rows.h5").stat().st_size > 0
    for ours, right in zip(in_file, in_memory, strict=True):
        assert torch.equal(ours, right)


MICRO = LongNetConfig(
    vocab_size=17, layers=2, embed_dim=16, heads=4, kv_heads=2, segment_lengths=(8, 40, 100), dilation_rates=(1, 3, 7)
)


def micro_model():
    torch.manual_seed(0)
    return LongNet(MICRO).double()


@pytest.mark.parametrize("before_in_file", [False, True])
@pytest.mark.parametrize("after_in_file", [False, True])
def test_rows_that_were_saved_are_gone_on_with(tmp_path, before_in_file, after_in_file):
    model, seq_len = micro_model(), 90
    x, y = tokens(seq_len, batch=1), tokens(seq_len, batch=1, seed=1)
    bounds, saved = chunk_bounds(seq_len, 25), tmp_path / "rows.h5"
    expected = whole(model, x, y)
    pattern, read = MICRO.pattern, lambda its: (x[:, its.start : its.stop], y[:, its.start : its.stop])
    before = GradientSweep(
        *(model, stream_of(model, seq_len)),
        *(RowStore(pattern, seq_len, scratch=saved if before_in_file else None), bounds),
    )
    while before.is_forward:
        before.advance(read)
    before.store.save(saved)
    before.store.close()
    after = GradientSweep(
        *(model, stream_of(model, seq_len)),
        *(RowStore(pattern, seq_len, scratch=tmp_path / "other.h5" if after_in_file else None), bounds),
    )
    after.done = before.done
    after.store.load(saved)
    model.zero_grad()
    while after.done < after.total:
        after.advance(read)
    assert_same((after.loss / seq_len, [parameter.grad for parameter in model.parameters()]), expected, 1e-9)


@pytest.mark.parametrize(("seq_len", "chunk_len"), [(90, 25), (96, 8), (96, 40), (30, 30), (301, 100), (64, 63)])
@pytest.mark.parametrize("in_file", [False, True])
def test_promised_bytes_are_those_that_wait_after_the_way_there(tmp_path, seq_len, chunk_len, in_file):
    model = micro_model()
    x = tokens(seq_len, batch=1)
    store = RowStore(MICRO.pattern, seq_len, scratch=tmp_path / "rows.h5" if in_file else None)
    sweep = GradientSweep(model, stream_of(model, seq_len), store, chunk_bounds(seq_len, chunk_len))
    while sweep.is_forward:
        sweep.advance(lambda its: (x[:, its.start : its.stop], x[:, its.start : its.stop]))
    store.save(tmp_path / "rows.h5")
    promised = carried_bytes(
        MICRO.pattern, chunk_len, seq_len, layers=2, batch=1, heads=4, head_dim=4, itemsize=8
    )  # fmt: skip
    assert promised == store.num_bytes
    store.close()


def test_what_is_carried_does_not_grow_with_the_sequence():
    model, sizes = micro_model(), []
    for seq_len in (100, 6400):
        x = tokens(seq_len, batch=1)
        bounds, most = chunk_bounds(seq_len, 30), 0
        stream = stream_of(model, seq_len)
        for its in map(slice, bounds[:-1], bounds[1:]):
            with torch.no_grad(), stream.next_chunk(its.stop - its.start) as plan:
                model.hidden(x[:, its], plan)
            most = max(most, sum(rows.nbytes for carry in stream.carries for rows in carry.rows.values()))
        sizes.append(most)
    rows = sum(-(-w // r) for w, r in zip(MICRO.segment_lengths, MICRO.dilation_rates, strict=True))
    assert sizes == [rows * 2 * MICRO.layers * MICRO.embed_dim * 8] * 2


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(seq_len=st.integers(1, 200), chunk_len=st.integers(1, 250), size=st.integers(1, 9))
def test_slices_of_all_chunks_are_every_token_once(seq_len, chunk_len, size):
    bounds = chunk_bounds(seq_len, chunk_len)
    chunks = list(map(range, bounds[:-1], bounds[1:]))
    assert all(len(chunk) == chunk_len for chunk in chunks[:-2])
    if seq_len > chunk_len:  # what is no whole chunk is at most half of one
        assert all(0 < len(chunk) <= (chunk_len + 1) // 2 or len(chunk) == chunk_len for chunk in chunks)
    assert len(chunks) <= -(-seq_len // chunk_len) + 1
    slices = [[slice_of_chunk(chunk, rank, size) for rank in range(size)] for chunk in chunks]
    assert [token for its in slices for one in its for token in one] == list(range(seq_len))
    for its in slices:
        assert max(map(len, its)) - min(map(len, its)) <= 1


def test_chunk_beyond_the_end_of_the_sequence_raises():
    stream = stream_of(micro_model(), 50)
    stream.position = 30
    with pytest.raises(PartitionError), stream.next_chunk(21):
        pass
