//! Time on the device.

use cudarc::driver::CudaEvent;
use cudarc::driver::sys::CUevent_flags;

use super::{Cuda, CudaError, driver};

/// Measures how long the device takes for what is queued between two calls.
#[derive(Debug)]
pub struct Timer {
    cuda: Cuda,
    start: CudaEvent,
    stop: CudaEvent,
}

impl Timer {
    /// # Errors
    /// `Driver`; `InCapture`.
    pub fn new(cuda: &Cuda) -> Result<Self, CudaError> {
        cuda.forbid_in_capture("making a timer")?;
        let event = || {
            cuda.stream()
                .context()
                .new_event(Some(CUevent_flags::CU_EVENT_DEFAULT))
                .map_err(|error| CudaError::driver("cuEventCreate", error))
        };
        Ok(Self { cuda: cuda.clone(), start: event()?, stop: event()? })
    }

    /// From what is queued next. An idle device starts at once, and the time until more is queued counts; work queued right before
    /// hides that.
    ///
    /// # Errors
    /// `Driver`; `InCapture`.
    pub fn start(&mut self) -> Result<(), CudaError> {
        self.record(&self.start)
    }

    /// Waits for everything queued so far, and gives the microseconds since [`Timer::start`].
    ///
    /// # Errors
    /// `Driver`, also for what went wrong in earlier work, and without a start; `InCapture`.
    pub fn stop_us(&mut self) -> Result<f32, CudaError> {
        self.record(&self.stop)?;
        self.stop.synchronize().map_err(|error| CudaError::driver("cuEventSynchronize", error))?;
        // SAFETY: both events have timing and are of this context; the last has happened. One that was never recorded is an error.
        let ms = unsafe { driver::event_elapsed_ms(self.start.cu_event(), self.stop.cu_event()) };
        ms.map(|ms| ms * 1000.0).map_err(|code| CudaError::Driver {
            call: "cuEventElapsedTime",
            code: format!("error {code}"),
            reason: "events cannot be compared".into(),
        })
    }

    fn record(&self, event: &CudaEvent) -> Result<(), CudaError> {
        self.cuda.forbid_in_capture("measuring time")?;
        event.record(self.cuda.stream()).map_err(|error| CudaError::driver("cuEventRecord", error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::tests::{ALL, open};
    use crate::stub::in_child;

    #[test]
    fn what_is_queued_in_between_counts() {
        in_child((module_path!(), "what_is_queued_in_between_counts"), &ALL, &[], || {
            let cuda = open();
            let mut timer = Timer::new(&cuda).unwrap();
            assert!(matches!(timer.stop_us(), Err(CudaError::Driver { .. })));
            let buffer = cuda.alloc_zeroed(8).unwrap();
            // The stand-in takes a microsecond for each.
            for fills in [0, 3] {
                buffer.as_slice::<u8>().fill_bytes(1).unwrap();
                timer.start().unwrap();
                (0..fills).for_each(|_| buffer.as_slice::<u8>().fill_bytes(2).unwrap());
                let us = timer.stop_us().unwrap();
                assert!((us - fills as f32).abs() < 0.01, "{us} for {fills}");
                buffer.as_slice::<u8>().fill_bytes(3).unwrap();
            }
        });
    }
}
