"""Kernels of `hopper_forward`: what a producer warp and the consumer warpgroups of one program do.

One producer warp copies rows of strided views ``(batch, heads, rows, head_dim)`` by TMA. Each consumer warpgroup owns 64
query rows and computes the scores of the next block of keys while the softmax of this one runs. Programs are
persistent; causal tiles come longest first.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# fmt: off


@gluon.jit
def _place(tile, m_tiles, H, ZH, chunk, keys, TILE: gl.constexpr, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr):
    if CAUSAL:
        # Heads in chunks that fit the cache; within a chunk the longest tiles of all heads first.
        number = tile // (chunk * m_tiles)
        inside = tile % (chunk * m_tiles)
        size = gl.minimum(chunk, ZH - number * chunk)
        row = (m_tiles - 1 - inside // size) * TILE
        zh = number * chunk + inside % size
        blocks = gl.cdiv(gl.minimum(keys, row + TILE), BLOCK_N)
    else:
        row = tile % m_tiles * TILE
        zh = tile // m_tiles
        blocks = gl.cdiv(keys, BLOCK_N)
    return zh // H, zh % H, row, blocks


@gluon.jit
def _produce(q_desc, k_desc, v_desc, q_bufs, k_bufs, v_bufs, q_ready, q_empty, k_ready, k_empty, v_ready, v_empty,
             first, step, tiles, m_tiles, H, ZH, chunk, group, rows, keys, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
             D: gl.constexpr, GROUPS: gl.constexpr, CAUSAL: gl.constexpr):
    n = 0
    turn = 0
    for tile in range(first, tiles, step):
        z, h, row, blocks = _place(tile, m_tiles, H, ZH, chunk, keys, GROUPS * BLOCK_M, BLOCK_N, CAUSAL)
        for g in gl.static_range(GROUPS):
            mbarrier.wait(q_empty.index(g), (turn & 1) ^ 1)
            mbarrier.expect(q_ready.index(g), q_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(q_desc, [z, h, row + g * BLOCK_M, 0], q_ready.index(g), q_bufs.index(g))
        turn += 1
        h_kv = h // group
        for j in range(blocks):
            stage = n % STAGES
            phase = (n // STAGES) & 1
            mbarrier.wait(k_empty.index(stage), phase ^ 1)
            mbarrier.expect(k_ready.index(stage), k_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(k_desc, [z, h_kv, j * BLOCK_N, 0], k_ready.index(stage), k_bufs.index(stage))
            mbarrier.wait(v_empty.index(stage), phase ^ 1)
            mbarrier.expect(v_ready.index(stage), v_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(v_desc, [z, h_kv, j * BLOCK_N, 0], v_ready.index(stage), v_bufs.index(stage))
            n += 1


@gluon.jit
def _softmax(s, top, total, scale):
    m_new = gl.maximum(top, gl.max(s, 1) * scale)
    p = gl.exp2(s * scale - gl.expand_dims(m_new, 1))
    alpha = gl.exp2(top - m_new)
    return p, m_new, total * alpha + gl.sum(p, 1), alpha


@gluon.jit
def _hide(s, first_col, offs_m, offs_n, keys, CAUSAL: gl.constexpr):
    cols = first_col + offs_n
    keep = gl.expand_dims(cols, 0) < keys
    if CAUSAL:
        keep = keep & (gl.expand_dims(cols, 0) <= gl.expand_dims(offs_m, 1))
    return gl.where(keep, s, float("-inf"))


@gluon.jit
def _consume(g: gl.constexpr, q_bufs, k_bufs, v_bufs, q_ready, q_empty, k_ready, k_empty, v_ready, v_empty, out_desc, o_bufs, o2, lse_ptr,
             first, step, tiles, m_tiles, H, ZH, chunk, rows, keys, scale, sl_z, sl_h, sl_m,
             BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr, GROUPS: gl.constexpr,
             CAUSAL: gl.constexpr, dtype: gl.constexpr):
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=o_layout, k_width=2)
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    out_layout: gl.constexpr = gl.SliceLayout(1, o_layout)
    offs_n = gl.arange(0, BLOCK_N, gl.SliceLayout(0, s_layout))
    q_buf = q_bufs.index(g)
    n = 0
    turn = 0
    for tile in range(first, tiles, step):
        z, h, row, blocks = _place(tile, m_tiles, H, ZH, chunk, keys, GROUPS * BLOCK_M, BLOCK_N, CAUSAL)
        row += g * BLOCK_M
        own = blocks
        full = keys // BLOCK_N
        if CAUSAL:
            own = gl.minimum(blocks, gl.cdiv(row + BLOCK_M, BLOCK_N))
            full = gl.minimum(full, (row + 1) // BLOCK_N)
        top = gl.full((BLOCK_M,), float("-inf"), gl.float32, row_layout)
        total = gl.zeros((BLOCK_M,), gl.float32, row_layout)
        o = gl.zeros((BLOCK_M, D), gl.float32, o_layout)
        offs_m = row + gl.arange(0, BLOCK_M, row_layout)
        mbarrier.wait(q_ready.index(g), turn & 1)
        stage = n % STAGES
        mbarrier.wait(k_ready.index(stage), (n // STAGES) & 1)
        s = warpgroup_mma(q_buf, k_bufs.index(stage).permute((1, 0)), gl.zeros((BLOCK_M, BLOCK_N), gl.float32, s_layout), use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=(s,))
        mbarrier.arrive(k_empty.index(stage), count=1)
        if full < 1:
            s = _hide(s, 0, offs_m, offs_n, keys, CAUSAL)
        p, top, total, alpha = _softmax(s, top, total, scale)
        p = gl.convert_layout(p.to(dtype), p_layout)
        for j in range(1, own):
            before = n % STAGES
            phase_before = (n // STAGES) & 1
            n += 1
            stage = n % STAGES
            mbarrier.wait(k_ready.index(stage), (n // STAGES) & 1)
            s_token = warpgroup_mma(q_buf, k_bufs.index(stage).permute((1, 0)), gl.zeros((BLOCK_M, BLOCK_N), gl.float32, s_layout), use_acc=False, is_async=True)
            mbarrier.wait(v_ready.index(before), phase_before)
            o_token = warpgroup_mma(p, v_bufs.index(before), o, is_async=True)
            s = warpgroup_mma_wait(1, deps=(s_token,))
            mbarrier.arrive(k_empty.index(stage), count=1)
            if j >= full:
                s = _hide(s, j * BLOCK_N, offs_m, offs_n, keys, CAUSAL)
            p_new, top, total, alpha = _softmax(s, top, total, scale)
            o, _ = warpgroup_mma_wait(0, deps=(o_token, p))
            mbarrier.arrive(v_empty.index(before), count=1)
            p = gl.convert_layout(p_new.to(dtype), p_layout)
            o = o * gl.expand_dims(gl.convert_layout(alpha, out_layout), 1)
        mbarrier.arrive(q_empty.index(g), count=1)
        last = n % STAGES
        mbarrier.wait(v_ready.index(last), (n // STAGES) & 1)
        o_token = warpgroup_mma(p, v_bufs.index(last), o, is_async=True)
        lse = (top + gl.log2(total)) * 0.6931471805599453
        o = warpgroup_mma_wait(0, deps=(o_token,))
        mbarrier.arrive(v_empty.index(last), count=1)
        n += 1
        if CAUSAL:
            for _ in range(own, blocks):  # keys that only later rows of the tile see
                stage = n % STAGES
                phase = (n // STAGES) & 1
                mbarrier.wait(k_ready.index(stage), phase)
                mbarrier.arrive(k_empty.index(stage), count=1)
                mbarrier.wait(v_ready.index(stage), phase)
                mbarrier.arrive(v_empty.index(stage), count=1)
                n += 1
        turn += 1
        o = o * gl.expand_dims(gl.convert_layout(1.0 / total, out_layout), 1)
        gl.store(lse_ptr + z.to(gl.int64) * sl_z + h * sl_h + offs_m.to(gl.int64) * sl_m, lse, mask=offs_m < rows)
        tma.store_wait(0)
        o2.index(g).store(o.to(dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(out_desc, [z, h, row, 0], o_bufs.index(g))
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["rows", "keys", "tiles", "m_tiles", "H", "ZH", "chunk", "group"])
def attention_kernel(q_desc, k_desc, v_desc, out_desc, lse_ptr, sl_z, sl_h, sl_m, rows, keys, scale,
                      tiles, m_tiles, H, ZH, chunk, group, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr, CAUSAL: gl.constexpr,
                      GROUPS: gl.constexpr, CONSUMER_REGS: gl.constexpr):
    BLOCK_M: gl.constexpr = 64
    dtype: gl.constexpr = q_desc.dtype
    q_bufs = gl.allocate_shared_memory(dtype, [GROUPS, 1, 1, BLOCK_M, D], q_desc.layout)
    k_bufs = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, D], k_desc.layout)
    v_bufs = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, D], v_desc.layout)
    layout2: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, D], dtype)
    o_bufs = gl.allocate_shared_memory(dtype, [GROUPS, 1, 1, BLOCK_M, D], q_desc.layout)
    o2 = o_bufs._reinterpret(dtype, [GROUPS, BLOCK_M, D], layout2)
    q2 = q_bufs._reinterpret(dtype, [GROUPS, BLOCK_M, D], layout2)
    k2 = k_bufs._reinterpret(dtype, [STAGES, BLOCK_N, D], layout2)
    v2 = v_bufs._reinterpret(dtype, [STAGES, BLOCK_N, D], layout2)
    q_ready = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(GROUPS):
        mbarrier.init(q_ready.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(v_ready.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=GROUPS)
        mbarrier.init(v_empty.index(i), count=GROUPS)
    fence_async_shared()
    first = gl.program_id(0)
    step = gl.num_programs(0)
    if GROUPS == 2:
        gl.warp_specialize([
            (_consume, (0, q2, k2, v2, q_ready, q_empty, k_ready, k_empty, v_ready, v_empty, out_desc, o_bufs, o2, lse_ptr,
                        first, step, tiles, m_tiles, H, ZH, chunk, rows, keys, scale, sl_z, sl_h, sl_m,
                        BLOCK_M, BLOCK_N, STAGES, D, GROUPS, CAUSAL, dtype)),
            (_consume, (1, q2, k2, v2, q_ready, q_empty, k_ready, k_empty, v_ready, v_empty, out_desc, o_bufs, o2, lse_ptr,
                        first, step, tiles, m_tiles, H, ZH, chunk, rows, keys, scale, sl_z, sl_h, sl_m,
                        BLOCK_M, BLOCK_N, STAGES, D, GROUPS, CAUSAL, dtype)),
            (_produce, (q_desc, k_desc, v_desc, q_bufs, k_bufs, v_bufs, q_ready, q_empty, k_ready, k_empty, v_ready, v_empty,
                        first, step, tiles, m_tiles, H, ZH, chunk, group, rows, keys, BLOCK_M, BLOCK_N, STAGES, D, GROUPS, CAUSAL)),
        ], [4, 1], [CONSUMER_REGS, 24])
    else:
        gl.warp_specialize([
            (_consume, (0, q2, k2, v2, q_ready, q_empty, k_ready, k_empty, v_ready, v_empty, out_desc, o_bufs, o2, lse_ptr,
                        first, step, tiles, m_tiles, H, ZH, chunk, rows, keys, scale, sl_z, sl_h, sl_m,
                        BLOCK_M, BLOCK_N, STAGES, D, GROUPS, CAUSAL, dtype)),
            (_consume, (1, q2, k2, v2, q_ready, q_empty, k_ready, k_empty, v_ready, v_empty, out_desc, o_bufs, o2, lse_ptr,
                        first, step, tiles, m_tiles, H, ZH, chunk, rows, keys, scale, sl_z, sl_h, sl_m,
                        BLOCK_M, BLOCK_N, STAGES, D, GROUPS, CAUSAL, dtype)),
            (_consume, (2, q2, k2, v2, q_ready, q_empty, k_ready, k_empty, v_ready, v_empty, out_desc, o_bufs, o2, lse_ptr,
                        first, step, tiles, m_tiles, H, ZH, chunk, rows, keys, scale, sl_z, sl_h, sl_m,
                        BLOCK_M, BLOCK_N, STAGES, D, GROUPS, CAUSAL, dtype)),
            (_produce, (q_desc, k_desc, v_desc, q_bufs, k_bufs, v_bufs, q_ready, q_empty, k_ready, k_empty, v_ready, v_empty,
                        first, step, tiles, m_tiles, H, ZH, chunk, group, rows, keys, BLOCK_M, BLOCK_N, STAGES, D, GROUPS, CAUSAL)),
        ], [4, 4, 1], [CONSUMER_REGS, CONSUMER_REGS, 24])
