// Gradients of the attention of many strided grids in one launch, with the statistics of the merged softmax.
//
// Programs are persistent. Each takes a tile of 128 keys of a grid, 64 for each of two warpgroups, and walks the blocks of
// queries that see them. Scores and their gradients are computed transposed, keys by queries, so that the products with
// queries and with output gradients take them from registers. Gradients of the queries are added onto a float32 tensor
// by the copy engine; those of keys and values are stored as compact rows.

struct Job {
    TensorMap q[2], dout[2], k[2], v[2], dq[2], dk[2], dv[2];  // for heads with `rows` rows, and with one fewer
    const float* statistics;  // (pieces, heads, blocks, 2, BLOCK_Q): log-sum-exp in powers of two, and delta
    int first_tile, row_tiles;
    int pieces, heads, rows;  // pieces of all sequences
    int rate, shift, longer;  // head h has its rows at (h + shift) % rate, and `rows` of them if that is below `longer`
    int group;                // query heads to a key/value head
    int chunk;                // heads worked on together
    int blocks;               // of queries, as the statistics count them
    int unused[3];
};

struct Params {
    Job jobs[MAX_JOBS];
    u32* taken;  // how many tiles programs have taken so far
    int count;
    u32 tiles;
    float scale;
    float scale_log2;  // times log2(e)
};

constexpr int GROUPS = 2;
constexpr int BLOCK_K = 128;                         // keys of a tile
constexpr int BLOCK_Q = HEAD_DIM == 64 ? 128 : 64;  // queries of a block
constexpr int HALVES = HEAD_DIM / 64;
constexpr int Q_HALVES = BLOCK_Q / 64;
constexpr int KV_BYTES = BLOCK_K * HEAD_DIM * 2;
constexpr int Q_BYTES = BLOCK_Q * HEAD_DIM * 2;
constexpr int DS_BYTES = BLOCK_K * BLOCK_Q * 2;
constexpr int STATISTICS_BYTES = 2 * BLOCK_Q * 4;
constexpr int KV_SLOTS = HEAD_DIM == 64 ? 2 : 1;
constexpr int RESULTS = HEAD_DIM == 64 ? 1 : 2;  // as shared memory allows
constexpr int STAGES = 2;

struct Tile {
    int job, piece, head, row, map, first, blocks, all;  // blocks of queries: the first, how many, and of all
};

struct alignas(1024) Shared {
    unsigned char k[KV_SLOTS][KV_BYTES];
    unsigned char v[KV_SLOTS][KV_BYTES];
    unsigned char q[STAGES][Q_BYTES];
    unsigned char dout[STAGES][Q_BYTES];
    unsigned char ds[2][DS_BYTES];
    unsigned char results[GROUPS][RESULTS][64 * 64 * 4];  // on their way to memory
    float statistics[STAGES][2][BLOCK_Q];
    u64 kv_full[KV_SLOTS], kv_empty[KV_SLOTS];
    u64 q_full[STAGES], q_empty[STAGES], dout_full[STAGES], dout_empty[STAGES];
    u64 results_full[GROUPS][RESULTS], results_empty[GROUPS][RESULTS];
    Tile tiles[TILES_AHEAD];
    u64 tile_full[TILES_AHEAD], tile_empty[TILES_AHEAD];
};

DEVICE Tile find_tile(const Params& params, int number) {
    Place place = find_place(params, number);
    const Job& job = params.jobs[place.job];
    Tile tile;
    tile.job = place.job, tile.piece = place.piece, tile.head = place.head, tile.map = place.map;
    tile.row = place.number * BLOCK_K;  // the longest first
    int rows = job.rows - tile.map;
    tile.all = (rows + BLOCK_Q - 1) / BLOCK_Q;
    tile.first = CAUSAL ? tile.row / BLOCK_Q : min(tile.row / BLOCK_Q, tile.all - 1);
    tile.blocks = CAUSAL ? tile.all - tile.first : tile.all;
    if (tile.row >= rows) tile.blocks = 0;
    return tile;
}

