// Log-probabilities under rows of raw logits f32 [R,V]: of a target token with its rank, and of the best tokens. A target of -1 - r
// stands for drawn[r], i32: the token that row r of the draws right before came to. If that is none, nothing is written.
//
// One block of 1024 threads per answer. The best tokens come one pass each, which is next to nothing for the few that
// requests may ask for: the next one is the largest key below the last. Sums are in f32, of at most V/1024 values by each
// thread, then over threads in a fixed order.

static constexpr int THREADS = 1024;

template <class T, class F>
DEVICE T reduce(T x, F f, u64* scratch) {
    // What was read of the last reduction is read.
    sync_block();
    return block_reduce(x, f, reinterpret_cast<T*>(scratch));
}

KERNEL(log_probs, 1024, float* target_log_probs, int* ranks, int* top_tokens, float* top_log_probs, const float* logits,
       const int* rows, const int* targets, const int* drawn, int num_top, int vocab_size) {
    wait_for_previous_launch();
    __shared__ u64 scratch[THREADS / WARP];
    const int given = targets[blockIdx.x];
    const int target = given >= 0 ? given : drawn[-1 - given];
    if (rows[blockIdx.x] < 0 || target < 0) return;
    const float* row = logits + static_cast<size_t>(rows[blockIdx.x]) * vocab_size;
    const float of_target = row[target];

    u64 best = 0;
    for_each_logit<THREADS>(row, vocab_size, [&](u32 token, float logit) { best = Max{}(best, key_of(logit, token)); });
    best = reduce(best, Max{}, scratch);
    const float maximum = logit_of(best);
    float sum = 0.0f;
    u32 larger = 0;
    for_each_logit<THREADS>(row, vocab_size, [&](u32, float logit) {
        sum += exp_exact(logit - maximum);
        larger += logit > of_target;
    });
    const float log_sum = maximum + log_exact(reduce(sum, Sum{}, scratch));
    larger = reduce(larger, Sum{}, scratch);
    if (threadIdx.x == 0) {
        target_log_probs[blockIdx.x] = of_target - log_sum;
        ranks[blockIdx.x] = 1 + static_cast<int>(larger);
    }

    for (int i = 0; i < num_top; i++) {
        const size_t at = static_cast<size_t>(blockIdx.x) * num_top + i;
        if (threadIdx.x == 0) {
            top_tokens[at] = i < vocab_size ? static_cast<int>(token_of(best)) : -1;
            top_log_probs[at] = i < vocab_size ? logit_of(best) - log_sum : -infinity();
        }
        if (i + 1 == num_top) break;
        const u64 last = best;
        best = 0;
        for_each_logit<THREADS>(row, vocab_size, [&](u32 token, float logit) {
            const u64 key = key_of(logit, token);
            if (key < last) best = Max{}(best, key);
        });
        best = reduce(best, Max{}, scratch);
    }
}
