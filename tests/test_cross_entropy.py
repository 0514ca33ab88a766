import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from longnet_hpc.cross_entropy import cross_entropy, token_losses

VOCAB = 11


def problem(tokens=23, width=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = (3 * torch.randn(tokens, width, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(0, VOCAB, (tokens,), generator=generator)
    targets[3:6] = -100
    return hidden, weight, targets


def torch_loss(hidden, weight, targets, reduction="sum"):
    return F.cross_entropy(hidden.double() @ weight.double().T, targets, reduction=reduction)


@pytest.mark.parametrize("piece_tokens", [1, 4, 23, 100, None])
def test_loss_and_gradients_equal_torchs(piece_tokens):
    hidden, weight, targets = problem()
    loss = cross_entropy(hidden, weight, targets, piece_tokens=piece_tokens)
    expected = torch_loss(hidden, weight, targets)
    torch.testing.assert_close(loss, expected)
    actual_grads = torch.autograd.grad(0.7 * loss, (hidden, weight))
    torch.testing.assert_close(actual_grads, torch.autograd.grad(0.7 * expected, (hidden, weight)))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_lower_precision_agrees_to_its_rounding(dtype, tolerance):
    hidden, weight, targets = problem(dtype=dtype)
    loss = cross_entropy(hidden, weight, targets, piece_tokens=5)
    expected = torch_loss(hidden, weight, targets)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)  # operands are exact, products are wide
    grads = torch.autograd.grad(loss, (hidden, weight))
    for grad, exact in zip(grads, torch.autograd.grad(expected, (hidden, weight)), strict=True):
        assert grad.dtype == dtype
        torch.testing.assert_close(grad.double(), exact.double(), rtol=tolerance, atol=tolerance * exact.abs().max())


def test_autocast_lowers_the_operands_alone():
    hidden, weight, targets = problem(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = cross_entropy(hidden, weight, targets, piece_tokens=5)
    rounded = torch_loss(hidden.bfloat16(), weight.bfloat16(), targets)
    assert loss.item() == pytest.approx(rounded.item(), rel=1e-6)
    assert [grad.dtype for grad in torch.autograd.grad(loss, (hidden, weight))] == [torch.float32] * 2


def test_gradients_pass_gradcheck():
    hidden, weight, targets = problem(tokens=7)
    assert torch.autograd.gradcheck(lambda h, w: cross_entropy(h, w, targets, piece_tokens=3), (hidden, weight))


def test_backward_can_run_twice():
    hidden, weight, targets = problem()
    loss = cross_entropy(hidden, weight, targets)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, (hidden, weight)), first, rtol=0, atol=0)


def test_only_what_needs_a_gradient_gets_one():
    hidden, weight, targets = problem()
    cross_entropy(hidden.detach(), weight, targets).backward()
    assert hidden.grad is None
    torch.testing.assert_close(weight.grad, torch.autograd.grad(torch_loss(hidden, weight, targets), weight)[0])


def test_narrow_target_that_would_wrap_to_the_ignored_one_counts():
    hidden, weight = torch.randn(3, 4), torch.randn(200, 4)
    targets = torch.tensor([156, 0, 199], dtype=torch.uint8)  # 156 is -100 modulo 256
    expected = F.cross_entropy(hidden @ weight.T, targets.long(), reduction="none")
    torch.testing.assert_close(token_losses(hidden, weight, targets), expected)
    torch.testing.assert_close(cross_entropy(hidden, weight, targets).float(), expected.sum())


def test_loss_of_each_token_equals_torchs_and_ignored_ones_are_zero():
    hidden, weight, targets = problem()
    expected = torch_loss(hidden, weight, targets, reduction="none").detach()
    actual = token_losses(hidden, weight, targets, piece_tokens=4)
    assert not actual.requires_grad
    torch.testing.assert_close(actual, expected)
    assert actual[3:6].tolist() == [0.0, 0.0, 0.0]
    assert token_losses(*(x.float() for x in (hidden, weight)), targets).dtype == torch.float32


def test_leading_dimensions_and_another_ignored_index():
    hidden, weight, targets = problem(tokens=24)
    targets = targets.clamp_min(0)
    expected = F.cross_entropy(hidden @ weight.T, targets, reduction="sum", ignore_index=2)
    shaped = hidden.view(2, 12, -1), weight, targets.view(2, 12)
    torch.testing.assert_close(cross_entropy(*shaped, ignore_index=2, piece_tokens=5), expected)
    assert token_losses(*shaped, ignore_index=2).shape == (2, 12)


def test_no_tokens_and_only_ignored_tokens_give_zero():
    for tokens in (0, 5):
        hidden, weight, _ = problem(tokens=tokens)
        loss = cross_entropy(hidden, weight, torch.full((tokens,), -100))
        loss.backward()
        assert loss.item() == 0.0
        assert not weight.grad.any()
        assert hidden.grad.shape == (tokens, 6)
        assert token_losses(hidden, weight, torch.full((tokens,), -100)).shape == (tokens,)


def test_huge_logits_stay_finite():
    hidden, weight = torch.full((1, 1), 1e4), torch.tensor([[1.0], [-1.0]])
    loss = cross_entropy(hidden.requires_grad_(), weight, torch.tensor([1]))
    assert loss.item() == 2e4
    assert math.isfinite(torch.autograd.grad(loss, hidden)[0].item())


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_logits_of_more_than_a_piece_never_exist():
    tokens, vocab, piece = 500, 64, 20
    hidden, weight = torch.randn(tokens, 2, requires_grad=True), torch.randn(vocab, 2, requires_grad=True)
    targets = torch.randint(0, vocab, (tokens,))
    for needs_grad in (True, False):
        with LargestTensor() as largest, torch.set_grad_enabled(needs_grad):
            loss = cross_entropy(hidden, weight, targets, piece_tokens=piece)
            if needs_grad:
                loss.backward()
            token_losses(hidden, weight, targets, piece_tokens=piece)
        assert largest.numel == piece * vocab  # more than hidden (1,000) and weight (128)
