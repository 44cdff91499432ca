// The columns of all ranks side by side: logits f32 [R,V] from what a gather left, one rank's [R, its columns] after another.
//
// starts i32 [P+1]: where each rank's columns begin in a row, and V. A rank's part takes `part_values` f32, of which the first
// R · its columns count. One thread a value: reads and writes 4 bytes each.

KERNEL(join_columns, 256, float* out, const float* parts, const int* starts, u64 part_values, int world_size, int num_columns) {
    wait_for_previous_launch();
    const int column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= num_columns) return;
    int owner = 0;
    while (owner + 1 < world_size && starts[owner + 1] <= column) owner++;
    const size_t row = blockIdx.y;
    const int begin = starts[owner], width = starts[owner + 1] - begin;
    out[row * num_columns + column] = parts[owner * part_values + row * width + (column - begin)];
}
