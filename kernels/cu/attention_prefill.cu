// Attention of prompts, whole or in chunks, over the paged KV cache (Dao, "FlashAttention-2", 2023).
//
// out bf16 [T, H·D] of the queries in qkv bf16 [T, (H + 2K)·D] (rotated), over k_cache and v_cache [blocks][K][16][D],
// which hold the keys and values of these tokens already. Token i of a sequence sees positions up to context_len + i.
//
// A block of 4 warps takes 128 rows of one sequence and KV head: row = token · G + head of the group, G = H/K. Packing the
// group makes each key serve G times as many rows, and the ragged edge of the causal mask G times narrower. A warp owns 32
// rows and keeps their scores and sums in registers: with 16 it would read shared memory for longer than it multiplies. Two
// blocks share a multiprocessor, so that one multiplies while the other takes exponentials. Queries stay in shared memory;
// keys and values come in tiles of 64 through two buffers of it, the next on its way while one is used: 64 rows of it would
// be bound by the L2 cache, at 128 rows a tile of 2·64·D values serves 4·128·64·D operations. Rows of a tile are stored with
// their 16-byte pieces exchanged (piece ^ row % 8), so that neither copies nor ldmatrix meet a bank twice.
//
// e4m3 caches are turned into bf16 on their way into shared memory, which is not asynchronous.
//
// Slots past the end hold anything; they come as zeros. Blocks past a sequence's rows leave at once.

static constexpr int WARPS = 4;
static constexpr int THREADS = WARPS * WARP;
static constexpr int ROWS = 32 * WARPS;
// Keys of a tile, and those of it whose scores are kept at once.
static constexpr int KEYS = 64;
static constexpr int STEP = 32;

struct Shape {
    int num_heads, num_kv_heads, table_stride;
    float scale;
};

// Where the 16-byte piece `piece` of row `row` of a tile is.
template <int D>
DEVICE bf16* at(bf16* tile, int row, int piece) { return tile + row * D + ((piece ^ row % 8) * 8); }

DEVICE void copy_piece(bf16* to, const bf16* from, bool valid) { cp_async16(to, from, valid); }
DEVICE void copy_piece(bf16* to, const fp8* from, bool valid) {
    uint4 x = {0, 0, 0, 0};
    if (valid) {
        const uint2 packed = load8(from);
        const uint2 a = bf16x4_of_fp8(packed.x), b = bf16x4_of_fp8(packed.y);
        x = uint4{a.x, a.y, b.x, b.y};
    }
    store16(to, x);
}

// Keys and values of a tile; `k_cache` and `v_cache` are those of block 0 of the KV head.
template <int D, class Kv>
DEVICE void load_tile(bf16* keys, bf16* values, const Kv* k_cache, const Kv* v_cache, const int* table, int tile, int length,
                      size_t block_values) {
    constexpr int PIECES = D / 8, ROWS_AT_ONCE = THREADS / PIECES;
    const int first = threadIdx.x / PIECES, piece = threadIdx.x % PIECES;
    // Half a tile at a time: there are no registers for more addresses.
#pragma unroll 1
    for (int half = 0; half < 2; half++) {
        const int begin = tile * KEYS + half * (KEYS / 2), last_block = (length - 1) / BLOCK_SIZE;
        const int ids[2] = {table[min_of(begin / BLOCK_SIZE, last_block)], table[min_of(begin / BLOCK_SIZE + 1, last_block)]};
#pragma unroll
        for (int i = 0; i < KEYS / 2 / ROWS_AT_ONCE; i++) {
            const int row = half * (KEYS / 2) + i * ROWS_AT_ONCE + first;
            const size_t in_block = (i * ROWS_AT_ONCE % BLOCK_SIZE + first) * D + 8 * piece;
            const size_t from = ids[i * ROWS_AT_ONCE / BLOCK_SIZE] * block_values + in_block;
            copy_piece(at<D>(keys, row, piece), k_cache + from, tile * KEYS + row < length);
            copy_piece(at<D>(values, row, piece), v_cache + from, tile * KEYS + row < length);
        }
    }
    cp_async_commit();
}

