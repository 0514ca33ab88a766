// Hopper's instructions under plain names: barriers in shared memory, copies of tensor tiles, matrix products of a
// warpgroup. Shared memory is addressed by 32-bit numbers. No header is needed, so that NVRTC alone compiles this.

using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

#define DEVICE __device__ __forceinline__

#define INFINITE __int_as_float(0x7F800000)

// ---- barriers -----------------------------------------------------------------------------------------------------

extern __shared__ __align__(1024) unsigned char memory[];  // all of a program's shared memory

DEVICE u32 memory_address() { return static_cast<u32>(__cvta_generic_to_shared(memory)); }

// Addresses of members of the struct `Shared` that lies there, counted in 32 bits: of an element of an array, and of one
// of an array of arrays.
#define OFFSET(member) static_cast<u32>(reinterpret_cast<u64>(&static_cast<Shared*>(nullptr)->member))
#define AT(member, i) (memory_address() + OFFSET(member) + (i) * static_cast<u32>(sizeof(Shared::member[0])))
#define AT2(member, i, j) (AT(member, i) + (j) * static_cast<u32>(sizeof(Shared::member[0][0])))

DEVICE void barrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

DEVICE void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrive, and let the phase end only when so many bytes have been copied, too.
DEVICE void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

DEVICE void barrier_wait(u32 barrier, u32 parity) {
    u32 done;
    do {
        asm volatile(
            "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
            : "=r"(done)
            : "r"(barrier), "r"(parity)
            : "memory");
    } while (!done);
}

// Of a warp all of whose lanes have waited for what they hand back.
DEVICE void release(u32 barrier) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
}

// Barriers by number, for some of the warps of a program.
DEVICE void named_sync(u32 number, u32 threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// What this thread wrote to shared memory may now be read by the copy engine and the tensor cores.
DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

template <int REGISTERS>
DEVICE void more_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS>
DEVICE void fewer_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// ---- copies of tiles ----------------------------------------------------------------------------------------------

struct alignas(64) TensorMap {
    u64 words[16];
};

DEVICE void copy_tile(const TensorMap* map, u32 to, u32 barrier, int c0, int c1, int c2, int c3, int c4) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(to),
        "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
        : "memory");
}

DEVICE void add_tile(const TensorMap* map, u32 from, int c0, int c1, int c2, int c3, int c4) {
    asm volatile(
        "cp.reduce.async.bulk.tensor.5d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(
            map),
        "r"(from), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
        : "memory");
}

DEVICE void store_tile(const TensorMap* map, u32 from, int c0, int c1, int c2, int c3, int c4) {
    asm volatile(
        "cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(map),
        "r"(from), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
        : "memory");
}

DEVICE void copy_row(u32 to, const void* from, u32 bytes, u32 barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from),
        "r"(bytes), "r"(barrier)
        : "memory");
}

DEVICE void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Wait until the copy engine has read what all but the last PENDING groups of this thread store.
template <int PENDING>
DEVICE void wait_stores_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}

template <int PENDING>
DEVICE void wait_stores() {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(PENDING) : "memory");
}

// ---- matrix products ----------------------------------------------------------------------------------------------

// A matrix of half precision in shared memory: rows of 64 columns (128 bytes), swizzled by the copy engine. Eight rows
// are a unit of 1024 bytes. Read along its columns (the inner dim of a product is the column) the units of further rows
// follow at once; read along its rows, `next_columns` bytes lead to the next 64 columns. These are the low bits of a
// descriptor; `address >> 4` added to them moves on. The high bits are the same for all.
DEVICE u32 matrix(u32 address, u32 next_columns = 16) { return (address & 0x3FFFF) >> 4 | next_columns >> 4 << 16; }

DEVICE u64 descriptor(u32 low) { return static_cast<u64>(1024 >> 4 | 1u << 30) << 32 | low; }

// The same number for all lanes, said so that the compiler knows it.
template <typename T>
DEVICE T uniform(T x) {
    return __shfl_sync(~0u, x, 0);
}

DEVICE void product_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

DEVICE void product_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int PENDING>
DEVICE void product_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Nothing that uses these registers moves to before this line.
template <typename T, int N>
DEVICE void hold(T (&registers)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) {
        if constexpr (sizeof(T) == 4 && static_cast<T>(0.5f) != T(0)) {
            asm volatile("" : "+f"(registers[i])::"memory");
        } else {
            asm volatile("" : "+r"(registers[i])::"memory");
        }
    }
}

// ---- numbers ------------------------------------------------------------------------------------------------------

DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

DEVICE float log2_fast(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Two numbers of half precision in one register, the first in the low bits.
DEVICE u32 pack(float low, float high) {
    u32 both;
#ifdef BFLOAT16
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#endif
    return both;
}

DEVICE void unpack(u32 both, float& low, float& high) {
#ifdef BFLOAT16
    low = __uint_as_float(both << 16);
    high = __uint_as_float(both & 0xFFFF0000u);
#else
    asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %2;\ncvt.f32.f16 %0, l;\ncvt.f32.f16 %1, h;\n}"
        : "=f"(low), "=f"(high)
        : "r"(both));
#endif
}

DEVICE u32 load_shared(u32 address) {
    u32 value;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
    return value;
}

DEVICE float2 load_shared_pair(u32 address) {
    float2 value;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(value.x), "=f"(value.y) : "r"(address) : "memory");
    return value;
}

DEVICE void store_shared_pair(u32 address, float x, float y) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(x), "f"(y) : "memory");
}

// Store four 8 x 8 matrices of half precision; each lane gives the address of one of their 32 rows.
DEVICE void store_matrices(u32 address, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b),
                 "r"(c), "r"(d)
                 : "memory");
}

// Over the four lanes that hold one row of a product.
DEVICE float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

DEVICE float row_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}
