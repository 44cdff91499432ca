//! How busy and how full a GPU is, for metrics.

use nvml_wrapper::Nvml;
use nvml_wrapper::error::NvmlError;

use super::DeviceInfo;

/// One GPU's view through NVML.
#[derive(Debug)]
pub struct GpuWatch {
    nvml: Nvml,
    index: u32,
}

/// A moment of a GPU. What it cannot tell is `None`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct GpuSample {
    /// Share of the last fraction of a second in which a kernel ran, 0 to 1.
    pub utilization: Option<f64>,
    /// Memory in use by all processes.
    pub used_bytes: Option<u64>,
    pub total_bytes: Option<u64>,
}

impl GpuWatch {
    /// Finds `device` by its UUID, else by its place on the bus: NVML counts all GPUs, CUDA those that this process may see. Needs no
    /// context and no CUDA call.
    ///
    /// # Errors
    /// The reason in words: without NVML, or for a part of a GPU, there are no such metrics, which is no fault.
    pub fn open(device: &DeviceInfo) -> Result<Self, String> {
        let nvml = open()?;
        let unknown = |error: NvmlError| format!("NVML does not know {device}: {error}");
        let index = match nvml.device_by_uuid(device.uuid.as_str()).and_then(|found| found.index()) {
            Ok(index) => index,
            Err(error) => {
                let bus = device.pci_bus_id.as_str();
                let found = nvml.device_by_pci_bus_id(bus).map_err(|_| unknown(error))?;
                // At a part's address is the whole GPU, whose use and memory are not the part's.
                if found.mig_mode().is_ok_and(|mode| mode.current != 0) {
                    return Err(format!("{device} is a part of a GPU, of which NVML knows the whole only"));
                }
                found.index().map_err(unknown)?
            }
        };
        Ok(Self { nvml, index })
    }

    /// Takes tens of microseconds; from any thread.
    pub fn sample(&self) -> GpuSample {
        let Ok(device) = self.nvml.device_by_index(self.index) else { return GpuSample::default() };
        let memory = device.memory_info().ok();
        GpuSample {
            utilization: device.utilization_rates().ok().map(|rates| f64::from(rates.gpu) / 100.0),
            used_bytes: memory.as_ref().map(|memory| memory.used),
            total_bytes: memory.as_ref().map(|memory| memory.total),
        }
    }
}

/// NVML by the name that drivers install, then by that of development packages.
fn open() -> Result<Nvml, String> {
    const NAMES: [&str; 2] = ["libnvidia-ml.so.1", "libnvidia-ml.so"];
    let mut reasons = Vec::new();
    for name in NAMES {
        match Nvml::builder().lib_path(name.as_ref()).init() {
            Ok(nvml) => return Ok(nvml),
            Err(error) => reasons.push(format!("{name}: {error}")),
        }
    }
    Err(format!("no NVML: {}", reasons.join("; ")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stub::{Stub, in_child};

    fn device(uuid: &str, pci_bus_id: &str) -> DeviceInfo {
        DeviceInfo {
            ordinal: 0,
            name: "some GPU".into(),
            uuid: uuid.into(),
            pci_bus_id: pci_bus_id.into(),
            capability: (8, 0),
            total_bytes: 0,
            num_sms: 0,
            l2_bytes: 0,
            max_shared_bytes: 0,
        }
    }

    #[test]
    fn a_gpu_is_found_by_what_it_is_and_not_by_its_number() {
        let test = "a_gpu_is_found_by_what_it_is_and_not_by_its_number";
        in_child((module_path!(), test), &[Stub::Nvml], &[], || {
            let watch =
                GpuWatch::open(&device("GPU-01010101-0101-0101-0101-010101010101", "ffff:ff:1f.7")).unwrap();
            let sample = watch.sample();
            // What it does not know is left out.
            let expected =
                GpuSample { utilization: Some(0.5), used_bytes: Some(800), total_bytes: Some(2000) };
            assert_eq!(sample, expected);
            let by_bus = GpuWatch::open(&device("GPU-8", "0000:01:00.0")).unwrap();
            assert_eq!(by_bus.sample().total_bytes, Some(1000));
            let reason = GpuWatch::open(&device("GPU-9", "0000:09:00.0")).unwrap_err();
            assert!(reason.starts_with("NVML does not know GPU 0 some GPU (8.0): "), "{reason}");
        });
    }

    #[test]
    fn a_part_of_a_gpu_is_not_taken_for_the_whole() {
        let test = "a_part_of_a_gpu_is_not_taken_for_the_whole";
        in_child((module_path!(), test), &[Stub::Nvml], &[("STUB_MIG", "1")], || {
            let reason = GpuWatch::open(&device("GPU-8", "0000:01:00.0")).unwrap_err();
            assert!(reason.contains("a part of a GPU"), "{reason}");
        });
    }

    #[test]
    fn without_nvml_there_is_a_reason() {
        // With a driver as without one, no GPU has this address.
        let reason = GpuWatch::open(&device("GPU-0", "ffff:ff:1f.7")).unwrap_err();
        assert!(reason.contains("NVML"), "{reason}");
    }
}
