// Passes over all rows (token, head) of two tensors, and over those rows of strided grids that belong to them.
//
// A row is read by as many lanes as it has pieces of 16 bytes. These lanes share the work of finding out on which grids
// the row lies, a lane for each grid. Programs are persistent, so that each lane reads what its grid is but once.

struct Divisor {  // quotients by `number` as products: x * factor >> shift, for x below 2^31
    u32 number, factor, shift;
};

DEVICE u32 operator/(u32 x, const Divisor& by) { return static_cast<u64>(x) * by.factor >> by.shift; }
DEVICE u32 operator%(u32 x, const Divisor& by) { return x - x / by * by.number; }

struct Job {
    void* parts[2];        // (pieces of all sequences, heads, stride), of the rows of the grid
    Divisor length, rate;  // tokens of a piece, and from row to row
    u32 start, count;      // first token, pieces of a sequence
    u32 shift, stride;     // head h has its rows at (h + shift) % rate
};

struct Params {
    Job jobs[JOBS];
    void* x[2];        // (batch, seq, heads, HEAD_DIM) of half precision
    const float* lse;  // (batch, seq, heads)
    Divisor seq, heads;
    u32 rows, unused;  // batch * seq * heads, which memory keeps below 2^31
};

struct alignas(16) Pairs {  // eight numbers of half precision
    u32 both[4];
};

constexpr int LANES = HEAD_DIM / 8;    // to a row
constexpr int ROWS = THREADS / LANES;  // to a program at once
constexpr int AHEAD = 4;               // rows that a lane waits for together
constexpr float LOG2E = 1.4426950408889634f;

// The job whose rows a lane finds; lanes without one do what the last one does.
DEVICE const Job& job_of(const Params& params, int lane) { return params.jobs[min(lane, JOBS - 1)]; }

// Where a row lies in the parts of a job, or -1 if it is not on the grid.
DEVICE i64 place_of(const Params& params, const Job& job, u32 row) {
    u32 token = row / params.heads, head = row - token * params.heads.number;
    u32 sequence = token / params.seq;
    token -= sequence * params.seq.number;
    u32 x = token - job.start, piece = x / job.length;  // before the start, far behind the last piece
    u32 inside = x - piece * job.length.number;
    u32 line = inside / job.rate, offset = inside - line * job.rate.number;
    bool on = row < params.rows && piece < job.count && offset == (head + job.shift) % job.rate;
    u32 its_head = (sequence * job.count + piece) * params.heads.number + head;
    return on ? static_cast<i64>(its_head) * job.stride + line : -1;
}

DEVICE Pairs load(const void* x, i64 row, int lane, bool there) {
    Pairs pairs = {};
    if (there) pairs = static_cast<const Pairs*>(x)[row * LANES + lane];
    return pairs;
}

// Give each job its rows' log-sum-exp, in powers of two, and delta: the sum over a row of output times gradient.
extern "C" __global__ void __launch_bounds__(THREADS, PROGRAMS) find_statistics(const __grid_constant__ Params params) {
    const int lane = threadIdx.x % LANES;
    const Job job = job_of(params, lane);
    for (u32 first = blockIdx.x * (ROWS * AHEAD); first < params.rows; first += gridDim.x * (ROWS * AHEAD)) {
        const u32 row = first + threadIdx.x / LANES;
        Pairs out[AHEAD], dout[AHEAD];
        float lse[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            bool there = row + i * ROWS < params.rows;
            out[i] = load(params.x[0], row + i * ROWS, lane, there);
            dout[i] = load(params.x[1], row + i * ROWS, lane, there);
            lse[i] = there ? params.lse[row + i * ROWS] : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            float delta = 0.0f;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float a, b, c, d;
                unpack(out[i].both[j], a, b);
                unpack(dout[i].both[j], c, d);
                delta += a * c + b * d;
            }
#pragma unroll
            for (int other = 1; other < LANES; other *= 2) delta += __shfl_xor_sync(~0u, delta, other);
            i64 place = place_of(params, job, row + i * ROWS);
            if (place < 0) continue;
            place += place & -BLOCK_Q;  // a block of the one, then a block of the other
            static_cast<float*>(job.parts[0])[place] = lse[i] * LOG2E;
            static_cast<float*>(job.parts[1])[place] = delta;
        }
    }
}

// Add the rows of all jobs onto both tensors, in place; rows on no grid are neither read nor written.
extern "C" __global__ void __launch_bounds__(THREADS, PROGRAMS) add_rows(const __grid_constant__ Params params) {
    const int lane = threadIdx.x % LANES, row_lane = threadIdx.x % 32 - lane;
    const Job job = job_of(params, lane);
    for (u32 first = blockIdx.x * ROWS; first < params.rows; first += gridDim.x * ROWS) {
        const u32 row = first + threadIdx.x / LANES;
        int place = place_of(params, job, row), places[JOBS], last = -1;
#pragma unroll
        for (int j = 0; j < JOBS; j++) last = max(last, places[j] = __shfl_sync(~0u, place, row_lane + j));
        if (last < 0) continue;
        Pairs own[2], parts[2][JOBS];  // all on their way at once
#pragma unroll
        for (int which = 0; which < 2; which++) {
            own[which] = load(params.x[which], row, lane, true);
#pragma unroll
            for (int j = 0; j < JOBS; j++)
                parts[which][j] = load(params.jobs[j].parts[which], places[j], lane, places[j] >= 0);
        }
#pragma unroll
        for (int which = 0; which < 2; which++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float low, high;
                unpack(own[which].both[i], low, high);
#pragma unroll
                for (int j = 0; j < JOBS; j++) {
                    float more_low, more_high;
                    unpack(parts[which][j].both[i], more_low, more_high);
                    low += more_low, high += more_high;
                }
                own[which].both[i] = pack(low, high);
            }
            static_cast<Pairs*>(params.x[which])[static_cast<i64>(row) * LANES + lane] = own[which];
        }
    }
}
