// Linear layers of 1 to 8 tokens: y [M,N] = x bf16 [M,K] · Wᵀ, W [N,K]. Bound by reading W once.
//
// A block of 8 warps makes 16 output columns (16 rows of W) of all tokens. A warp takes groups of 32-value units along K,
// each warp the next group, so that a block reads W in long pieces; the warps' sums are added in a fixed order. The
// products are made on the tensor cores: a tile of W is the 16 × 16 operand, the tokens are the 8 columns of the other
// one, so eight tokens cost what one does. Both operands come straight from memory in 16-byte loads, without shared
// memory: the order of values along K within a unit does not matter as long as it is the same in both, so lane
// (g, t) = (lane / 4, lane % 4) takes values 8t..8t+8 of rows g and g + 8 and of token g. The next group is on its way while
// one is multiplied.
//
// K is a multiple of 32. Formats of W:
//   bf16  [N,K]
//   fp8   e4m3 [N,K] with scales f32 [N]
//   q8    int8 [N,K] with scales f16 [N,K/32] (GGUF's Q8_0, parts apart)
//   q4_0  [N,K/2] with scales f16 [N,K/32]: a block's 16 bytes hold value j low and value j + 16 high; minus 8
//   q4_1  the same with mins f16 [N,K/32] added instead
// Small integers are exact in bf16; a block's sum is scaled in f32.
//
// What becomes of y: stored as bf16, stored as f32, added to f32 (the residual stream); or W has 2·N rows, gates before
// ups, and silu(gate) · up is stored as bf16 ("swiglu").

static constexpr int WARPS = 8;
static constexpr int ROWS = 16;
static constexpr int TOKENS = 8;
static constexpr int UNIT = 32;
// Partial sums of a tile: tokens are this far apart, which keeps lanes in different banks.
static constexpr int STRIDE = 20;

struct Bf16Weights {
    using Raw = uint4;
    static constexpr int GROUP = 4, GROUP_OF_TWO = 2;
    static constexpr bool NIBBLES = false, SCALED = false, WITH_MIN = false;
    const bf16* values;

    METHOD Raw load(size_t row, int k, int t, int size) const { return stream16(values + row * size + k + 8 * t); }
    METHOD static void expand(u32 (&f)[4], Raw raw) {
        f[0] = raw.x;
        f[1] = raw.y;
        f[2] = raw.z;
        f[3] = raw.w;
    }
    METHOD float row_scale(int) const { return 1.0f; }
};

struct Fp8Weights {
    using Raw = uint2;
    // Nearly as many bytes on their way as of bf16.
    static constexpr int GROUP = 8, GROUP_OF_TWO = 3;
    static constexpr bool NIBBLES = false, SCALED = false, WITH_MIN = false;
    const fp8* values;
    const float* scales;

    METHOD Raw load(size_t row, int k, int t, int size) const { return stream8(values + row * size + k + 8 * t); }
    METHOD static void expand(u32 (&f)[4], Raw raw) {
        const uint2 a = bf16x4_of_fp8(raw.x), b = bf16x4_of_fp8(raw.y);
        f[0] = a.x;
        f[1] = a.y;
        f[2] = b.x;
        f[3] = b.y;
    }
    METHOD float row_scale(int row) const { return scales[row]; }
};

struct Q8Weights {
    using Raw = uint2;
    static constexpr int GROUP = 4, GROUP_OF_TWO = 2;
    static constexpr bool NIBBLES = false, SCALED = true, WITH_MIN = false;
    const signed char* values;
    const unsigned short* scales;
    const unsigned short* mins;

