// Hopper's instructions, acted out on a CPU: what `primitives.cuh` and the generated products are on the GPU.
//
// Every thread of a program is a fiber, and they take turns in random order. Copies of tiles happen some turns after
// they were asked for, and matrix products at once or when they are waited for, so that kernels which wait for too little
// get wrong results here, too. A program in which no thread can go on is reported as such.

#include <math.h>
#include <setjmp.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <array>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <utility>
#include <vector>

using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;
using std::max;
using std::min;

#define DEVICE inline
#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define INFINITE INFINITY

struct Index {
    u32 x;
};
struct float2 {
    float x, y;
};

// ---- threads ------------------------------------------------------------------------------------------------------

constexpr u32 SHARED_BYTES = 232448, STACK_BYTES = 1 << 18;
alignas(1024) static unsigned char memory[SHARED_BYTES];

struct Product {  // sums (64, columns) += a (64, 16) @ b (16, columns)
    float* sums;
    const u32* registers;  // of this thread, or null: a is a matrix in shared memory
    u32 a, b;
    int a_rows, b_rows, columns, scale_sum, group;
};

struct Meeting {  // of some threads, which all wait for the last
    int arrived = 0;
    u64 number = 0;
};

struct Fiber {
    ucontext_t context;  // where it starts
    jmp_buf place;       // where it goes on: to switch so takes no system call
    u32 thread;
    bool started = false, done = false;
    const u64* watched = nullptr;  // it can go on once this is no longer as it was
    u64 as_it_was;
    std::vector<Product> products;
    int group = 0;  // of products that is open
};

struct Barrier {
    int arrivals, pending;
    i64 bytes;
    u64 phase;
};

struct Machine {
    std::vector<Fiber> fibers;
    std::vector<std::unique_ptr<unsigned char[]>> stacks;  // kept from program to program
    jmp_buf scheduler;
    Fiber* current = nullptr;
    u32 block = 0, blocks = 0, taken = 0;
    std::map<u32, Barrier> barriers;
    std::vector<Meeting> warps, groups;
    std::map<u32, Meeting> named;
    std::vector<std::array<u64, 32>> deposits;
    std::vector<std::pair<u64, std::function<void()>>> copies;  // and the turn in which they happen
    u64 turn = 0;
    std::mt19937 random;
    u64 steps = 0;  // that changed something
};
static Machine machine;

#define threadIdx (Index{machine.current->thread})
#define blockIdx (Index{machine.block})
#define gridDim (Index{machine.blocks})

// Let the others go on until a number is no longer what it is.
inline void wait_while(const u64& number, u64 value) {
    machine.current->watched = &number, machine.current->as_it_was = value;
    if (number == value && !_setjmp(machine.current->place)) _longjmp(machine.scheduler, 1);
}

template <typename F>
void meet(Meeting& meeting, int count, F last) {
    u64 number = meeting.number;
    if (++meeting.arrived == count) {
        last();
        meeting.arrived = 0;
        meeting.number++;
        machine.steps++;
    } else {
        wait_while(meeting.number, number);
    }
}

inline Meeting& warp() { return machine.warps[threadIdx.x / 32]; }

// What every lane of the warp says, lane by lane.
inline std::array<u64, 32> everybody(u64 mine) {
    auto& deposit = machine.deposits[threadIdx.x / 32];
    deposit[threadIdx.x % 32] = mine;
    meet(warp(), 32, [] {});
    std::array<u64, 32> all = deposit;
    meet(warp(), 32, [] {});
    return all;
}

inline void __syncwarp() { meet(warp(), 32, [] {}); }
inline void __syncthreads() { meet(machine.named[0], machine.fibers.size(), [] {}); }
inline void named_sync(u32 number, u32 threads) { meet(machine.named[number], threads, [] {}); }

template <typename T>
T __shfl_sync(u32, T x, int lane) {
    u64 bits = 0;
    memcpy(&bits, &x, sizeof x);
    bits = everybody(bits)[lane];
    memcpy(&x, &bits, sizeof x);
    return x;
}

template <typename T>
T __shfl_xor_sync(u32, T x, int mask) {
    u64 bits = 0;
    memcpy(&bits, &x, sizeof x);
    bits = everybody(bits)[threadIdx.x % 32 ^ mask];
    memcpy(&x, &bits, sizeof x);
    return x;
}

inline bool __any_sync(u32, bool x) {
    for (u64 its : everybody(x))
        if (its) return true;
    return false;
}

