// Which tiles there are, and which of them a program computes. Kernels define Params, whose jobs these are, Tile and Shared.

struct Place {
    int job, number, piece, head, map;  // the number of the tile among those of its head, and which map is its head's
};

// Tiles of the jobs one after the other. The heads of a job come in chunks that fit the cache, and within a chunk the
// first tiles of all heads, then the second ones.
template <typename Params>
DEVICE Place find_place(const Params& params, int number) {
    Place place;
    place.job = 0;
    while (place.job + 1 < params.count && number >= params.jobs[place.job + 1].first_tile) place.job++;
    const auto& job = params.jobs[place.job];
    number -= job.first_tile;
    int part = number / (job.chunk * job.row_tiles);
    int inside = number - part * job.chunk * job.row_tiles;
    int size = min(job.chunk, job.pieces * job.heads - part * job.chunk);
    int head = part * job.chunk + inside % size;
    place.number = inside / size;
    place.piece = head / job.heads;
    place.head = head - place.piece * job.heads;
    place.map = (place.head + job.shift) % job.rate >= job.longer;
    return place;
}

constexpr int TILES_AHEAD = 4;
constexpr int TILE_READERS = 3;

// Take the next tile that has work and tell the other warps; in the end, take one whose job is -1.
template <typename Params, typename Shared>
DEVICE void take_tile(const Params& params, Shared& shared, u32 turn) {
    decltype(find_tile(params, 0)) tile;
    do {
        u32 number = atomicAdd(params.taken, 1u);
        tile.job = -1;
        if (number < params.tiles) tile = find_tile(params, number);
    } while (tile.job >= 0 && tile.blocks == 0);
    u32 slot = turn % TILES_AHEAD;
    barrier_wait(AT(tile_empty, slot), ((turn / TILES_AHEAD) & 1) ^ 1);
    shared.tiles[slot] = tile;
    barrier_arrive(AT(tile_full, slot));
}

// The tile that was taken at this turn, for a thread that reads each of them once.
template <typename Shared>
DEVICE auto next_tile(Shared& shared, u32& turn) {
    u32 slot = turn % TILES_AHEAD;
    barrier_wait(AT(tile_full, slot), (turn / TILES_AHEAD) & 1);
    auto tile = shared.tiles[slot];
    barrier_arrive(AT(tile_empty, slot));
    turn++;
    return tile;
}

template <typename Shared>
DEVICE void init_tile_barriers(Shared&) {
    for (int slot = 0; slot < TILES_AHEAD; slot++) {
        barrier_init(AT(tile_full, slot), 1);
        barrier_init(AT(tile_empty, slot), TILE_READERS);
    }
}

// Rows of one head, all of their columns.
DEVICE void load_rows(const TensorMap* map, u32 to, u32 barrier, int rows, int head, int offset, int row, int piece) {
    for (int half = 0; half < HEAD_DIM / 64; half++)
        copy_tile(map, to + half * rows * 128, barrier, half * 64, head, offset, row, piece);
}