// Scores of a warp's rows: [i] those of rows 16·i + g and 16·i + g + 8.
template <int D>
DEVICE void multiply_keys(float (&s)[2][STEP / 8][4], bf16* queries, bf16* keys, int lane) {
    const int matrix = lane / 8, row = lane % 8;
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
        u32 q[2][4];
#pragma unroll
        for (int r = 0; r < 2; r++) ldmatrix_x4(q[r], at<D>(queries, 16 * r + lane % 16, 2 * i + lane / 16));
#pragma unroll
        for (int n = 0; n < STEP / 16; n++) {
            u32 k[4];
            ldmatrix_x4(k, at<D>(keys, 16 * n + 8 * (matrix / 2) + row, 2 * i + matrix % 2));
#pragma unroll
            for (int r = 0; r < 2; r++) {
                mma_bf16(s[r][2 * n], q[r], k[0], k[1]);
                mma_bf16(s[r][2 * n + 1], q[r], k[2], k[3]);
            }
        }
    }
}

template <int D>
DEVICE void add_values(float (&acc)[2][D / 8][4], const float (&p)[2][STEP / 8][4], bf16* values, int lane) {
    const int matrix = lane / 8, row = lane % 8;
#pragma unroll
    for (int i = 0; i < STEP / 16; i++) {
        u32 a[2][4];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            a[r][0] = bf16x2_of(p[r][2 * i][0], p[r][2 * i][1]);
            a[r][1] = bf16x2_of(p[r][2 * i][2], p[r][2 * i][3]);
            a[r][2] = bf16x2_of(p[r][2 * i + 1][0], p[r][2 * i + 1][1]);
            a[r][3] = bf16x2_of(p[r][2 * i + 1][2], p[r][2 * i + 1][3]);
        }
#pragma unroll
        for (int n = 0; n < D / 16; n++) {
            u32 v[4];
            ldmatrix_x4_trans(v, at<D>(values, 16 * i + 8 * (matrix % 2) + row, 2 * n + matrix / 2));
#pragma unroll
            for (int r = 0; r < 2; r++) {
                mma_bf16(acc[r][2 * n], a[r], v[0], v[1]);
                mma_bf16(acc[r][2 * n + 1], a[r], v[2], v[3]);
            }
        }
    }
}

template <int D, class Kv>
DEVICE void attend(bf16* out, const bf16* qkv, const Kv* k_cache, const Kv* v_cache, const int* cu_seqlens,
                   const int* context_lens, const int* block_tables, const Shape& shape, bf16* shared) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    // Late rows see the most keys, so they begin first, those of all heads: what is left at the end is short.
    const int first_row = (gridDim.y - 1 - blockIdx.y) * ROWS, kv_head = blockIdx.x, sequence = blockIdx.z;
    const int first_token = cu_seqlens[sequence], num_tokens = cu_seqlens[sequence + 1] - first_token;
    const int group = shape.num_heads / shape.num_kv_heads, num_rows = num_tokens * group;
    const int context_len = context_lens[sequence], length = context_len + num_tokens;
    wait_for_previous_launch();
    if (first_row >= num_rows) return;
    const int* table = block_tables + static_cast<size_t>(sequence) * shape.table_stride;
    const size_t width = static_cast<size_t>(shape.num_heads + 2 * shape.num_kv_heads) * D;
    // Rows past the end repeat the last one.
    const auto row_at = [&](int row) { return min_of(first_row + row, num_rows - 1); };

    constexpr int TILE = KEYS * D, PIECES = D / 8;
    bf16* queries = shared;
    bf16* tiles = shared + ROWS * D;
#pragma unroll
    for (int i = 0; i < ROWS * PIECES / THREADS; i++) {
        const int n = i * THREADS + threadIdx.x, row = row_at(n / PIECES), piece = n % PIECES;
        const int head = kv_head * group + row % group;
        cp_async16(at<D>(queries, n / PIECES, piece), qkv + (first_token + row / group) * width + head * D + 8 * piece, true);
    }
    queries += 32 * warp * D;

    const int first_position = context_len + first_row / group;
    const int last_position = context_len + row_at(ROWS - 1) / group;
    const int num_tiles = last_position / KEYS + 1;
    // Keys and values of one buffer, then of the other.
    const size_t block_values = static_cast<size_t>(shape.num_kv_heads) * BLOCK_SIZE * D;
    k_cache += kv_head * (BLOCK_SIZE * D);
    v_cache += kv_head * (BLOCK_SIZE * D);
    load_tile<D>(tiles, tiles + TILE, k_cache, v_cache, table, 0, length, block_values);

    float acc[2][D / 8][4] = {}, max[2][2], sum[2][2] = {};
#pragma unroll
    for (int i = 0; i < 4; i++) max[i / 2][i % 2] = -infinity();
    const float scale = shape.scale * LOG2_E;
    const auto mask = [&](float (&s)[2][STEP / 8][4], int position) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int last = context_len + row_at(32 * warp + 16 * r + g + 8 * half) / group - position;
