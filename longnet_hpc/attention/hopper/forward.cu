// Forward attention of many strided grids in one launch.
//
// A grid ("job") has pieces, heads and up to `rows` rows a head and piece, which lie `rate` tokens apart. Programs are
// persistent: one warp copies tiles in the order in which GROUPS warpgroups consume them. Each warpgroup owns 64 query
// rows of a tile and walks the keys that they see from the last block to the first, so that only its first block is
// masked; with NARROW, where but half of that is seen, the other half is not computed. The products of a block and the
// softmax of the next run side by side, across tiles, too. With PARTS, grids are dense (`rate` 1), and the softmax of a
// row starts from the compact results of other grids on which the row lies.

struct Job {
    TensorMap q[2], k[2], v[2], out[2];  // for heads with `rows` rows, and for those with one fewer
    float* lse;
    i64 lse_piece, lse_head, lse_row;  // strides in elements
    int first_tile, row_tiles;
    int pieces, heads, rows;  // pieces of all sequences
    int rate, shift, longer;  // head h has its rows at (h + shift) % rate, and `rows` of them if that is below `longer`
    int group;                // query heads to a key/value head
    int chunk;                // heads worked on together
    int start, length, count;  // first token, tokens of a piece, pieces of a sequence
    int unused[11];
};

struct Part {
    TensorMap out[2];
    const float* lse;  // (pieces, heads, rows)
    int start, length, count, heads, rows, rate, shift, longer;
    int first, held;  // rows before it in the buffer, and rows that it has there
    int unused[4];
};

struct Params {
    Job jobs[MAX_JOBS];
    Part parts[PARTS ? PARTS : 1];
    u32* taken;  // how many tiles programs have taken so far
    int count;
    u32 tiles;
    float scale;  // times log2(e)
};

constexpr int BLOCK_M = 64;   // query rows of a warpgroup
constexpr int BLOCK_N = 128;  // keys of a block
constexpr int HALVES = HEAD_DIM / 64;
static_assert(GROUPS * BLOCK_M <= BLOCK_N + BLOCK_M, "a warpgroup sees at most one block less than another");
constexpr int Q_BYTES = BLOCK_M * HEAD_DIM * 2;
constexpr int KV_BYTES = BLOCK_N * HEAD_DIM * 2;
constexpr int Q_SLOTS = 2;
constexpr float LN2 = 0.6931471805599453f, LOG2E = 1.4426950408889634f;
constexpr float LAZY = 8.0f;  // the running maximum may be so far behind, in powers of two
constexpr int NOWHERE = 1 << 20;

struct Tile {
    int job, piece, head, row, rows, blocks, map, unused;
};

struct Window {  // where the rows of a part begin in the 64 rows of a warpgroup
    int first;
    u32 per_rate;       // 2^16 / rate, rounded up
    const float* lse;  // of that row
};

struct alignas(1024) Shared {
    unsigned char q[Q_SLOTS][GROUPS][Q_BYTES];  // later the rows of the output
    unsigned char k[STAGES][KV_BYTES];
    unsigned char v[STAGES][KV_BYTES];
    unsigned char parts[GROUPS][(PARTS ? PARTS_ROWS : 8) * HEAD_DIM * 2];
    u64 q_full[Q_SLOTS][GROUPS], q_empty[Q_SLOTS], out_full[Q_SLOTS][GROUPS];
    u64 k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES];
    u64 parts_full[GROUPS], parts_empty[1];
    Tile tiles[TILES_AHEAD];
    u64 tile_full[TILES_AHEAD], tile_empty[TILES_AHEAD];
    Window windows[GROUPS][PARTS ? PARTS : 1];
};

DEVICE Tile find_tile(const Params& params, int number) {
    Place place = find_place(params, number);
    const Job& job = params.jobs[place.job];
    Tile tile;
    tile.job = place.job, tile.piece = place.piece, tile.head = place.head, tile.map = place.map;
    tile.row = (job.row_tiles - 1 - place.number) * BLOCK_M * GROUPS;  // the longest first
    tile.rows = job.rows - tile.map;
    int seen = CAUSAL ? min(tile.rows, tile.row + BLOCK_M * GROUPS) : tile.rows;
    tile.blocks = tile.row < tile.rows ? (seen + BLOCK_N - 1) / BLOCK_N : 0;
    return tile;
}

