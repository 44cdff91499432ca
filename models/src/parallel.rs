//! Filling a large buffer on several threads.

use std::thread;

/// Fewer bytes than this are not worth a thread.
const MIN_BYTES: usize = 64 * 1024;

/// Fills `out`, which consists of units of `unit_bytes` (the last may be shorter), in as many contiguous pieces as there are
/// `threads`: `fill(first_unit, piece)`. What a unit becomes must not depend on the piece that it is in.
///
/// # Errors
/// That of the first piece in order that failed.
pub(crate) fn fill_units<E: Send>(
    threads: usize,
    unit_bytes: usize,
    out: &mut [u8],
    fill: impl Fn(usize, &mut [u8]) -> Result<(), E> + Sync,
) -> Result<(), E> {
    let threads = threads.min(out.len() / MIN_BYTES).max(1);
    let units_per_piece = out.len().div_ceil(unit_bytes).div_ceil(threads).max(1);
    let mut pieces = out.chunks_mut(units_per_piece * unit_bytes).enumerate();
    let Some((_, own)) = pieces.next() else { return Ok(()) };
    let fill = &fill;
    thread::scope(|scope| {
        let others: Vec<_> =
            pieces.map(|(idx, piece)| scope.spawn(move || fill(idx * units_per_piece, piece))).collect();
        let first = fill(0, own);
        let joined = others.into_iter().map(|other| other.join().expect("a piece does not panic"));
        joined.fold(first, Result::and)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_unit_is_filled_once_whatever_the_number_of_threads() {
        for len in [0, 1, 19, 20, 21, 3 * MIN_BYTES + 7] {
            let expected: Vec<u8> = (0..len).map(|at| (at / 20 % 251) as u8 + 1).collect();
            for threads in [1, 2, 3, 7] {
                let mut out = vec![0; len];
                let fill = |first: usize, piece: &mut [u8]| {
                    for (idx, unit) in piece.chunks_mut(20).enumerate() {
                        unit.iter_mut().for_each(|byte| *byte += ((first + idx) % 251) as u8 + 1);
                    }
                    Ok::<(), ()>(())
                };
                fill_units(threads, 20, &mut out, fill).unwrap();
                assert!(out == expected, "{len} bytes, {threads} threads");
            }
        }
    }

    #[test]
    fn the_first_failure_in_order_is_told() {
        let mut out = vec![0; 4 * MIN_BYTES];
        let fail_from = |unit: usize| {
            move |first: usize, piece: &mut [u8]| {
                let failed = (first..first + piece.len() / 16).find(|&at| at >= unit);
                failed.map_or(Ok(()), Err)
            }
        };
        let units = out.len() / 16;
        assert_eq!(fill_units(4, 16, &mut out, fail_from(units / 4 + 3)), Err(units / 4 + 3));
        assert_eq!(fill_units(4, 16, &mut out, fail_from(units)), Ok(()));
    }
}