#pragma unroll
                for (int n = 0; n < STEP / 8; n++) {
#pragma unroll
                    for (int i = 0; i < 2; i++)
                        if (8 * n + 2 * t + i > last) s[r][n][2 * half + i] = -infinity();
                }
            }
        }
    };
    for (int tile = 0; tile < num_tiles; tile++) {
        bf16* keys = tiles + tile % 2 * (2 * TILE);
        bf16* values = keys + TILE;
        if (tile + 1 < num_tiles) {
            bf16* next = tiles + (tile + 1) % 2 * (2 * TILE);
            load_tile<D>(next, next + TILE, k_cache, v_cache, table, tile + 1, length, block_values);
            cp_async_wait<1>();
        } else {
            cp_async_wait<0>();
        }
        sync_block();

#pragma unroll 1
        for (int first = 0; first < KEYS; first += STEP) {
            float s[2][STEP / 8][4] = {};
            multiply_keys<D>(s, queries, keys + first * D, lane);
            const int position = tile * KEYS + first;
            if (position + STEP - 1 > first_position) mask(s, position);
            bool grew = false;
            float correction[2][2];
#pragma unroll
            for (int r = 0; r < 2; r++) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float largest = -infinity();
#pragma unroll
                    for (int n = 0; n < STEP / 8; n++)
                        largest = max_of(largest, max_of(s[r][n][2 * half], s[r][n][2 * half + 1]));
                    largest = max_of(largest, shuffle_xor(largest, 1));
                    largest = max_of(largest, shuffle_xor(largest, 2));
                    // The first step has position 0, which every row sees: the maximum is finite.
                    const float next_max = max_of(max[r][half], largest * scale);
                    grew |= next_max > max[r][half];
                    correction[r][half] = exp2_fast(max[r][half] - next_max);
                    max[r][half] = next_max;
                    float added = 0.0f;
#pragma unroll
                    for (int n = 0; n < STEP / 8; n++) {
#pragma unroll
                        for (int i = 2 * half; i < 2 * half + 2; i++) {
                            s[r][n][i] = exp2_fast(s[r][n][i] * scale - next_max);
                            added += s[r][n][i];
                        }
                    }
                    sum[r][half] = sum[r][half] * correction[r][half] + added;
                }
            }
            // After the first keys maxima seldom grow.
            if (any_lane(grew)) {
#pragma unroll
                for (int r = 0; r < 2; r++) {
#pragma unroll
                    for (int n = 0; n < D / 8; n++) {
#pragma unroll
                        for (int i = 0; i < 4; i++) acc[r][n][i] *= correction[r][i / 2];
                    }
                }
            }
            add_values<D>(acc, s, values + first * D, lane);
        }
        // The next turn loads into the buffer that was read here.
        sync_block();
    }

#pragma unroll
    for (int r = 0; r < 2; r++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float total = sum[r][half];
            total += shuffle_xor(total, 1);
            total += shuffle_xor(total, 2);
            const int row = first_row + 32 * warp + 16 * r + g + 8 * half;
            if (row >= num_rows) continue;
            const float inverse = 1.0f / total;
            const size_t head = static_cast<size_t>(first_token + row / group) * shape.num_heads + kv_head * group + row % group;
            bf16* to = out + head * D + 2 * t;
#pragma unroll
            for (int n = 0; n < D / 8; n++)
                store4(to + 8 * n, bf16x2_of(acc[r][n][2 * half] * inverse, acc[r][n][2 * half + 1] * inverse));
        }
    }
}

#define PREFILL_KERNEL(name, D, Kv)                                                                              \
    KERNEL_RESIDENT(name, 128, 2, bf16* out, const bf16* qkv, const Kv* k_cache, const Kv* v_cache, const int* cu_seqlens,\
                    const int* context_lens, const int* block_tables, int num_heads, int num_kv_heads, int table_stride,\
                    float scale) {                                                                                     \
        DYNAMIC_SHARED(shared);                                                                                  \
        const Shape shape = {num_heads, num_kv_heads, table_stride, scale};                                      \
        attend<D, Kv>(out, qkv, k_cache, v_cache, cu_seqlens, context_lens, block_tables, shape,                 \
                      reinterpret_cast<bf16*>(shared));                                                          \
    }

PREFILL_KERNEL(attention_prefill_bf16_d64, 64, bf16)
PREFILL_KERNEL(attention_prefill_bf16_d128, 128, bf16)
PREFILL_KERNEL(attention_prefill_fp8_d64, 64, fp8)
PREFILL_KERNEL(attention_prefill_fp8_d128, 128, fp8)
