//! Sums of few values over the ranks of one machine, by a kernel of our own in which every rank reads what the others have.
//!
//! For the few kilobytes that a decode step sums, twice a layer, a library's collective is mostly waiting. Here a rank copies its
//! values to where the others can read them, says so, and adds up all ranks' in their order (`kernels/cu/all_reduce.cu`): every rank
//! gets the same bits.
//!
//! The memory that others read is taken once and kept for the process's life: a rank may still read it when its owner has long given
//! the group up. For each group, ranks agree whether all of them can, and try it, before anything depends on it.

use std::sync::Arc;
use std::time::Duration;

use half::bf16;

use super::{CommError, Communicator, DeviceCommError, TcpCommunicator};
use crate::cuda::launcher::{self, ALL_REDUCE_BLOCKS, Group, Reduced};
use crate::cuda::{
    Cuda, CudaError, DeviceBuffer, DeviceSlice, Element, HostFlag, IpcHandle, PeerBuffer, Runner,
};

/// The most bytes that are summed so. Above, every rank reading all that all others have costs more than the steps of a ring.
pub const ONE_SHOT_BYTES: usize = 256 * 1024;

/// The most ranks, whose flags one warp watches.
pub const ONE_SHOT_RANKS: usize = 32;

/// One rank's memory for sums in one shot.
#[derive(Debug)]
pub struct OneShotMemory {
    cuda: Cuda,
    world_size: usize,
    /// What the others read and write: 2 · [`ONE_SHOT_BYTES`] of values, then u32 [blocks][world size] flags.
    shared: DeviceBuffer,
    /// What only this rank uses: u64 [2][world size] addresses, then u32 [2][blocks] epochs.
    own: DeviceBuffer,
    /// For sums that are tried.
    trial: DeviceBuffer,
}

/// Ends one group's sums, from any thread: kernels that wait for others stop, and results are worthless.
#[derive(Clone, Debug)]
pub struct OneShotAbort(Arc<HostFlag>);

/// One group's sums in one shot. The [`OneShotMemory`] outlives it, and graphs that hold sums are dropped before.
#[derive(Debug)]
pub struct OneShot {
    cuda: Cuda,
    group: Group,
    /// The most bytes that are summed so in this group.
    most_bytes: usize,
    abort: OneShotAbort,
    /// Open for as long as kernels read them.
    peers: Vec<PeerBuffer>,
}

/// What came of a meeting.
#[derive(Debug)]
pub enum Meeting {
    /// All ranks can.
    All(OneShot),
    /// At least one cannot; why this one cannot, if it is this one.
    NotAll(Option<String>),
}

impl OneShotAbort {
    pub fn abort(&self) {
        self.0.set(1);
    }

    pub fn is_aborted(&self) -> bool {
        self.0.get() != 0
    }

    /// The same for somebody who may outlive the group, and must not keep the device's memory.
    pub fn from_elsewhere(&self) -> impl Fn() + Send + 'static + use<> {
        let flag = Arc::downgrade(&self.0);
        move || {
            if let Some(flag) = flag.upgrade() {
                flag.set(1);
            }
        }
    }
}

impl Drop for OneShot {
    fn drop(&mut self) {
        self.abort.abort();
        // Kernels that still run may use the others' memory: then it stays open to the end of the process.
        if !matches!(self.cuda.is_idle_within(PATIENCE), Ok(true)) {
            std::mem::forget(std::mem::take(&mut self.peers));
        }
    }
}

impl OneShotMemory {
    const VALUES: usize = 2 * ONE_SHOT_BYTES;
    /// The driver shares whole pages of this size: what else lay on one would be shared, too.
    const PAGE: usize = 2 << 20;

    /// # Errors
    /// [`CudaError`]: memory above all.
    ///
    /// # Panics
    /// If there are more than [`ONE_SHOT_RANKS`].
    pub fn new(cuda: &Cuda, world_size: usize) -> Result<Self, CudaError> {
        assert!(world_size <= ONE_SHOT_RANKS, "{world_size} ranks");
        let flags = ALL_REDUCE_BLOCKS * world_size * size_of::<u32>();
        let shared = cuda.alloc((Self::VALUES + flags).next_multiple_of(Self::PAGE))?;
        let own = cuda.alloc(2 * world_size * size_of::<u64>() + 2 * ALL_REDUCE_BLOCKS * size_of::<u32>())?;
        let trial = cuda.alloc(ONE_SHOT_BYTES)?;
        Ok(Self { cuda: cuda.clone(), world_size, shared, own, trial })
    }

    /// What will end the sums of the next group.
    ///
    /// # Errors
    /// As [`Cuda::host_flag`].
    pub fn begin(&self) -> Result<OneShotAbort, CudaError> {
        Ok(OneShotAbort(Arc::new(self.cuda.host_flag()?)))
    }

