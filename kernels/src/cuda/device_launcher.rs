//! The checks' view of a GPU.

use std::collections::HashMap;

use super::launcher::{Address, Launch, Launcher};
use super::{DeviceBuffer, Runner};

/// A [`Launcher`] on a GPU.
#[derive(Debug)]
pub struct DeviceLauncher<'a> {
    runner: &'a Runner,
    memory: HashMap<Address, DeviceBuffer>,
}

impl<'a> DeviceLauncher<'a> {
    pub fn new(runner: &'a Runner) -> Self {
        Self { runner, memory: HashMap::new() }
    }

    /// The buffer that an address is in, and where.
    fn find(&self, address: Address) -> Result<(&DeviceBuffer, usize), String> {
        let holds = |buffer: &&DeviceBuffer| {
            let start = buffer.as_slice::<u8>().address();
            (start..start + buffer.bytes() as u64).contains(&address)
        };
        let buffer = self.memory.values().find(holds).ok_or("an address of no buffer")?;
        Ok((buffer, (address - buffer.as_slice::<u8>().address()) as usize))
    }
}

impl Launcher for DeviceLauncher<'_> {
    fn allocate(&mut self, bytes: usize) -> Result<Address, String> {
        let buffer = self.runner.cuda().alloc(bytes).map_err(|error| error.to_string())?;
        let address = buffer.as_slice::<u8>().address();
        self.memory.insert(address, buffer);
        Ok(address)
    }

    fn free(&mut self, address: Address) {
        self.memory.remove(&address);
    }

    fn upload(&mut self, address: Address, bytes: &[u8]) -> Result<(), String> {
        let (buffer, at) = self.find(address)?;
        buffer.slice(at, bytes.len()).write(bytes).map_err(|error| error.to_string())
    }

    fn download(&mut self, address: Address, bytes: &mut [u8]) -> Result<(), String> {
        let (buffer, at) = self.find(address)?;
        buffer.slice(at, bytes.len()).read(bytes).map_err(|error| error.to_string())
    }

    fn launch(&mut self, launch: &Launch) -> Result<(), String> {
        self.runner.launch(launch).map_err(|error| error.to_string())
    }

    fn launch_together(&mut self, _streams: &[Vec<Launch>]) -> Result<(), String> {
        Err("one stream runs one launch after the other".into())
    }

    fn has_streams(&self) -> bool {
        false
    }
}
