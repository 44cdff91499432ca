// Weights from one format into another; the formats are those of gemv.cu.
//
// dequantize_*: out bf16 [N,K], for products of more tokens than a GEMV takes. A thread makes 8 values.
// quantize_fp8: values e4m3 [N,K] = x bf16 [N,K] / scale, scales f32 [N] = largest |x| of the row / 448. One block per row.

// Where this thread's 8 values are; false beyond the row.
DEVICE bool own_values(size_t& row, int& k, int size) {
    row = blockIdx.x;
    k = (blockIdx.y * blockDim.x + threadIdx.x) * 8;
    return k < size;
}

KERNEL(dequantize_fp8, 256, bf16* out, const fp8* values, const float* scales, int size) {
    wait_for_previous_launch();
    size_t row;
    int k;
    if (!own_values(row, k, size)) return;
    const uint2 packed = stream8(values + row * size + k);
    const uint2 a = bf16x4_of_fp8(packed.x), b = bf16x4_of_fp8(packed.y);
    float x[8];
    unpack8(x, uint4{a.x, a.y, b.x, b.y});
    const float scale = scales[row];
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] *= scale;
    store16(out + row * size + k, pack8(x));
}

KERNEL(dequantize_q8, 256, bf16* out, const signed char* values, const unsigned short* scales, int size) {
    wait_for_previous_launch();
    size_t row;
    int k;
    if (!own_values(row, k, size)) return;
    const uint2 packed = stream8(values + row * size + k);
    const float scale = f32_of_f16(scales[row * (size / 32) + k / 32]);
    float x[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const u32 word = i < 4 ? packed.x : packed.y;
        x[i] = scale * static_cast<signed char>(word >> 8 * (i % 4) & 0xff);
    }
    store16(out + row * size + k, pack8(x));
}

// The quants of 8 values: the low or the high nibbles of half a block's bytes.
DEVICE void load_nibbles(float (&x)[8], const unsigned char* block, int within) {
    const uint2 packed = load8(block + within % 16);
    const int shift = within < 16 ? 0 : 4;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const u32 word = i < 4 ? packed.x : packed.y;
        x[i] = static_cast<float>(word >> (8 * (i % 4) + shift) & 15);
    }
}

KERNEL(dequantize_q4_0, 256, bf16* out, const unsigned char* values, const unsigned short* scales, int size) {
    wait_for_previous_launch();
    size_t row;
    int k;
    if (!own_values(row, k, size)) return;
    const size_t block = row * (size / 32) + k / 32;
    const float scale = f32_of_f16(scales[block]);
    float x[8];
    load_nibbles(x, values + block * 16, k % 32);
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = scale * (x[i] - 8.0f);
    store16(out + row * size + k, pack8(x));
}

KERNEL(dequantize_q4_1, 256, bf16* out, const unsigned char* values, const unsigned short* scales,
       const unsigned short* mins, int size) {
    wait_for_previous_launch();
    size_t row;
    int k;
    if (!own_values(row, k, size)) return;
    const size_t block = row * (size / 32) + k / 32;
    const float scale = f32_of_f16(scales[block]), min = f32_of_f16(mins[block]);
    float x[8];
    load_nibbles(x, values + block * 16, k % 32);
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = scale * x[i] + min;
    store16(out + row * size + k, pack8(x));
}

KERNEL(quantize_fp8, 512, fp8* values, float* scales, const bf16* x, int size) {
    wait_for_previous_launch();
    __shared__ float scratch[16];
    const bf16* row = x + static_cast<size_t>(blockIdx.x) * size;
    float largest = 0.0f;
    for (int k = threadIdx.x * 8; k < size; k += blockDim.x * 8) {
        float a[8];
        unpack8(a, load16(row + k));
#pragma unroll
        for (int i = 0; i < 8; i++) largest = max_of(largest, float_of(bits_of(a[i]) & 0x7fffffffu));
    }
    largest = block_reduce(largest, Max{}, scratch);
    // A row of zeros has the scale 1, and one of tiny numbers a scale whose inverse is finite.
    const float scale = largest > 1e-30f ? largest / 448.0f : 1.0f;
    if (threadIdx.x == 0) scales[blockIdx.x] = scale;
    for (int k = threadIdx.x * 8; k < size; k += blockDim.x * 8) {
        float a[8];
        unpack8(a, load16(row + k));
        u32 words[2] = {};
#pragma unroll
        for (int i = 0; i < 8; i++) words[i / 4] |= static_cast<u32>(fp8_of(a[i] / scale)) << 8 * (i % 4);
        store8(values + static_cast<size_t>(blockIdx.x) * size + k, uint2{words[0], words[1]});
    }
}
