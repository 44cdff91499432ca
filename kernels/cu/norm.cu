// RMSNorm (Zhang and Sennrich, "Root mean square layer normalization", 2019) of the residual stream, and adding to it.
//
//   rms_norm:         out bf16 [T,E] = weight · hidden / sqrt(mean(hidden²) + epsilon), hidden f32 [T,E]
//   add_rms_norm_*:   hidden += x [T,E] first
//   gather_rms_norm:  out bf16 [R,E] of the rows of hidden that `rows` i32 [R] lists; a negative one gives zeros
//   add_bias_*:       x [T,N] += bias bf16 [N], x in bf16 (a layer's output) or f32 (the residual stream)
//
// One block per row, 8 values a thread and turn. The second pass over a row finds it in the L1 cache.

DEVICE void normalize(bf16* out, const float* row, const bf16* weight, int hidden_size, float epsilon, float sum,
                      float* scratch) {
    sum = block_reduce(sum, Sum{}, scratch);
    const float scale = rsqrt_exact(sum / hidden_size + epsilon);
    for (int e = threadIdx.x * 8; e < hidden_size; e += blockDim.x * 8) {
        float x[8], w[8];
        load_f32x8(x, row + e);
        unpack8(w, load16(weight + e));
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] *= scale * w[i];
        store16(out + e, pack8(x));
    }
}

DEVICE float sum_of_squares(const float (&x)[8]) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) sum += x[i] * x[i];
    return sum;
}

DEVICE void norm_of_row(bf16* out, const float* row, const bf16* weight, int hidden_size, float epsilon,
                        float* scratch) {
    float sum = 0.0f;
    for (int e = threadIdx.x * 8; e < hidden_size; e += blockDim.x * 8) {
        float x[8];
        load_f32x8(x, row + e);
        sum += sum_of_squares(x);
    }
    normalize(out, row, weight, hidden_size, epsilon, sum, scratch);
}

KERNEL(rms_norm, 512, bf16* out, const float* hidden, const bf16* weight, int hidden_size, float epsilon) {
    wait_for_previous_launch();
    __shared__ float scratch[16];
    const size_t at = static_cast<size_t>(blockIdx.x) * hidden_size;
    norm_of_row(out + at, hidden + at, weight, hidden_size, epsilon, scratch);
}

KERNEL(gather_rms_norm, 512, bf16* out, const float* hidden, const int* rows, const bf16* weight, int hidden_size,
       float epsilon) {
    wait_for_previous_launch();
    __shared__ float scratch[16];
    const int row = rows[blockIdx.x];
    bf16* to = out + static_cast<size_t>(blockIdx.x) * hidden_size;
    if (row < 0) {
        for (int e = threadIdx.x * 8; e < hidden_size; e += blockDim.x * 8) store16(to + e, uint4{0, 0, 0, 0});
        return;
    }
    norm_of_row(to, hidden + static_cast<size_t>(row) * hidden_size, weight, hidden_size, epsilon, scratch);
}

DEVICE void load_row(float (&x)[8], const bf16* p) { unpack8(x, load16(p)); }
DEVICE void load_row(float (&x)[8], const float* p) { load_f32x8(x, p); }

// Each thread reads back only what it wrote, so the passes need no barrier of their own.
template <class X>
DEVICE void add_then_norm(bf16* out, float* hidden, const X* x, const bf16* weight, int hidden_size, float epsilon,
                          float* scratch) {
    const size_t at = static_cast<size_t>(blockIdx.x) * hidden_size;
    float* row = hidden + at;
    float sum = 0.0f;
    for (int e = threadIdx.x * 8; e < hidden_size; e += blockDim.x * 8) {
        float a[8], b[8];
        load_f32x8(a, row + e);
        load_row(b, x + at + e);
#pragma unroll
        for (int i = 0; i < 8; i++) a[i] += b[i];
        store_f32x8(row + e, a);
        sum += sum_of_squares(a);
    }
    normalize(out + at, row, weight, hidden_size, epsilon, sum, scratch);
}

KERNEL(add_rms_norm_bf16, 512, bf16* out, float* hidden, const bf16* x, const bf16* weight, int hidden_size,
       float epsilon) {
    wait_for_previous_launch();
    __shared__ float scratch[16];
    add_then_norm(out, hidden, x, weight, hidden_size, epsilon, scratch);
}

KERNEL(add_rms_norm_f32, 512, bf16* out, float* hidden, const float* x, const bf16* weight, int hidden_size,
       float epsilon) {
    wait_for_previous_launch();
    __shared__ float scratch[16];
    add_then_norm(out, hidden, x, weight, hidden_size, epsilon, scratch);
}

DEVICE void store_row(bf16* p, const float (&x)[8]) { store16(p, pack8(x)); }
DEVICE void store_row(float* p, const float (&x)[8]) { store_f32x8(p, x); }

template <class X>
DEVICE void add_to_row(X* x, const bf16* bias, int num_columns) {
    const int n = (blockIdx.y * blockDim.x + threadIdx.x) * 8;
    if (n >= num_columns) return;
    X* at = x + static_cast<size_t>(blockIdx.x) * num_columns + n;
    float a[8], b[8];
    load_row(a, at);
    load_row(b, bias + n);
#pragma unroll
    for (int i = 0; i < 8; i++) a[i] += b[i];
    store_row(at, a);
}

KERNEL(add_bias_bf16, 256, bf16* x, const bf16* bias, int num_columns) {
    wait_for_previous_launch();
    add_to_row(x, bias, num_columns);
}

KERNEL(add_bias_f32, 256, float* x, const bf16* bias, int num_columns) {
    wait_for_previous_launch();
    add_to_row(x, bias, num_columns);
}
