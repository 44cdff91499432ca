// A token from each row of logits: what kernels/src/sampling does on a CPU, in the same order and with the same noise.
//
// Penalties, bias, allowed and banned ids; then min-p, top-k and top-p, each of which keeps a beginning of the vocabulary in
// descending order (equal logits by ascending id); then argmax(logit / temperature + Gumbel noise) of what is kept, the
// noise from Philox with key = seed and counter = (id / 4, position, choice, 0). Temperature 0 takes the largest logit.
//
// One block of 1024 threads per answer; a pass over a row comes from the L2 cache. The last token kept is found without a
// sort: counts (or sums of integer weights, which add up to the same in any order) of a few levels below the maximum bound
// the search, and four passes over 8 bits of the logits each find the value itself. Then ids decide among equal ones.
//
// status: 0; 1 if a logit is NaN or the largest is not finite; 2 if no token is left. The token is -1 then.

static constexpr int THREADS = 1024;
static constexpr int LEVELS = 8;
// No noise is larger, and so much is certainly lost by rounding.
static constexpr float MAX_NOISE = 16.636f;

// Lists are parts of arrays that all rows share. Each token is in a list once.
struct SampleRow {
    // Which row of the logits; -1 answers nothing.
    int logits_row;
    float temperature;
    int top_k;
    float top_p, min_p;
    float repetition, presence, frequency;
    u32 seed_low, seed_high, position, choice;
    int first_used, num_used;
    int first_bias, num_bias;
    // -1 ids allow everything.
    int first_allowed, num_allowed;
    int first_banned, num_banned;
};
struct UsedToken { int token, in_prompt, in_output; };
struct Bias { int token; float bias; };

// Tokens with a larger ordered logit, and those of this one up to an id.
struct Cut {
    u32 logit, last;
    METHOD bool keeps(u32 token, u32 x) const { return x > logit || (x == logit && token <= last); }
};

struct Shared {
    u64 scratch[THREADS / WARP];
    u64 histogram[256];
    // What a pass has found: the bits of the value so far, and the sum before it.
    u64 sum_before;
    u32 value;
    int found;
    u32 counts[THREADS / WARP];
    u32 last;
};

template <class F>
DEVICE u64 reduce(u64 x, F f, Shared& shared) {
    // What was read of the last reduction is read.
    sync_block();
    return block_reduce(x, f, shared.scratch);
}

// The row's largest logit and the lowest id that has it, as a key.
DEVICE u64 best_of(const float* row, int vocab_size, Shared& shared) {
    u64 best = 0;
    for_each_logit<THREADS>(row, vocab_size, [&](u32 token, float logit) { best = Max{}(best, key_of(logit, token)); });
    return reduce(best, Max{}, shared);
}

// Weights e^((logit - maximum) / temperature) in units of 2⁻⁴⁶, so that 2¹⁶ tokens of weight 1 fit.
struct Weigh {
    float maximum, inverse;
    METHOD u64 operator()(float logit) const {
        return static_cast<u64>(exp_exact(mul_rounded(add_rounded(logit, -maximum), inverse)) * 70368744177664.0f);
    }
};
struct One {
    METHOD u64 operator()(float) const { return 1; }
};

// Sums of what candidates weigh: of all that `cut` keeps, and of those above levels at distances below the maximum.
template <class W>
DEVICE void sum_levels(u64 (&sums)[LEVELS + 1], const float* row, int vocab_size, const Cut& cut, const W& weigh,
                       const float (&levels)[LEVELS], Shared& shared) {
#pragma unroll
    for (int i = 0; i <= LEVELS; i++) sums[i] = 0;
    for_each_logit<THREADS>(row, vocab_size, [&](u32 token, float logit) {
        if (!cut.keeps(token, ordered_bits(logit)) || logit == -infinity()) return;
        const u64 weight = weigh(logit);
        sums[LEVELS] += weight;
#pragma unroll
        for (int i = 0; i < LEVELS; i++) sums[i] += logit > levels[i] ? weight : 0;
    });
#pragma unroll
    for (int i = 0; i <= LEVELS; i++) sums[i] = reduce(sums[i], Sum{}, shared);
}