    METHOD Raw load(size_t row, int k, int t, int size) const { return stream8(values + row * size + k + 8 * t); }
    // q + 128 in the low byte of 2²³ is a float; what was added is taken away again.
    template <int BYTE>
    METHOD static float at(u32 four) {
        constexpr u32 SELECTOR = 0x7650 | BYTE;
        return float_of(permute_bytes<SELECTOR>(four, 0x4b000000u)) - 8388736.0f;
    }
    METHOD static void expand(u32 (&f)[4], Raw raw) {
        const u32 a = raw.x ^ 0x80808080u, b = raw.y ^ 0x80808080u;
        f[0] = bf16x2_of(at<0>(a), at<1>(a));
        f[1] = bf16x2_of(at<2>(a), at<3>(a));
        f[2] = bf16x2_of(at<0>(b), at<1>(b));
        f[3] = bf16x2_of(at<2>(b), at<3>(b));
    }
    METHOD float row_scale(int) const { return 1.0f; }
};

template <bool MINS>
struct Q4Weights {
    using Raw = u32;
    static constexpr int GROUP = 4, GROUP_OF_TWO = 4;
    static constexpr bool NIBBLES = true, SCALED = true, WITH_MIN = MINS;
    const unsigned char* values;
    const unsigned short* scales;
    const unsigned short* mins;

    METHOD Raw load(size_t row, int k, int t, int size) const {
        return stream4(values + row * (size / 2) + k / 2 + 4 * t);
    }
    // 128 + q has q in its low bits: 128 is taken away, or 136.
    METHOD static u32 pair(u32 places) {
        const u32 shift = MINS ? 0xc300c300u : 0xc308c308u;
        return fma_bf16x2((places & 0x000f000fu) | 0x43004300u, 0x3f803f80u, shift);
    }
    METHOD static void expand(u32 (&f)[4], Raw raw) {
        const u32 first = permute_bytes<0x4140>(raw, 0), second = permute_bytes<0x4342>(raw, 0);
        f[0] = pair(first);
        f[1] = pair(second);
        f[2] = pair(first >> 4);
        f[3] = pair(second >> 4);
    }
    METHOD float row_scale(int) const { return 1.0f; }
};

// A group of units of two rows of each tile. Lane t keeps the scales of unit t, for all four lanes of its rows.
template <class W, int TILES>
struct Loaded {
    // What is on its way has to fit into registers beside what is multiplied.
    static constexpr int GROUP = TILES == 1 ? W::GROUP : W::GROUP_OF_TWO;
    typename W::Raw values[TILES][2][GROUP];
    float scale[TILES][2], min[TILES][2];
};

template <class W, int TILES>
DEVICE void load_group(Loaded<W, TILES>& loaded, const W& w, const int (&rows)[TILES][2], int group, int t, int size) {
    constexpr int GROUP = Loaded<W, TILES>::GROUP;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const size_t row = static_cast<size_t>(rows[tile][half]);
#pragma unroll
            for (int u = 0; u < GROUP; u++) {
                const int k = (group * GROUP + u) * UNIT;
                if (k < size) loaded.values[tile][half][u] = w.load(row, k, t, size);
            }
            if constexpr (W::SCALED) {
                const int unit = group * GROUP + t, num_units = size / UNIT;
                if (unit < num_units) {
                    loaded.scale[tile][half] = f32_of_f16(w.scales[row * num_units + unit]);
                    if constexpr (W::WITH_MIN) loaded.min[tile][half] = f32_of_f16(w.mins[row * num_units + unit]);
                }
            }
        }
    }
}

// The values of x that stand beside a lane's values of W.
template <bool NIBBLES>
DEVICE void load_x(u32 (&b)[4], const bf16* x, int t) {
    if constexpr (NIBBLES) {
        const uint2 low = load8(x + 4 * t), high = load8(x + 16 + 4 * t);
        b[0] = low.x;
        b[1] = low.y;
        b[2] = high.x;
        b[3] = high.y;
    } else {
        const uint4 all = load16(x + 8 * t);
        b[0] = all.x;
        b[1] = all.y;
        b[2] = all.z;
        b[3] = all.w;
    }
}

DEVICE void multiply_unit(float (&c)[4], const u32 (&low)[4], const u32 (&high)[4], const u32 (&b)[4]) {
    const u32 first[4] = {low[0], high[0], low[1], high[1]}, second[4] = {low[2], high[2], low[3], high[3]};
    mma_bf16(c, first, b[0], b[1]);
    mma_bf16(c, second, b[2], b[3]);
}

