//! Up to which size sums in one shot are faster than a library's, by time: that depends on what the GPUs are connected by and on how
//! many there are.

use std::fmt;
use std::time::Duration;

use half::bf16;

use super::one_shot::gather;
use super::{
    CommError, DeviceCollectives, DeviceCommError, ONE_SHOT_BYTES, OneShotMemory, SmallSums, TcpCommunicator,
};
use crate::cuda::{Runner, Timer};

/// Sizes that are timed.
const SIZES: [usize; 4] = [8 << 10, 32 << 10, 128 << 10, ONE_SHOT_BYTES];
/// Sums of a recording.
const SUMS: usize = 16;
/// How often it is replayed.
const REPLAYS: usize = 4;
/// How long the sums of one size may take: a library makes its connections with the first.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long the slowest rank took for a sum.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SumTimes {
    pub bytes: usize,
    pub one_shot_us: f32,
    pub others_us: f32,
}

impl fmt::Display for SumTimes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { bytes, one_shot_us, others_us } = self;
        write!(f, "{bytes} bytes: {one_shot_us:.1} µs in one shot, {others_us:.1} µs otherwise")
    }
}

impl<C: DeviceCollectives> SmallSums<C> {
    /// Times sums of some sizes, in one shot and otherwise, as recorded steps do them, and leaves to one shot those up to the size from
    /// which it is slower. `wait` waits for the device, at most so long, and for what goes wrong with the others meanwhile. All ranks
    /// call this, and come to the same; nothing happens without sums in one shot.
    ///
    /// # Errors
    /// [`DeviceCommError`]; the group is of no use afterwards.
    pub fn keep_the_faster(
        &mut self,
        runner: &Runner,
        comm: &mut TcpCommunicator,
        memory: &OneShotMemory,
        wait: impl Fn(&C, Duration) -> Result<(), DeviceCommError>,
    ) -> Result<Vec<SumTimes>, DeviceCommError> {
        if self.one_shot.is_none() {
            return Ok(Vec::new());
        }
        let mut own = Vec::with_capacity(2 * SIZES.len());
        for bytes in SIZES {
            let values = memory.trial().slice::<bf16>(0, bytes / size_of::<bf16>());
            // The sum of zeros is one, however often.
            values.fill_bytes(0)?;
            own.push(self.time(runner, &wait, |sums| match &sums.one_shot {
                Some(one_shot) => Ok(one_shot.all_reduce(runner, values)?),
                None => Ok(()),
            })?);
            own.push(self.time(runner, &wait, |sums| sums.others.all_reduce_bf16(runner, values))?);
        }
        let all = gather(comm, &own)?;
        let slowest = |at: usize| all.iter().skip(at).step_by(own.len()).copied().fold(0.0, slower);
        let times = SIZES.iter().enumerate().map(|(size, &bytes)| SumTimes {
            bytes,
            one_shot_us: slowest(2 * size),
            others_us: slowest(2 * size + 1),
        });
        let times: Vec<SumTimes> = times.collect();
        let most_bytes = faster_up_to(&times);
        self.one_shot.take_if(|_| most_bytes == 0);
        if let Some(one_shot) = &mut self.one_shot {
            one_shot.limit_to(most_bytes);
        }
        Ok(times)
    }

    /// Microseconds that one of the sums takes which `queue` queues.
    fn time(
        &mut self,
        runner: &Runner,
        wait: impl Fn(&C, Duration) -> Result<(), DeviceCommError>,
        mut queue: impl FnMut(&mut Self) -> Result<(), DeviceCommError>,
    ) -> Result<f32, DeviceCommError> {
        let cuda = runner.cuda();
        queue(self)?;
        let mut outcome = Ok(());
        let graph = cuda.capture(|| {
            outcome = (0..SUMS).try_for_each(|_| queue(self));
            Ok(())
        });
        outcome?;
        let mut graph = graph?;
        runner.replay(&mut graph)?;
        let mut timer = Timer::new(cuda)?;
        timer.start()?;
        for _ in 0..REPLAYS {
            runner.replay(&mut graph)?;
        }
        wait(&self.others, PATIENCE)?;
        if self.one_shot.as_ref().is_some_and(|one_shot| one_shot.is_aborted()) {
            return Err(CommError::Aborted.into());
        }
        Ok(timer.stop_us()? / (SUMS * REPLAYS) as f32)
    }
}

/// Of two times; what is not known is the slowest.
fn slower(a: f32, b: f32) -> f32 {
    if a.is_nan() || a >= b { a } else { b }
}

/// The largest size up to which one shot is no slower; 0 for none.
fn faster_up_to(times: &[SumTimes]) -> usize {
    let faster = times.iter().take_while(|times| times.one_shot_us <= times.others_us);
    faster.last().map_or(0, |times| times.bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_shot_is_kept_up_to_the_first_size_at_which_it_loses() {
        let times = |pairs: &[(usize, f32, f32)]| -> Vec<SumTimes> {
            let times = |&(bytes, one_shot_us, others_us)| SumTimes { bytes, one_shot_us, others_us };
            pairs.iter().map(times).collect()
        };
        assert_eq!(faster_up_to(&times(&[(1, 3.0, 9.0), (2, 4.0, 9.0), (3, 9.0, 9.0)])), 3);
        assert_eq!(faster_up_to(&times(&[(1, 3.0, 9.0), (2, 12.0, 9.0), (3, 8.0, 9.0)])), 1);
        assert_eq!(faster_up_to(&times(&[(1, 10.0, 9.0), (2, 4.0, 9.0)])), 0);
        let unknown = [1.0, f32::NAN, 2.0].into_iter().fold(0.0, slower);
        assert_eq!(faster_up_to(&times(&[(1, unknown, 9.0)])), 0, "what is not known is not better");
    }
}