// A counter of tiles that programs take: they run one after the other here, so each gets every so-manieth.
inline u32 atomicAdd(u32*, u32) { return machine.block + machine.blocks * machine.taken++; }

template <typename T>
T uniform(T x) {
    return __shfl_sync(~0u, x, 0);
}

// ---- barriers -----------------------------------------------------------------------------------------------------

#define AT(member, i) (static_cast<u32>(offsetof(Shared, member)) + (i) * static_cast<u32>(sizeof(Shared::member[0])))
#define AT2(member, i, j) (AT(member, i) + (j) * static_cast<u32>(sizeof(Shared::member[0][0])))

inline void check(bool right, const char* what) {
    if (!right) {
        fprintf(stderr, "emulator: %s\n", what);
        abort();
    }
}

inline void barrier_init(u32 address, u32 arrivals) {
    machine.barriers[address] = {static_cast<int>(arrivals), static_cast<int>(arrivals), 0, 0};
}

inline void barrier_settle(Barrier& barrier) {
    check(barrier.pending >= 0 && barrier.bytes >= 0, "more arrivals or bytes than a barrier expects");
    machine.steps++;
    if (barrier.pending == 0 && barrier.bytes == 0) barrier.phase ^= 1, barrier.pending = barrier.arrivals;
}

inline void barrier_arrive(u32 address) {
    Barrier& barrier = machine.barriers.at(address);
    barrier.pending--;
    barrier_settle(barrier);
}

inline void barrier_expect(u32 address, u32 bytes) {
    machine.barriers.at(address).bytes += bytes;
    barrier_arrive(address);
}

inline void barrier_copied(u32 address, u32 bytes) {
    Barrier& barrier = machine.barriers.at(address);
    barrier.bytes -= bytes;
    barrier_settle(barrier);
}

inline void barrier_wait(u32 address, u32 parity) {
    wait_while(machine.barriers.at(address).phase, parity);
}

inline void release(u32 barrier) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
}

inline void fence_async() {}
template <int>
void more_registers() {}
template <int>
void fewer_registers() {}

// ---- copies of tiles ----------------------------------------------------------------------------------------------

struct alignas(64) TensorMap {
    u64 words[16];  // address, five sizes, four strides in bytes, rows of a tile, bytes of an element
};

inline u32 swizzled(u32 address) { return address ^ ((address >> 7 & 7) << 4); }

template <typename F>
void for_elements(const TensorMap& map, u32 tile, const int (&at)[5], F visit) {
    int size = map.words[11], columns = 128 / size, rows = map.words[10];
    check(tile % 128 == 0, "a tile that is not aligned to 128 bytes");
    for (int row = 0; row < rows; row++)
        for (int column = 0; column < columns; column++) {
            i64 where[5] = {at[0] + column, at[1], at[2], at[3] + row, at[4]}, offset = where[0] * size;
            bool inside = where[0] >= 0 && where[0] < static_cast<i64>(map.words[1]);
            for (int dim = 1; dim < 5; dim++) {
                inside = inside && where[dim] >= 0 && where[dim] < static_cast<i64>(map.words[1 + dim]);
                offset += where[dim] * static_cast<i64>(map.words[5 + dim]);
            }
            unsigned char* there = inside ? reinterpret_cast<unsigned char*>(map.words[0]) + offset : nullptr;
            visit(memory + swizzled(tile + row * 128 + column * size), there, size);
        }
}

// Most copies take a few turns, some take many.
inline void later(std::function<void()> copy) {
    machine.copies.push_back({machine.turn + machine.random() % (machine.random() % 4 ? 4 : 40), copy});
}

inline void copy_tile(const TensorMap* map, u32 to, u32 barrier, int c0, int c1, int c2, int c3, int c4) {
    later([=] {
        for_elements(*map, to, {c0, c1, c2, c3, c4}, [](unsigned char* here, const unsigned char* there, int size) {
            if (there) memcpy(here, there, size);
            else memset(here, 0, size);
        });
        barrier_copied(barrier, map->words[10] * 128);
    });
}

inline void store_tile(const TensorMap* map, u32 from, int c0, int c1, int c2, int c3, int c4) {
    for_elements(*map, from, {c0, c1, c2, c3, c4}, [](const unsigned char* here, unsigned char* there, int size) {
        if (there) memcpy(there, here, size);
    });
}

inline void add_tile(const TensorMap* map, u32 from, int c0, int c1, int c2, int c3, int c4) {
    for_elements(*map, from, {c0, c1, c2, c3, c4}, [](const unsigned char* here, unsigned char* there, int) {
        if (there) *reinterpret_cast<float*>(there) += *reinterpret_cast<const float*>(here);
    });
}