template <class W, int TILES>
DEVICE void multiply_group(float (&sum)[TILES][4], const Loaded<W, TILES>& loaded, const bf16* x, bool has_token,
                           int group, int lane, int size) {
    constexpr int GROUP = Loaded<W, TILES>::GROUP;
    const int t = lane % 4;
    // All at once, before the first is needed. Tokens that are not there are zero.
    u32 x_units[GROUP][4] = {};
#pragma unroll
    for (int u = 0; u < GROUP; u++) {
        const int k = (group * GROUP + u) * UNIT;
        if (has_token && k < size) load_x<W::NIBBLES>(x_units[u], x + k, t);
    }
#pragma unroll
    for (int u = 0; u < GROUP; u++) {
        if ((group * GROUP + u) * UNIT >= size) break;
        const u32(&b)[4] = x_units[u];
        float x_sum[4] = {};
        if constexpr (W::WITH_MIN) {
            const u32 ones[4] = {0x3f803f80u, 0x3f803f80u, 0x3f803f80u, 0x3f803f80u};
            multiply_unit(x_sum, ones, ones, b);
        }
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            u32 low[4], high[4];
            W::expand(low, loaded.values[tile][0][u]);
            W::expand(high, loaded.values[tile][1][u]);
            if constexpr (!W::SCALED) {
                multiply_unit(sum[tile], low, high, b);
            } else {
                float c[4] = {};
                multiply_unit(c, low, high, b);
                const int holder = lane - t + u;
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const float scale = shuffle_from(loaded.scale[tile][half], holder);
                    sum[tile][2 * half] += scale * c[2 * half];
                    sum[tile][2 * half + 1] += scale * c[2 * half + 1];
                    if constexpr (W::WITH_MIN) {
                        const float min = shuffle_from(loaded.min[tile][half], holder);
                        sum[tile][2 * half] += min * x_sum[2 * half];
                        sum[tile][2 * half + 1] += min * x_sum[2 * half + 1];
                    }
                }
            }
        }
    }
}

// Leaves y of (tile, token, row of the tile) of this block to `finish(token, column, y of each tile)`. Tile 1, if there is
// one, has the rows that come num_columns later. `partial` is f32 [TILES][WARPS][TOKENS · STRIDE] in shared memory.
template <class W, int TILES, class F>
DEVICE void gemv(const W& w, const bf16* x, int num_tokens, int num_columns, int size, float* partial, F finish) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const int first_column = blockIdx.x * ROWS;
    int rows[TILES][2];
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
        for (int half = 0; half < 2; half++)
            rows[tile][half] = tile * num_columns + min_of(first_column + g + 8 * half, num_columns - 1);
    }
    const bool has_token = g < num_tokens;
    const bf16* x_row = x + static_cast<size_t>(has_token ? g : 0) * size;

    float sum[TILES][4] = {};
    const int num_groups = divide_up(size, Loaded<W, TILES>::GROUP * UNIT);
    // One is multiplied while the other is on its way; taking turns spares moving registers.
    Loaded<W, TILES> even = {}, odd = {};
    int group = warp;
    if (group < num_groups) load_group(even, w, rows, group, t, size);
    // Weights are as they were loaded: only what follows depends on other launches.
    wait_for_previous_launch();
    while (group < num_groups) {
        if (group + WARPS < num_groups) load_group(odd, w, rows, group + WARPS, t, size);
        multiply_group(sum, even, x_row, has_token, group, lane, size);
        group += WARPS;
        if (group >= num_groups) break;
        if (group + WARPS < num_groups) load_group(even, w, rows, group + WARPS, t, size);
        multiply_group(sum, odd, x_row, has_token, group, lane, size);
        group += WARPS;
    }

