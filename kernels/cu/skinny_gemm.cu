// y[M,N] = x bf16 [M,K] · Wᵀ for up to 64 tokens: bound by reading W, like a GEMV, but with enough tokens that x has to be
// shared by many rows of W.
//
// A block of 4 warps takes 64 rows of W and one of num_splits spans of K. Stages of 128 bytes of each row (of 4-bit weights
// 64), and what stands beside them in x, come by cp.async, several ahead; two warps share the 64 rows, two the depth of a stage. W does not depend
// on other launches: its first stages are on their way before the launch before is over. The spans of one tile are added in
// their order by whichever block is the last to be done (the order of additions is the same whoever that is).
//
// Weights in GGUF's blocks of 32 are rounded to bf16 with their scale on their way into a product, as `dequantize` does; the
// formats are those of gemv.cu.
//
// What becomes of y: stored as bf16; added to f32 (the residual stream); or W has 2·N rows, gates before ups, and
// silu(gate) · up is stored as bf16.

static constexpr int WARPS = 4;
static constexpr int THREADS = WARPS * WARP;
static constexpr int ROWS = 64;
// Sums of a tile: tokens are this far apart, which keeps lanes in different banks.
static constexpr int STRIDE = ROWS + 4;

enum Epilogue { STORE, ADD, SWIGLU };

struct Operands {
    int num_tokens, num_columns, size, num_splits;
};

// Chunks of 16 bytes of a row change places with the row, so that those that are read together are in different banks.
template <int ROW_BYTES>
DEVICE int chunk_at(int chunk, int row) {
    return ROW_BYTES == 128 ? chunk ^ (row & 7) : chunk ^ (row >> 1 & 3);
}

// 16 bytes of 16 rows, twice: r[0], r[1] of rows g and g + 8 of a chunk, r[2], r[3] of those of the next.
template <int ROW_BYTES>
DEVICE void load_rows(u32 (&r)[4], const unsigned char* w, int first_row, int chunk, int lane) {
    const int row = first_row + lane % 16;
    ldmatrix_x4(r, w + row * ROW_BYTES + 16 * chunk_at<ROW_BYTES>(chunk + lane / 16, row));
}

// Of x [TOKENS][DEPTH] where lanes hold four neighbours of W at a time: the two pairs take the places of columns 2t and 2t + 8.
DEVICE int x_chunk_of_fours(int chunk, int token) { return chunk ^ ((token & 3) << 1); }
template <int TOKENS, int DEPTH>
DEVICE void multiply_fours(float (&sum)[2][TOKENS / 8][4], const u32 (&a)[2][4], const unsigned char* x, int step, int lane) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int j = 0; j < TOKENS / 8; j++) {
        const int token = 8 * j + g, chunk = 2 * step + t / 2;
        const uint2 b = load8(x + token * (2 * DEPTH) + 16 * x_chunk_of_fours(chunk, token) + 8 * (t % 2));
#pragma unroll
        for (int tile = 0; tile < 2; tile++) mma_bf16(sum[tile][j], a[tile], b.x, b.y);
    }
}

// A lane's rows of W for them: four_of(tile, half of the tile's rows) gives its four neighbours as two pairs.
template <class F>
DEVICE void fill_fours(u32 (&a)[2][4], F four_of) {
#pragma unroll
    for (int tile = 0; tile < 2; tile++) {
#pragma unroll
        for (int row = 0; row < 2; row++) {
            const uint2 four = four_of(tile, row);
            a[tile][row] = four.x;
            a[tile][2 + row] = four.y;
        }
    }
}

struct NoScales {};

struct Bf16Tiles {
    static constexpr int ROW_BYTES = 128, DEPTH = 64, PER_CHUNK = 8, STEPS = 4;
    using Scales = NoScales;
    const bf16* values;

    METHOD const void* at(size_t row, int k, int size) const { return values + row * size + k; }
    METHOD void load_scales(Scales&, const int (&)[2][2], int, int) const {}
    METHOD float row_scale(int) const { return 1.0f; }
    METHOD static int x_chunk(int chunk, int token) { return chunk ^ (token & 7); }