// Warp 0 looks for the bin, from the largest logits on, at which the sum reaches `target`.
DEVICE void find_bin(double target, int shift, Shared& shared) {
    const int lane = threadIdx.x, top = 255 - 8 * lane;
    u64 mine = 0;
    for (int i = 0; i < 8; i++) mine += shared.histogram[top - i];
    u64 until = mine;
    for (int lanes = 1; lanes < WARP; lanes *= 2) {
        const u32 low = shuffle_up(static_cast<u32>(until), lanes), high = shuffle_up(static_cast<u32>(until >> 32), lanes);
        if (lane >= lanes) until += static_cast<u64>(high) << 32 | low;
    }
    u64 sum = shared.sum_before + until - mine;
    // Sums only grow, so the first lane that reaches the target is the one that starts below it.
    const bool reaches = sum + mine > 0 && static_cast<double>(sum + mine) >= target;
    const bool before = sum > 0 && static_cast<double>(sum) >= target;
    sync_warp();
    if (reaches && !before) {
        int bin = top;
        while (sum + shared.histogram[bin] == 0 || static_cast<double>(sum + shared.histogram[bin]) < target)
            sum += shared.histogram[bin--];
        shared.sum_before = sum;
        shared.value |= static_cast<u32>(bin) << shift;
        shared.found = shift + 1;
    }
}

// The id of the `wanted`-th token, from 1 on, with this ordered logit.
DEVICE u32 find_equal(const float* row, int vocab_size, u32 value, u32 wanted, Shared& shared) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int per_thread = divide_up(vocab_size, THREADS), first = threadIdx.x * per_thread;
    const int end = min_of(first + per_thread, vocab_size);
    u32 mine = 0;
    for (int token = first; token < end; token++) mine += ordered_bits(row[token]) == value;
    u32 until = mine;
    for (int lanes = 1; lanes < WARP; lanes *= 2) {
        const u32 other = shuffle_up(until, lanes);
        if (lane >= lanes) until += other;
    }
    if (lane == WARP - 1) shared.counts[warp] = until;
    sync_block();
    for (int i = 0; i < warp; i++) until += shared.counts[i];
    if (until >= wanted && until - mine < wanted) {
        u32 left = wanted - (until - mine);
        for (int token = first; left > 0; token++) {
            left -= ordered_bits(row[token]) == value;
            shared.last = token;
        }
    }
    sync_block();
    return shared.last;
}

// The first candidate, in order, at which the sum of weights reaches `target`, becomes the end of `cut`; nothing changes if
// none does. `above`: no candidate up to this ordered logit is needed for that.
template <class W>
DEVICE void cut_at(Cut& cut, const float* row, int vocab_size, double target, u32 above, const W& weigh, Shared& shared) {
    sync_block();
    if (threadIdx.x == 0) {
        shared.sum_before = 0;
        shared.value = 0;
        shared.found = 0;
    }
    u32 known = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        for (int bin = threadIdx.x; bin < 256; bin += THREADS) shared.histogram[bin] = 0;
        sync_block();
        const u32 value = shared.value;
        for_each_logit<THREADS>(row, vocab_size, [&](u32 token, float logit) {
            const u32 x = ordered_bits(logit);
            if (x <= above || (x & known) != value || logit == -infinity() || !cut.keeps(token, x)) return;
            atomic_add(shared.histogram + (x >> shift & 255), weigh(logit));
        });
        sync_block();
        if (threadIdx.x < WARP) find_bin(target, shift, shared);
        sync_block();
        // Another value in each pass: nobody has to wait before the next one is written.
        if (shared.found != shift + 1) return;
        known |= 255u << shift;
    }
    const u32 value = shared.value;
    const u64 before = shared.sum_before, equal = shared.histogram[value & 255], each = weigh(float_of_ordered(value));
    // All candidates with this logit weigh the same: how many of them?
    u64 wanted = 1;
    if (static_cast<double>(before) < target) {
        const double estimate = (target - static_cast<double>(before)) / static_cast<double>(each);
        wanted = static_cast<u64>(estimate);
        wanted = wanted > 1 ? wanted - 1 : 1;
        while (wanted * each < equal && static_cast<double>(before + wanted * each) < target) wanted++;
    }
    if (wanted * each < equal) cut = Cut{value, find_equal(row, vocab_size, value, static_cast<u32>(wanted), shared)};
    else if (value > cut.logit) cut = Cut{value, 0xffffffffu};
}

