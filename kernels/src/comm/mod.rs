//! Collectives: what the ranks of a tensor-parallel group do together.
//!
//! A [`Communicator`] is one rank's end of a group. All ranks call the same collectives with the same sizes in the same order;
//! one that does not is found out ([`CommError::Diverged`]), never answered with wrong numbers. A sum has the fixed order of
//! [`crate::cpu::SegmentPlan`], whatever the number of ranks and whichever way the data takes, so its bits do not depend on
//! either.
//!
//! An implementation moves bytes between ranks ([`Communicator::exchange`]); the collectives stand on that.
//!
//! Ranks with a GPU use a [`NcclCommunicator`] instead, whose collectives are queued on the device.

mod device;
mod error;
mod nccl;
mod one_shot;
mod sum_times;
mod tcp;

use std::ops::Range;

pub use device::{DeviceCollectives, DeviceCommError, HostCollectives, NcclCollectives, SmallSums};
pub use error::CommError;
pub use nccl::{
    NCCL_LIBRARY_VARIABLE, Nccl, NcclAbort, NcclCommunicator, NcclElement, NcclError, NcclOptions,
    NcclUniqueId, NcclWait,
};
pub use one_shot::{Meeting, ONE_SHOT_BYTES, ONE_SHOT_RANKS, OneShot, OneShotAbort, OneShotMemory, Summed};
pub use sum_times::SumTimes;
pub use tcp::{AbortHandle, TcpCommunicator, TcpOptions};

use crate::cpu::{Epilogue, Team};

/// Above this a sum is split: each rank adds its share of the rows and hands the result out. That is less to move and to add
/// for more than two ranks, at the price of a second round trip.
const SPLIT_BYTES: usize = 256 * 1024;

/// One rank's end of a group.
pub trait Communicator: Send {
    /// Which rank this is.
    fn rank(&self) -> usize;

    /// Ranks of the group.
    fn size(&self) -> usize;

    /// Sends `outgoing[p]` to every other rank `p` and fills `incoming[p]` with what that sends here, all at once; the entries
    /// of this rank itself are not looked at.
    ///
    /// # Errors
    /// Any [`CommError`]; the communicator is of no use afterwards.
    ///
    /// # Panics
    /// If there is not one entry for each rank.
    fn exchange(&mut self, outgoing: &[&[f32]], incoming: &mut [&mut [f32]]) -> Result<(), CommError>;

    /// Every rank gives `own` and gets what all gave, one after another in the order of ranks: rank `p`'s part of `all` is
    /// `ranges[p]`, and lies there afterwards for all ranks.
    ///
    /// # Errors
    /// As [`Communicator::exchange`].
    ///
    /// # Panics
    /// If `ranges` do not follow each other from 0 to the end of `all`, one for each rank.
    fn all_gather(&mut self, ranges: &[Range<usize>], all: &mut [f32]) -> Result<(), CommError> {
        let rank = self.rank();
        let mut parts = split(ranges, all);
        let own = std::mem::take(&mut parts[rank]);
        let outgoing: Vec<&[f32]> = vec![own; ranges.len()];
        self.exchange(&outgoing, &mut parts)
    }

    /// The same where all give as much: `all` [P · N] = every rank's `own` [N].
    ///
    /// # Errors
    /// As [`Communicator::exchange`].
    ///
    /// # Panics
    /// If `all` is not so long.
    fn all_gather_equal(&mut self, own: &[f32], all: &mut [f32]) -> Result<(), CommError> {
        let len = own.len();
        let ranges: Vec<Range<usize>> = (0..self.size()).map(|rank| rank * len..(rank + 1) * len).collect();
        all[ranges[self.rank()].clone()].copy_from_slice(own);
        self.all_gather(&ranges, all)
    }