// Compact results of other grids for the rows of each warpgroup: a lane for each of both.
DEVICE void load_parts(const Params& params, Shared& shared, const Tile& tile, u32 turn) {
    const int lane = threadIdx.x % 32, g = lane / max(PARTS, 1), which = lane % max(PARTS, 1);
    barrier_wait(AT(parts_empty, 0), (turn & 1) ^ 1);
    if (g >= GROUPS) return;
    const Job& job = params.jobs[tile.job];
    const Part& part = params.parts[which];
    int sequence = tile.piece / job.count, row = tile.row + g * BLOCK_M;
    int x = job.start + (tile.piece - sequence * job.count) * job.length + row - part.start;
    int piece = x / part.length, inside = x - piece * part.length;
    int offset = (tile.head + part.shift) % part.rate;
    int skipped = inside <= offset ? 0 : (inside - offset + part.rate - 1) / part.rate;
    bool there = x >= 0 && piece < part.count && row < tile.rows;
    piece += sequence * part.count;
    Window& window = shared.windows[g][which];
    window.first = there ? skipped * part.rate + offset - inside : NOWHERE;
    window.per_rate = (65536 + part.rate - 1) / part.rate;
    window.lse = part.lse + (static_cast<i64>(piece) * part.heads + tile.head) * part.rows + skipped;
    u32 full = AT(parts_full, g);
    if (there) {
        barrier_expect(full, part.held * HEAD_DIM * 2);
        load_rows(&part.out[offset >= part.longer], AT(parts, g) + part.first * HEAD_DIM * 2, full,
             part.held, tile.head, 0, skipped, piece);
    } else {
        barrier_arrive(full);
    }
}

// Queries of the tiles, what the tiles are, and in the end word that there are no more.
DEVICE void produce_q(const Params& params, Shared& shared) {
    Tile tile;
    u32 turn = 0;
    do {
        u32 slot = turn % Q_SLOTS;
        int g = threadIdx.x;
        if (g == 0) take_tile(params, shared, turn);
        __syncwarp();
        tile = shared.tiles[turn % TILES_AHEAD];
        barrier_wait(AT(q_empty, slot), ((turn / Q_SLOTS) & 1) ^ 1);
        if (g < GROUPS) {
            u32 full = AT2(q_full, slot, g);
            if (tile.job < 0) {
                barrier_arrive(full);
            } else {
                const Job& job = params.jobs[tile.job];
                barrier_expect(full, Q_BYTES);
                load_rows(&job.q[tile.map], AT2(q, slot, g), full, BLOCK_M, tile.head,
                     (tile.head + job.shift) % job.rate, tile.row + g * BLOCK_M, tile.piece);
            }
        }
        if (PARTS && tile.job >= 0) load_parts(params, shared, tile, turn);
        turn++;
    } while (tile.job >= 0);
}

// Keys (or VALUES) of the tiles, from the last block to the first.
template <bool VALUES>
DEVICE void produce_kv(const Params& params, Shared& shared) {
    u32 n = 0;
    u32 turn = 0;
    for (Tile tile = next_tile(shared, turn); tile.job >= 0; tile = next_tile(shared, turn)) {
        const Job& job = params.jobs[tile.job];
        const TensorMap* map = VALUES ? &job.v[tile.map] : &job.k[tile.map];
        int offset = (tile.head + job.shift) % job.rate, head = tile.head / job.group;
        for (int block = tile.blocks - 1; block >= 0; block--) {
            u32 stage = n % STAGES, full = VALUES ? AT(v_full, stage) : AT(k_full, stage);
            barrier_wait(VALUES ? AT(v_empty, stage) : AT(k_empty, stage), ((n / STAGES) & 1) ^ 1);
            barrier_expect(full, KV_BYTES);
            load_rows(map, VALUES ? AT(v, stage) : AT(k, stage), full, BLOCK_N, head, offset, block * BLOCK_N, tile.piece);
            n++;
        }
    }
}

