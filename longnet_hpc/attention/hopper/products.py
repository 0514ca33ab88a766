"""The C++ wrappers of Hopper's matrix products: one function for each width and kind of operands."""

from __future__ import annotations

__all__ = ["products"]


def products(widths: tuple[int, ...], element: str) -> str:
    """Return C++ source of the functions ``product_N`` that kernels call, for some widths N.

    Each queues ``sums (64, N) += a (64, 16) @ b (16, N)`` for a warpgroup, in float32; ``scale_sum`` 0 forgets what the
    sums were. ``a`` is a matrix in shared memory (``matrix``) or four registers a thread; ``A_ROWS`` and ``B_ROWS`` say
    that a matrix lies in memory with its inner dim along the rows.

    Parameters
    ----------
    widths : tuple of int
        Columns of the products, multiples of 8 up to 256.
    element : str
        ``bf16`` or ``f16``.
    """
    return "\n".join(_from_shared(n, element) + _from_registers(n, element) for n in widths)


def _sums(n: int) -> tuple[str, str]:
    numbers = ", ".join(f"%{i}" for i in range(n // 2))
    return numbers, ", ".join(f'"+f"(sums[{i}])' for i in range(n // 2))


def _instruction(n: int, element: str) -> str:
    return f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{element}.{element}"


def _from_shared(n: int, element: str) -> str:
    numbers, outputs = _sums(n)
    a, b, scale, a_rows, b_rows = (f"%{n // 2 + i}" for i in range(5))
    return f"""
template <int A_ROWS, int B_ROWS>
DEVICE void product_{n}(float (&sums)[{n // 2}], u32 a, u32 b, int scale_sum) {{
    asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, {scale}, 0;\\n"
        "{_instruction(n, element)} {{{numbers}}}, {a}, {b}, p, 1, 1, {a_rows}, {b_rows};\\n}}"
        : {outputs}
        : "l"(descriptor(a)), "l"(descriptor(b)), "r"(scale_sum), "n"(A_ROWS), "n"(B_ROWS));
}}
"""


def _from_registers(n: int, element: str) -> str:
    numbers, outputs = _sums(n)
    a = ", ".join(f"%{n // 2 + i}" for i in range(4))
    b, scale, b_rows = (f"%{n // 2 + i}" for i in range(4, 7))
    return f"""
template <int B_ROWS>
DEVICE void product_{n}(float (&sums)[{n // 2}], const u32* a, u32 b, int scale_sum) {{
    asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, {scale}, 0;\\n"
        "{_instruction(n, element)} {{{numbers}}}, {{{a}}}, {b}, p, 1, 1, {b_rows};\\n}}"
        : {outputs}
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor(b)), "r"(scale_sum), "n"(B_ROWS));
}}
"""
