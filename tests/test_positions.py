import math
from decimal import Decimal, localcontext

import pytest
import torch

from longnet_hpc.errors import ConfigError
from longnet_hpc.positions import POSITIONS, longest_xpos, rotary, xpos

CPU = torch.device("cpu")
PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459")


def exact_angle(position, pair, head_dim, base):
    """Return the rotary angle modulo 2 pi, reduced in 50 decimal digits."""
    with localcontext() as context:
        context.prec = 50
        return float((position * Decimal(base) ** (Decimal(-2 * pair) / head_dim)) % (2 * PI))


def factors(name, start, local_len, seq_len, dtype, head_dim=16):
    return POSITIONS[name](start, local_len, seq_len, head_dim, 10000.0, dtype, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rotary_angles_are_exact_near_a_billion(dtype):
    start = 10**9 - 2
    factor = torch.view_as_complex(factors("rotary", start, 5, 2 * 10**9, dtype).query[:, 0])
    for row in range(5):
        for pair in range(8):
            angle = exact_angle(start + row, pair, 16, 10000)
            assert factor[row, pair].item() == pytest.approx(complex(math.cos(angle), math.sin(angle)), abs=5e-7)
    assert (factor[1:] - factor[:-1]).abs()[:, 0].min() > 0.9  # the chord of one radian


@pytest.mark.parametrize("name", list(POSITIONS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_result_is_the_rotated_pairs_rounded_once(name, dtype):
    q, k = torch.randn(2, 2, 6, 3, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    rotated = factors(name, 40, 6, 100, dtype).apply(q, k)
    for x, actual, sign in zip((q, k), rotated, (1, -1), strict=True):
        assert actual.dtype == dtype
        expected = torch.empty(x.shape, dtype=torch.float64)
        for row in range(6):
            for pair in range(8):
                angle = (40 + row) * 10000 ** (-2 * pair / 16)
                zeta = (2 * pair + 0.4 * 16) / (1.4 * 16)
                scale = 1.0 if name == "rotary" else zeta ** (sign * (40 + row - 50) / 512)
                a, b = x[:, row, :, 2 * pair].double(), x[:, row, :, 2 * pair + 1].double()
                expected[:, row, :, 2 * pair] = scale * (a * math.cos(angle) - b * math.sin(angle))
                expected[:, row, :, 2 * pair + 1] = scale * (a * math.sin(angle) + b * math.cos(angle))
        tolerance = {torch.float64: 1e-13, torch.float32: 2e-6}.get(dtype, torch.finfo(dtype).eps)
        torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", list(POSITIONS))
def test_scores_depend_on_the_distance_alone(name):
    q, k = (x.expand(1, 64, 1, 16) for x in torch.randn(2, 1, 1, 1, 16, dtype=torch.float64))
    scores = []
    for start, seq_len in ((0, 64), (1000, 5000)):
        turned_q, turned_k = factors(name, start, 64, seq_len, torch.float64).apply(q, k)
        scores.append(turned_q[0, :, 0] @ turned_k[0, :, 0].T)
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-9, atol=1e-9)
    diagonals = [scores[0].diagonal(-distance) for distance in range(64)]
    for diagonal in diagonals:
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))


@pytest.mark.parametrize("name", list(POSITIONS))
def test_slices_are_parts_of_the_whole(name):
    whole = factors(name, 0, 50, 50, torch.float32)
    for start, length in ((0, 7), (7, 0), (7, 43)):
        part = factors(name, start, length, 50, torch.float32)
        torch.testing.assert_close(part.query, whole.query[start : start + length], rtol=0, atol=1e-7)
        torch.testing.assert_close(part.key, whole.key[start : start + length], rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_xpos_at_its_limit_neither_overflows_nor_vanishes_and_beyond_it_is_an_error(dtype):
    limit = longest_xpos(dtype)
    x = torch.full((1, 1, 1, 16), 100.0, dtype=dtype)
    for position in (0, limit - 1):
        for turned in factors("xpos", position, 1, limit, dtype).apply(x, x):
            larger_of_pair = turned.unflatten(-1, (-1, 2)).abs().amax(dim=-1)
            assert torch.isfinite(turned).all()
            assert larger_of_pair.min() > torch.finfo(dtype).tiny
    message = f"overflows beyond {limit} tokens, got {limit + 1}"
    with pytest.raises(ConfigError, match=message):
        xpos(0, 1, limit + 1, 16, 10000.0, dtype, CPU)
    rotary(0, 1, limit + 1, 16, 10000.0, dtype, CPU)


def test_xpos_reaches_the_length_of_the_paper_and_float16_less_far():
    assert longest_xpos(torch.bfloat16) == longest_xpos(torch.float32) > 2**16
    assert 2**10 < longest_xpos(torch.float16) < 2**13


@pytest.mark.parametrize("strided", [lambda x: x[..., ::2], lambda x: x[..., 1:17], lambda x: x.transpose(1, 3)])
def test_strides_of_the_input_do_not_matter(strided):
    x = strided(torch.randn(2, 16, 3, 32))[..., :16]
    rotation = factors("rotary", 5, x.shape[1], 100, torch.float32)
    for turned, expected in zip(rotation.apply(x, x), rotation.apply(x.clone(), x.clone()), strict=True):
        torch.testing.assert_close(turned, expected)


def test_gradient_of_the_rotation_is_its_adjoint():
    rotation = factors("xpos", 3, 4, 20, torch.float64, head_dim=6)
    q, k = (torch.randn(1, 4, 2, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(rotation.apply, (q, k))