// Outputs of the tiles, from where their queries were.
DEVICE void store_outputs(const Params& params, Shared& shared) {
    u32 turn = 0;
    for (Tile tile = next_tile(shared, turn); tile.job >= 0; tile = next_tile(shared, turn)) {
        u32 number = turn - 1, slot = number % Q_SLOTS;
        for (int g = 0; g < GROUPS; g++) {
            barrier_wait(AT2(out_full, slot, g), (number / Q_SLOTS) & 1);
            int row = tile.row + g * BLOCK_M;
            if (row >= tile.rows) continue;
            for (int half = 0; half < HALVES; half++)
                store_tile(&params.jobs[tile.job].out[tile.map], AT2(q, slot, g) + half * BLOCK_M * 128,
                           half * 64, tile.head, 0, row, tile.piece);
            commit_stores();
        }
        wait_stores_read<0>();
        barrier_arrive(AT(q_empty, slot));
    }
    wait_stores<0>();
}

struct Consumer {
    const Params& params;
    Shared& shared;
    const int group, lane, row_in_group;
    u32 n = 0;     // blocks that were begun
    u32 held = 0;  // the block whose weights are not used yet
    float scores[BLOCK_N / 2];
    u32 weights[BLOCK_N / 4];
    float out[HEAD_DIM / 2];
    float top[2] = {0.0f, 0.0f}, total[2] = {0.0f, 0.0f}, scaling[2];

    DEVICE Consumer(const Params& params, Shared& shared, int group)
        : params(params), shared(shared), group(group), lane(threadIdx.x % 32),
          row_in_group(threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4) {}

    template <int KEYS>
    DEVICE void queue_scores(u32 slot) {
        u32 stage = n % STAGES;
        barrier_wait(AT(k_full, stage), (n / STAGES) & 1);
        u32 a = matrix(AT2(q, slot, group)), b = matrix(AT(k, stage));
        product_fence();
#pragma unroll
        for (int step = 0; step < HEAD_DIM / 16; step++) {
            u32 its_a = a + step % 4 * 2 + step / 4 * (BLOCK_M * 128 >> 4);
            u32 its_b = b + step % 4 * 2 + step / 4 * (BLOCK_N * 128 >> 4);
            if constexpr (KEYS == BLOCK_N) {
                product_128<0, 0>(scores, its_a, its_b, step > 0);
            } else {
                product_64<0, 0>(reinterpret_cast<float (&)[32]>(scores), its_a, its_b, step > 0);
            }
        }
        product_commit();
        n++;
    }

    template <int KEYS>
    DEVICE void queue_outputs() {
        u32 stage = held % STAGES;
        barrier_wait(AT(v_full, stage), (held / STAGES) & 1);
        u32 b = matrix(AT(v, stage), BLOCK_N * 128);
        hold(out);
        hold(weights);
        product_fence();
#pragma unroll
        for (int step = 0; step < KEYS / 16; step++)
            PRODUCT_D<1>(out, weights + step * 4, b + step * (16 * 128 >> 4), 1);
        product_commit();
    }

    DEVICE void scores_done() {
        hold(scores);
        release(AT(k_empty, (n - 1) % STAGES));
    }

    DEVICE void outputs_done() {
        product_wait<0>();
        hold(out);
        release(AT(v_empty, held % STAGES));
    }

    // With FIRST, `top` holds the largest log-sum-exp of the parts.
    template <bool FIRST, int KEYS>
    DEVICE void softmax() {
#pragma unroll
        for (int side = 0; side < 2; side++) {
            float most = fmaxf(scores[2 * side], scores[2 * side + 1]);
#pragma unroll
            for (int j = 1; j < KEYS / 8; j++)
                most = fmaxf(most, fmaxf(scores[4 * j + 2 * side], scores[4 * j + 2 * side + 1]));
            most = row_max(most) * params.scale;
            if constexpr (FIRST) {
                top[side] = fmaxf(top[side], most);
                total[side] = 0.0f;
            } else {
                float new_top = most > top[side] + LAZY ? most : top[side];
                scaling[side] = exp2_fast(top[side] - new_top);
                total[side] *= scaling[side];
                top[side] = new_top;
            }
            float sum = 0.0f;
#pragma unroll
            for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
                for (int i = 2 * side; i < 2 * side + 2; i++) {
                    scores[4 * j + i] = exp2_fast(scores[4 * j + i] * params.scale - top[side]);
                    sum += scores[4 * j + i];
                }
            total[side] += sum;
        }
    }