// The programs of one head begin at different queries, so that they do not add onto the same rows at once.
DEVICE int block_of(const Tile& tile, int i) {
    int block = tile.first + i;
    return block < tile.all ? block : block - tile.all;
}

// Keys and values of the tiles, what the tiles are, and in the end word that there are no more.
DEVICE void produce_kv(const Params& params, Shared& shared) {
    Tile tile;
    u32 turn = 0;
    do {
        u32 slot = turn % KV_SLOTS, full = AT(kv_full, slot);
        take_tile(params, shared, turn);
        tile = shared.tiles[turn % TILES_AHEAD];
        barrier_wait(AT(kv_empty, slot), ((turn / KV_SLOTS) & 1) ^ 1);
        if (tile.job < 0) {
            barrier_arrive(full);
        } else {
            const Job& job = params.jobs[tile.job];
            int offset = (tile.head + job.shift) % job.rate, head = tile.head / job.group;
            barrier_expect(full, 2 * KV_BYTES);
            load_rows(&job.k[tile.map], AT(k, slot), full, BLOCK_K, head, offset, tile.row, tile.piece);
            load_rows(&job.v[tile.map], AT(v, slot), full, BLOCK_K, head, offset, tile.row, tile.piece);
        }
        turn++;
    } while (tile.job >= 0);
}

// Queries, gradients of the output, and statistics.
DEVICE void produce_q(const Params& params, Shared& shared) {
    u32 n = 0, turn = 0;
    for (Tile tile = next_tile(shared, turn); tile.job >= 0; tile = next_tile(shared, turn)) {
        const Job& job = params.jobs[tile.job];
        int offset = (tile.head + job.shift) % job.rate;
        const float* statistics =
            job.statistics + (static_cast<i64>(tile.piece) * job.heads + tile.head) * job.blocks * (2 * BLOCK_Q);
        for (int i = 0; i < tile.blocks; i++) {
            int block = block_of(tile, i);
            u32 stage = n % STAGES, parity = ((n / STAGES) & 1) ^ 1, full = AT(q_full, stage);
            barrier_wait(AT(q_empty, stage), parity);
            barrier_expect(full, Q_BYTES + STATISTICS_BYTES);
            load_rows(&job.q[tile.map], AT(q, stage), full, BLOCK_Q, tile.head, offset, block * BLOCK_Q,
                 tile.piece);
            copy_row(AT(statistics, stage), statistics + block * (2 * BLOCK_Q), STATISTICS_BYTES, full);
            full = AT(dout_full, stage);
            barrier_wait(AT(dout_empty, stage), parity);
            barrier_expect(full, Q_BYTES);
            load_rows(&job.dout[tile.map], AT(dout, stage), full, BLOCK_Q, tile.head, offset,
                 block * BLOCK_Q, tile.piece);
            n++;
        }
    }
}

// What one warpgroup leaves in `results`: gradients of the queries block by block, then of values and of keys.
DEVICE void store_results(const Params& params, Shared& shared, int group) {
    u32 n = 0, turn = 0, from = 0;
    auto taken = [&] {
        commit_stores();
        wait_stores_read<0>();
        barrier_arrive(AT2(results_empty, group, n++ % RESULTS));
    };
    auto wait = [&] {
        from = AT2(results, group, n % RESULTS);
        barrier_wait(AT2(results_full, group, n % RESULTS), (n / RESULTS) & 1);
    };
    for (Tile tile = next_tile(shared, turn); tile.job >= 0; tile = next_tile(shared, turn)) {
        const Job& job = params.jobs[tile.job];
        int offset = (tile.head + job.shift) % job.rate;
        for (int i = 0; i < tile.blocks; i++) {
            int row = block_of(tile, i) * BLOCK_Q + (Q_HALVES == 2 ? group * 64 : 0), column = HALVES == 2 ? group * 64 : 0;
            wait();
            add_tile(&job.dq[tile.map], from, column, tile.head, offset, row, tile.piece);
            add_tile(&job.dq[tile.map], from + 64 * 128, column + 32, tile.head, offset, row, tile.piece);
            taken();
        }
        for (int which = 0; which < 2; which++) {
            wait();
            for (int half = 0; half < HALVES; half++)
                store_tile(which ? &job.dk[tile.map] : &job.dv[tile.map], from + half * 64 * 128, half * 64, tile.head, 0,
                           tile.row + group * 64, tile.piece);
            taken();
        }
    }
    wait_stores<0>();
}