    // Adds products of half the depth of 32 rows.
    template <int TOKENS>
    METHOD static void multiply(float (&sum)[2][TOKENS / 8][4], const unsigned char* w, const unsigned char* x, const Scales&,
                                int first_row, int first_step, int lane) {
#pragma unroll
        for (int step = first_step; step < first_step + STEPS / 2; step++) {
            u32 a[2][4];
#pragma unroll
            for (int tile = 0; tile < 2; tile++) load_rows<ROW_BYTES>(a[tile], w, first_row + 16 * tile, 2 * step, lane);
#pragma unroll
            for (int j = 0; j < TOKENS / 16; j++) {
                const int token = 16 * j + lane / 16 * 8 + lane % 8, chunk = 2 * step + lane / 8 % 2;
                u32 b[4];
                ldmatrix_x4(b, x + token * (2 * DEPTH) + 16 * x_chunk(chunk, token));
#pragma unroll
                for (int tile = 0; tile < 2; tile++) {
                    mma_bf16(sum[tile][2 * j], a[tile], b[0], b[1]);
                    mma_bf16(sum[tile][2 * j + 1], a[tile], b[2], b[3]);
                }
            }
        }
    }
};

struct Fp8Tiles {
    static constexpr int ROW_BYTES = 128, DEPTH = 128, PER_CHUNK = 16, STEPS = 8;
    using Scales = NoScales;
    const fp8* values;
    const float* scales;

    METHOD const void* at(size_t row, int k, int size) const { return values + row * size + k; }
    METHOD void load_scales(Scales&, const int (&)[2][2], int, int) const {}
    METHOD float row_scale(int row) const { return scales[row]; }
    METHOD static int x_chunk(int chunk, int token) { return x_chunk_of_fours(chunk, token); }

    template <int TOKENS>
    METHOD static void multiply(float (&sum)[2][TOKENS / 8][4], const unsigned char* w, const unsigned char* x, const Scales&,
                                int first_row, int first_step, int lane) {
#pragma unroll
        for (int pair = 0; pair < STEPS / 4; pair++) {
            const int step = first_step + 2 * pair;
            u32 raw[2][4];
#pragma unroll
            for (int tile = 0; tile < 2; tile++) load_rows<ROW_BYTES>(raw[tile], w, first_row + 16 * tile, step, lane);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                u32 a[2][4];
                fill_fours(a, [&](int tile, int row) { return bf16x4_of_fp8(raw[tile][2 * half + row]); });
                multiply_fours<TOKENS, DEPTH>(sum, a, x, step + half, lane);
            }
        }
    }
};

// Scales of two neighbouring blocks of a lane's four rows, and mins where there are any.
struct BlockScales {
    float scale[2][2][2], min[2][2][2] = {};
};
DEVICE void load_block_scales(float (&to)[2][2][2], const unsigned short* from, const int (&rows)[2][2], int block,
                              int num_blocks) {
#pragma unroll
    for (int tile = 0; tile < 2; tile++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const size_t at = static_cast<size_t>(rows[tile][half]) * num_blocks + block + i;
                to[tile][half][i] = block + i < num_blocks ? f32_of_f16(from[at]) : 0.0f;
            }
        }
    }
}

// Four bytes less ZERO, scaled, as two pairs. Integers in the low bits of 2²³ are floats; what was added is taken away again.
template <int ZERO>
DEVICE uint2 fours_of_block(u32 bytes, float scale, float min) {
    float x[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float integer = float_of(0x4b000000u | (bytes >> 8 * i & 0xff)) - (8388608.0f + ZERO);
        x[i] = integer * scale + min;
    }
    return uint2{bf16x2_of(x[0], x[1]), bf16x2_of(x[2], x[3])};
}

struct Q8Tiles {
    static constexpr int ROW_BYTES = 128, DEPTH = 128, PER_CHUNK = 16, STEPS = 8;
    using Scales = BlockScales;
    const signed char* values;
    const unsigned short* scales;

    METHOD const void* at(size_t row, int k, int size) const { return values + row * size + k; }
    METHOD void load_scales(Scales& to, const int (&rows)[2][2], int k, int size) const {
        load_block_scales(to.scale, scales, rows, k / 32, size / 32);
    }
    METHOD float row_scale(int) const { return 1.0f; }
    METHOD static int x_chunk(int chunk, int token) { return x_chunk_of_fours(chunk, token); }

    template <int TOKENS>
    METHOD static void multiply(float (&sum)[2][TOKENS / 8][4], const unsigned char* w, const unsigned char* x,
                                const Scales& of, int first_row, int first_step, int lane) {
#pragma unroll
        for (int block = 0; block < STEPS / 4; block++) {
            const int step = first_step + 2 * block;
            u32 raw[2][4];
#pragma unroll
            for (int tile = 0; tile < 2; tile++) load_rows<ROW_BYTES>(raw[tile], w, first_row + 16 * tile, step, lane);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                u32 a[2][4];
                fill_fours(a, [&](int tile, int row) {
                    return fours_of_block<128>(raw[tile][2 * half + row] ^ 0x80808080u, of.scale[tile][row][block], 0.0f);
                });
                multiply_fours<TOKENS, DEPTH>(sum, a, x, step + half, lane);
            }
        }
    }
};

