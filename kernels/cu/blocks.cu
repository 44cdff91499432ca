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
