// Attention of a few new tokens per sequence over the paged KV cache: decode steps and the verification of drafts.
//
// out bf16 [T, H·D] of the queries in qkv bf16 [T, (H + 2K)·D] (rotated), over k_cache and v_cache [blocks][K][16][D],
// which hold the keys and values of these tokens already. Token i of a sequence sees positions up to context_len + i.
//
// The query heads of a KV head and the tokens of a sequence are rows of one 16-row tile (row = token · G + head of the
// group, G = H/K), so that each key and value is read once for all of them (the packing is FlashInfer's and
// FlashDecoding's; Dao et al., "FlashAttention-2", 2023, for the rest). Bound by reading the cache.
//
// A block of 4 warps takes one of num_splits equal spans of a sequence's KV blocks; each warp takes every fourth KV block
// of it with a softmax of its own, and the warps are merged in order in shared memory. Spans depend on lengths that are
// read on the device, so a captured launch is right for every step. More splits than one leave (m, l, acc) f32 per
// (token, head, split) for attention_combine.
//
// Keys and values go from memory to tensor-core operands without shared memory. For scores, lane (g, t) takes values
// 8t..8t+8 of each 32 of key g: the order along D is free as long as queries have the same. For the output, it takes
// values 8g..8g+8 of each 64 of keys 2t, 2t+1, 2t+8, 2t+9: eight products make columns 8g + j. All loads have 8 values.
//
// Slots past the end hold anything: their scores are replaced, and their values, which would be multiplied by 0, zeroed.

static constexpr int WARPS = 4;
static constexpr int ROWS = 16;

struct Shape {
    int num_heads, num_kv_heads, num_splits, table_stride;
    float scale;
};

// Eight values as they come from memory: turned into pairs only where they are multiplied, or that would wait for them.
template <class Kv>
struct Eight;
template <>
struct Eight<bf16> {
    uint4 raw;
    METHOD void load(const bf16* p) { raw = pass16(p); }
    METHOD void clear() { raw = uint4{0, 0, 0, 0}; }
    METHOD void pairs(u32 (&x)[4]) const {
        x[0] = raw.x;
        x[1] = raw.y;
        x[2] = raw.z;
        x[3] = raw.w;
    }
};
template <>
struct Eight<fp8> {
    uint2 raw;
    METHOD void load(const fp8* p) { raw = pass8(p); }
    METHOD void clear() { raw = uint2{0, 0}; }
    METHOD void pairs(u32 (&x)[4]) const {
        const uint2 a = bf16x4_of_fp8(raw.x), b = bf16x4_of_fp8(raw.y);
        x[0] = a.x;
        x[1] = a.y;
        x[2] = b.x;
        x[3] = b.y;
    }
};

// One warp's softmax over the keys it has seen: of rows g and g + 8.
template <int D>
struct Partial {
    float acc[D / 8][4];
    float max[2], sum[2];
};

// Keys g and g + 8 of a block.
template <int D, class Kv>
DEVICE void load_keys(Eight<Kv> (&k)[2][D / 32], const Kv* keys, int g, int t) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
        for (int i = 0; i < D / 32; i++) k[half][i].load(keys + (8 * half + g) * D + 32 * i + 8 * t);
    }
}

// Scores of 16 keys of one block: s[0] those of keys 2t, 2t+1, s[1] those of keys 2t+8, 2t+9.
template <int D, class Kv>
DEVICE void multiply_keys(float (&s)[2][4], const u32 (&q)[D / 32][2][4], const Eight<Kv> (&k)[2][D / 32]) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
        for (int i = 0; i < D / 32; i++) {
            u32 pairs[4];
            k[half][i].pairs(pairs);
            mma_bf16(s[half], q[i][0], pairs[0], pairs[1]);
            mma_bf16(s[half], q[i][1], pairs[2], pairs[3]);
        }
    }
}