// A chunk is a block: its low nibbles are one step, its high ones the next.
template <bool MINS>
struct Q4Tiles {
    static constexpr int ROW_BYTES = 64, DEPTH = 128, PER_CHUNK = 32, STEPS = 8;
    using Scales = BlockScales;
    const unsigned char* values;
    const unsigned short* scales;
    const unsigned short* mins;

    METHOD const void* at(size_t row, int k, int size) const { return values + row * (size / 2) + k / 2; }
    METHOD void load_scales(Scales& to, const int (&rows)[2][2], int k, int size) const {
        load_block_scales(to.scale, scales, rows, k / 32, size / 32);
        if constexpr (MINS) load_block_scales(to.min, mins, rows, k / 32, size / 32);
    }
    METHOD float row_scale(int) const { return 1.0f; }
    METHOD static int x_chunk(int chunk, int token) { return x_chunk_of_fours(chunk, token); }

    template <int TOKENS>
    METHOD static void multiply(float (&sum)[2][TOKENS / 8][4], const unsigned char* w, const unsigned char* x,
                                const Scales& of, int first_row, int first_step, int lane) {
        u32 raw[2][4];
#pragma unroll
        for (int tile = 0; tile < 2; tile++) load_rows<ROW_BYTES>(raw[tile], w, first_row + 16 * tile, first_step / 2, lane);
#pragma unroll
        for (int block = 0; block < STEPS / 4; block++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                u32 a[2][4];
                fill_fours(a, [&](int tile, int row) {
                    const u32 four = raw[tile][2 * block + row] >> 4 * half & 0x0f0f0f0fu;
                    return fours_of_block<MINS ? 0 : 8>(four, of.scale[tile][row][block], of.min[tile][row][block]);
                });
                multiply_fours<TOKENS, DEPTH>(sum, a, x, first_step + 2 * block + half, lane);
            }
        }
    }
};

template <Epilogue EPILOGUE>
DEVICE int column_of(int tile, int row) {
    return EPILOGUE == SWIGLU ? tile * (ROWS / 2) + row % (ROWS / 2) : tile * ROWS + row;
}

// The row of W of a tile's row; that of the last column past the end.
template <Epilogue EPILOGUE>
DEVICE int row_of(int row, int column, int num_columns) {
    column = min_of(column, num_columns - 1);
    return EPILOGUE == SWIGLU && row >= ROWS / 2 ? num_columns + column : column;
}

// What becomes of eight columns of a token.
template <Epilogue EPILOGUE, class W, class Out>
DEVICE void finish(Out* out, const W& w, float (&y)[8], float (&up)[8], int token, int column, int num_columns) {
    const size_t at = static_cast<size_t>(token) * num_columns + column;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        y[i] *= w.row_scale(column + i);
        if constexpr (EPILOGUE == SWIGLU) y[i] = silu(y[i]) * up[i] * w.row_scale(num_columns + column + i);
    }
    if constexpr (EPILOGUE == ADD) {
        float before[8];
        load_f32x8(before, out + at);
#pragma unroll
        for (int i = 0; i < 8; i++) y[i] += before[i];
        store_f32x8(out + at, y);
    } else {
        store16(out + at, pack8(y));
    }
}