struct Consumer {
    const Params& params;
    Shared& shared;
    const int group, lane, row_in_group;
    u32 n = 0, stored = 0;
    float scores[BLOCK_Q / 2], slopes[BLOCK_Q / 2];     // (64 keys, BLOCK_Q): probabilities, and their gradients
    u32 weights[BLOCK_Q / 4], weight_slopes[BLOCK_Q / 4];  // of half precision
    float dk[HEAD_DIM / 2], dv[HEAD_DIM / 2];

    DEVICE Consumer(const Params& params, Shared& shared, int group)
        : params(params), shared(shared), group(group), lane(threadIdx.x % 32),
          row_in_group(threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4) {}

    // (64 keys, BLOCK_Q) = rows of keys or values times rows of queries or output gradients.
    DEVICE void queue_scores(float (&sums)[BLOCK_Q / 2], u32 keys, u32 queries) {
        u32 a = matrix(keys + group * 64 * 128), b = matrix(queries);
        product_fence();
#pragma unroll
        for (int step = 0; step < HEAD_DIM / 16; step++) {
            u32 inside = step % 4 * 2;
            PRODUCT_Q<0, 0>(sums, a + inside + step / 4 * (BLOCK_K * 128 >> 4),
                            b + inside + step / 4 * (BLOCK_Q * 128 >> 4), step > 0);
        }
        product_commit();
    }

    // (64 keys, HEAD_DIM) += weights times rows of queries or output gradients.
    DEVICE void queue_gradient(float (&sums)[HEAD_DIM / 2], const u32 (&a)[BLOCK_Q / 4], u32 queries,
                               bool more) {
        u32 b = matrix(queries, BLOCK_Q * 128);
#pragma unroll
        for (int step = 0; step < BLOCK_Q / 16; step++)
            PRODUCT_D<1>(sums, a + step * 4, b + step * (16 * 128 >> 4), more || step > 0);
        product_commit();
    }

    // (64 queries, 64 columns) = transposed gradients of the scores times keys.
    DEVICE void queue_dq(float (&dq)[32], u32 ds, u32 keys) {
        u32 a = matrix(ds + (Q_HALVES == 2 ? group * BLOCK_K * 128 : 0));
        u32 b = matrix(keys + (HALVES == 2 ? group * BLOCK_K * 128 : 0));
#pragma unroll
        for (int step = 0; step < BLOCK_K / 16; step++)
            product_64<1, 1>(dq, a + step * (16 * 128 >> 4), b + step * (16 * 128 >> 4), step > 0);
        product_commit();
    }