DEVICE Cut filter(const float* row, int vocab_size, u64 best, const SampleRow& options, Shared& shared) {
    const float maximum = logit_of(best), inverse = 1.0f / options.temperature;
    // Ordered logits of numbers are above 0.
    Cut cut = {0, 0xffffffffu};
    if (options.min_p > 0.0f) {
        // p ≥ min_p · p_max in logits.
        const float floor = add_rounded(maximum, mul_rounded(log_exact(options.min_p), options.temperature));
        // min_p = 1 with rounding must not exclude the best itself.
        if (floor > maximum) return Cut{static_cast<u32>(best >> 32), token_of(best)};
        cut.logit = ordered_bits(floor);
    }
    u64 sums[LEVELS + 1];
    if (options.top_k > 0 && options.top_k < vocab_size) {
        const float distances[LEVELS] = {0.25f, 1.0f, 2.0f, 4.0f, 6.0f, 9.0f, 12.0f, 16.0f};
        float levels[LEVELS];
#pragma unroll
        for (int i = 0; i < LEVELS; i++) levels[i] = maximum - distances[i];
        sum_levels(sums, row, vocab_size, cut, One{}, levels, shared);
        const u64 k = options.top_k;
        if (sums[LEVELS] > k) {
            u32 above = 0;
#pragma unroll
            for (int i = LEVELS - 1; i >= 0; i--) above = sums[i] >= k ? ordered_bits(levels[i]) : above;
            cut_at(cut, row, vocab_size, static_cast<double>(k), above, One{}, shared);
        }
    }
    if (options.top_p < 1.0f) {
        const Weigh weigh = {maximum, inverse};
        const float distances[LEVELS] = {0.5f, 1.0f, 2.0f, 3.0f, 4.5f, 6.5f, 9.0f, 12.0f};
        float levels[LEVELS];
#pragma unroll
        for (int i = 0; i < LEVELS; i++) levels[i] = maximum - distances[i] * options.temperature;
        sum_levels(sums, row, vocab_size, cut, weigh, levels, shared);
        const double needed = static_cast<double>(options.top_p) * static_cast<double>(sums[LEVELS]);
        u32 above = 0;
#pragma unroll
        for (int i = LEVELS - 1; i >= 0; i--)
            above = sums[i] > 0 && static_cast<double>(sums[i]) >= needed ? ordered_bits(levels[i]) : above;
        cut_at(cut, row, vocab_size, needed, above, weigh, shared);
    }
    return cut;
}

// −ln(−ln u) of random bits.
DEVICE float gumbel(u32 bits) {
    const float u = mul_rounded(add_rounded(static_cast<float>(bits >> 9), 0.5f), float_of(0x34000000u));
    return -log_exact(-log_exact(u));
}

DEVICE uint4 noise_bits(const SampleRow& options, u32 quad) {
    const u64 seed = static_cast<u64>(options.seed_high) << 32 | options.seed_low;
    return philox(seed, uint4{quad, options.position, options.choice, 0});
}

// The key of the winner; its value is not finite if the scaled maximum overflows.
DEVICE u64 noisy_best(const float* row, int vocab_size, u64 best, const Cut& cut, const SampleRow& options,
                      Shared& shared) {
    const float inverse = 1.0f / options.temperature;
    const u32 best_token = token_of(best);
    const uint4 best_bits = noise_bits(options, best_token / 4);
    const u32 words[4] = {best_bits.x, best_bits.y, best_bits.z, best_bits.w};
    u32 word = words[0];
#pragma unroll
    for (int i = 1; i < 4; i++) word = best_token % 4 == i ? words[i] : word;
    float leader = add_rounded(mul_rounded(logit_of(best), inverse), gumbel(word));
    u64 winner = key_of(leader, best_token);
    if (!is_finite(leader)) return winner;
    for (int quad = threadIdx.x; quad * 4 < vocab_size; quad += THREADS) {
        float x[4];
        bool may_win = false;
        // A little below: more than all roundings of the comparison come to.
        const float bar = leader - MAX_NOISE - (0.01f + float_of(bits_of(leader) & 0x7fffffffu) * float_of(0x35000000u));
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const u32 token = 4 * quad + i;
            x[i] = token < static_cast<u32>(vocab_size) ? row[token] : -infinity();
            may_win |= mul_rounded(x[i], inverse) >= bar && cut.keeps(token, ordered_bits(x[i]));
        }
        if (!may_win) continue;
        const uint4 bits = noise_bits(options, quad);
        const u32 words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const u32 token = 4 * quad + i;
            const float value = add_rounded(mul_rounded(x[i], inverse), gumbel(words[i]));
            if (!cut.keeps(token, ordered_bits(x[i]))) continue;
            leader = max_of(leader, value);
            winner = Max{}(winner, key_of(value, token));
        }
    }
    return reduce(winner, Max{}, shared);
}