template <int D, class Kv>
DEVICE void add_values(Partial<D>& partial, const float (&p)[2][4], const Eight<Kv> (&v)[D / 64][4]) {
    const u32 a[4] = {bf16x2_of(p[0][0], p[0][1]), bf16x2_of(p[0][2], p[0][3]), bf16x2_of(p[1][0], p[1][1]),
                      bf16x2_of(p[1][2], p[1][3])};
#pragma unroll
    for (int i = 0; i < D / 64; i++) {
        u32 x[4][4];
#pragma unroll
        for (int key = 0; key < 4; key++) v[i][key].pairs(x[key]);
#pragma unroll
        for (int pair = 0; pair < 4; pair++) {
            // Both values of a pair, each beside its neighbour key's.
            mma_bf16(partial.acc[8 * i + 2 * pair], a, permute_bytes<0x5410>(x[0][pair], x[1][pair]),
                     permute_bytes<0x5410>(x[2][pair], x[3][pair]));
            mma_bf16(partial.acc[8 * i + 2 * pair + 1], a, permute_bytes<0x7632>(x[0][pair], x[1][pair]),
                     permute_bytes<0x7632>(x[2][pair], x[3][pair]));
        }
    }
}

template <int D, class Kv>
DEVICE void attend(bf16* out, float* partial_acc, float* partial_max, float* partial_sum, const bf16* qkv,
                   const Kv* k_cache, const Kv* v_cache, const int* cu_seqlens, const int* context_lens,
                   const int* block_tables, const Shape& shape, float* shared) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const int split = blockIdx.x % shape.num_splits, first_row = blockIdx.x / shape.num_splits * ROWS;
    const int kv_head = blockIdx.y, sequence = blockIdx.z;
    // The step's arrays are there before its first launch, and reading one after the other takes longer than a short
    // context does.
    const int first_token = cu_seqlens[sequence], num_tokens = cu_seqlens[sequence + 1] - first_token;
    const int group = shape.num_heads / shape.num_kv_heads;
    const int context_len = context_lens[sequence], length = context_len + num_tokens;
    // Every warp of a split has a block before there is another split.
    const int num_blocks = divide_up(length, BLOCK_SIZE);
    const int per_split = max_of(divide_up(num_blocks, shape.num_splits), shape.num_splits > 1 ? WARPS : 0);
    const int end = min_of((split + 1) * per_split, num_blocks);
    const int* table = block_tables + static_cast<size_t>(sequence) * shape.table_stride;
    const size_t width = static_cast<size_t>(shape.num_heads + 2 * shape.num_kv_heads) * D;
    int block = split * per_split + warp;
    // Ids of blocks are read two turns ahead, keys one, and values at the start of their turn: something is always on its
    // way while something else is multiplied.
    int id = block < end ? table[block] : 0, next_id = block + WARPS < end ? table[block + WARPS] : 0;
    wait_for_previous_launch();
    if (first_row >= num_tokens * group) return;
    // Partial results are those of the sequences at hand, wherever these begin in the step.
    const auto place_of = [&](int token, int head) {
        const size_t of_token = static_cast<size_t>(token - cu_seqlens[0]) * shape.num_heads + head;
        return of_token * shape.num_splits + split;
    };
    if (shape.num_splits > 1 && split * per_split >= num_blocks) {
        const int row = first_row + static_cast<int>(threadIdx.x);
        if (threadIdx.x < ROWS && row < num_tokens * group)
            partial_max[place_of(first_token + row / group, kv_head * group + row % group)] = -infinity();
        return;
    }

    // Rows g and g + 8: their queries, and the last position each sees. Rows past the end repeat the last one.
    u32 q[D / 32][2][4];
    int last_position[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = min_of(first_row + g + 8 * half, num_tokens * group - 1);
        const int token = row / group, head = kv_head * group + row % group;
        last_position[half] = context_len + token;
        const bf16* from = qkv + (first_token + token) * width + head * D;
#pragma unroll
        for (int i = 0; i < D / 32; i++) {
            const uint4 x = load16(from + 32 * i + 8 * t);
            q[i][0][half] = x.x;
            q[i][0][2 + half] = x.y;
            q[i][1][half] = x.z;
            q[i][1][2 + half] = x.w;
        }
    }

    Partial<D> mine = {};
    mine.max[0] = mine.max[1] = -infinity();
    const float scale = shape.scale * LOG2_E;
    const auto unit_of = [&](int id) {
        return (static_cast<size_t>(id) * shape.num_kv_heads + kv_head) * (BLOCK_SIZE * D);
    };
    Eight<Kv> k[2][D / 32];
    if (block < end) load_keys<D>(k, k_cache + unit_of(id), g, t);
    for (; block < end; block += WARPS) {
        const int first_position = block * BLOCK_SIZE;
        const Kv* values = v_cache + unit_of(id);
        Eight<Kv> v[D / 64][4];
#pragma unroll
        for (int i = 0; i < D / 64; i++) {
#pragma unroll
            for (int key = 0; key < 4; key++) {
                const int slot = 2 * t + key % 2 + 8 * (key / 2);
                v[i][key].load(values + slot * D + 64 * i + 8 * g);
            }
        }
        float s[2][4] = {};
        multiply_keys<D>(s, q, k);
        id = next_id;
        if (block + 2 * WARPS < end) next_id = table[block + 2 * WARPS];
        if (block + WARPS < end) load_keys<D>(k, k_cache + unit_of(id), g, t);
        if (first_position + BLOCK_SIZE > length) {
#pragma unroll
            for (int i = 0; i < D / 64; i++) {
#pragma unroll
                for (int key = 0; key < 4; key++) {
                    if (first_position + 2 * t + key % 2 + 8 * (key / 2) >= length) v[i][key].clear();
                }
            }
        }

#pragma unroll
        for (int half = 0; half < 2; half++) {
            float largest = -infinity();
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float& x = s[i / 2][2 * half + i % 2];
                const int position = first_position + 2 * t + i % 2 + 8 * (i / 2);
                x = position <= last_position[half] ? x * scale : -infinity();
                largest = max_of(largest, x);
            }
            largest = max_of(largest, shuffle_xor(largest, 1));
            largest = max_of(largest, shuffle_xor(largest, 2));
            const float max = max_of(mine.max[half], largest);
            // A row that sees no key of this block yet has nothing to subtract.
            const float base = max == -infinity() ? 0.0f : max;
            const float correction = exp2_fast(mine.max[half] - base);
            mine.max[half] = max;
            float sum = 0.0f;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float& x = s[i / 2][2 * half + i % 2];
                x = exp2_fast(x - base);
                sum += x;
            }
            mine.sum[half] = mine.sum[half] * correction + sum;
