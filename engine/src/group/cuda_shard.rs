//! A rank's share on a GPU.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use tandem_kernels::comm::{
    CommError, Communicator, DeviceCollectives, DeviceCommError, HostCollectives, Meeting, Nccl, NcclAbort,
    NcclCollectives, NcclCommunicator, NcclError, NcclOptions, NcclUniqueId, NcclWait, ONE_SHOT_RANKS,
    OneShot, OneShotAbort, OneShotMemory, SmallSums, TcpCommunicator, TcpOptions,
};
use tandem_kernels::cuda::CudaError;
use tandem_models::ForwardBatch;

use super::cpu_shard::COLLECTIVE_TIMEOUT;
use super::device::{Forming, ShardDevice, ShardError, ShardOutput};
use crate::executor::cuda::STEP_DEADLINE;
use crate::executor::cuda_step::{CudaStep, QueuedStep};
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

/// Whether few values are summed over ranks by a kernel of our own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CustomAllReduce {
    /// Where every rank has a GPU of its own, all on one machine, and they reach each other's memory.
    #[default]
    Auto,
    /// Also where ranks share a GPU; refused where it cannot be.
    Always,
    Never,
}

impl CustomAllReduce {
    /// For people, and for ranks to compare.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Always => "always",
            Self::Never => "never",
        }
    }
}

/// Model with its KV, and connections.
pub(crate) struct CudaShard {
    step: CudaStep,
    transport: Transport,
    custom_all_reduce: CustomAllReduce,
    others: Option<Connected>,
    /// Taken for the first group, kept for all.
    one_shot: Option<OneShotMemory>,
    /// Steps that were begun.
    queued: VecDeque<Queued>,
    /// When the last step was over.
    last_done: Instant,
}

/// A step that was begun.
struct Queued {
    step: QueuedStep,
    start: Instant,
    /// Once it is the first.
    wait: Option<NcclWait>,
}

enum Connected {
    Nccl(SmallSums<NcclCollectives>),
    Host(SmallSums<HostCollectives>),
}

impl CudaShard {
    pub(crate) fn new(step: CudaStep, transport: Transport, custom_all_reduce: CustomAllReduce) -> Self {
        Self {
            step,
            transport,
            custom_all_reduce,
            others: None,
            one_shot: None,
            queued: VecDeque::new(),
            last_done: Instant::now(),
        }
    }

    /// Ends what an older epoch left: recorded steps first, for they hold the communicator.
    fn part(&mut self) -> Result<(), ShardError> {
        self.queued.clear();
        self.step.model.forget_graphs();
        let Some(others) = self.others.take() else { return Ok(()) };
        others.give_up();
        let (one_shot, nccl) = match others {
            Connected::Nccl(SmallSums { others, one_shot }) => (one_shot, Some(others)),
            Connected::Host(SmallSums { one_shot, .. }) => (one_shot, None),
        };
        if let Some(NcclCollectives(comm)) = nccl {
            let abort = comm.abort_handle();
            abort.abort();
            drop(comm);
            if !abort.wait_released(RELEASE) {
                return Err(ShardError::Unfit("NCCL does not let go of the GPU".into()));
            }
        }
        // Waits for kernels that the others' memory is open for; meeting them again would not begin before.
        drop(one_shot);
        Ok(())
    }

    fn look_at_first(&mut self) -> Result<Option<ShardOutput>, ShardError> {
        let (Some(queued), Some(others)) = (self.queued.front_mut(), &self.others) else { return Ok(None) };
        match others.look(&self.step, queued) {
            Ok(true) => {}
            Ok(false) => return Ok(None),
            Err(error) => {
                others.give_up();
                return Err(of_step(&self.step, error));
            }
        }
        let since = queued.start.max(self.last_done);
        self.last_done = Instant::now();
        let rows = self.step.collect(&queued.step).map_err(of_device)?;
        self.queued.pop_front();
        Ok(Some(ShardOutput { forward: self.last_done - since, rows }))
    }

    fn make_ready(&mut self, num_blocks: usize, others: &mut Connected) -> Result<(), ShardError> {
        self.step.model.allocate_kv(num_blocks).map_err(of_device)?;
        self.step.model.record(Some(others.collectives())).map_err(|error| of_step(&self.step, error))
    }