    /// What every rank gives arrives at rank 0: `parts[p]` there is filled with `own` of rank `p`, but for rank 0's own. Other
    /// ranks give no parts.
    ///
    /// # Errors
    /// As [`Communicator::exchange`].
    ///
    /// # Panics
    /// If rank 0 has not one part for each rank.
    fn gather(&mut self, own: &[f32], parts: &mut [&mut [f32]]) -> Result<(), CommError> {
        let size = self.size();
        if self.rank() == 0 {
            return self.exchange(&vec![&[][..]; size], parts);
        }
        let mut outgoing = vec![&[][..]; size];
        outgoing[0] = own;
        let mut nothing: Vec<&mut [f32]> = (0..size).map(|_| &mut [][..]).collect();
        self.exchange(&outgoing, &mut nothing)
    }

    /// `out` [T, N] += the sum over all ranks' `own` [P, T, N] in the fixed tree over `size · P` parts, plus `bias` [N]; on
    /// every rank. `gathered` is scratch of `size · P · T · N` values.
    ///
    /// # Errors
    /// As [`Communicator::exchange`].
    ///
    /// # Panics
    /// If lengths do not fit together.
    fn all_reduce(
        &mut self,
        team: &Team<'_>,
        own: &[f32],
        sum: &Sum<'_>,
        gathered: &mut [f32],
        out: &mut [f32],
    ) -> Result<(), CommError> {
        let size = self.size();
        assert_eq!(own.len(), sum.parts * out.len(), "parts of a sum");
        let gathered = &mut gathered[..size * own.len()];
        if size > 2 && size_of_val(own) > SPLIT_BYTES && out.len() >= size * sum.columns {
            return self.all_reduce_split(team, own, sum, gathered, out);
        }
        self.all_gather_equal(own, gathered)?;
        team.reduce_segments(gathered, size * sum.parts, sum.bias, out, Epilogue::Add);
        Ok(())
    }

    /// The same in two steps: every rank adds its share of the rows, then all gather the results.
    #[doc(hidden)]
    fn all_reduce_split(
        &mut self,
        team: &Team<'_>,
        own: &[f32],
        sum: &Sum<'_>,
        gathered: &mut [f32],
        out: &mut [f32],
    ) -> Result<(), CommError> {
        let (rank, size) = (self.rank(), self.size());
        let rows = out.len() / sum.columns;
        let shares: Vec<Range<usize>> = (0..size)
            .map(|rank| rows * rank / size * sum.columns..rows * (rank + 1) / size * sum.columns)
            .collect();
        let share = shares[rank].len();
        let gathered = &mut gathered[..size * sum.parts * share];
        for part in 0..sum.parts {
            let own = &own[part * out.len()..(part + 1) * out.len()];
            let outgoing: Vec<&[f32]> = shares.iter().map(|share| &own[share.clone()]).collect();
            // The parts of rank p lie from part p · P on.
            let mut incoming: Vec<&mut [f32]> =
                gathered.chunks_mut(share).skip(part).step_by(sum.parts).collect();
            incoming[rank].copy_from_slice(outgoing[rank]);
            self.exchange(&outgoing, &mut incoming)?;
        }
        let own_rows = &mut out[shares[rank].clone()];
        team.reduce_segments(gathered, size * sum.parts, sum.bias, own_rows, Epilogue::Add);
        self.all_gather(&shares, out)
    }
}

/// What is added up.
#[derive(Clone, Copy, Debug)]
pub struct Sum<'a> {
    /// `P`: parts that each rank contributes.
    pub parts: usize,
    /// `N`.
    pub columns: usize,
    /// [N], added once after the sum.
    pub bias: Option<&'a [f32]>,
}

/// The parts of `all` at `ranges`.
fn split<'a>(ranges: &[Range<usize>], all: &'a mut [f32]) -> Vec<&'a mut [f32]> {
    let mut rest = all;
    let mut at = 0;
    let parts = ranges.iter().map(|range| {
        assert_eq!(range.start, at, "ranges follow each other");
        at = range.end;
        rest.split_off_mut(..range.len()).expect("ranges lie inside")
    });
    let parts = parts.collect();
    assert!(rest.is_empty(), "ranges reach the end");
    parts
}

#[cfg(test)]
mod tests;