    DEVICE void find_weights(u32 lse, int first_query, int first_key, int rows) {
        u32 pairs = lse + lane % 4 * 8;
        // Rows that are not there score 0, which may weigh without bound against a small log-sum-exp.
        bool hidden = CAUSAL ? first_query < first_key + 63 : first_key + 64 > rows;
#pragma unroll
        for (int j = 0; j < BLOCK_Q / 8; j++) {
            float2 its = load_shared_pair(pairs + j * 32);
#pragma unroll
            for (int i = 0; i < 4; i++)
                scores[4 * j + i] = exp2_fast(scores[4 * j + i] * params.scale_log2 - (i % 2 ? its.y : its.x));
        }
        if (hidden) {
            int key = first_key + row_in_group, query = first_query + lane % 4 * 2;
#pragma unroll
            for (int j = 0; j < BLOCK_Q / 8; j++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    if ((CAUSAL ? query + j * 8 + i % 2 : rows - 1) < key + i / 2 * 8) scores[4 * j + i] = 0.0f;
        }
    }

    DEVICE void find_slopes(u32 delta) {
        u32 pairs = delta + lane % 4 * 8;
#pragma unroll
        for (int j = 0; j < BLOCK_Q / 8; j++) {
            float2 its = load_shared_pair(pairs + j * 32);
#pragma unroll
            for (int i = 0; i < 4; i++) slopes[4 * j + i] = scores[4 * j + i] * (slopes[4 * j + i] - (i % 2 ? its.y : its.x));
#pragma unroll
            for (int side = 0; side < 2; side++) {
                weights[2 * j + side] = pack(scores[4 * j + 2 * side], scores[4 * j + 2 * side + 1]);
                weight_slopes[2 * j + side] = pack(slopes[4 * j + 2 * side], slopes[4 * j + 2 * side + 1]);
            }
        }
        hold(weights);
        hold(weight_slopes);
    }

    DEVICE void share_slopes(u32 ds) {
        int row = group * 64 + threadIdx.x % 128 / 32 * 16 + lane % 16;
        u32 to = ds + row * 128;
#pragma unroll
        for (int c = 0; c < BLOCK_Q / 16; c++) {
            u32 chunk = (c % 4 * 2 + lane / 16) ^ (row & 7);
            store_matrices(to + c / 4 * (BLOCK_K * 128) + chunk * 16, weight_slopes[4 * c], weight_slopes[4 * c + 1],
                           weight_slopes[4 * c + 2], weight_slopes[4 * c + 3]);
        }
        fence_async();
    }

    // Where the next results go, once that is free.
    DEVICE u32 wait_results() {
        u32 slot = stored % RESULTS;
        barrier_wait(AT2(results_empty, group, slot), ((stored / RESULTS) & 1) ^ 1);
        return AT2(results, group, slot);
    }

    DEVICE void results_ready() {
        fence_async();
        release(AT2(results_full, group, stored++ % RESULTS));
    }

    DEVICE void store_dq(const float (&dq)[32]) {
        u32 base = wait_results();
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int side = 0; side < 2; side++) {
                int row = row_in_group + side * 8, column = j % 4 * 32 + lane % 4 * 8;
                store_shared_pair(base + j / 4 * (64 * 128) + row * 128 + (column ^ ((row & 7) << 4)),
                                  dq[4 * j + 2 * side] * params.scale, dq[4 * j + 2 * side + 1] * params.scale);
            }
        results_ready();
    }

    DEVICE void store_rows(const float (&rows)[HEAD_DIM / 2], float factor) {
        int row = threadIdx.x % 128 / 32 * 16 + lane % 16;
        u32 to = wait_results() + row * 128;
#pragma unroll
        for (int c = 0; c < HEAD_DIM / 16; c++) {
            u32 chunk = (c % 4 * 2 + lane / 16) ^ (row & 7);
            store_matrices(to + c / 4 * (64 * 128) + chunk * 16, pack(rows[8 * c] * factor, rows[8 * c + 1] * factor),
                           pack(rows[8 * c + 2] * factor, rows[8 * c + 3] * factor),
                           pack(rows[8 * c + 4] * factor, rows[8 * c + 5] * factor),
                           pack(rows[8 * c + 6] * factor, rows[8 * c + 7] * factor));
        }
        results_ready();
    }

    // The next tile of this program, once it is there; its job is negative if there is none.
    DEVICE Tile fetch(u32 turn) {
        u32 slot = turn % KV_SLOTS;
        barrier_wait(AT(kv_full, slot), (turn / KV_SLOTS) & 1);
        Tile tile = shared.tiles[turn % TILES_AHEAD];
        tile.job = uniform(tile.job), tile.row = uniform(tile.row), tile.first = uniform(tile.first);
        tile.blocks = uniform(tile.blocks), tile.all = uniform(tile.all);
        return tile;
    }

    // Queue the scores of block number n, and their gradients.
    DEVICE void queue_scores_of(u32 number, u32 slot) {
        barrier_wait(AT(q_full, number % STAGES), (number / STAGES) & 1);
        queue_scores(scores, AT(k, slot), AT(q, number % STAGES));
    }

    DEVICE void queue_slopes_of(u32 number, u32 slot) {
        barrier_wait(AT(dout_full, number % STAGES), (number / STAGES) & 1);
        queue_scores(slopes, AT(v, slot), AT(dout, number % STAGES));
    }