    template <int KEYS>
    DEVICE void pack_weights() {
#pragma unroll
        for (int i = 0; i < BLOCK_N / 4; i++) weights[i] = i < KEYS / 4 ? pack(scores[2 * i], scores[2 * i + 1]) : 0;
        held = n - 1;
    }

    DEVICE void rescale() {
        if (__any_sync(~0u, scaling[0] != 1.0f || scaling[1] != 1.0f)) {
#pragma unroll
            for (int j = 0; j < HEAD_DIM / 8; j++)
#pragma unroll
                for (int i = 0; i < 4; i++) out[4 * j + i] *= scaling[i / 2];
        }
    }

    template <int KEYS>
    DEVICE void hide(const Tile& tile, int first_key) {
        if (first_key + KEYS <= tile.rows && !(CAUSAL && first_key + KEYS > tile.row + group * BLOCK_M)) return;
        int row = tile.row + group * BLOCK_M + row_in_group, key = first_key + lane % 4 * 2;
#pragma unroll
        for (int side = 0; side < 2; side++) {
            int end = CAUSAL ? min(tile.rows, row + side * 8 + 1) : tile.rows;
#pragma unroll
            for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
                for (int i = 0; i < 2; i++)
                    if (key + j * 8 + i >= end) scores[4 * j + 2 * side + i] = -INFINITE;
        }
    }

    // The output goes to where the queries of its tile were, and from there to memory.
    DEVICE void store(const Tile& tile, u32 slot, const float (&its_top)[2], const float (&its_total)[2]) {
        const Job& job = params.jobs[tile.job];
        float factor[2];
#pragma unroll
        for (int side = 0; side < 2; side++) {
            int row = tile.row + group * BLOCK_M + row_in_group + side * 8;
            float sum = row_sum(its_total[side]);
            factor[side] = 1.0f / sum;
            if (row < tile.rows && lane % 4 == 0)
                job.lse[tile.piece * job.lse_piece + tile.head * job.lse_head + row * job.lse_row] =
                    (its_top[side] + log2_fast(sum)) * LN2;
        }
        int row = threadIdx.x % 128 / 32 * 16 + lane % 16;
        u32 to = AT2(q, slot, group) + row * 128;
        named_sync(1 + group, 128);
#pragma unroll
        for (int c = 0; c < HEAD_DIM / 16; c++) {
            u32 chunk = (c % 4 * 2 + lane / 16) ^ (row & 7);
            store_matrices(to + c / 4 * (BLOCK_M * 128) + chunk * 16, pack(out[8 * c] * factor[0], out[8 * c + 1] * factor[0]),
                           pack(out[8 * c + 2] * factor[1], out[8 * c + 3] * factor[1]),
                           pack(out[8 * c + 4] * factor[0], out[8 * c + 5] * factor[0]),
                           pack(out[8 * c + 6] * factor[1], out[8 * c + 7] * factor[1]));
        }
        fence_async();
        release(AT2(out_full, slot, group));
    }

    // ---- parts ----

    float part_lse[2][PARTS ? PARTS : 1];

    // The row of a part in its window, or a negative number.
    DEVICE int place(const Window& window, int number, int side) {
        int ahead = row_in_group + side * 8 - window.first;
        int row = (static_cast<u32>(max(ahead, 0)) * window.per_rate) >> 16;
        return ahead >= 0 && row * params.parts[number].rate == ahead ? row : -1;
    }

