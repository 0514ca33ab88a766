import copy

import oracle
import pytest
import torch
from parallel_case import assert_all_close, cut, own_slice
from torch import nn

from longnet_hpc import DilatedAttention
from longnet_hpc.errors import ConfigError, PatternError, ShapeError

WHOLE = {"segment_lengths": (64,), "dilation_rates": (1,)}
DILATED = {"segment_lengths": (8, 32), "dilation_rates": (1, 3)}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(**arguments):
    """Return torch's module and ours with the same random parameters, biases included."""
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(24, 4, dtype=torch.float64, **arguments)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = DilatedAttention(24, 4, dtype=torch.float64, **arguments, **WHOLE)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("arguments", "widths", "shape"),
    [
        ({"batch_first": True}, (24, 24, 24), (2, 19)),
        ({"batch_first": False, "bias": False}, (24, 24, 24), (19, 2)),
        ({"batch_first": True, "kdim": 10, "vdim": 6}, (24, 10, 6), (2, 19)),
        ({"batch_first": False, "vdim": 24, "kdim": 8}, (24, 8, 24), (19,)),
    ],
)
def test_undilated_whole_segment_equals_torch_with_gradients(arguments, widths, shape, causal):
    theirs, ours = pair(**arguments)
    inputs = [normal(*shape, width, seed=i).requires_grad_() for i, width in enumerate(widths)]
    mask = nn.Transformer.generate_square_subsequent_mask(19, dtype=torch.float64) if causal else None
    expected, _ = theirs(*inputs, need_weights=False, attn_mask=mask, is_causal=causal)
    actual, weights = ours(*inputs, is_causal=causal)
    assert weights is None
    torch.testing.assert_close(actual, expected)
    upstream = normal(*expected.shape, seed=9)
    expected_grads = torch.autograd.grad(expected, [*inputs, *theirs.parameters()], upstream)
    torch.testing.assert_close(torch.autograd.grad(actual, [*inputs, *ours.parameters()], upstream), expected_grads)


@pytest.mark.parametrize("arguments", [{}, {"bias": False}, {"kdim": 10, "vdim": 6}])
def test_state_dicts_load_both_ways_and_initialisation_is_torchs(arguments):
    torch.manual_seed(3)
    theirs = nn.MultiheadAttention(24, 4, **arguments)
    torch.manual_seed(3)
    ours = DilatedAttention(24, 4, **arguments)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(ours.state_dict()[name], tensor) for name, tensor in theirs.state_dict().items())
    theirs.load_state_dict(ours.state_dict())


def test_dilated_branches_equal_the_oracle():
    module = DilatedAttention(24, 6, dtype=torch.float64, softmax_scale=0.7, **DILATED)
    nn.init.normal_(module.in_proj_bias)
    x = normal(2, 45, 24)
    q, k, v = ((x @ module.in_proj_weight.T + module.in_proj_bias).view(2, 45, 3, 6, 4)).unbind(2)
    expected, _ = oracle.attention(q, k, v, *DILATED.values(), causal=True, scale=0.7)
    torch.testing.assert_close(module(x, x, x, is_causal=True)[0], module.out_proj(expected.flatten(2)))


def padding_of(kind, batch=3, seq=45):
    """Return a mask, True for padding; the tokens of the first sequence all count, those of the last never."""
    position = torch.arange(seq).expand(batch, seq)
    if kind == "anywhere":
        padding = torch.rand(batch, seq, generator=torch.Generator().manual_seed(5)) < 0.3
    else:
        padding = position >= 30 if kind == "right" else position < 15
    return padding & torch.tensor([False, *[True] * (batch - 1)])[:, None] | (torch.arange(batch) == batch - 1)[:, None]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["right", "left", "anywhere"])
def test_padded_sequences_are_shorter_sequences_with_gradients(kind, causal):
    module = DilatedAttention(24, 4, dtype=torch.float64, **DILATED)
    nn.init.normal_(module.in_proj_bias)
    x, padding, upstream = normal(3, 45, 24).requires_grad_(), padding_of(kind), normal(3, 45, 24, seed=9)
    actual, _ = module(x, x, x, key_padding_mask=padding, is_causal=causal)
    assert torch.equal(actual[padding], module.out_proj.bias.expand(int(padding.sum()), -1))
    pairs = zip(x, padding, strict=True)
    expected = module.out_proj(torch.zeros_like(x)).masked_scatter(
        ~padding[..., None],
        torch.cat([module(*[part[None, ~its]] * 3, is_causal=causal)[0][0] for part, its in pairs]),
    )
    torch.testing.assert_close(actual, expected)
    leaves = [x, *module.parameters()]
    torch.testing.assert_close(*(torch.autograd.grad(out, leaves, upstream) for out in (actual, expected)))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("as_number", [False, True])