    fn connect(&mut self, forming: Forming<'_>) -> Result<Connected, ShardError> {
        let options = TcpOptions { timeout: COLLECTIVE_TIMEOUT, spin: false };
        let mut comm = TcpCommunicator::new(forming.rank, forming.peers, options)?;
        let on_host = comm.abort_handle();
        let given_up = || ShardError::Failed("given up".into());
        let small = self.begin_small_sums(forming.size)?;
        let ends_small = small.as_ref().map(OneShotAbort::from_elsewhere);
        if self.transport == Transport::Host {
            let watched = forming.aborts.watch(forming.epoch, move || {
                on_host.abort();
                ends_small.iter().for_each(|end| end());
            });
            if !watched {
                return Err(given_up());
            }
            let one_shot = self.meet(&mut comm, small)?;
            tell(one_shot.as_ref());
            return Ok(Connected::Host(SmallSums { others: HostCollectives::new(comm), one_shot }));
        }
        let nccl = Nccl::open()?;
        let abort = NcclAbort::new(nccl);
        let on_device = abort.clone();
        let watched = forming.aborts.watch(forming.epoch, move || {
            on_host.abort();
            ends_small.iter().for_each(|end| end());
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
        let communicator = communicator.map_err(|error| of_step(&self.step, error.into()))?;
        let one_shot = self.meet(&mut comm, small)?;
        let mut sums = SmallSums { others: NcclCollectives(communicator), one_shot };
        // What steps do not record is not recorded here either: that it may be at fault is a reason not to.
        if self.custom_all_reduce == CustomAllReduce::Auto && self.step.model.options().graphs {
            self.keep_the_faster(&mut sums, &mut comm)?;
        }
        tell(sums.one_shot.as_ref());
        Ok(Connected::Nccl(sums))
    }

    /// Small sums by whatever is faster.
    fn keep_the_faster(
        &self,
        sums: &mut SmallSums<NcclCollectives>,
        comm: &mut TcpCommunicator,
    ) -> Result<(), ShardError> {
        let Some(memory) = &self.one_shot else { return Ok(()) };
        let runner = self.step.model.runner();
        let wait =
            |others: &NcclCollectives, patience| Ok(others.0.wait(patience, || runner.cuda().is_idle())?);
        let times = sums.keep_the_faster(runner, comm, memory, wait);
        let times = times.map_err(|error| of_step(&self.step, error))?;
        times.iter().for_each(|times| tracing::debug!(%times, "a sum over ranks"));
        if let (None, Some(smallest)) = (&sums.one_shot, times.first()) {
            tracing::info!(reason = "it is faster", %smallest, "small sums over ranks go by NCCL");
        }
        Ok(())
    }

    /// What will end sums in one shot, if they are to be tried: a question whose answer all ranks have alike.
    fn begin_small_sums(&mut self, size: usize) -> Result<Option<OneShotAbort>, ShardError> {
        let wanted = match self.custom_all_reduce {
            CustomAllReduce::Never => false,
            // Ranks on one GPU take turns of milliseconds: they would wait for each other longer than the host takes.
            CustomAllReduce::Auto => self.transport == Transport::Nccl,
            CustomAllReduce::Always => true,
        };
        if !wanted || size > ONE_SHOT_RANKS {
            return match self.custom_all_reduce {
                CustomAllReduce::Always => Err(cannot_be("there are too many ranks")),
                _ => Ok(None),
            };
        }
        if self.one_shot.is_none() {
            let cuda = self.step.model.runner().cuda();
            self.one_shot = Some(OneShotMemory::new(cuda, size).map_err(of_device)?);
        }
        self.one_shot.as_ref().map(OneShotMemory::begin).transpose().map_err(of_device)
    }

    fn meet(
        &self,
        comm: &mut TcpCommunicator,
        abort: Option<OneShotAbort>,
    ) -> Result<Option<OneShot>, ShardError> {
        let (Some(abort), Some(memory)) = (abort, &self.one_shot) else { return Ok(None) };
        let meeting = memory
            .meet(self.step.model.runner(), comm, &abort)
            .map_err(|error| of_step(&self.step, error))?;
        match meeting {
            Meeting::All(one_shot) => Ok(Some(one_shot)),
            Meeting::NotAll(reason) if self.custom_all_reduce == CustomAllReduce::Always => {
                Err(cannot_be(reason.as_deref().unwrap_or("another rank cannot")))
            }
            Meeting::NotAll(reason) => {
                if let Some(reason) = reason {
                    tracing::info!(reason, "small sums over ranks go by NCCL");
                }
                Ok(None)
            }
        }
    }
}

impl ShardDevice for CudaShard {
    fn form(&mut self, forming: Forming<'_>) -> Result<(), ShardError> {
        self.part()?;
        let num_blocks = forming.num_blocks;
        let mut others = self.connect(forming)?;
        let ready = self.make_ready(num_blocks, &mut others);
        self.others = Some(others);
        if ready.is_err() {
            self.part()?;
        }
        ready
    }

    fn begin(&mut self, batch: &ForwardBatch, rows: &[SampleRow<'_>]) -> Result<(), ShardError> {
        let Some(others) = &mut self.others else {
            return Err(ShardError::Failed("no group was formed".into()));
        };
        let start = Instant::now();
        let step = self
            .step
            .queue(batch, rows, Some(others.collectives()))
            .map_err(|error| of_step(&self.step, error))?;
        self.queued.push_back(Queued { step, start, wait: None });
        Ok(())
    }

    fn poll(&mut self) -> Result<Option<ShardOutput>, ShardError> {
        let outcome = self.look_at_first();
        if outcome.is_err() {
            self.queued.clear();
        }
        outcome
    }

    fn computes_beside(&self) -> bool {
        // By way of the host a step is queued only as it is computed.
        matches!(self.others, Some(Connected::Nccl(_)))
    }

    fn kept_tokens(&self) -> usize {
        self.step.kept_tokens()
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

    fn one_shot(&self) -> Option<&OneShot> {
        match self {
            Self::Nccl(collectives) => collectives.one_shot.as_ref(),
            Self::Host(collectives) => collectives.one_shot.as_ref(),
        }
    }

    /// Ends kernels that wait for other ranks.
    fn give_up(&self) {
        if let Some(one_shot) = self.one_shot() {
            one_shot.abort();
        }
    }

    /// Whether the first of the queued steps is done; looks whether the communicator was given up or has failed.
    fn look(&self, step: &CudaStep, queued: &mut Queued) -> Result<bool, DeviceCommError> {
        let Queued { step: queued, start, wait } = queued;
        let is_done = match self {
            Self::Nccl(sums) => {
                let wait = wait.get_or_insert_with(|| NcclWait::begin(STEP_DEADLINE));
                sums.others.0.look(wait, || step.is_done(queued))?
            }
            Self::Host(_) if step.is_done(queued)? => true,
            Self::Host(_) if start.elapsed() < STEP_DEADLINE => false,
            Self::Host(_) => {
                let ms = STEP_DEADLINE.as_millis();
                return Err(NcclError::Timeout { what: "a step", ms }.into());
            }
        };
        // Given up, kernels end as if they had the sums.
        match is_done && self.one_shot().is_some_and(OneShot::is_aborted) {
            true => Err(CommError::Aborted.into()),
            false => Ok(is_done),
        }
    }
}

fn tell(one_shot: Option<&OneShot>) {
    if let Some(one_shot) = one_shot {
        let most_bytes = one_shot.most_bytes();
        tracing::info!(most_bytes, "small sums over ranks are made in one shot");
    }
}

fn cannot_be(reason: &str) -> ShardError {
    ShardError::Unfit(format!("custom-all-reduce is always, and cannot be: {reason}"))
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

fn of_step(step: &CudaStep, error: DeviceCommError) -> ShardError {
    match error {
        DeviceCommError::Cuda(error) | DeviceCommError::Nccl(NcclError::Device(error)) => of_device(error),
        error @ DeviceCommError::Stuck => ShardError::Unfit(error.to_string()),
        // "Unhandled CUDA error": the device may have failed, and every new communicator on it would; or just a call, as when
        // the memory of a rank that died is opened.
        DeviceCommError::Nccl(error @ NcclError::Failed { code: 1, .. }) => {
            match step.model.runner().cuda().is_idle_within(RELEASE) {
                Ok(true) => ShardError::Failed(error.to_string()),
                Ok(false) | Err(_) => ShardError::Unfit(error.to_string()),
            }
        }
        other => ShardError::Failed(other.to_string()),
    }
}
