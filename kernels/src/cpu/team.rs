//! Who does an operation: all workers together, or one worker alone on rows of its own.
//!
//! With few rows the workers share the columns of each layer, so that every weight is read once, by one core. With many
//! rows a worker takes a block of rows through several operations by itself: what one operation writes for the next
//! stays in that core's cache, and nobody waits for anybody in between. The bits are the same: a row's result never
//! depends on who computes it.

use std::ops::Range;

use super::buffer::SharedMut;
use super::isa::Detected;
use super::{Cpu, Scratch};

/// The most rows of a block that one worker takes: its inputs and outputs together fill half of a second-level cache of
/// 1 MiB for a hidden size of a thousand, and a load of weights serves ten register tiles.
pub const BLOCK_ROWS: usize = 64;

/// Below this many rows per worker, reading every weight once per worker costs more than sharing columns does.
const MIN_ROWS: usize = 24;

/// Weights of a region that are read again for each block: they should come out of the last-level cache.
const MAX_WEIGHTS: usize = 16 * 1024 * 1024;

/// The workers of an operation.
pub struct Team<'a> {
    pub(super) isa: Detected,
    pub(super) scratch: &'a Scratch,
    /// `None` for one worker alone.
    pub(super) all: Option<&'a Cpu>,
    worker: usize,
}

impl Cpu {
    /// All workers.
    pub const fn team(&self) -> Team<'_> {
        Team { isa: self.isa, scratch: &self.scratch, all: Some(self), worker: 0 }
    }

    /// How many of `rows` one block of [`Cpu::for_row_blocks`] should have where a block reads `weight_bytes` of weights:
    /// all of them if workers should rather share columns.
    pub fn block_rows(&self, rows: usize, weight_bytes: usize) -> usize {
        if rows < MIN_ROWS * self.threads() || weight_bytes > MAX_WEIGHTS {
            return rows;
        }
        let blocks = rows.div_ceil(BLOCK_ROWS).next_multiple_of(self.threads());
        rows.div_ceil(blocks)
    }

    /// Calls `job` for every block of `block_rows` of `rows`, with the block's rows of each buffer. If one block holds all
    /// rows, the job's team is all workers; otherwise each block is one worker's, later blocks first: behind causal
    /// attention they have the most to do.
    ///
    /// # Panics
    /// If a buffer is no whole number of rows, or `block_rows` is 0 with rows to do.
    pub fn for_row_blocks<const N: usize>(
        &self,
        rows: usize,
        block_rows: usize,
        buffers: [&mut [f32]; N],
        job: impl Fn(&Team<'_>, Range<usize>, [&mut [f32]; N]) + Sync,
    ) {
        if rows <= block_rows {
            return job(&self.team(), 0..rows, buffers);
        }
        let blocks = rows.div_ceil(block_rows);
        let buffers = buffers.map(|buffer| {
            assert!(buffer.len().is_multiple_of(rows), "{} values in {rows} rows", buffer.len());
            (SharedMut::new(buffer.as_mut_ptr()), buffer.len() / rows)
        });
        let (isa, scratch) = (self.isa, &self.scratch);
        self.pool.run_items(blocks, |worker, item| {
            let start = (blocks - 1 - item) * block_rows;
            let range = start..rows.min(start + block_rows);
            let parts = buffers.map(|(buffer, cols)| {
                // SAFETY: blocks are disjoint, each goes to one worker, and the buffers are borrowed exclusively meanwhile.
                unsafe { std::slice::from_raw_parts_mut(buffer.get().add(start * cols), range.len() * cols) }
            });
            job(&Team { isa, scratch, all: None, worker }, range, parts);
        });
    }
}

impl Team<'_> {
    /// Which worker this is; 0 if it is all of them. No two teams of a region have the same at a time.
    pub const fn worker(&self) -> usize {
        self.worker
    }

    pub(super) fn threads(&self) -> usize {
        self.all.map_or(1, Cpu::threads)
    }

    /// Calls `job(worker, item)` for every item, each once, on whichever worker is free.
    pub(super) fn run_items(&self, items: usize, job: impl Fn(usize, usize) + Sync) {
        match self.all {
            Some(cpu) => cpu.pool.run_items(items, job),
            None => (0..items).for_each(|item| job(self.worker, item)),
        }
    }

    /// The same with consecutive items for each worker, as long as it keeps up.
    pub(super) fn run_shares(&self, items: usize, job: impl Fn(usize, usize) + Sync) {
        match self.all {
            Some(cpu) => cpu.pool.run_shares(items, job),
            None => (0..items).for_each(|item| job(self.worker, item)),
        }
    }

    /// Splits `rows` of `cols` values over the workers in ranges; small work stays on the caller, where a fork-join
    /// would cost more than it saves.
    pub(super) fn for_row_ranges(&self, rows: usize, cols: usize, job: impl Fn(Range<usize>) + Sync) {
        const WORTH_A_FORK: usize = 8 * 1024;
        if rows * cols < WORTH_A_FORK || rows < 2 || self.threads() == 1 {
            return job(0..rows);
        }
        let per_item = rows.div_ceil(4 * self.threads()).max(1);
        self.run_items(rows.div_ceil(per_item), |_, item| {
            let start = item * per_item;
            job(start..rows.min(start + per_item));
        });
    }
}

#[cfg(test)]
mod tests {
    use super::super::CpuOptions;
    use super::*;

    fn cpu(threads: usize) -> Cpu {
        Cpu::new(CpuOptions { threads: Some(threads), ..CpuOptions::default() }).unwrap()
    }

    #[test]
    fn every_row_is_in_one_block_with_its_parts_of_the_buffers() {
        for threads in [1, 2, 3] {
            let cpu = cpu(threads);
            for (rows, block_rows) in [(1, 1), (7, 7), (7, 9), (7, 3), (64, 16), (65, 16), (100, 1)] {
                let (mut ones, mut pairs) = (vec![0.0; rows], vec![0.0; 2 * rows]);
                cpu.for_row_blocks(
                    rows,
                    block_rows,
                    [&mut ones, &mut pairs],
                    |team, range, [ones, pairs]| {
                        assert!(team.worker() < threads && range.len() <= block_rows);
                        assert_eq!((ones.len(), pairs.len()), (range.len(), 2 * range.len()));
                        for (i, row) in range.enumerate() {
                            ones[i] += row as f32;
                            pairs[2 * i] += row as f32;
                            pairs[2 * i + 1] -= row as f32;
                        }
                    },
                );
                let expected: Vec<f32> = (0..rows).map(|row| row as f32).collect();
                assert_eq!(ones, expected);
                assert_eq!(pairs, expected.iter().flat_map(|&x| [x, -x]).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn blocks_are_small_and_even_and_only_of_many_rows() {
        let cpu = cpu(2);
        assert_eq!(cpu.block_rows(MIN_ROWS, 0), MIN_ROWS);
        assert_eq!(cpu.block_rows(512, MAX_WEIGHTS + 1), 512);
        for rows in 2 * MIN_ROWS..600 {
            let block = cpu.block_rows(rows, MAX_WEIGHTS);
            assert!(block <= BLOCK_ROWS && rows.div_ceil(block) >= 2, "{block} of {rows}");
        }
    }

    #[test]
    #[should_panic(expected = "values in 3 rows")]
    fn buffers_of_broken_rows_are_refused() {
        cpu(1).for_row_blocks(3, 1, [&mut [0.0; 4]], |_, _, _| {});
    }
}
