import pytest
import torch
import torchscale_oracle as theirs
from parallel_case import assert_all_close, cut, own_slice
from test_gigapath import HOW, slide, slide_weights
from test_torchscale import ENCODER, random

from longnet_hpc import SequencePlan
from longnet_hpc.comm import all_reduce_sum
from longnet_hpc.errors import ShapeError
from longnet_hpc.integrations.gigapath import load_slide_encoder
from longnet_hpc.integrations.torchscale import load_encoder

pytestmark = pytest.mark.mpi(min_size=2)


@pytest.mark.parametrize("changes", [{}, {"deepnorm": True, "xpos_rel_pos": True}])
def test_states_and_gradients_of_an_encoder_do_not_depend_on_ranks(comm, changes):
    config = {**ENCODER, **changes}
    model = load_encoder(theirs.state_dict(config, "encoder"), config, dtype=torch.float64)
    x, dout, parameters = random(2, 47, 24), random(2, 47, 24, seed=1), list(model.parameters())
    whole = model.states(x)
    expected = torch.autograd.grad((model(x) * dout).sum(), parameters)
    for seed in range(3):
        lengths = cut(47, comm.size, seed)
        plan = SequencePlan.build(model.config.pattern, lengths[comm.rank], comm=comm)
        part, part_dout = (own_slice(tensor, lengths, comm.rank) for tensor in (x, dout))
        states = [own_slice(state, lengths, comm.rank) for state in whole]
        assert_all_close(comm, zip(model.states(part, plan), states, strict=True), 1e-10)
        grads = torch.autograd.grad((model(part, plan) * part_dout).sum(), parameters)
        assert_all_close(comm, [(all_reduce_sum(comm, a), b) for a, b in zip(grads, expected, strict=True)], 1e-9)


def test_slide_encoder_does_not_depend_on_ranks(comm):
    model, (tiles, coords) = load_slide_encoder(slide_weights(), **HOW), slide(29)
    whole = model(tiles, coords)
    for seed in range(3):
        lengths = cut(30, comm.size, seed)
        plan = SequencePlan.build(model.config.pattern, lengths[comm.rank], comm=comm)
        start = max(0, sum(lengths[: comm.rank]) - 1)  # the class token comes before the first tile
        own = slice(start, max(start, sum(lengths[: comm.rank + 1]) - 1))
        expected = own_slice(whole, lengths, comm.rank)
        assert_all_close(comm, [(model(tiles[:, own], coords[:, own], plan), expected)], 1e-10)


def test_fault_on_one_rank_is_an_error_on_all_ranks(comm):
    model, x = load_encoder(theirs.state_dict(ENCODER, "encoder"), ENCODER, dtype=torch.float64), random(2, 8, 24)
    plan = SequencePlan.build(model.config.pattern, 8, comm=comm)
    with pytest.raises(ShapeError, match="embeddings must be"):
        model(x[..., :5] if comm.rank == 1 else x, plan)
    with pytest.raises(ShapeError, match="batch 1 is not 2"):
        model(x[:1] if comm.rank == 1 else x, plan)
    with pytest.raises(ShapeError, match="gradient of the embeddings True is not False"):
        model(x.clone().requires_grad_() if comm.rank == 1 else x, plan)
    slide_model, (tiles, coords) = load_slide_encoder(slide_weights(), **HOW), slide(8)
    plan = SequencePlan.build(slide_model.config.pattern, 8 + (comm.rank == 0), comm=comm)
    with pytest.raises(ShapeError, match="coords must be 0 to below"):
        slide_model(tiles, -coords if comm.rank == 1 else coords, plan)
