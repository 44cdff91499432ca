// Rows of the embedding table, and the rows of hidden that logits are wanted of.
//
// embed: hidden f32 [T,E] = table bf16 [vocab_end - vocab_begin, E] at token_ids i32 [T]. An id of -1 - r stands for drawn[r], i32:
// what row r of the draws of the step before came to. With a vocabulary that is split over ranks, an id of another rank gives a row of
// zeros: the ranks' rows are summed afterwards.
//
// One block per token; a thread moves 8 values. Reads 2·E and writes 4·E bytes a token.

KERNEL(embed, 512, float* hidden, const bf16* table, const int* token_ids, const int* drawn, int hidden_size, int vocab_begin,
       int vocab_end) {
    wait_for_previous_launch();
    const int given = token_ids[blockIdx.x];
    const int id = given >= 0 ? given : drawn[-1 - given];
    const bool ours = id >= vocab_begin && id < vocab_end;
    float* row = hidden + static_cast<size_t>(blockIdx.x) * hidden_size;
    const bf16* from = table + static_cast<size_t>(ours ? id - vocab_begin : 0) * hidden_size;
    for (int e = threadIdx.x * 8; e < hidden_size; e += blockDim.x * 8) {
        float x[8] = {};
        if (ours) unpack8(x, load16(from + e));
        store_f32x8(row + e, x);
    }
}
