import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longnet_hpc.errors import ConfigError
from longnet_hpc.positions import POSITIONS, Rotation, longest_xpos, rotary, xpos

CPU = torch.device("cpu")


def exact_turn(position, pair, head_dim, base):
    """Return the rotary factor, computed in 50 decimal digits."""
    with mpmath.workdps(50):
        return complex(mpmath.expj(position * mpmath.mpf(base) ** (mpmath.mpf(-2 * pair) / head_dim)))


def factors(name, start, local_len, seq_len, dtype, head_dim=16, base=10000.0):
    return POSITIONS[name](start, local_len, seq_len, head_dim, base, dtype, CPU)


def turns(factor):
    return torch.view_as_complex(factor[:, 0])


@pytest.mark.parametrize("start", [0, 10**9 - 2, 1_299_999_900, 2**50])
@pytest.mark.parametrize("base", [10000.0, 500000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rotary_is_exact_at_any_position(start, base, dtype):
    factor = turns(factors("rotary", start, 400, 2**51, dtype, base=base).query)
    tolerance = 2e-15 if dtype == torch.float64 else 1e-7
    for row in (0, 1, 2, 99, 255, 256, 399):
        for pair in range(8):
            assert factor[row, pair].item() == pytest.approx(exact_turn(start + row, pair, 16, base), abs=tolerance)
    assert (factor[1:] - factor[:-1]).abs()[:, 0].min() > 0.9  # the chord of one radian


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(("rotary", "xpos")),
    start=st.integers(0, 3 * 10**5),
    local_len=st.sampled_from((0, 1)) | st.integers(2, 2000),
    head_dim=st.integers(1, 20).map(lambda pairs: 2 * pairs),
    base=st.floats(1.5, 1e6),
)
def test_factors_equal_the_direct_formula_in_float64(name, start, local_len, head_dim, base):
    seq_len = start + local_len + 7
    rotation = factors(name, start, local_len, seq_len, torch.float64, head_dim, base)
    position = torch.arange(start, start + local_len, dtype=torch.float64)[:, None]
    pair = torch.arange(0, head_dim, 2, dtype=torch.float64)
    angle = position * base ** (-pair / head_dim)
    zeta = (pair + 0.4 * head_dim) / (1.4 * head_dim)
    scale = torch.ones_like(angle) if name == "rotary" else zeta ** ((position - seq_len // 2) / 512)
    of_direct = (2 + math.log(base)) * 2**-53 * angle  # how far the direct formula may be off, by its roundings
    for factor, magnitude in ((rotation.query, scale), (rotation.key, 1 / scale)):
        assert factor.shape == (local_len, 1, head_dim // 2, 2)
        assert ((turns(factor).abs() / magnitude - 1).abs() < 1e-12).all()
        error = (turns(factor) - torch.polar(magnitude, angle)).abs() / magnitude
        assert (error < of_direct + (2e-15 if name == "rotary" else 1e-12)).all()


def test_positions_are_right_at_the_end_of_a_billion_tokens():
    q, k = torch.nn.functional.normalize(torch.randn(2, 1, 300, 1, 64, dtype=torch.float64), dim=-1)
    starts = (17, 10**9 + 17)

    def scores(rotation, dtype):
        turned_q, turned_k = (x[0, :, 0].double() for x in rotation.apply(q.to(dtype), k.to(dtype)))
        return turned_q @ turned_k.T

    def with_angles_in_float32(start):
        frequency = 10000.0 ** -(torch.arange(0, 64, 2) / 64)
        angle = torch.arange(start, start + 300).float()[:, None, None] * frequency
        factor = torch.stack((angle.cos(), angle.sin()), dim=-1)
        return Rotation(factor, factor)

    for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
        near, far = (scores(factors("rotary", start, 300, 2 * 10**9, dtype, 64), dtype) for start in starts)
        torch.testing.assert_close(near, far, rtol=0, atol=tolerance)
    near, far = (scores(with_angles_in_float32(start), torch.float32) for start in starts)
    assert (near - far).abs().max() > 0.1


@pytest.mark.parametrize("name", ["rotary", "xpos"])
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


def test_long_slices_are_parts_of_the_whole():
    whole = factors("rotary", 10**9 + 1, 300_000, 2 * 10**9, torch.float64).query
    for start, length in ((0, 1), (100, 200_000), (131_000, 300), (299_999, 1)):
        part = factors("rotary", 10**9 + 1 + start, length, 2 * 10**9, torch.float64).query
        torch.testing.assert_close(part, whole[start : start + length], rtol=0, atol=1e-15)


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