    /// Meets the other ranks, all of which call this: opens their memory, and tries some sums.
    ///
    /// # Errors
    /// [`DeviceCommError`] if this rank's device or its connections fail, `Stuck` if the device does not end what it is at; that this
    /// rank cannot reach the others is none.
    ///
    /// # Panics
    /// If `comm` has another number of ranks than this memory is for.
    pub fn meet(
        &self,
        runner: &Runner,
        comm: &mut TcpCommunicator,
        abort: &OneShotAbort,
    ) -> Result<Meeting, DeviceCommError> {
        assert_eq!(comm.size(), self.world_size, "ranks that memory was taken for");
        if !self.cuda.is_idle_within(PATIENCE)? {
            return Err(DeviceCommError::Stuck);
        }
        // From here on no kernel of an earlier group writes flags, on any rank.
        all_can(comm, true)?;
        self.flags().fill_bytes(0)?;
        self.epochs().fill_bytes(0)?;
        self.cuda.synchronize()?;
        // Nor does one of this group before all flags are zero: every rank waits for all offers.
        let offers = offers(comm, &Offer::of(&self.shared))?;
        let opened = self.open(comm.rank(), &offers);
        let can = all_can(comm, opened.is_ok())?;
        let peers = match (can, opened) {
            (true, Ok(peers)) => peers,
            (_, opened) => return Ok(Meeting::NotAll(opened.err())),
        };
        let group = self.group(comm.rank(), &peers, abort)?;
        let one_shot = OneShot {
            cuda: self.cuda.clone(),
            group,
            most_bytes: ONE_SHOT_BYTES,
            abort: abort.clone(),
            peers,
        };
        let tried = one_shot.try_out(runner, &self.trial)?;
        let can = all_can(comm, tried)?;
        match tried {
            _ if can => Ok(Meeting::All(one_shot)),
            true => Ok(Meeting::NotAll(None)),
            false => Ok(Meeting::NotAll(Some("sums that were tried came out wrong, or did not end".into()))),
        }
    }

    /// What may be written to at any time.
    pub(super) fn trial(&self) -> &DeviceBuffer {
        &self.trial
    }

    fn flags(&self) -> DeviceSlice<'_, u32> {
        self.shared.slice(Self::VALUES, ALL_REDUCE_BLOCKS * self.world_size)
    }

    fn addresses(&self) -> DeviceSlice<'_, u64> {
        self.own.slice(0, 2 * self.world_size)
    }

    fn epochs(&self) -> DeviceSlice<'_, u32> {
        self.own.slice(2 * self.world_size * size_of::<u64>(), 2 * ALL_REDUCE_BLOCKS)
    }

    /// The others' memory in the order of ranks, or in words why there is none.
    fn open(&self, rank: usize, offers: &[Offer]) -> Result<Vec<PeerBuffer>, String> {
        let own = &offers[rank];
        if let Some(other) = offers.iter().position(|offer| offer.machine == [0; MACHINE_BYTES]) {
            return Err(format!("the memory of rank {other}'s GPU cannot be shared"));
        }
        if offers.iter().any(|offer| offer.machine != own.machine) {
            return Err("ranks are on several machines".into());
        }
        let others = offers.iter().enumerate().filter(|(other, _)| *other != rank);
        others
            .map(|(other, offer)| {
                let opened = self.cuda.open_peer(&IpcHandle::from_bytes(offer.handle));
                opened.map_err(|error| format!("the memory of rank {other} is out of reach: {error}"))
            })
            .collect()
    }

    fn group(&self, rank: usize, peers: &[PeerBuffer], abort: &OneShotAbort) -> Result<Group, CudaError> {
        let mut values: Vec<u64> = peers.iter().map(PeerBuffer::address).collect();
        values.insert(rank, self.shared.as_slice::<u8>().address());
        let flags: Vec<u64> = values.iter().map(|address| address + Self::VALUES as u64).collect();
        self.addresses().write(&[&values[..], &flags[..]].concat())?;
        let addresses = self.addresses();
        Ok(Group {
            rank,
            world_size: self.world_size,
            buffers: addresses.address(),
            capacity: ONE_SHOT_BYTES,
            num_blocks: ALL_REDUCE_BLOCKS,
            flags: addresses.slice(self.world_size..2 * self.world_size).address(),
            epochs: self.epochs().address(),
            abort: abort.0.address(),
        })
    }
}

impl OneShot {
    /// As [`OneShotAbort::abort`].
    pub fn abort(&self) {
        self.abort.abort();
    }

    pub fn is_aborted(&self) -> bool {
        self.abort.is_aborted()
    }

    /// The most bytes that are summed so in this group.
    pub fn most_bytes(&self) -> usize {
        self.most_bytes
    }

    /// Leaves larger sums to others; every rank has to.
    pub fn limit_to(&mut self, most_bytes: usize) {
        self.most_bytes = self.most_bytes.min(most_bytes);
    }

    /// Whether so many values are summed so.
    pub fn takes<T: Summed>(&self, values: DeviceSlice<'_, T>) -> bool {
        values.len().is_multiple_of(8) && values.bytes() <= self.most_bytes
    }

    /// Queues `values` = the sum of all ranks' `values`, on every rank. May be captured.
    ///
    /// # Errors
    /// As [`Runner::launch`].
    ///
    /// # Panics
    /// If these are not as many as [`OneShot::takes`].
    pub fn all_reduce<T: Summed>(
        &self,
        runner: &Runner,
        values: DeviceSlice<'_, T>,
    ) -> Result<(), CudaError> {
        let at = values.address();
        runner.launch(&launcher::one_shot_all_reduce(at, at, T::REDUCED, values.len(), self.group))
    }

