"""Kernels of `parts`: for each token and head of the sum, find the row of every part, and add up.

The table has K entries of COLUMNS integers for each head; `parts` says what they are. Those of unused places have no
pieces.
"""

import triton
import triton.language as tl

__all__ = ["gradient_kernel", "softmax_kernel"]


@triton.jit
def _rows_of(entry, t, b):
    """Return which tokens lie on the grid of an entry of the table, and their rows from its first on."""
    length = tl.load(entry + 1).to(tl.int32)
    rate = tl.load(entry + 4).to(tl.int32)
    count = tl.load(entry + 2)
    first_sequence = tl.load(entry + 5)
    x = t - tl.load(entry).to(tl.int32)
    piece = x // length
    inside = x - piece * length
    row = inside // rate
    on = (x >= 0) & (piece < count) & (row * rate == inside) & (row < tl.load(entry + 3))
    on = on & (b >= first_sequence) & (b < tl.load(entry + 6))
    return on, (b - first_sequence) * count + piece, row


@triton.jit
def softmax_kernel(
    table, out, lse, seq, heads, K: tl.constexpr, part_type: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Merge normalised outputs by their log-sum-exp (LongNet, Eq. 9-10): one pass for the weights, one for the rows."""
    blocks = tl.cdiv(seq, TOKENS)  # of all sequences one after the other, since only this dim of a launch may be long
    t = tl.program_id(0) % blocks * TOKENS + tl.arange(0, TOKENS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    h = tl.program_id(1)
    d = tl.arange(0, WIDTH)
    entries = table + h * K * COLUMNS
    top = tl.full((TOKENS,), float("-inf"), tl.float32)
    total = tl.zeros((TOKENS,), tl.float32)
    for k in range(K):
        entry = entries + k * COLUMNS
        on, z, row = _rows_of(entry, t, b)
        at = tl.load(entry + 10).to(tl.pointer_type(tl.float32))
        part_lse = tl.load(at + z * tl.load(entry + 11) + row * tl.load(entry + 12), mask=on, other=float("-inf"))
        new_top = tl.maximum(top, part_lse)
        finite = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp(top - finite) + tl.exp(part_lse - finite)
        top = new_top
    seen = total > 0
    merged = tl.where(seen, top + tl.log(tl.where(seen, total, 1.0)), float("-inf"))
    base = tl.where(seen, merged, 0.0)
    acc = tl.zeros((TOKENS, WIDTH), tl.float32)
    for k in range(K):
        entry = entries + k * COLUMNS
        on, z, row = _rows_of(entry, t, b)
        at = tl.load(entry + 10).to(tl.pointer_type(tl.float32))
        part_lse = tl.load(at + z * tl.load(entry + 11) + row * tl.load(entry + 12), mask=on, other=float("-inf"))
        at = tl.load(entry + 7).to(tl.pointer_type(part_type))
        at = at + (z * tl.load(entry + 8) + row * tl.load(entry + 9))[:, None] + d[None, :]
        part = tl.load(at, mask=on[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        acc += part * tl.exp(part_lse - base)[:, None]
    here = t < seq
    token = b * seq + t
    tl.store(lse + token * heads + h, merged, mask=here)
    at = out + (token * heads + h)[:, None] * D + d[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=here[:, None] & (d < D)[None, :])


@triton.jit
def gradient_kernel(
    table, out, seq, heads, K: tl.constexpr, part_type: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add up gradients; parts have the dtype of the sum, or float32."""
    blocks = tl.cdiv(seq, TOKENS)  # of all sequences one after the other, since only this dim of a launch may be long
    t = tl.program_id(0) % blocks * TOKENS + tl.arange(0, TOKENS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    h = tl.program_id(1)
    d = tl.arange(0, WIDTH)
    entries = table + h * K * COLUMNS
    acc = tl.zeros((TOKENS, WIDTH), tl.float32)
    for k in range(K):
        entry = entries + k * COLUMNS
        on, z, row = _rows_of(entry, t, b)
        wide = tl.load(entry + 13) != 0
        offset = (z * tl.load(entry + 8) + row * tl.load(entry + 9))[:, None] + d[None, :]
        there = on[:, None] & (d < D)[None, :]
        at = tl.load(entry + 7).to(tl.pointer_type(part_type)) + offset
        acc += tl.load(at, mask=there & ~wide, other=0.0).to(tl.float32)
        if wide:
            acc += tl.load(tl.load(entry + 7).to(tl.pointer_type(tl.float32)) + offset, mask=there, other=0.0)
    at = out + ((b * seq + t) * heads + h)[:, None] * D + d[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=(t < seq)[:, None] & (d < D)[None, :])