#pragma unroll
            for (int i = 0; i < D / 8; i++) {
                mine.acc[i][2 * half] *= correction;
                mine.acc[i][2 * half + 1] *= correction;
            }
        }
        add_values<D>(mine, s, v);
    }

    // Warps after the first leave what they have; all then add up D/8 values of a row, in the order of warps.
#pragma unroll
    for (int half = 0; half < 2; half++) {
        mine.sum[half] += shuffle_xor(mine.sum[half], 1);
        mine.sum[half] += shuffle_xor(mine.sum[half], 2);
    }
    float* maxima = shared + WARPS * ROWS * D;
    float* sums = maxima + WARPS * ROWS;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = warp * ROWS + g + 8 * half;
        // Column 2t + e of product (i, j) is value 64·i + 8·(2t + e) + j. Turned by the row, lanes are in different banks.
#pragma unroll
        for (int i = 0; i < D / 64; i++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float x[8];
#pragma unroll
                for (int j = 0; j < 8; j++) x[j] = mine.acc[8 * i + j][2 * half + e];
                store_f32x8(shared + row * D + ((64 * i + 8 * (2 * t + e)) ^ (8 * (g % 8))), x);
            }
        }
        if (t == 0) {
            maxima[row] = mine.max[half];
            sums[row] = mine.sum[half];
        }
    }
    sync_block();

    const int row = threadIdx.x / 8, part = threadIdx.x % 8;
    if (first_row + row >= num_tokens * group) return;
    float max = -infinity();
#pragma unroll
    for (int i = 0; i < WARPS; i++) max = max_of(max, maxima[i * ROWS + row]);
    float sum = 0.0f, acc[D / 64][8] = {};
#pragma unroll
    for (int i = 0; i < WARPS; i++) {
        const float of_warp = maxima[i * ROWS + row];
        if (of_warp == -infinity()) continue;
        const float weight = exp2_fast(of_warp - max);
        sum += weight * sums[i * ROWS + row];
#pragma unroll
        for (int c = 0; c < D / 64; c++) {
            float x[8];
            load_f32x8(x, shared + (i * ROWS + row) * D + ((64 * c + 8 * part) ^ (8 * (row % 8))));
#pragma unroll
            for (int j = 0; j < 8; j++) acc[c][j] += weight * x[j];
        }
    }
    const int token = first_token + (first_row + row) / group, head = kv_head * group + (first_row + row) % group;
    const size_t at = static_cast<size_t>(token) * shape.num_heads + head;
    if (shape.num_splits == 1) {
        const float inverse = 1.0f / sum;
#pragma unroll
        for (int c = 0; c < D / 64; c++) {
#pragma unroll
            for (int j = 0; j < 8; j++) acc[c][j] *= inverse;
            store16(out + at * D + 64 * c + 8 * part, pack8(acc[c]));
        }
        return;
    }
    const size_t place = place_of(token, head);
    if (part == 0) {
        partial_max[place] = max;
        partial_sum[place] = sum;
    }