inline void copy_row(u32 to, const void* from, u32 bytes, u32 barrier) {
    check(bytes % 16 == 0 && to % 16 == 0 && reinterpret_cast<u64>(from) % 16 == 0, "a row that is not aligned");
    later([=] {
        memcpy(memory + to, from, bytes);
        barrier_copied(barrier, bytes);
    });
}

inline void commit_stores() {}
template <int>
void wait_stores_read() {}
template <int>
void wait_stores() {}

// ---- numbers ------------------------------------------------------------------------------------------------------

inline float exp2_fast(float x) { return exp2f(x); }
inline float log2_fast(float x) { return log2f(x); }

inline float wide(uint16_t half) {
#ifdef BFLOAT16
    u32 bits = static_cast<u32>(half) << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
#else
    _Float16 x;
    memcpy(&x, &half, 2);
    return x;
#endif
}

inline uint16_t narrow(float x) {
#ifdef BFLOAT16
    u32 bits;
    memcpy(&bits, &x, 4);
    return x != x ? 0x7FC0 : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
#else
    _Float16 half = x;
    uint16_t bits;
    memcpy(&bits, &half, 2);
    return bits;
#endif
}

inline u32 pack(float low, float high) { return narrow(low) | static_cast<u32>(narrow(high)) << 16; }
inline void unpack(u32 both, float& low, float& high) { low = wide(both & 0xFFFF), high = wide(both >> 16); }

template <typename T>
T load(u32 address) {
    T x;
    memcpy(&x, memory + address, sizeof x);
    return x;
}

inline u32 load_shared(u32 address) { return load<u32>(address); }
inline float2 load_shared_pair(u32 address) { return load<float2>(address); }
inline void store_shared_pair(u32 address, float x, float y) {
    float2 pair{x, y};
    memcpy(memory + address, &pair, sizeof pair);
}

inline void store_matrices(u32 address, u32 a, u32 b, u32 c, u32 d) {
    u32 lane = threadIdx.x % 32, mine[4] = {a, b, c, d};
    std::array<u64, 32> rows = everybody(address);
    for (int i = 0; i < 4; i++) memcpy(memory + rows[8 * i + lane / 4] + lane % 4 * 4, &mine[i], 4);
    __syncwarp();
}

inline float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

inline float row_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

// ---- matrix products ----------------------------------------------------------------------------------------------

inline u32 matrix(u32 address, u32 next_columns = 16) { return (address & 0x3FFFF) >> 4 | next_columns >> 4 << 16; }

inline void product_fence() {}
template <typename T, int N>
void hold(T (&)[N]) {}

// Element (outer, inner) of a matrix in shared memory, where `inner` is the dim that a product sums over.
inline float element(u32 matrix, int along_rows, int outer, int inner) {
    u32 start = (matrix & 0x3FFF) << 4, next_columns = (matrix >> 16 & 0x3FFF) << 4;
    u32 address = along_rows ? start + outer / 64 * next_columns + inner / 8 * 1024 + inner % 8 * 128 + outer % 64 * 2
                             : start + outer / 8 * 1024 + outer % 8 * 128 + inner * 2;
    return wide(load<uint16_t>(swizzled(address)));
}

inline void multiply(u32 first_thread, size_t number) {
    const Product& its = machine.fibers[first_thread].products[number];
    std::vector<float> a(64 * 16), b(16 * its.columns);
    for (int row = 0; row < 64; row++)
        for (int inner = 0; inner < 16; inner++) {
            if (!its.registers) {
                a[row * 16 + inner] = element(its.a, its.a_rows, row, inner);
                continue;
            }
            u32 thread = first_thread + row / 16 * 32 + row % 8 * 4 + inner % 8 / 2;
            u32 both = machine.fibers[thread].products[number].registers[row % 16 / 8 + inner / 8 * 2];
            a[row * 16 + inner] = wide(inner % 2 ? both >> 16 : both & 0xFFFF);
        }
    for (int column = 0; column < its.columns; column++)
        for (int inner = 0; inner < 16; inner++) b[inner * its.columns + column] = element(its.b, its.b_rows, column, inner);
    std::vector<float> sums(its.columns);
    for (int row = 0; row < 64; row++) {
        std::fill(sums.begin(), sums.end(), 0.0f);
        for (int inner = 0; inner < 16; inner++)
            for (int column = 0; column < its.columns; column++)
                sums[column] += a[row * 16 + inner] * b[inner * its.columns + column];
        for (int column = 0; column < its.columns; column++) {
            u32 thread = first_thread + row / 16 * 32 + row % 8 * 4 + column % 8 / 2;
            float& sum = machine.fibers[thread].products[number].sums[column / 8 * 4 + row % 16 / 8 * 2 + column % 2];
            sum = (its.scale_sum ? sum : 0.0f) + sums[column];
        }
    }
}