    // Make probabilities of the scores of block i of a tile, number n, while the last product queued runs.
    DEVICE void scores_to_weights(const Tile& tile, int i) {
        product_wait<1>();
        hold(scores);
        find_weights(AT2(statistics, n % STAGES, 0), block_of(tile, i) * BLOCK_Q, tile.row + group * 64,
                     params.jobs[tile.job].rows - tile.map);
        product_wait<0>();
        hold(slopes);
    }

    // Block i of a tile, whose probabilities and gradients are there; with MORE, those of the next are left there.
    template <bool MORE>
    DEVICE void block(const Tile& tile, int i, u32 slot) {
        u32 stage = n % STAGES;
        find_slopes(AT2(statistics, stage, 1));
        hold(dk);
        hold(dv);
        product_fence();
        queue_gradient(dv, weights, AT(dout, stage), i > 0);
        share_slopes(AT(ds, n % 2));
        queue_gradient(dk, weight_slopes, AT(q, stage), i > 0);
        named_sync(1, GROUPS * 128);
        float dq[32];
        queue_dq(dq, AT(ds, n % 2), AT(k, slot));
        product_wait<1>();
        hold(dk);
        hold(dv);
        release(AT(dout_empty, stage));
        release(AT(q_empty, stage));
        product_wait<0>();
        hold(dq);
        store_dq(dq);
        n++;
        if constexpr (MORE) {
            queue_scores_of(n, slot);
            queue_slopes_of(n, slot);
            scores_to_weights(tile, i + 1);
        }
    }

    DEVICE void run() {
        u32 turn = 0;
        Tile tile = fetch(turn);
        if (tile.job < 0) return;
        queue_scores_of(n, 0);
        queue_slopes_of(n, 0);
        scores_to_weights(tile, 0);
        for (;;) {
            u32 slot = turn % KV_SLOTS;
            for (int i = 0; i + 1 < tile.blocks; i++) block<true>(tile, i, slot);
            block<false>(tile, tile.blocks - 1, slot);
            release(AT(kv_empty, slot));
            turn++;
            if constexpr (KV_SLOTS == 1) store_gradients();  // while keys and values come
            tile = fetch(turn);
            if (tile.job < 0) break;
            slot = turn % KV_SLOTS;
            queue_scores_of(n, slot);
            queue_slopes_of(n, slot);
            if constexpr (KV_SLOTS > 1) store_gradients();  // while the products run
            scores_to_weights(tile, 0);
        }
        if constexpr (KV_SLOTS > 1) store_gradients();
    }

    DEVICE void store_gradients() {
        store_rows(dv, 1.0f);
        store_rows(dk, params.scale);
    }
};

extern "C" __global__ void __launch_bounds__((GROUPS + 1) * 128, 1) backward(const __grid_constant__ Params params) {
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    if (threadIdx.x == 0) {
        for (int slot = 0; slot < KV_SLOTS; slot++) {
            barrier_init(AT(kv_full, slot), 1);
            barrier_init(AT(kv_empty, slot), GROUPS * 4);
        }
        init_tile_barriers(shared);
        for (int stage = 0; stage < STAGES; stage++) {
            barrier_init(AT(q_full, stage), 1);
            barrier_init(AT(dout_full, stage), 1);
            barrier_init(AT(q_empty, stage), GROUPS * 4);
            barrier_init(AT(dout_empty, stage), GROUPS * 4);
        }
        for (int g = 0; g < GROUPS; g++)
            for (int slot = 0; slot < RESULTS; slot++) {
                barrier_init(AT2(results_full, g, slot), 4);
                barrier_init(AT2(results_empty, g, slot), 1);
            }
        fence_async();
    }
    __syncthreads();
    int group = uniform(static_cast<int>(threadIdx.x / 128)) - 1;
    if (group < 0) {
        fewer_registers<40>();
        if (threadIdx.x == 0) produce_kv(params, shared);
        if (threadIdx.x == 32) produce_q(params, shared);
        if (threadIdx.x == 64) store_results(params, shared, 0);
        if (threadIdx.x == 96) store_results(params, shared, 1);
    } else {
        more_registers<232>();
        Consumer(params, shared, group).run();
    }
}