def test_undilated_padded_sequences_equal_torch_with_gradients(causal, batch_first, as_number):
    theirs, ours = pair(batch_first=batch_first)
    x, padding = normal(2, 19, 24), padding_of("right", 3, 19)[:2]
    padding[1, 12:] = True
    mask = nn.Transformer.generate_square_subsequent_mask(19, dtype=torch.float64) if causal else None
    if mask is not None and not as_number:
        mask = mask == -torch.inf  # torch wants both of one kind
    given = torch.zeros(2, 19, dtype=torch.float64).masked_fill(padding, -torch.inf) if as_number else padding
    results = []
    for module, how in ((theirs, {"attn_mask": mask, "need_weights": False}), (ours, {"is_causal": causal})):
        leaf = (x if batch_first else x.transpose(0, 1)).clone().requires_grad_()
        out, _ = module(leaf, leaf, leaf, key_padding_mask=given, **how)
        tokens = (out if batch_first else out.transpose(0, 1))[~padding]
        results.append((tokens.detach(), *torch.autograd.grad(tokens.square().sum(), [leaf, *module.parameters()])))
    torch.testing.assert_close(*results)


def test_encoder_stack_takes_padding():
    layer, _ = encoder_layer()
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x, padding = normal(2, 40, 24), torch.zeros(2, 40, dtype=torch.bool)
    padding[1, 30:] = True
    with torch.no_grad():
        torch.testing.assert_close(
            encoder(x, src_key_padding_mask=padding)[1, :30], encoder(x[1:, :30])[0], rtol=0, atol=1e-12
        )


def encoder_layer():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(24, 4, 48, dropout=0.0, batch_first=True, dtype=torch.float64)
    dense = copy.deepcopy(layer)
    layer.self_attn = DilatedAttention(24, 4, dtype=torch.float64, **DILATED)
    layer.self_attn.load_state_dict(dense.self_attn.state_dict())
    return layer, dense


def test_encoder_layer_in_evaluation_does_not_go_around_it():
    layer, dense = encoder_layer()
    x = normal(2, 40, 24)
    training = layer(x)
    with torch.no_grad():
        evaluation, undilated = layer.eval()(x), dense.eval()(x)
    torch.testing.assert_close(evaluation, training.detach())
    assert (evaluation - undilated).abs().max() > 1e-3
    layer.self_attn = DilatedAttention(24, 4, dtype=torch.float64, **WHOLE)
    layer.self_attn.load_state_dict(dense.self_attn.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), undilated)


@pytest.mark.parametrize("training", [False, True])
def test_encoder_stack_with_causal_mask_is_causal(training):
    layer, _ = encoder_layer()
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train(training)
    mask = nn.Transformer.generate_square_subsequent_mask(40, dtype=torch.float64)
    x = normal(2, 40, 24)
    changed = x.clone()
    changed[:, 30] += 1.0
    with torch.no_grad():
        before, after = encoder(x, mask=mask), encoder(changed, mask=mask)
        assert not torch.allclose(before, encoder(x))
    assert torch.equal(before[:, :30], after[:, :30])
    assert not torch.allclose(before[:, 30:], after[:, 30:])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_input_of_an_encoder_stack_is_one_clear_error():
    layer, dense = encoder_layer()
    encoder = nn.TransformerEncoder(dense, 1).eval()
    encoder.layers[0].self_attn = layer.self_attn
    padding = torch.zeros(2, 40, dtype=torch.bool)
    padding[1, 30:] = True
    with torch.no_grad(), pytest.raises(ShapeError, match="nested tensors"):
        encoder(normal(2, 40, 24), src_key_padding_mask=padding)


def test_parameters_can_be_reset_and_another_dtype_is_one_clear_error():
    module = DilatedAttention(24, 4)
    before = module.in_proj_weight.clone()
    module._reset_parameters()
    assert not torch.equal(before, module.in_proj_weight)
    x = normal(1, 9, 24)
    with pytest.raises(ShapeError, match=r"query must be torch\.float32 as the weights are, got torch\.float64"):
        module(x, x, x)


def test_copy_shares_a_communicator_that_cannot_be_copied():
    class Uncopyable:
        def __reduce_ex__(self, protocol):
            raise TypeError("cannot be copied")

    module = DilatedAttention(24, 4, comm=Uncopyable())
    assert copy.deepcopy(module).comm is module.comm


