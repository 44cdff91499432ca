//! Sums over ranks whose devices reach each other's memory.

use super::{Address, Arg, Launch};

/// The type of what is summed; sums are in f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduced {
    Bf16,
    F32,
}

impl Reduced {
    pub const fn bytes(self) -> usize {
        match self {
            Self::Bf16 => 2,
            Self::F32 => 4,
        }
    }
}

/// Blocks of an all-reduce: resident on any device at once, and enough to load 256 KiB in one go.
pub const ALL_REDUCE_BLOCKS: usize = 32;

/// One rank's view of the group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Group {
    pub rank: usize,
    /// At most 32.
    pub world_size: usize,
    /// u64 [world size]: the addresses of every rank's staging buffer, 2 · `capacity` bytes.
    pub buffers: Address,
    pub capacity: usize,
    /// The same for all ranks and launches of the group, usually [`ALL_REDUCE_BLOCKS`].
    pub num_blocks: usize,
    /// u64 [world size]: the addresses of every rank's flags, u32 [blocks][world size], zero at first.
    pub flags: Address,
    /// This rank's u32 [2][blocks], zero at first.
    pub epochs: Address,
    /// u32: not zero ends all waiting for good, and results are worthless.
    pub abort: Address,
}

/// out = Σ over ranks of input, `count` values, a multiple of 8; both may be the same. Every rank launches it with the same
/// type and count, in the same order.
pub fn one_shot_all_reduce(
    out: Address,
    input: Address,
    reduced: Reduced,
    count: usize,
    group: Group,
) -> Launch {
    const THREADS: usize = 512;
    let bytes = count * reduced.bytes();
    assert!(count.is_multiple_of(8) && bytes <= group.capacity, "{bytes} bytes to {}", group.capacity);
    assert!(group.world_size <= 32 && group.rank < group.world_size, "rank {}", group.rank);
    let kernel = match reduced {
        Reduced::Bf16 => "one_shot_all_reduce_bf16",
        Reduced::F32 => "one_shot_all_reduce_f32",
    };
    let args = [
        out.into(),
        input.into(),
        group.buffers.into(),
        group.flags.into(),
        group.epochs.into(),
        group.abort.into(),
        group.rank.into(),
        group.world_size.into(),
        count.into(),
        Arg::U64(group.capacity as u64),
    ];
    Launch::new("all_reduce", kernel, [group.num_blocks, 1, 1], THREADS, args)
}