template <int TOKENS, int STAGES, Epilogue EPILOGUE, class W, class Out>
DEVICE void multiply(Out* out, float* partials, u32* counters, const bf16* x, const W& w, const Operands& of,
                     unsigned char* shared) {
    constexpr int ROW_BYTES = W::ROW_BYTES, W_BYTES = ROWS * ROW_BYTES, STAGE_BYTES = W_BYTES + TOKENS * W::DEPTH * 2;
    const int thread = threadIdx.x, warp = thread / WARP, lane = thread % WARP;
    const int tile = blockIdx.x, split = blockIdx.y;
    const int num_steps = divide_up(of.size, W::DEPTH), per_split = divide_up(num_steps, of.num_splits);
    const int begin = split * per_split, count = max_of(min_of(begin + per_split, num_steps) - begin, 0);

    const auto load_w = [&](int step) {
        unsigned char* to = shared + step % STAGES * STAGE_BYTES;
#pragma unroll
        for (int i = 0; i < W_BYTES / 16 / THREADS; i++) {
            const int unit = thread + i * THREADS, row = unit / (ROW_BYTES / 16), chunk = unit % (ROW_BYTES / 16);
            const int column = column_of<EPILOGUE>(tile, row), k = (begin + step) * W::DEPTH + chunk * W::PER_CHUNK;
            const bool valid = column < of.num_columns && k < of.size;
            const void* from = w.at(row_of<EPILOGUE>(row, column, of.num_columns), valid ? k : 0, of.size);
            cp_async16(to + row * ROW_BYTES + 16 * chunk_at<ROW_BYTES>(chunk, row), from, valid);
        }
    };
    const auto load_x = [&](int step) {
        constexpr int CHUNKS = W::DEPTH / 8;
        unsigned char* to = shared + step % STAGES * STAGE_BYTES + W_BYTES;
#pragma unroll
        for (int i = 0; i < TOKENS * CHUNKS / THREADS; i++) {
            const int unit = thread + i * THREADS, token = unit / CHUNKS, chunk = unit % CHUNKS;
            const int k = (begin + step) * W::DEPTH + chunk * 8;
            const bool valid = token < of.num_tokens && k < of.size;
            const bf16* from = x + (valid ? static_cast<size_t>(token) * of.size + k : 0);
            cp_async16(to + token * (2 * W::DEPTH) + 16 * W::x_chunk(chunk, token), from, valid);
        }
    };

    const int first_row = warp % 2 * 32, first_step = warp / 2 * (W::STEPS / 2);
    int rows[2][2];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int row = first_row + 16 * (i / 2) + lane / 4 + 8 * (i % 2);
        rows[i / 2][i % 2] = row_of<EPILOGUE>(row, column_of<EPILOGUE>(tile, row), of.num_columns);
    }
    typename W::Scales scales = {}, next_scales = {};
    const auto load_scales = [&](typename W::Scales& to, int step) {
        if (step < count) w.load_scales(to, rows, (begin + step) * W::DEPTH + first_step * 16, of.size);
    };

#pragma unroll
    for (int step = 0; step < STAGES - 1; step++)
        if (step < count) load_w(step);
    load_scales(scales, 0);
    // W is as it was loaded: only what follows depends on other launches.
    wait_for_previous_launch();
#pragma unroll
    for (int step = 0; step < STAGES - 1; step++) {
        if (step < count) load_x(step);
        cp_async_commit();
    }
    float sum[2][TOKENS / 8][4] = {};
    for (int step = 0; step < count; step++) {
        cp_async_wait<STAGES - 2>();
        sync_block();
        if (step + STAGES - 1 < count) {
            load_w(step + STAGES - 1);
            load_x(step + STAGES - 1);
        }
        cp_async_commit();
        const unsigned char* stage = shared + step % STAGES * STAGE_BYTES;
        load_scales(next_scales, step + 1);
        W::template multiply<TOKENS>(sum, stage, stage + W_BYTES, scales, first_row, first_step, lane);
        scales = next_scales;
    }

    // The two halves of the depth come together, token by token.
    sync_block();
    float* sums = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int part = WARPS / 2 - 1; part >= 0; part--) {
        if (warp / 2 == part) {
#pragma unroll
            for (int t = 0; t < 2; t++) {
#pragma unroll
                for (int j = 0; j < TOKENS / 8; j++) {
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const int token = 8 * j + lane % 4 * 2 + i % 2, row = first_row + 16 * t + lane / 4 + i / 2 * 8;
                        float& to = sums[token * STRIDE + row];
                        to = part == 0 ? sum[t][j][i] + to : sum[t][j][i];
                    }
                }
            }
        }
        sync_block();
    }

    constexpr int WIDTH = EPILOGUE == SWIGLU ? ROWS / 2 : ROWS;
    const int num_units = of.num_tokens * (WIDTH / 8);
    if (of.num_splits == 1) {
        for (int unit = thread; unit < num_units; unit += THREADS) {
            const int token = unit / (WIDTH / 8), row = unit % (WIDTH / 8) * 8, column = column_of<EPILOGUE>(tile, row);
            if (column >= of.num_columns) continue;
            float y[8], up[8] = {};
            load_f32x8(y, sums + token * STRIDE + row);
            if constexpr (EPILOGUE == SWIGLU) load_f32x8(up, sums + token * STRIDE + ROWS / 2 + row);
            finish<EPILOGUE>(out, w, y, up, token, column, of.num_columns);
        }
        return;
    }
    const size_t of_split = static_cast<size_t>(gridDim.x) * of.num_tokens * ROWS;
    float* mine = partials + static_cast<size_t>(tile) * of.num_tokens * ROWS;
    for (int unit = thread; unit < of.num_tokens * (ROWS / 8); unit += THREADS) {
        const int token = unit / (ROWS / 8), row = unit % (ROWS / 8) * 8;
        float y[8];
        load_f32x8(y, sums + token * STRIDE + row);
        store_f32x8(mine + split * of_split + token * ROWS + row, y);
    }
    fence_device();
    sync_block();
    u32* last = reinterpret_cast<u32*>(shared);
    if (thread == 0) *last = fetch_add(counters + tile, 1) + 1 == static_cast<u32>(of.num_splits);
    sync_block();
    if (!*last) return;
    fence_device();
    if (thread == 0) counters[tile] = 0;
    const auto add_up = [&](float (&y)[8], int token, int row) {
        for (int i = 0; i < of.num_splits; i++) {
            const float* from = mine + i * of_split + token * ROWS + row;
            const uint4 low = load16_volatile(from), high = load16_volatile(from + 4);
            const u32 words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
            for (int j = 0; j < 8; j++) y[j] += float_of(words[j]);
        }
    };
    for (int unit = thread; unit < num_units; unit += THREADS) {
        const int token = unit / (WIDTH / 8), row = unit % (WIDTH / 8) * 8, column = column_of<EPILOGUE>(tile, row);
        if (column >= of.num_columns) continue;
        float y[8] = {}, up[8] = {};
        add_up(y, token, row);
        if constexpr (EPILOGUE == SWIGLU) add_up(up, token, ROWS / 2 + row);
        finish<EPILOGUE>(out, w, y, up, token, column, of.num_columns);
    }
}

