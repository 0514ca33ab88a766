import pytest
import torch
from parallel_case import assert_all_close, cut, own_slice
from test_model import micro_model, tokens

from longnet_hpc import LongNet, LongNetConfig, Pattern, SequencePlan
from longnet_hpc.comm import all_reduce_sum
from longnet_hpc.errors import ShapeError

pytestmark = pytest.mark.mpi(min_size=2)


def check_same_as_one_rank(comm, model, x, y, lengths, tolerance):
    """Compare loss and gradients, per token, of all ranks together with those of one process."""
    parameters = list(model.parameters())
    expected = None
    if comm.rank == 0:
        whole = model.loss(x, y, dropout_seed=3) / y.numel()
        expected = [whole.detach(), *torch.autograd.grad(whole, parameters)]
    whole, *expected = comm.bcast(expected)
    plan = SequencePlan.build(Pattern.from_lists(model.config.segment_lengths, model.config.dilation_rates),
                              lengths[comm.rank], comm=comm)  # fmt: skip
    own = [own_slice(t, lengths, comm.rank) for t in (x, y)]
    part = model.loss(*own, plan, dropout_seed=3) / y.numel()
    grads = torch.autograd.grad(part, parameters)
    assert_all_close(comm, [(all_reduce_sum(comm, part), whole)], tolerance)
    scale = max(g.abs().max().item() for g in expected)
    pairs = [(all_reduce_sum(comm, a) / scale, b / scale) for a, b in zip(grads, expected, strict=True)]
    assert_all_close(comm, pairs, tolerance)


@pytest.mark.parametrize("positions", ["rotary", "xpos"])
@pytest.mark.parametrize(("checkpointing", "keep_attention"), [(False, True), (True, True), (True, False)])
def test_loss_and_gradients_do_not_depend_on_ranks(comm, positions, checkpointing, keep_attention):
    model = micro_model(dropout=0.2, positions=positions)
    model.activation_checkpointing, model.keep_attention = checkpointing, keep_attention
    x, y = tokens(71), tokens(71, seed=1)
    for seed in range(3):
        check_same_as_one_rank(comm, model, x, y, cut(71, comm.size, seed), 1e-9)


@pytest.mark.timeout(300)
def test_pattern_of_the_paper_at_32768_tokens_gives_the_same_loss_and_gradients(comm):
    torch.manual_seed(0)
    model = LongNet(LongNetConfig(layers=1, embed_dim=12 * 8, heads=12))
    x, y = (torch.randint(0, 256, (1, 32768)) for _ in range(2))
    lengths = [32768 * (rank + 1) // comm.size - 32768 * rank // comm.size for rank in range(comm.size)]
    check_same_as_one_rank(comm, model, x, y, lengths, 1e-5)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda model, x, y: micro_model(kv_heads=1), "disagrees with rank 0: model"),
        (lambda model, x, y: (model, x.fill_(99))[0], "token 99 is outside the vocabulary of 17"),
        (lambda model, x, y: (model, y.fill_(-1))[0], "target -1 is outside the vocabulary of 17"),
        (lambda model, x, y: model.eval(), "training False is not True"),
        (
            lambda model, x, y: (model, model.norm.requires_grad_(False))[0],
            "parameters that need a gradient 41 is not 43",
        ),
    ],
)
def test_fault_on_one_rank_is_an_error_on_all_ranks(comm, spoil, words):
    model, x, y = micro_model(), tokens(8), tokens(8, seed=1)
    plan = SequencePlan.build(model.config.pattern, 8, comm=comm)
    if comm.rank == 1:
        model = spoil(model, x, y)
    with pytest.raises(ShapeError, match=words):
        model.loss(x, y, plan)
