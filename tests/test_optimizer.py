"""The optimizer on one process: its learning rates, and its updates against other ways to get them."""

import copy
from itertools import pairwise

import pytest
import torch

from longnet_hpc import LongNet, LongNetConfig
from longnet_hpc.config import OptimizerConfig
from longnet_hpc.optimizer import Optimizer, learning_rate

MODEL = LongNetConfig(layers=2, embed_dim=16, heads=2, segment_lengths=(16, 64), dilation_rates=(1, 2))


def test_learning_rate_warms_up_linearly_and_falls_by_a_cosine():
    settings = OptimizerConfig(learning_rate=2.0, final_learning_rate=0.1, warmup_steps=4)
    rates = [learning_rate(step, 105, settings) for step in range(105)]
    assert rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert rates[54] == pytest.approx(1.1)  # half way, half way between 2 and 0.2
    assert rates[-1] == pytest.approx(0.2)
    assert all(a >= b for a, b in pairwise(rates[4:]))
    assert learning_rate(0, 1, OptimizerConfig(learning_rate=2.0, warmup_steps=0)) == 2.0


def test_update_is_that_of_adamw_with_clipping_and_decay_on_matrices_only():
    torch.manual_seed(0)
    model = LongNet(MODEL)
    settings = OptimizerConfig(clip_norm=0.5, weight_decay=0.3)
    ours = Optimizer(model, settings)
    theirs = {name: parameter.detach().double().clone() for name, parameter in model.named_parameters()}
    means = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in theirs.items()}
    for step, rate in enumerate((0.01, 0.02, 0.03), start=1):
        gradient = torch.randn(model.parameter_count)
        scale = 0.5 / gradient.double().norm()
        start_at = 0
        for name, p in theirs.items():
            g = gradient[start_at : start_at + p.numel()].double().view_as(p) * scale
            start_at += p.numel()
            m, v = means[name]
            m.mul_(0.9).add_(g, alpha=0.1)
            v.mul_(0.95).add_(g * g, alpha=0.05)
            if p.dim() >= 2:
                p *= 1 - rate * 0.3
            p -= rate * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
        norm = ours.step(gradient.clone(), rate)
        assert norm == pytest.approx(float(gradient.double().norm()), rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach().double(), theirs[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("skipped", [False, True])
def test_update_has_the_bits_of_torchs_class(skipped):
    torch.manual_seed(0)
    model = LongNet(MODEL)
    other = copy.deepcopy(model)
    settings = OptimizerConfig(clip_norm=1e9)
    groups = [[p for p in other.parameters() if (p.dim() < 2) == is_vector] for is_vector in (False, True)]
    theirs = torch.optim.AdamW(
        [
            {"params": its, "weight_decay": decay}
            for its, decay in zip(groups, (settings.weight_decay, 0.0), strict=True)
        ],
        betas=(settings.beta1, settings.beta2),
    )
    ours = Optimizer(model, settings)
    if skipped:  # the moments are as after a step without a gradient, but nothing decays
        ours.skip()
        for p in other.parameters():
            theirs.state[p] = {
                "step": torch.tensor(1.0),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
    for rate in (0.01, 0.02, 0.03):
        gradient = torch.randn(model.parameter_count)
        parts = gradient.split([p.numel() for p in other.parameters()])
        for p, part in zip(other.parameters(), parts, strict=True):
            p.grad = part.view_as(p).clone()
        for group in theirs.param_groups:
            group["lr"] = rate
        theirs.step()
        ours.step(gradient, rate)
    assert all(map(torch.equal, model.parameters(), other.parameters()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_update_on_a_gpu_is_that_on_the_cpu_after_a_resumption_too():
    torch.manual_seed(0)
    model = LongNet(MODEL)
    models = model, copy.deepcopy(model).cuda()
    gradients = torch.randn(4, model.parameter_count)
    optimizers = [Optimizer(each, OptimizerConfig()) for each in models]
    for step, gradient in enumerate(gradients):
        if step == 2:
            state = {name: tensor.clone() for name, tensor in optimizers[1].state().items()}
            optimizers[1] = Optimizer(models[1], OptimizerConfig())
            optimizers[1].load_state(state, step)
        for each, optimizer in zip(models, optimizers, strict=True):
            optimizer.step(gradient.to(each.norm.weight.device, copy=True), 0.01)
    for expected, actual in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(actual.cpu(), expected, rtol=1e-4, atol=1e-6)
