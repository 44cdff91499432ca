//! Rows shared out over the workers of a backend.

use super::RowOps;
use crate::cpu::{Cpu, SharedMut};

/// Calls `job(ops, scratch, row)` once for every row `0..out.len()`, on whichever worker is free, with that worker's
/// scratch, and puts the results in their places. What a job answers must not depend on the scratch's contents.
///
/// # Panics
/// If there are fewer scratches than workers ([`Cpu::threads`]), or with the panic of a job.
pub fn for_each_row<S: Send, T: Send>(
    cpu: &Cpu,
    scratches: &mut [S],
    out: &mut [T],
    job: impl Fn(RowOps, &mut S, usize) -> T + Sync,
) {
    assert!(scratches.len() >= cpu.threads(), "{} scratches, {} workers", scratches.len(), cpu.threads());
    let ops = RowOps::from(cpu);
    let (scratches, places) = (SharedMut::new(scratches.as_mut_ptr()), SharedMut::new(out.as_mut_ptr()));
    cpu.run_items(out.len(), |worker, row| {
        // SAFETY: workers are numbered below the number of scratches, and no two run at once under one number.
        let scratch = unsafe { &mut *scratches.get().add(worker) };
        let answer = job(ops, scratch, row);
        // SAFETY: every row below the length is given out once, so nobody else touches its place.
        unsafe { *places.get().add(row) = answer };
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::testing::backends;

    #[test]
    fn results_are_in_row_order_whoever_made_them() {
        for threads in 1..=3 {
            let cpu = backends(threads).pop().unwrap();
            let mut done = vec![0; threads];
            for num_rows in [0, 1, 2, 17, 300] {
                let mut out = vec![None; num_rows];
                for_each_row(&cpu, &mut done, &mut out, |_, done, row| {
                    *done += 1;
                    Some(row.to_string())
                });
                assert!(out.iter().enumerate().all(|(row, out)| *out == Some(row.to_string())));
            }
            assert_eq!(done.iter().sum::<usize>(), 320);
        }
    }
}
