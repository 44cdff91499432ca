// A sum over the ranks of one machine in one shot: each reads what all others have, as TensorRT-LLM's and vLLM's custom
// all-reduce do. For small tensors, where a ring's steps would cost more than reading world_size times as much.
//
// A block copies its part into the rank's buffer, tells the same block of every rank, waits for theirs, and adds up all
// buffers in the order of ranks: every rank has the same bits. Buffers are double: a block that has met its peers at epoch
// e + 1 knows that their launches of epoch e are over, so what it writes at e + 2 is read by nobody any more. Epochs are
// counted on the device, one for each block, so that a captured launch can be replayed. That holds only if all blocks of a
// launch are at the same epoch, so every launch of a group has the same grid, however little there is to add.
//
// A wait ends when `abort` is set, which is looked at now and then, for it lies on the host. The output is then worthless, and the
// block stops for good: it neither publishes anything any more, so that no rank takes nonsense for a sum, nor touches the memory of
// ranks that may be gone. The grid has at most as many blocks as can be resident at once.
//
//   buffers u64 [world_size]: addresses of each rank's 2 · capacity bytes
//   flags   u64 [world_size]: addresses of each rank's u32 [blocks][world_size], zero before the first launch
//   epochs  u32 [2][blocks] of this rank: epochs, and whether a block has stopped; zero before the first launch
//   count   a multiple of 8; count values fit capacity bytes

DEVICE void add16(float (&sum)[8], const bf16*, uint4 x) {
    float values[8];
    unpack8(values, x);
#pragma unroll
    for (int i = 0; i < 8; i++) sum[i] += values[i];
}
DEVICE void add16(float (&sum)[4], const float*, uint4 x) {
    sum[0] += float_of(x.x);
    sum[1] += float_of(x.y);
    sum[2] += float_of(x.z);
    sum[3] += float_of(x.w);
}
DEVICE uint4 rounded(const float (&sum)[8]) { return pack8(sum); }
DEVICE uint4 rounded(const float (&sum)[4]) {
    return uint4{bits_of(sum[0]), bits_of(sum[1]), bits_of(sum[2]), bits_of(sum[3])};
}

template <class T>
DEVICE void all_reduce(T* out, const T* input, const u64* buffers, const u64* flags, u32* epochs, const u32* abort, int rank,
                       int world_size, int count, u64 capacity) {
    constexpr int EACH = 16 / sizeof(T);
    u32* stopped = epochs + gridDim.x + blockIdx.x;
    if (*stopped != 0) return;
    const u32 epoch = epochs[blockIdx.x] + 1;
    const u64 half = (epoch & 1) * capacity;
    const int first = (blockIdx.x * blockDim.x + threadIdx.x) * EACH, step = gridDim.x * blockDim.x * EACH;

    T* mine = reinterpret_cast<T*>(buffers[rank] + half);
    for (int i = first; i < count; i += step) store16(mine + i, load16(input + i));
    fence_system();
    sync_block();
    const int peer = threadIdx.x;
    if (peer < world_size) {
        store_release(reinterpret_cast<u32*>(flags[peer]) + blockIdx.x * world_size + rank, epoch);
        const u32* arrived = reinterpret_cast<const u32*>(flags[rank]) + blockIdx.x * world_size + peer;
        // By difference, so that epochs may wrap around.
        for (u32 spins = 1; static_cast<int>(load_acquire(arrived) - epoch) < 0; spins++) {
            if (spins % 64 == 0 && load_acquire(abort) != 0) {
                *stopped = 1;
                break;
            }
            spin_pause();
        }
    }
    sync_block();
    if (load_acquire(stopped) != 0) return;
    for (int i = first; i < count; i += step) {
        float sum[EACH] = {};
        for (int r = 0; r < world_size; r++)
            add16(sum, out, load16_volatile(reinterpret_cast<const T*>(buffers[r] + half) + i));
        store16(out + i, rounded(sum));
    }
    if (threadIdx.x == 0) epochs[blockIdx.x] = epoch;
}

KERNEL_RESIDENT(one_shot_all_reduce_bf16, 512, 2, bf16* out, const bf16* input, const u64* buffers, const u64* flags, u32* epochs,
       const u32* abort, int rank, int world_size, int count, u64 capacity) {
    wait_for_previous_launch();
    all_reduce(out, input, buffers, flags, epochs, abort, rank, world_size, count, capacity);
}

KERNEL_RESIDENT(one_shot_all_reduce_f32, 512, 2, float* out, const float* input, const u64* buffers, const u64* flags, u32* epochs,
       const u32* abort, int rank, int world_size, int count, u64 capacity) {
    wait_for_previous_launch();
    all_reduce(out, input, buffers, flags, epochs, abort, rank, world_size, count, capacity);
}