    /// Whether sums of all sizes come out right, in time, and several on the way at once: small integers, whose sums are exact.
    fn try_out(&self, runner: &Runner, memory: &DeviceBuffer) -> Result<bool, DeviceCommError> {
        const ROUNDS: usize = 4;
        let mut exact = true;
        for round in 0..ROUNDS {
            for bytes in [32, 16384 + 32 * round, ONE_SHOT_BYTES] {
                let of_rank = |rank: usize, i: usize| (i * 7 + rank * 31 + round * 13) % 61;
                let singles = memory.slice::<f32>(0, bytes / size_of::<f32>());
                let halves = memory.slice::<bf16>(0, bytes / size_of::<bf16>());
                // All ranks go on: one that stopped would keep the others waiting.
                exact &= self.sums_are(runner, singles, 2, |rank, i| of_rank(rank, i) as f32)?;
                exact &= self
                    .sums_are(runner, halves, 1, |rank, i| bf16::from_f32((of_rank(rank, i) % 2) as f32))?;
                if self.abort.is_aborted() {
                    return Ok(false);
                }
            }
        }
        Ok(exact)
    }

    /// Whether `values`, summed `times` times, are what they should be on this rank.
    fn sums_are<T: Summed>(
        &self,
        runner: &Runner,
        values: DeviceSlice<'_, T>,
        times: u32,
        of_rank: impl Fn(usize, usize) -> T,
    ) -> Result<bool, DeviceCommError> {
        let Group { rank, world_size, .. } = self.group;
        let own: Vec<T> = (0..values.len()).map(|i| of_rank(rank, i)).collect();
        values.write(&own)?;
        for _ in 0..times {
            self.all_reduce(runner, values)?;
        }
        if !self.cuda.is_idle_within(PATIENCE)? {
            self.abort.abort();
            if !self.cuda.is_idle_within(PATIENCE)? {
                return Err(DeviceCommError::Stuck);
            }
        }
        if self.abort.is_aborted() {
            return Ok(false);
        }
        let mut sums = own;
        values.read(&mut sums)?;
        // Summed again, a sum is that of equal values.
        let factor = world_size.pow(times - 1) as f32;
        let sum = |i| (0..world_size).map(|rank| of_rank(rank, i).into()).sum::<f32>() * factor;
        Ok(sums.into_iter().enumerate().all(|(i, found)| found.into() == sum(i)))
    }
}

/// How long sums may take that are only tried: every rank begins them at once.
const PATIENCE: Duration = Duration::from_secs(5);

/// A type of values that are summed.
pub trait Summed: Element + Into<f32> {
    const REDUCED: Reduced;
}

impl Summed for f32 {
    const REDUCED: Reduced = Reduced::F32;
}

impl Summed for bf16 {
    const REDUCED: Reduced = Reduced::Bf16;
}

/// Room for a boot's id, as text.
const MACHINE_BYTES: usize = 36;

/// What a rank tells the others of its memory.
struct Offer {
    /// The machine, by the id of its boot: a handle of another machine means nothing here. Zeros without an offer.
    machine: [u8; MACHINE_BYTES],
    handle: [u8; IpcHandle::BYTES],
}

impl Offer {
    const WORDS: usize = (MACHINE_BYTES + IpcHandle::BYTES) / 4;

    fn of(memory: &DeviceBuffer) -> Self {
        let none = Self { machine: [0; MACHINE_BYTES], handle: [0; IpcHandle::BYTES] };
        let Ok(boot) = std::fs::read("/proc/sys/kernel/random/boot_id") else { return none };
        match (boot.first_chunk(), memory.ipc_handle()) {
            (Some(machine), Ok(handle)) => Self { machine: *machine, handle: *handle.as_bytes() },
            _ => none,
        }
    }
}

/// All ranks' offers. Connections carry words.
fn offers(comm: &mut TcpCommunicator, own: &Offer) -> Result<Vec<Offer>, CommError> {
    let words = gather(comm, &words_of(&[&own.machine[..], &own.handle].concat()))?;
    let offers = words.chunks(Offer::WORDS).map(|words| {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let (machine, handle) = bytes.split_at(MACHINE_BYTES);
        Offer { machine: machine.try_into().expect("so long"), handle: handle.try_into().expect("so long") }
    });
    Ok(offers.collect())
}

/// Whether all ranks can, which each of them knows after this.
fn all_can(comm: &mut TcpCommunicator, can: bool) -> Result<bool, CommError> {
    Ok(gather(comm, &[f32::from(u8::from(can))])?.iter().all(|&can| can == 1.0))
}

fn words_of(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

/// What all ranks give, in their order.
pub(super) fn gather(comm: &mut TcpCommunicator, own: &[f32]) -> Result<Vec<f32>, CommError> {
    let mut all = vec![0.0; comm.size() * own.len()];
    comm.all_gather_equal(own, &mut all)?;
    Ok(all)
}
