//! Collectives on values that lie on GPUs.
//!
//! [`NcclCollectives`] queues them on the device's stream: what GPUs are connected by carries them. [`HostCollectives`] brings the
//! values to the host and over the ranks' own connections: slow, and right everywhere, also where NCCL is not installed or several
//! ranks share a GPU. [`SmallSums`] sums few values in one shot where ranks reach each other's memory, and leaves the rest to one of
//! the two.

use half::bf16;

use super::{CommError, Communicator, NcclCommunicator, NcclError, OneShot, Summed, TcpCommunicator};
use crate::cuda::{CudaError, DeviceSlice, Runner};

/// Why a collective did not happen.
#[derive(Debug, thiserror::Error)]
pub enum DeviceCommError {
    #[error(transparent)]
    Cuda(#[from] CudaError),
    #[error(transparent)]
    Nccl(#[from] NcclError),
    #[error(transparent)]
    Comm(#[from] CommError),
    /// Nothing can be done about it in this process.
    #[error(
        "the GPU does not end what it is at; if that is a sum in one shot, --custom-all-reduce never leaves those out"
    )]
    Stuck,
}

/// One rank's end of a group of GPUs. All ranks call the same with the same sizes in the same order.
pub trait DeviceCollectives {
    /// Which rank this is, and how many there are.
    fn place(&self) -> (usize, usize);

    /// `values` = the sum of all ranks' `values`, on every rank; kernels of our own are `runner`'s.
    ///
    /// # Errors
    /// [`DeviceCommError`]; it is of no use afterwards.
    fn all_reduce_bf16(
        &mut self,
        runner: &Runner,
        values: DeviceSlice<'_, bf16>,
    ) -> Result<(), DeviceCommError>;

    /// The same for f32.
    ///
    /// # Errors
    /// As there.
    fn all_reduce_f32(
        &mut self,
        runner: &Runner,
        values: DeviceSlice<'_, f32>,
    ) -> Result<(), DeviceCommError>;

    /// `all` [P · N] = every rank's `own` [N], in the order of ranks.
    ///
    /// # Errors
    /// As there.
    fn all_gather_f32(
        &mut self,
        own: DeviceSlice<'_, f32>,
        all: DeviceSlice<'_, f32>,
    ) -> Result<(), DeviceCommError>;

    /// Whether they are only queued, so that a graph can hold them.
    fn is_queued(&self) -> bool;
}

/// By NCCL.
#[derive(Debug)]
pub struct NcclCollectives(pub NcclCommunicator);

impl DeviceCollectives for NcclCollectives {
    fn place(&self) -> (usize, usize) {
        (self.0.rank(), self.0.size())
    }

    fn all_reduce_bf16(&mut self, _: &Runner, values: DeviceSlice<'_, bf16>) -> Result<(), DeviceCommError> {
        Ok(self.0.all_reduce(values)?)
    }

    fn all_reduce_f32(&mut self, _: &Runner, values: DeviceSlice<'_, f32>) -> Result<(), DeviceCommError> {
        Ok(self.0.all_reduce(values)?)
    }

    fn all_gather_f32(
        &mut self,
        own: DeviceSlice<'_, f32>,
        all: DeviceSlice<'_, f32>,
    ) -> Result<(), DeviceCommError> {
        Ok(self.0.all_gather(own, all)?)
    }

    fn is_queued(&self) -> bool {
        true
    }
}

/// By way of the host. Sums are in f32, in the order of ranks, and so the same on every rank.
pub struct HostCollectives {
    comm: TcpCommunicator,
    own: Vec<f32>,
    gathered: Vec<f32>,
    rounded: Vec<bf16>,
}

impl HostCollectives {
    pub fn new(comm: TcpCommunicator) -> Self {
        Self { comm, own: Vec::new(), gathered: Vec::new(), rounded: Vec::new() }
    }

    /// All ranks' `own` in `gathered`.
    fn gather(&mut self) -> Result<(), CommError> {
        self.gathered.resize(self.comm.size() * self.own.len(), 0.0);
        self.comm.all_gather_equal(&self.own, &mut self.gathered)
    }

    /// The sum of all ranks' `own` in `own`.
    fn sum(&mut self) -> Result<(), CommError> {
        self.gather()?;
        let len = self.own.len();
        self.own.copy_from_slice(&self.gathered[..len]);
        for part in self.gathered.chunks_exact(len.max(1)).skip(1) {
            self.own.iter_mut().zip(part).for_each(|(sum, value)| *sum += value);
        }
        Ok(())
    }
}

impl DeviceCollectives for HostCollectives {
    fn place(&self) -> (usize, usize) {
        (self.comm.rank(), self.comm.size())
    }

    fn all_reduce_bf16(&mut self, _: &Runner, values: DeviceSlice<'_, bf16>) -> Result<(), DeviceCommError> {
        self.rounded.resize(values.len(), bf16::ZERO);
        values.read(&mut self.rounded)?;
        self.own.clear();
        self.own.extend(self.rounded.iter().map(|value| value.to_f32()));
        self.sum()?;
        self.rounded.clear();
        self.rounded.extend(self.own.iter().map(|&value| bf16::from_f32(value)));
        Ok(values.write(&self.rounded)?)
    }

    fn all_reduce_f32(&mut self, _: &Runner, values: DeviceSlice<'_, f32>) -> Result<(), DeviceCommError> {
        self.own.resize(values.len(), 0.0);
        values.read(&mut self.own)?;
        self.sum()?;
        Ok(values.write(&self.own)?)
    }

    fn all_gather_f32(
        &mut self,
        own: DeviceSlice<'_, f32>,
        all: DeviceSlice<'_, f32>,
    ) -> Result<(), DeviceCommError> {
        self.own.resize(own.len(), 0.0);
        own.read(&mut self.own)?;
        self.gather()?;
        Ok(all.write(&self.gathered)?)
    }

    fn is_queued(&self) -> bool {
        false
    }
}

/// Sums of few values in one shot, if the ranks can do that, and everything else by `others`.
pub struct SmallSums<C> {
    pub others: C,
    pub one_shot: Option<OneShot>,
}

impl<C> SmallSums<C> {
    fn one_shot<T: Summed>(&self, values: DeviceSlice<'_, T>) -> Option<&OneShot> {
        self.one_shot.as_ref().filter(|one_shot| one_shot.takes(values))
    }
}

impl<C: DeviceCollectives> DeviceCollectives for SmallSums<C> {
    fn place(&self) -> (usize, usize) {
        self.others.place()
    }

    fn all_reduce_bf16(
        &mut self,
        runner: &Runner,
        values: DeviceSlice<'_, bf16>,
    ) -> Result<(), DeviceCommError> {
        match self.one_shot(values) {
            Some(sums) => Ok(sums.all_reduce(runner, values)?),
            None => self.others.all_reduce_bf16(runner, values),
        }
    }

    fn all_reduce_f32(
        &mut self,
        runner: &Runner,
        values: DeviceSlice<'_, f32>,
    ) -> Result<(), DeviceCommError> {
        match self.one_shot(values) {
            Some(sums) => Ok(sums.all_reduce(runner, values)?),
            None => self.others.all_reduce_f32(runner, values),
        }
    }

    fn all_gather_f32(
        &mut self,
        own: DeviceSlice<'_, f32>,
        all: DeviceSlice<'_, f32>,
    ) -> Result<(), DeviceCommError> {
        self.others.all_gather_f32(own, all)
    }

    fn is_queued(&self) -> bool {
        self.others.is_queued()
    }
}