    DEVICE void begin_parts(const Tile& tile, u32 turn) {
        barrier_wait(AT(parts_full, group), turn & 1);
#pragma unroll
        for (int number = 0; number < PARTS; number++) {
            const Window window = shared.windows[group][number];
#pragma unroll
            for (int side = 0; side < 2; side++) {
                int row = place(window, number, side);
                bool there = row >= 0 && tile.row + group * BLOCK_M + row_in_group + side * 8 < tile.rows;
                part_lse[side][number] = there ? window.lse[row] * LOG2E : -INFINITE;
            }
        }
    }

    DEVICE void top_of_parts() {
#pragma unroll
        for (int side = 0; side < 2; side++) {
            top[side] = -INFINITE;
#pragma unroll
            for (int number = 0; number < PARTS; number++) top[side] = fmaxf(top[side], part_lse[side][number]);
        }
    }

    DEVICE void add_parts() {
#pragma unroll
        for (int number = 0; number < PARTS; number++) {
            const Window window = shared.windows[group][number];
            const Part& part = params.parts[number];
            u32 base = AT(parts, group) + part.first * HEAD_DIM * 2;
#pragma unroll
            for (int side = 0; side < 2; side++) {
                int row = place(window, number, side);
                if (row < 0) continue;
                float weight = exp2_fast(part_lse[side][number] - top[side]);
                if (lane % 4 == 0) total[side] += weight;
#pragma unroll
                for (int j = 0; j < HEAD_DIM / 8; j++) {
                    u32 address = base + j / 8 * (part.held * 128) + row * 128 + j % 8 * 16;
                    address ^= address >> 3 & 0x70;
                    float low, high;
                    unpack(load_shared(address + lane % 4 * 4), low, high);
                    out[4 * j + 2 * side] += weight * low;
                    out[4 * j + 2 * side + 1] += weight * high;
                }
            }
        }
    }

    // Blocks of keys that rows of this warpgroup see.
    DEVICE int blocks_of(const Tile& tile) {
        if (!CAUSAL) return tile.blocks;
        return (min(tile.rows, tile.row + (group + 1) * BLOCK_M) + BLOCK_N - 1) / BLOCK_N;
    }

