"""Kernels of `gelu_norm`: a row at a time in registers, read once and written once.

A row is two vectors of whole powers of two, which is what Triton's vectors must be: 3,072 features are 2,048 and 1,024,
where one vector would be 4,096 and a quarter of the arithmetic in vain. Programs walk the rows with a stride, so that
what belongs to the features stays in registers.
"""

import triton
import triton.language as tl

__all__ = ["gelu_norm_backward_kernel", "gelu_norm_kernel"]


@triton.jit
def _load(at, FEATURES: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """Return the two vectors of a row in float32, 0 beyond its features."""
    first = tl.arange(0, FIRST)
    second = FIRST + tl.arange(0, SECOND)
    rest = tl.load(at + second, mask=second < FEATURES, other=0.0)
    return tl.load(at + first).to(tl.float32), rest.to(tl.float32)


@triton.jit
def _store(at, values, rest, FEATURES: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """Store the two vectors of a row."""
    first = tl.arange(0, FIRST)
    second = FIRST + tl.arange(0, SECOND)
    tl.store(at + first, values.to(at.dtype.element_ty))
    tl.store(at + second, rest.to(at.dtype.element_ty), mask=second < FEATURES)


@triton.jit
def _tail(x, PRECISE: tl.constexpr):
    """Return the normal distribution beyond |x|: two to a polynomial, a third of the instructions of the library's erf.

    Its error times max(|x|, 1) is below 1.2e-6, a hundredth of what half precision can hold, or 3e-8 if ``PRECISE``.
    The leading coefficients are negative, so that far out it falls to 0.
    """
    x = tl.abs(x)
    if PRECISE:
        p = 3.1458675948670134e-05 - 2.1560804270848166e-06 * x
        p = -0.00022117335174698383 + x * (-0.00014978002582211047 + x * p)
        p = -0.4591890275478363 + x * (-0.052562352269887924 + x * (0.007167283911257982 + x * p))
        return tl.exp2(-1.0 + x * (-1.1511069536209106 + x * p))
    p = -0.052281349897384644 + x * (0.007253097835928202 - 0.000495731714181602 * x)
    return tl.exp2(-1.0 + x * (-1.1510469913482666 + x * (-0.4594598710536957 + x * p)))


@triton.jit
def _gelu(x, PRECISE: tl.constexpr):
    """Return GELU."""
    return tl.maximum(x, 0.0) - tl.abs(x) * _tail(x, PRECISE)


@triton.jit
def _gelu_and_slope(x, PRECISE: tl.constexpr):
    """Return GELU and its derivative."""
    tail = _tail(x, PRECISE)
    below = tl.where(x < 0, tail, 1.0 - tail)
    bell = tl.exp2(-0.7213475204444817 * x * x)  # exp(-x^2 / 2)
    return tl.maximum(x, 0.0) - tl.abs(x) * tail, below + x * (0.3989422804014327 * bell)


@triton.jit
def gelu_norm_kernel(
    h, weight, bias, out, means, rstds, rows, eps,
    FEATURES: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, STAGES: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """Write the rows, and the mean and the reciprocal standard deviation of each after GELU."""
    weight_a, weight_b = _load(weight, FEATURES, FIRST, SECOND)
    bias_a, bias_b = _load(bias, FEATURES, FIRST, SECOND)
    inside = FIRST + tl.arange(0, SECOND) < FEATURES
    for row in tl.range(tl.program_id(0), rows, tl.num_programs(0), num_stages=STAGES):
        offset = tl.cast(row, tl.int64) * FEATURES
        a, b = _load(h + offset, FEATURES, FIRST, SECOND)
        a = _gelu(a, PRECISE)
        b = _gelu(b, PRECISE)
        mean = (tl.sum(a) + tl.sum(b)) / FEATURES
        a -= mean
        b = tl.where(inside, b - mean, 0.0)
        rstd = tl.rsqrt((tl.sum(a * a) + tl.sum(b * b)) / FEATURES + eps)
        _store(out + offset, a * rstd * weight_a + bias_a, b * rstd * weight_b + bias_b, FEATURES, FIRST, SECOND)
        tl.store(means + row, mean)
        tl.store(rstds + row, rstd)


@triton.jit
def gelu_norm_backward_kernel(
    dout, h, weight, means, rstds, dh, weight_sums, bias_sums, rows,
    FEATURES: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, STAGES: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """Write the gradient of each row, and this program's sums over its rows for those of weight and bias."""
    weight_a, weight_b = _load(weight, FEATURES, FIRST, SECOND)
    weight_sum_a = tl.zeros((FIRST,), tl.float32)
    weight_sum_b = tl.zeros((SECOND,), tl.float32)
    bias_sum_a = tl.zeros((FIRST,), tl.float32)
    bias_sum_b = tl.zeros((SECOND,), tl.float32)
    for row in tl.range(tl.program_id(0), rows, tl.num_programs(0), num_stages=STAGES):
        offset = tl.cast(row, tl.int64) * FEATURES
        mean = tl.load(means + row)
        rstd = tl.load(rstds + row)
        a, b = _load(h + offset, FEATURES, FIRST, SECOND)
        grad_a, grad_b = _load(dout + offset, FEATURES, FIRST, SECOND)
        a, slope_a = _gelu_and_slope(a, PRECISE)
        b, slope_b = _gelu_and_slope(b, PRECISE)
        a = (a - mean) * rstd
        b = (b - mean) * rstd
        weight_sum_a += grad_a * a
        weight_sum_b += grad_b * b
        bias_sum_a += grad_a
        bias_sum_b += grad_b
        grad_a *= weight_a
        grad_b *= weight_b
        # What normalising takes out of a gradient: its mean, and its share along the normed row.
        common = (tl.sum(grad_a) + tl.sum(grad_b)) / FEATURES
        along = (tl.sum(grad_a * a) + tl.sum(grad_b * b)) / FEATURES
        grad_a = (grad_a - common - a * along) * rstd * slope_a
        grad_b = (grad_b - common - b * along) * rstd * slope_b
        _store(dh + offset, grad_a, grad_b, FEATURES, FIRST, SECOND)
    offset = tl.program_id(0) * FEATURES
    _store(weight_sums + offset, weight_sum_a, weight_sum_b, FEATURES, FIRST, SECOND)
    _store(bias_sums + offset, bias_sum_a, bias_sum_b, FEATURES, FIRST, SECOND)