#define bf16_PARAMETERS const bf16* weights
#define bf16_TILES Bf16Tiles{weights}
#define fp8_PARAMETERS const fp8* weights, const float* scales
#define fp8_TILES Fp8Tiles{weights, scales}
#define q8_PARAMETERS const signed char* weights, const unsigned short* scales
#define q8_TILES Q8Tiles{weights, scales}
#define q4_0_PARAMETERS const unsigned char* weights, const unsigned short* scales
#define q4_0_TILES Q4Tiles<false>{weights, scales, nullptr}
#define q4_1_PARAMETERS const unsigned char* weights, const unsigned short* scales, const unsigned short* mins
#define q4_1_TILES Q4Tiles<true>{weights, scales, mins}
#define SKINNY_KERNEL(format, TOKENS, STAGES, name, EPILOGUE, Out)                                                    \
    KERNEL_RESIDENT(skinny_##format##_##TOKENS##_##name, 128, 2, Out* out, float* partials, u32* counters, const bf16* x, \
                    format##_PARAMETERS, int num_tokens, int num_columns, int size, int num_splits) {                \
        DYNAMIC_SHARED(shared);                                                                                      \
        const Operands of = {num_tokens, num_columns, size, num_splits};                                             \
        multiply<TOKENS, STAGES, EPILOGUE>(out, partials, counters, x, format##_TILES, of, shared);                   \
    }
#define SKINNY_KERNELS(format, TOKENS, STAGES)                     \
    SKINNY_KERNEL(format, TOKENS, STAGES, store_bf16, STORE, bf16) \
    SKINNY_KERNEL(format, TOKENS, STAGES, add_f32, ADD, float)     \
    SKINNY_KERNEL(format, TOKENS, STAGES, swiglu, SWIGLU, bf16)
// Of more values in a stage fewer stages have room.
#define SKINNY_FORMAT(format, STAGES_OF_64) \
    SKINNY_KERNELS(format, 16, 6)           \
    SKINNY_KERNELS(format, 32, 6)           \
    SKINNY_KERNELS(format, 64, STAGES_OF_64)

// The engine compiles each format by itself, side by side: all of them take a compiler long.
#if !defined(ONLY_BF16) && !defined(ONLY_FP8) && !defined(ONLY_Q8) && !defined(ONLY_Q4_0) && !defined(ONLY_Q4_1)
#define ALL
#endif
#if defined(ONLY_BF16) || defined(ALL)
SKINNY_FORMAT(bf16, 6)
#endif
#if defined(ONLY_FP8) || defined(ALL)
SKINNY_FORMAT(fp8, 4)
#endif
#if defined(ONLY_Q8) || defined(ALL)
SKINNY_FORMAT(q8, 4)
#endif
#if defined(ONLY_Q4_0) || defined(ALL)
SKINNY_FORMAT(q4_0, 4)
#endif
#if defined(ONLY_Q4_1) || defined(ALL)
SKINNY_FORMAT(q4_1, 4)
#endif