// Compute what a warpgroup has queued, but for the last groups.
inline void compute_products(u32 first, int pending) {
    auto& fibers = machine.fibers;
    size_t count = 0;
    while (count < fibers[first].products.size() && fibers[first].products[count].group < fibers[first].group - pending)
        multiply(first, count++);
    for (u32 thread = first; thread < first + 128; thread++) {
        check(fibers[thread].group == fibers[first].group, "a product that not all threads of a warpgroup queue");
        fibers[thread].products.erase(fibers[thread].products.begin(), fibers[thread].products.begin() + count);
    }
}

// Some products are computed at once, others as late as may be.
inline void product_commit() {
    machine.current->group++;
    meet(machine.groups[threadIdx.x / 128], 128, [] {
        if (machine.random() % 2) compute_products(threadIdx.x / 128 * 128, 0);
    });
}

template <int PENDING>
void product_wait() {
    meet(machine.groups[threadIdx.x / 128], 128, [] { compute_products(threadIdx.x / 128 * 128, PENDING); });
}

template <int A_ROWS, int B_ROWS, int N>
void product(float (&sums)[N], u32 a, u32 b, int scale_sum) {
    machine.current->products.push_back({sums, nullptr, a, b, A_ROWS, B_ROWS, 2 * N, scale_sum, machine.current->group});
}

template <int B_ROWS, int N>
void product(float (&sums)[N], const u32* a, u32 b, int scale_sum) {
    machine.current->products.push_back({sums, a, 0, b, 0, B_ROWS, 2 * N, scale_sum, machine.current->group});
}

#define product_64 product
#define product_128 product
#define PRODUCT_D product
#define PRODUCT_Q product

// ---- launch -------------------------------------------------------------------------------------------------------

static std::function<void()> kernel_body;

inline void fiber_main() {
    kernel_body();
    machine.current->done = true;
    machine.steps++;
    _longjmp(machine.scheduler, 1);
}

inline void go_on(Fiber& fiber) {
    if (fiber.watched && *fiber.watched == fiber.as_it_was) return;
    machine.current = &fiber;
    if (_setjmp(machine.scheduler)) return;
    if (fiber.started) _longjmp(fiber.place, 1);
    fiber.started = true;
    setcontext(&fiber.context);
}

// Run one program after the other; return 1 if one of them cannot go on.
inline int run_programs(u32 programs, u32 threads, u32 seed) {
    machine.random.seed(seed);
    for (u32 block = 0; block < programs; block++) {
        memset(memory, 0xFF, SHARED_BYTES);  // numbers that are none
        machine.block = block, machine.blocks = programs, machine.taken = 0;
        machine.barriers.clear(), machine.named.clear(), machine.copies.clear();
        machine.warps.assign(threads / 32, {}), machine.groups.assign(threads / 128, {});
        machine.deposits.assign(threads / 32, {});
        machine.fibers = std::vector<Fiber>(threads);
        std::vector<u32> order;
        for (u32 thread = 0; thread < threads; thread++) {
            Fiber& fiber = machine.fibers[thread];
            fiber.thread = thread;
            if (machine.stacks.size() <= thread) machine.stacks.emplace_back(new unsigned char[STACK_BYTES]);
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = machine.stacks[thread].get();
            fiber.context.uc_stack.ss_size = STACK_BYTES;
            makecontext(&fiber.context, fiber_main, 0);
            order.push_back(thread);
        }
        u64 before = ~0ull;
        while (!order.empty()) {
            if (machine.steps == before && machine.copies.empty()) return 1;
            before = machine.steps;
            machine.turn++;
            for (size_t i = 0; i < machine.copies.size();) {
                if (machine.copies[i].first > machine.turn) {
                    i++;
                    continue;
                }
                auto copy = machine.copies[i].second;
                machine.copies.erase(machine.copies.begin() + i);
                copy();
            }
            u32 turn = machine.random() % order.size();  // whose turn it is first
            for (u32 i = 0; i < order.size(); i++) go_on(machine.fibers[order[(i + turn) % order.size()]]);
            std::vector<u32> left;
            for (u32 thread : order)
                if (!machine.fibers[thread].done) left.push_back(thread);
            order = left;
        }
    }
    return 0;
}