    // The first KEYS of the last block are where a tile begins, which ends the tile before where that is PENDING.
    template <bool PENDING, int KEYS>
    DEVICE void begin(const Tile& tile, int blocks, u32 slot, u32 turn, const Tile& before, u32 before_slot) {
        if (PARTS) begin_parts(tile, turn);
        u32 unseen = n;  // a block that only rows of other warpgroups see
        if (blocks < tile.blocks) {
            pass(AT(k_full, n % STAGES), AT(k_empty, n % STAGES), n);
            n++;
        }
        queue_scores<KEYS>(slot);
        float old_top[2] = {top[0], top[1]}, old_total[2] = {total[0], total[1]};
        if constexpr (PENDING) {
            queue_outputs<BLOCK_N>();
            product_wait<1>();
        } else {
            product_wait<0>();
        }
        scores_done();
        hide<KEYS>(tile, (blocks - 1) * BLOCK_N);
        top_of_parts();
        softmax<true, KEYS>();
        if constexpr (PENDING) {
            outputs_done();
            store(before, before_slot, old_top, old_total);
        }
        pack_weights<KEYS>();
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 2; i++) out[i] = 0.0f;
        if (PARTS) {
            add_parts();
            fence_async();  // these reads come before the next copies
            release(AT(parts_empty, 0));
        }
        if (blocks < tile.blocks) pass(AT(v_full, unseen % STAGES), AT(v_empty, unseen % STAGES), unseen);
    }

    // The next block of a tile, while the outputs of the block before, of which KEYS count, are computed.
    template <int KEYS>
    DEVICE void block(u32 slot) {
        queue_scores<BLOCK_N>(slot);
        queue_outputs<KEYS>();
        product_wait<1>();
        scores_done();
        softmax<false, BLOCK_N>();
        outputs_done();
        pack_weights<BLOCK_N>();
        rescale();
    }

    // Hand a block back that is not needed here.
    DEVICE void pass(u32 full, u32 empty, u32 number) {
        barrier_wait(full, (number / STAGES) & 1);
        release(empty);
    }

    // A tile that has no rows for this warpgroup.
    DEVICE void skip(const Tile& tile, u32 slot, u32 turn) {
        for (int i = 0; i < tile.blocks; i++, n++) {
            pass(AT(k_full, n % STAGES), AT(k_empty, n % STAGES), n);
            pass(AT(v_full, n % STAGES), AT(v_empty, n % STAGES), n);
        }
        if (PARTS) {
            barrier_wait(AT(parts_full, group), turn & 1);
            release(AT(parts_empty, 0));
        }
        release(AT2(out_full, slot, group));
    }

    DEVICE void run() {
        Tile before;
        bool pending = false;
        u32 before_slot = 0;
        for (u32 turn = 0;; turn++) {
            u32 slot = turn % Q_SLOTS;
            barrier_wait(AT2(q_full, slot, group), (turn / Q_SLOTS) & 1);
            Tile tile = shared.tiles[turn % TILES_AHEAD];
            tile.job = uniform(tile.job), tile.row = uniform(tile.row), tile.blocks = uniform(tile.blocks);
            tile.rows = uniform(tile.rows);
            if (tile.job < 0) break;
            if (tile.row + group * BLOCK_M >= tile.rows) {
                if (pending) {
                    queue_outputs<BLOCK_N>();
                    outputs_done();
                    store(before, before_slot, top, total);
                    pending = false;
                }
                skip(tile, slot, turn);
                continue;
            }
            const int blocks = blocks_of(tile), first = (blocks - 1) * BLOCK_N;
            int end = CAUSAL ? min(tile.rows, tile.row + (group + 1) * BLOCK_M) : tile.rows, done = 1;
            if (NARROW && end - first <= BLOCK_N / 2) {
                if (pending) {
                    begin<true, BLOCK_N / 2>(tile, blocks, slot, turn, before, before_slot);
                } else {
                    begin<false, BLOCK_N / 2>(tile, blocks, slot, turn, before, before_slot);
                }
                if (blocks > 1) {
                    block<BLOCK_N / 2>(slot);
                    done = 2;
                }
            } else if (pending) {
                begin<true, BLOCK_N>(tile, blocks, slot, turn, before, before_slot);
            } else {
                begin<false, BLOCK_N>(tile, blocks, slot, turn, before, before_slot);
            }
            for (; done < blocks; done++) block<BLOCK_N>(slot);
            before = tile;
            before_slot = slot;
            pending = true;
        }
        if (pending) {
            queue_outputs<BLOCK_N>();
            outputs_done();
            store(before, before_slot, top, total);
        }
    }
};

extern "C" __global__ void __launch_bounds__((GROUPS + 1) * 128, 1) forward(const __grid_constant__ Params params) {
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    if (threadIdx.x == 0) {
        for (int slot = 0; slot < Q_SLOTS; slot++) {
            for (int g = 0; g < GROUPS; g++) barrier_init(AT2(q_full, slot, g), 1);
            for (int g = 0; g < GROUPS; g++) barrier_init(AT2(out_full, slot, g), 4);
            barrier_init(AT(q_empty, slot), 1);
        }
        init_tile_barriers(shared);
        for (int stage = 0; stage < STAGES; stage++) {
            barrier_init(AT(k_full, stage), 1);
            barrier_init(AT(v_full, stage), 1);
            barrier_init(AT(k_empty, stage), GROUPS * 4);
            barrier_init(AT(v_empty, stage), GROUPS * 4);
        }
        for (int g = 0; g < GROUPS; g++) barrier_init(AT(parts_full, g), max(PARTS, 1));
        barrier_init(AT(parts_empty, 0), GROUPS * 4);
        fence_async();
    }
    __syncthreads();
    int group = uniform(static_cast<int>(threadIdx.x / 128)) - 1;
    if (group < 0) {
        fewer_registers<GROUPS == 3 ? 32 : 40>();
        if (threadIdx.x < 32) produce_q(params, shared);
        if (threadIdx.x == 32) produce_kv<false>(params, shared);
        if (threadIdx.x == 64) produce_kv<true>(params, shared);
        if (threadIdx.x == 96) store_outputs(params, shared);
    } else {
        more_registers<GROUPS == 3 ? 160 : 232>();
        Consumer(params, shared, group).run();
    }
}
