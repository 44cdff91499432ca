// Rotary position embedding (Su et al., "RoFormer", 2021; halves rotated against each other as in GPT-NeoX and Hugging
// Face) and the write to the KV cache.
//
// qkv bf16 [T, (H + 2K)·D]: queries are rotated in place; keys are rotated into k_cache, values copied into v_cache, both
// [blocks][K][16][D], at slot_mapping i32 [T] (block · 16 + slot; -1 writes nothing). The tables are f32
// [max_position][D/2]. Keys and values in qkv stay as they are.
//
// One block per token. A thread rotates 8 pairs: two loads and two stores of 16 bytes; or it copies 8 values.

DEVICE void store_kv8(bf16* p, const float (&x)[8]) { store16(p, pack8(x)); }
DEVICE void store_kv8(fp8* p, const float (&x)[8]) {
    u32 words[2] = {};
#pragma unroll
    for (int i = 0; i < 8; i++) words[i / 4] |= static_cast<u32>(fp8_of(x[i])) << 8 * (i % 4);
    store8(p, uint2{words[0], words[1]});
}

template <class Kv>
DEVICE void rope_and_store(bf16* qkv, Kv* k_cache, Kv* v_cache, const float* cos_table, const float* sin_table,
                           const int* positions, const int* slot_mapping, int num_heads, int num_kv_heads,
                           int head_dim) {
    const int token = blockIdx.x, half = head_dim / 2, slot = slot_mapping[token];
    bf16* row = qkv + static_cast<size_t>(token) * (num_heads + 2 * num_kv_heads) * head_dim;
    const float* cos_row = cos_table + static_cast<size_t>(positions[token]) * half;
    const float* sin_row = sin_table + static_cast<size_t>(positions[token]) * half;
    const auto in_cache = [&](int kv_head) {
        const size_t unit = static_cast<size_t>(slot / BLOCK_SIZE) * num_kv_heads + kv_head;
        return (unit * BLOCK_SIZE + slot % BLOCK_SIZE) * head_dim;
    };

    const int per_head = half / 8, num_rotated = num_heads + (slot >= 0 ? num_kv_heads : 0);
    for (int i = threadIdx.x; i < num_rotated * per_head; i += blockDim.x) {
        const int head = i / per_head, d = i % per_head * 8;
        bf16* at = row + head * head_dim + d;
        float a[8], b[8], c[8], s[8];
        unpack8(a, load16(at));
        unpack8(b, load16(at + half));
        load_f32x8(c, cos_row + d);
        load_f32x8(s, sin_row + d);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const float x = a[j], y = b[j];
            a[j] = x * c[j] - y * s[j];
            b[j] = y * c[j] + x * s[j];
        }
        if (head < num_heads) {
            store16(at, pack8(a));
            store16(at + half, pack8(b));
        } else {
            Kv* to = k_cache + in_cache(head - num_heads) + d;
            store_kv8(to, a);
            store_kv8(to + half, b);
        }
    }

    if (slot < 0) return;
    const bf16* values = row + (num_heads + num_kv_heads) * head_dim;
    for (int i = threadIdx.x * 8; i < num_kv_heads * head_dim; i += blockDim.x * 8) {
        float x[8];
        unpack8(x, load16(values + i));
        store_kv8(v_cache + in_cache(i / head_dim) + i % head_dim, x);
    }
}

KERNEL(rope_and_store_kv_bf16, 512, bf16* qkv, bf16* k_cache, bf16* v_cache, const float* cos_table,
       const float* sin_table, const int* positions, const int* slot_mapping, int num_heads, int num_kv_heads,
       int head_dim) {
    wait_for_previous_launch();
    rope_and_store(qkv, k_cache, v_cache, cos_table, sin_table, positions, slot_mapping, num_heads, num_kv_heads,
                   head_dim);
}

KERNEL(rope_and_store_kv_fp8, 512, bf16* qkv, fp8* k_cache, fp8* v_cache, const float* cos_table,
       const float* sin_table, const int* positions, const int* slot_mapping, int num_heads, int num_kv_heads,
       int head_dim) {
    wait_for_previous_launch();
    rope_and_store(qkv, k_cache, v_cache, cos_table, sin_table, positions, slot_mapping, num_heads, num_kv_heads,
                   head_dim);
}