#pragma unroll
    for (int c = 0; c < D / 64; c++) store_f32x8(partial_acc + place * D + 64 * c + 8 * part, acc[c]);
}

#define DECODE_KERNEL(name, D, Kv)                                                                                  \
    KERNEL_RESIDENT(name, 128, 2, bf16* out, float* partial_acc, float* partial_max, float* partial_sum,             \
                    const bf16* qkv, const Kv* k_cache, const Kv* v_cache, const int* cu_seqlens,                    \
                    const int* context_lens, const int* block_tables, int num_heads, int num_kv_heads,               \
                    int num_splits, int table_stride, float scale) {                                                 \
        __shared__ __align__(16) float shared[WARPS * ROWS * (D + 2)];                                               \
        const Shape shape = {num_heads, num_kv_heads, num_splits, table_stride, scale};                              \
        attend<D, Kv>(out, partial_acc, partial_max, partial_sum, qkv, k_cache, v_cache, cu_seqlens, context_lens,   \
                      block_tables, shape, shared);                                                                  \
    }

DECODE_KERNEL(attention_decode_bf16_d64, 64, bf16)
DECODE_KERNEL(attention_decode_bf16_d128, 128, bf16)
DECODE_KERNEL(attention_decode_fp8_d64, 64, fp8)
DECODE_KERNEL(attention_decode_fp8_d128, 128, fp8)

// out bf16 [T, H·D] of the splits' partial results, of which those without keys have a maximum of -∞. Grid (tokens of the
// sequences, H); tokens that belong to no sequence are left alone. 8 values a thread: head_dim / 8 threads take every so
// many-th split, and what they have is added in shared memory in the order of splits modulo that number.
KERNEL(attention_combine, 128, bf16* out, const float* partial_acc, const float* partial_max, const float* partial_sum,
       const int* cu_seqlens, int num_sequences, int num_splits, int head_dim) {
    __shared__ __align__(16) float accs[128 * 8];
    __shared__ float sums[128];
    const int token = cu_seqlens[0] + static_cast<int>(blockIdx.x);
    const bool is_token = token < cu_seqlens[num_sequences];
    wait_for_previous_launch();
    if (!is_token) return;
    const int parts = head_dim / 8, groups = blockDim.x / parts;
    const int part = threadIdx.x % parts, group = threadIdx.x / parts;
    const size_t at = static_cast<size_t>(blockIdx.x) * gridDim.y + blockIdx.y;
    float max = -infinity();
    for (int i = 0; i < num_splits; i++) max = max_of(max, partial_max[at * num_splits + i]);
    float sum = 0.0f, acc[8] = {};
#pragma unroll 4
    for (int i = group; i < num_splits; i += groups) {
        const size_t place = at * num_splits + i;
        if (partial_max[place] == -infinity()) continue;
        const float weight = exp2_fast(partial_max[place] - max);
        sum += weight * partial_sum[place];
        float x[8];
        load_f32x8(x, partial_acc + place * head_dim + 8 * part);
#pragma unroll
        for (int j = 0; j < 8; j++) acc[j] += weight * x[j];
    }
    store_f32x8(accs + 8 * threadIdx.x, acc);
    sums[threadIdx.x] = sum;
    sync_block();
    if (group > 0) return;
    for (int other = 1; other < groups; other++) {
        float x[8];
        load_f32x8(x, accs + 8 * (other * parts + part));
        sum += sums[other * parts + part];
#pragma unroll
        for (int j = 0; j < 8; j++) acc[j] += x[j];
    }
    const float inverse = 1.0f / sum;
#pragma unroll
    for (int j = 0; j < 8; j++) acc[j] *= inverse;
    const size_t to = static_cast<size_t>(token) * gridDim.y + blockIdx.y;
    store16(out + to * head_dim + 8 * part, pack8(acc));
}
