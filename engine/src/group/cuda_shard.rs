//! A rank's share on a GPU.

use std::time::{Duration, Instant};

use tandem_kernels::comm::{
    Communicator, DeviceCollectives, DeviceCommError, HostCollectives, Nccl, NcclAbort, NcclCollectives,
    NcclCommunicator, NcclError, NcclOptions, NcclUniqueId, TcpCommunicator, TcpOptions,
};
use tandem_kernels::cuda::CudaError;
use tandem_models::ForwardBatch;

use super::cpu_shard::COLLECTIVE_TIMEOUT;
use super::device::{Forming, ShardDevice, ShardError, ShardOutput};
use crate::executor::cuda::{STEP_DEADLINE, wait_for_device};
use crate::executor::cuda_step::CudaStep;
use crate::sample_row::SampleRow;

/// How long an aborted communicator may take to let the device go.
const RELEASE: Duration = Duration::from_secs(8);

/// What carries collectives between GPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Transport {
    Nccl,
    /// The ranks' own connections, by way of the host: where NCCL is not there, or ranks share a GPU.
    Host,
}

impl Transport {
    /// For people, and for ranks to compare.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Nccl => "NCCL",
            Self::Host => "host",
        }
    }
}

/// Model with its KV, and connections.
pub(crate) struct CudaShard {
    step: CudaStep,
    transport: Transport,
    others: Option<Connected>,
}

enum Connected {
    Nccl(NcclCollectives),
    Host(HostCollectives),
}

impl CudaShard {
    pub(crate) fn new(step: CudaStep, transport: Transport) -> Self {
        Self { step, transport, others: None }
    }

    /// Ends what an older epoch left: recorded steps first, for they hold the communicator.
    fn part(&mut self) -> Result<(), ShardError> {
        self.step.model.forget_graphs();
        let Some(Connected::Nccl(NcclCollectives(comm))) = self.others.take() else { return Ok(()) };
        let abort = comm.abort_handle();
        abort.abort();
        drop(comm);
        match abort.wait_released(RELEASE) {
            true => Ok(()),
            false => Err(ShardError::Unfit("NCCL does not let go of the GPU".into())),
        }
    }

    fn connect(&mut self, forming: Forming<'_>) -> Result<Connected, ShardError> {
        let options = TcpOptions { timeout: COLLECTIVE_TIMEOUT, spin: false };
        let mut comm = TcpCommunicator::new(forming.rank, forming.peers, options)?;
        let on_host = comm.abort_handle();
        let given_up = || ShardError::Failed("given up".into());
        if self.transport == Transport::Host {
            return match forming.aborts.watch(forming.epoch, move || on_host.abort()) {
                true => Ok(Connected::Host(HostCollectives::new(comm))),
                false => Err(given_up()),
            };
        }
        let nccl = Nccl::open()?;
        let abort = NcclAbort::new(nccl);
        let on_device = abort.clone();
        let watched = forming.aborts.watch(forming.epoch, move || {
            on_host.abort();
            // It may take seconds, for which whoever gives up cannot be silent.
            let aborting = std::thread::Builder::new().name("tandem-abort".into());
            if let Err(error) = aborting.spawn(move || on_device.abort()) {
                tracing::error!(%error, "no thread to give NCCL up");
            }
        });
        if !watched {
            return Err(given_up());
        }
        let id = share_id(nccl, &mut comm)?;
        self.step.model.runner().cuda().bind().map_err(of_device)?;
        let place = (forming.rank, forming.size);
        let communicator = NcclCommunicator::init(&abort, &id, place, NcclOptions::default());
        let communicator = communicator.map_err(|error| of_step(error.into()))?;
        Ok(Connected::Nccl(NcclCollectives(communicator)))
    }
}

impl ShardDevice for CudaShard {
    fn form(&mut self, forming: Forming<'_>) -> Result<(), ShardError> {
        self.part()?;
        let num_blocks = forming.num_blocks;
        let mut others = self.connect(forming)?;
        self.step.model.allocate_kv(num_blocks).map_err(of_device)?;
        self.step.model.record(Some(others.collectives())).map_err(of_step)?;
        self.others = Some(others);
        Ok(())
    }

    fn step(&mut self, batch: &ForwardBatch, rows: &[SampleRow<'_>]) -> Result<ShardOutput, ShardError> {
        let Some(others) = &mut self.others else {
            return Err(ShardError::Failed("no group was formed".into()));
        };
        let start = Instant::now();
        self.step.queue(batch, rows, Some(others.collectives())).map_err(of_step)?;
        others.wait(&self.step).map_err(of_step)?;
        let forward = start.elapsed();
        Ok(ShardOutput { forward, rows: self.step.collect(batch, rows).map_err(of_device)? })
    }

    fn fill_nan(&mut self, blocks: &[u32]) {
        if let Err(error) = self.step.model.fill_nan(blocks) {
            tracing::error!(%error, "blocks cannot be overwritten");
        }
    }

    fn vocab_size(&self) -> usize {
        self.step.model.config().vocab_size
    }
}

impl Connected {
    fn collectives(&mut self) -> &mut dyn DeviceCollectives {
        match self {
            Self::Nccl(collectives) => collectives,
            Self::Host(collectives) => collectives,
        }
    }

    /// Waits until a step is done, while it looks whether the communicator was given up or has failed.
    fn wait(&self, step: &CudaStep) -> Result<(), DeviceCommError> {
        match self {
            Self::Nccl(NcclCollectives(comm)) => Ok(comm.wait(STEP_DEADLINE, || step.is_done())?),
            Self::Host(_) if wait_for_device(step)? => Ok(()),
            Self::Host(_) => Err(NcclError::Timeout { what: "a step", ms: STEP_DEADLINE.as_millis() }.into()),
        }
    }
}

/// Rank 0 makes an id and gives it to all, bits for bits: the ranks' connections carry words.
fn share_id(nccl: Nccl, comm: &mut TcpCommunicator) -> Result<NcclUniqueId, ShardError> {
    const WORDS: usize = NcclUniqueId::BYTES / 4;
    let mut words = [0.0f32; WORDS];
    if comm.rank() == 0 {
        let id = nccl.unique_id()?;
        let (bytes, _) = id.as_bytes().as_chunks::<4>();
        words.iter_mut().zip(bytes).for_each(|(word, bytes)| *word = f32::from_le_bytes(*bytes));
    }
    let ranges: Vec<_> =
        (0..comm.size()).map(|rank| if rank == 0 { 0..WORDS } else { WORDS..WORDS }).collect();
    comm.all_gather(&ranges, &mut words)?;
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    Ok(NcclUniqueId::from_bytes(&bytes)?)
}

/// After some errors nothing works on the device any more.
fn of_device(error: CudaError) -> ShardError {
    match error.poisons_context() {
        true => ShardError::Unfit(error.to_string()),
        false => ShardError::Failed(error.to_string()),
    }
}

fn of_step(error: DeviceCommError) -> ShardError {
    match error {
        DeviceCommError::Cuda(error) | DeviceCommError::Nccl(NcclError::Device(error)) => of_device(error),
        // "Unhandled CUDA error": the device has failed, and every new communicator on it would.
        DeviceCommError::Nccl(error @ NcclError::Failed { code: 1, .. }) => {
            ShardError::Unfit(error.to_string())
        }
        other => ShardError::Failed(other.to_string()),
    }
}
