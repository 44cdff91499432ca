//! What ranks have column by column, put together.

use super::{Address, Arg, Launch};

/// Parts of rows, one rank's after another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ColumnParts {
    /// f32 [P][part values].
    pub parts: Address,
    /// i32 [P+1]: where each rank's columns begin, and how many there are.
    pub starts: Address,
    /// Values from one rank's part to the next one's; the first R · its columns count.
    pub part_values: usize,
    pub world_size: usize,
}

/// out f32 [R,V] = the ranks' columns side by side.
pub fn join_columns(out: Address, of: ColumnParts, num_rows: usize, num_columns: usize) -> Launch {
    let args = [
        out.into(),
        of.parts.into(),
        of.starts.into(),
        Arg::U64(of.part_values as u64),
        of.world_size.into(),
        num_columns.into(),
    ];
    Launch::new("columns", "join_columns", [num_columns.div_ceil(256), num_rows, 1], 256, args)
}