// Penalties, bias, allowed and banned ids, on a copy of the row.
DEVICE void adjust(float* adjusted, const float* raw, int vocab_size, const SampleRow& options, const UsedToken* used,
                   const Bias* bias, const int* allowed, const int* banned) {
    const bool all = options.num_allowed < 0;
    for (int token = threadIdx.x; token < vocab_size; token += THREADS) adjusted[token] = all ? raw[token] : -infinity();
    sync_block();
    // What is excluded stays so whatever is done to it, so this may come before the others.
    for (int i = threadIdx.x; i < options.num_allowed; i += THREADS) {
        const int token = allowed[options.first_allowed + i];
        adjusted[token] = raw[token];
    }
    sync_block();
    for (int i = threadIdx.x; i < options.num_used; i += THREADS) {
        const UsedToken use = used[options.first_used + i];
        float logit = adjusted[use.token];
        if (use.in_prompt != 0 || use.in_output > 0)
            logit = logit > 0.0f ? logit / options.repetition : mul_rounded(logit, options.repetition);
        if (use.in_output > 0) {
            logit = add_rounded(logit, -mul_rounded(options.frequency, static_cast<float>(use.in_output)));
            logit = add_rounded(logit, -options.presence);
        }
        adjusted[use.token] = logit;
    }
    sync_block();
    for (int i = threadIdx.x; i < options.num_bias; i += THREADS) {
        const Bias b = bias[options.first_bias + i];
        adjusted[b.token] = add_rounded(adjusted[b.token], b.bias);
    }
    sync_block();
    for (int i = threadIdx.x; i < options.num_banned; i += THREADS)
        adjusted[banned[options.first_banned + i]] = -infinity();
    sync_block();
}

DEVICE void answer(int* tokens, int* status, int token, int what) {
    if (threadIdx.x != 0) return;
    tokens[blockIdx.x] = token;
    status[blockIdx.x] = what;
}

// tokens, status i32 [n]; workspace f32 [n,V], of which only rows with lists are touched; logits f32 [R,V]; rows [n].
KERNEL(sample, 1024, int* tokens, int* status, float* workspace, const float* logits, const SampleRow* rows,
       const UsedToken* used, const Bias* bias, const int* allowed, const int* banned, int vocab_size) {
    wait_for_previous_launch();
    __shared__ Shared shared;
    const SampleRow options = rows[blockIdx.x];
    if (options.logits_row < 0) return answer(tokens, status, -1, 0);
    const float* row = logits + static_cast<size_t>(options.logits_row) * vocab_size;
    u64 best = best_of(row, vocab_size, shared);
    if (!is_finite(logit_of(best))) return answer(tokens, status, -1, 1);
    if (options.num_used > 0 || options.num_bias > 0 || options.num_allowed >= 0 || options.num_banned > 0) {
        float* adjusted = workspace + static_cast<size_t>(blockIdx.x) * vocab_size;
        adjust(adjusted, row, vocab_size, options, used, bias, allowed, banned);
        row = adjusted;
        best = best_of(row, vocab_size, shared);
        if (!is_finite(logit_of(best))) return answer(tokens, status, -1, 2);
    }
    if (options.temperature == 0.0f) return answer(tokens, status, static_cast<int>(token_of(best)), 0);
    Cut cut = {0, 0xffffffffu};
    if (options.top_k != 0 || options.top_p < 1.0f || options.min_p > 0.0f)
        cut = filter(row, vocab_size, best, options, shared);
    best = noisy_best(row, vocab_size, best, cut, options, shared);
    const bool good = is_finite(logit_of(best));
    answer(tokens, status, good ? static_cast<int>(token_of(best)) : -1, good ? 0 : 2);
}
