// Whole KV blocks, and weights that nobody trained.
//
// `caches` is an array of device addresses, one of each cache [num_blocks][block_bytes]: the keys and the values of all
// layers go in one launch. Grid: (blocks listed, caches). block_bytes is a multiple of 16.

// pairs i32 [n][2]: from, to. No block is in the list twice but as the source of several.
KERNEL(copy_blocks, 256, const u64* caches, const int* pairs, u64 block_bytes) {
    wait_for_previous_launch();
    unsigned char* cache = reinterpret_cast<unsigned char*>(caches[blockIdx.y]);
    const unsigned char* from = cache + pairs[2 * blockIdx.x] * block_bytes;
    unsigned char* to = cache + pairs[2 * blockIdx.x + 1] * block_bytes;
    for (u64 i = threadIdx.x * 16; i < block_bytes; i += blockDim.x * 16) store16(to + i, load16(from + i));
}

// Fills the blocks listed with a 32-bit pattern: all ones is NaN in bf16, f32 and e4m3.
KERNEL(fill_blocks, 256, const u64* caches, const int* blocks, u64 block_bytes, int pattern) {
    wait_for_previous_launch();
    unsigned char* to = reinterpret_cast<unsigned char*>(caches[blockIdx.y]) + blocks[blockIdx.x] * block_bytes;
    const u32 x = static_cast<u32>(pattern);
    for (u64 i = threadIdx.x * 16; i < block_bytes; i += blockDim.x * 16) store16(to + i, uint4{x, x, x, x});
}

// out bf16 [count], uniform in [-scale, scale): value i depends on (seed, first + i) alone, so that a shard has the values
// it would have in the whole. `first` and `count` are multiples of 8.
KERNEL(fill_random, 256, bf16* out, u64 count, u64 first, u64 seed, float scale) {
    wait_for_previous_launch();
    const u64 stride = static_cast<u64>(gridDim.x) * blockDim.x * 8;
    for (u64 i = (static_cast<u64>(blockIdx.x) * blockDim.x + threadIdx.x) * 8; i < count; i += stride) {
        float x[8];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const u64 counter = (first + i) / 4 + half;
            const uint4 bits = philox(seed, uint4{static_cast<u32>(counter), static_cast<u32>(counter >> 32), 0, 0});
            const u32 words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
            for (int j = 0; j < 4; j++) {
                // 24 bits are exact in f32.
                const float unit = static_cast<float>(words[j] >> 8) * float_of(0x34000000u);
                x[4 * half + j] = mul_rounded(add_rounded(unit, -1.0f), scale);
            }
        }
        store16(out + i, pack8(x));
    }
}

// One step of SplitMix64, as a hash.
DEVICE u64 mix_of(u64 word) {
    word = (word ^ word >> 30) * 0xbf58476d1ce4e5b9ull;
    word = (word ^ word >> 27) * 0x94d049bb133111ebull;
    return word ^ word >> 31;
}

// out bf16 [rows of the grid][cols] = columns from first_col on of rows from first_row on of a random matrix with row_cols columns:
// element e of it is entry (word e / 4 of the sequence that `key` names) >> 16 (e % 4), modulo 4096, of table bf16 [4096]. `cols` is
// a multiple of 8; a thread makes 8 values.
KERNEL(draw_weights, 256, bf16* out, const bf16* table, u64 key, u64 first_row, u64 first_col, u64 row_cols, int cols) {
    wait_for_previous_launch();
    const int k = (blockIdx.y * blockDim.x + threadIdx.x) * 8;
    if (k >= cols) return;
    const u64 first = (first_row + blockIdx.x) * row_cols + first_col + k;
    u32 drawn[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const u64 element = first + i;
        const u64 word = mix_of(key + (element >> 2) * 0x9e3779b97f4a7c15ull);
        drawn[i] = table[word >> 16 * (element & 3) & 4095];
    }
    store16(out + static_cast<size_t>(blockIdx.x) * cols + k,
            uint4{drawn[0] | drawn[1] << 16, drawn[2] | drawn[3] << 16, drawn[4] | drawn[5] << 16, drawn[6] | drawn[7] << 16});
}
