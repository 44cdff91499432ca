//! How busy and how full GPUs are, for metrics, as plain data.

use tandem_kernels::cuda::{Cuda, GpuWatch};

/// Looks at GPUs through NVML.
#[derive(Debug)]
pub struct GpuMeter {
    watches: Vec<(usize, GpuWatch)>,
}

/// A moment of one GPU. What it does not tell is `None`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GpuUsage {
    /// Its number among the GPUs that this process sees.
    pub gpu: usize,
    /// Share of the last fraction of a second in which a kernel ran, 0 to 1.
    pub utilization_ratio: Option<f64>,
    /// Memory in use by all processes.
    pub memory_used_bytes: Option<u64>,
    pub memory_total_bytes: Option<u64>,
}

impl GpuMeter {
    /// Finds GPUs by their numbers. Opens NVML, which may take a while; makes no context on any GPU.
    ///
    /// # Errors
    /// The first reason why one cannot be looked at, in words.
    pub fn open(ordinals: impl IntoIterator<Item = usize>) -> Result<Self, String> {
        let devices = Cuda::probe().map_err(|error| error.to_string())?;
        let watch = |ordinal: usize| {
            let device = devices.get(ordinal).ok_or_else(|| format!("there is no GPU {ordinal}"))?;
            Ok((ordinal, GpuWatch::open(device)?))
        };
        Ok(Self { watches: ordinals.into_iter().map(watch).collect::<Result<_, String>>()? })
    }

    /// Asks the driver: microseconds as a rule, and as long as it likes when it is in trouble.
    pub fn read(&self) -> Vec<GpuUsage> {
        let usage = |(gpu, watch): &(usize, GpuWatch)| {
            let sample = watch.sample();
            GpuUsage {
                gpu: *gpu,
                utilization_ratio: sample.utilization,
                memory_used_bytes: sample.used_bytes,
                memory_total_bytes: sample.total_bytes,
            }
        };
        self.watches.iter().map(usage).collect()
    }
}