@pytest.mark.parametrize("mask_of", [lambda m: m, lambda m: m == -torch.inf])
def test_causal_mask_is_taken_and_another_refused(mask_of):
    module = DilatedAttention(24, 4, dtype=torch.float64, **DILATED)
    x = normal(1, 9, 24)
    mask = nn.Transformer.generate_square_subsequent_mask(9, dtype=torch.float64)
    torch.testing.assert_close(module(x, x, x, attn_mask=mask_of(mask))[0], module(x, x, x, is_causal=True)[0])
    mask[0, 3] = 0.0
    with pytest.raises(ConfigError, match="None or the causal mask"):
        module(x, x, x, attn_mask=mask_of(mask), is_causal=True)
    with pytest.raises(ConfigError, match="None or the causal mask"):
        module(x, x, x, attn_mask=torch.ones(9, 9).tril(), is_causal=True)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"add_bias_kv": True}, ConfigError, "must be False"),
        ({"add_zero_attn": True}, ConfigError, "must be False"),
        ({"num_heads": 5}, ConfigError, "got 5 heads for width 24"),
        ({"dilation_rates": (1,)}, PatternError, "must pair up"),
    ],
)
def test_bad_constructor_argument_is_one_clear_error(arguments, error, words):
    with pytest.raises(error) as caught:
        DilatedAttention(**{"embed_dim": 24, "num_heads": 4, **arguments})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"key_padding_mask": torch.zeros(9, 1, dtype=torch.bool)}, ShapeError, "(batch, seq) = (1, 9), got (9, 1)"),
        ({"key_padding_mask": torch.ones(1, 9)}, ConfigError, "key_padding_mask must be boolean, or 0"),
        ({"key_padding_mask": torch.zeros(1, 9, dtype=torch.int64)}, ConfigError, "key_padding_mask must be boolean"),
        ({"need_weights": True}, ConfigError, "need_weights"),
        ({"key": torch.zeros(1, 8, 24), "value": torch.zeros(1, 8, 24)}, ShapeError, "equal length"),
        ({"value": torch.zeros(1, 9, 23)}, ShapeError, "value must be 24 wide, got 23"),
        ({"query": torch.zeros(24)}, ShapeError, "2- or 3-dimensional"),
    ],
)
def test_bad_call_argument_is_one_clear_error(arguments, error, words):
    x = torch.zeros(1, 9, 24)
    with pytest.raises(error) as caught:
        DilatedAttention(24, 4)(**{"query": x, "key": x, "value": x, **arguments})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_dropout_of_weights_is_refused_in_training_alone():
    module, x = DilatedAttention(24, 4, dropout=0.1), torch.zeros(1, 9, 24)
    with pytest.raises(ConfigError, match=r"got 0\.1"):
        module(x, x, x)
    module.eval()(x, x, x)


@pytest.mark.mpi(min_size=2)
def test_ranks_together_equal_one_process(comm):
    module = DilatedAttention(24, 4, dtype=torch.float64, comm=comm, **DILATED)
    alone = DilatedAttention(24, 4, dtype=torch.float64, **DILATED)
    nn.init.normal_(alone.in_proj_weight, generator=torch.Generator().manual_seed(1))
    nn.init.normal_(alone.out_proj.weight, generator=torch.Generator().manual_seed(2))
    module.load_state_dict(alone.state_dict())
    x, lengths = normal(2, 50, 24), cut(50, comm.size, 4)
    part = own_slice(x, lengths, comm.rank)
    expected = own_slice(alone(x, x, x, is_causal=True)[0], lengths, comm.rank)
    assert_all_close(comm, [(module(part, part, part, is_causal=True)[0].detach(), expected.detach())], 1e-10)


@pytest.mark.mpi(min_size=2)
def test_bad_argument_on_one_rank_raises_on_all(comm):
    module, x = DilatedAttention(24, 4, comm=comm), torch.zeros(1, 9, 24)
    with pytest.raises(ConfigError, match="need_weights"):
        module(x, x, x, need_weights=comm.rank == 1)


@pytest.mark.mpi(min_size=2)
def test_input_that_is_no_tensor_on_one_rank_is_an_error_on_all_ranks(comm):
    module, x = DilatedAttention(24, 4, comm=comm, **DILATED), torch.zeros(1, 8, 24)
    with pytest.raises(ShapeError, match="must be tensors, got NoneType"):
        module(None if comm.rank == 1 else x, x, x)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("kind", ["right", "anywhere"])
def test_padded_sequences_on_ranks_together_equal_one_process(comm, kind):
    alone = DilatedAttention(24, 4, dtype=torch.float64, **DILATED)
    module = DilatedAttention(24, 4, dtype=torch.float64, comm=comm, **DILATED)
    alone.load_state_dict(comm.bcast(alone.state_dict()))
    module.load_state_dict(alone.state_dict())
    whole, padding, lengths = normal(3, 45, 24).requires_grad_(), padding_of(kind), cut(45, comm.size, 2)
    part = own_slice(whole.detach(), lengths, comm.rank).requires_grad_()
    outs = [
        m(x, x, x, key_padding_mask=its, is_causal=True)[0]
        for m, x, its in ((alone, whole, padding), (module, part, own_slice(padding, lengths, comm.rank)))
    ]
    grads = [torch.autograd.grad(out.square().sum(), x)[0] for out, x in zip(outs, (whole, part), strict=True)]
    assert_all_close(
        comm,
        [(own, own_slice(full.detach(), lengths, comm.rank)) for full, own in (outs, grads)],
        1e-10,
    )


@pytest.mark.mpi(min_size=2)
def test_padding_on_one_rank_alone_is_an_error_on_all(comm):
    module, x = DilatedAttention(24, 4, comm=comm, **DILATED), torch.zeros(2, 8, 24)
    with pytest.raises(ShapeError, match="key_padding_mask given is not none"):
        module(x, x, x, key_padding_mask=torch.zeros(2, 8, dtype=torch.bool) if comm.rank else None)