#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        float* to = partial + (tile * WARPS + warp) * (TOKENS * STRIDE) + 2 * t * STRIDE + g;
        to[0] = sum[tile][0];
        to[STRIDE] = sum[tile][1];
        to[8] = sum[tile][2];
        to[STRIDE + 8] = sum[tile][3];
    }
    sync_block();
    const int token = threadIdx.x / ROWS, row = threadIdx.x % ROWS, column = first_column + row;
    if (token >= num_tokens || column >= num_columns) return;
    float y[TILES];
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        const float* from = partial + tile * WARPS * (TOKENS * STRIDE) + token * STRIDE + row;
        y[tile] = 0.0f;
#pragma unroll
        for (int i = 0; i < WARPS; i++) y[tile] += from[i * (TOKENS * STRIDE)];
        y[tile] *= w.row_scale(tile * num_columns + column);
    }
    finish(token, column, y);
}

#define SHAPE int num_tokens, int num_columns, int size
#define GEMV_KERNELS(format, Weights, WEIGHT_PARAMETERS, WEIGHT_ARGUMENTS)                                         \
    KERNEL_RESIDENT(gemv_##format##_store_bf16, 256, 2, bf16* out, const bf16* x, WEIGHT_PARAMETERS, SHAPE) {                   \
        __shared__ float partial[WARPS * TOKENS * STRIDE];                                                         \
        gemv<Weights, 1>(Weights{WEIGHT_ARGUMENTS}, x, num_tokens, num_columns, size, partial,                      \
                         [&](int token, int column, const float(&y)[1]) {                                          \
                             out[static_cast<size_t>(token) * num_columns + column] = bf16_of(y[0]);               \
                         });                                                                                       \
    }                                                                                                              \
    KERNEL_RESIDENT(gemv_##format##_store_f32, 256, 2, float* out, const bf16* x, WEIGHT_PARAMETERS, SHAPE) {                   \
        __shared__ float partial[WARPS * TOKENS * STRIDE];                                                         \
        gemv<Weights, 1>(Weights{WEIGHT_ARGUMENTS}, x, num_tokens, num_columns, size, partial,                      \
                         [&](int token, int column, const float(&y)[1]) {                                          \
                             out[static_cast<size_t>(token) * num_columns + column] = y[0];                        \
                         });                                                                                       \
    }                                                                                                              \
    KERNEL_RESIDENT(gemv_##format##_add_f32, 256, 2, float* out, const bf16* x, WEIGHT_PARAMETERS, SHAPE) {                     \
        __shared__ float partial[WARPS * TOKENS * STRIDE];                                                         \
        gemv<Weights, 1>(Weights{WEIGHT_ARGUMENTS}, x, num_tokens, num_columns, size, partial,                      \
                         [&](int token, int column, const float(&y)[1]) {                                          \
                             out[static_cast<size_t>(token) * num_columns + column] += y[0];                       \
                         });                                                                                       \
    }                                                                                                              \
    KERNEL_RESIDENT(gemv_##format##_swiglu, 256, 2, bf16* out, const bf16* x, WEIGHT_PARAMETERS, SHAPE) {                       \
        __shared__ float partial[2 * WARPS * TOKENS * STRIDE];                                                     \
        gemv<Weights, 2>(Weights{WEIGHT_ARGUMENTS}, x, num_tokens, num_columns, size, partial,                      \
                         [&](int token, int column, const float(&y)[2]) {                                          \
                             out[static_cast<size_t>(token) * num_columns + column] = bf16_of(silu(y[0]) * y[1]);  \
                         });                                                                                       \
    }

#define COMMA ,
GEMV_KERNELS(bf16, Bf16Weights, const bf16* weights, weights)
GEMV_KERNELS(fp8, Fp8Weights, const fp8* weights COMMA const float* scales, weights COMMA scales)
GEMV_KERNELS(q8, Q8Weights, const signed char* weights COMMA const unsigned short* scales,
             weights COMMA scales COMMA nullptr)
GEMV_KERNELS(q4_0, Q4Weights<false>, const unsigned char* weights COMMA const unsigned short* scales,
             weights COMMA scales COMMA nullptr)
GEMV_KERNELS(q4_1, Q4Weights<true>,
             const unsigned char* weights COMMA const unsigned short* scales COMMA const unsigned short* mins,
             weights COMMA scales COMMA mins)
