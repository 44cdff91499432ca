// SwiGLU's product (Shazeer, "GLU variants improve transformer", 2020): out bf16 [T,I] = silu(gate) · up, where gate_up
// bf16 [T,2I] has the gates of a token before its ups.
//
// A thread makes 8 values; reads 4·I and writes 2·I bytes a token.

KERNEL(silu_mul, 256, bf16* out, const bf16* gate_up, int intermediate_size) {
    wait_for_previous_launch();
    const int i = (blockIdx.y * blockDim.x + threadIdx.x) * 8;
    if (i >= intermediate_size) return;
    const bf16* row = gate_up + static_cast<size_t>(blockIdx.x) * 2 * intermediate_size;
    float gate[8], up[8];
    unpack8(gate, load16(row + i));
    unpack8(up, load16(row + intermediate_size + i));
#pragma unroll
    for (int j = 0; j < 8; j++) gate[j] = silu(gate[j]) * up[j];
    store16(out + static_cast<size_t>(blockIdx.x) * intermediate_size + i, pack8(gate));
}
