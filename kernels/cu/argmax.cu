// The token with the largest logit of each row of f32 [R,V], the lowest id of equal ones: greedy sampling.
//
// A block looks at a span of a row and raises the row's key, logit before complemented id in 64 bits: the maximum is the
// same in whatever order blocks come. `argmax_finish` turns keys into answers and clears them for the next step, so that
// both launches can be captured. keys u64 [R] are zero before the first.
//
// status: 0, or 1 where a logit is NaN or the largest is not finite; the token is -1 then.

static constexpr int THREADS = 256;
static constexpr int SPAN = 16 * THREADS;

KERNEL(argmax_span, 256, u64* keys, const float* logits, int vocab_size) {
    wait_for_previous_launch();
    __shared__ u64 scratch[THREADS / WARP];
    const float* row = logits + static_cast<size_t>(blockIdx.y) * vocab_size;
    const int first = blockIdx.x * SPAN + threadIdx.x, end = min_of(vocab_size, (blockIdx.x + 1) * SPAN);
    u64 best = 0;
#pragma unroll 8
    for (int token = first; token < end; token += THREADS)
        best = Max{}(best, key_of(row[token], token));
    best = block_reduce(best, Max{}, scratch);
    if (threadIdx.x == 0) atomic_max(keys + blockIdx.y, best);
}

KERNEL(argmax_finish, 256, int* tokens, int* status, u64* keys, int num_rows) {
    wait_for_previous_launch();
    const int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= num_rows) return;
    const u64 key = keys[row];
    const bool good = is_finite(logit_of(key));
    tokens[row] = good ? static_cast<int>(token_of(key)) : -1;
    status[row] = good ? 0 : 1;
    keys[row] = 0;
}
