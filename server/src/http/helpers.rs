//! Threads for what would hold up the HTTP thread: parsing long bodies, templates and tokenizing, writing long answers.
//!
//! Short work runs at once on the HTTP thread; handing it over would cost more than it does. Long work runs on the
//! runtime's blocking threads, a bounded number of pieces at a time. The bound belongs to the work and not to the
//! handler: a client that leaves drops its handler, but nothing stops a piece that has begun.

use std::sync::Arc;

use tokio::sync::Semaphore;

use super::errors::ApiError;

/// The bound, shared by all requests.
#[derive(Debug)]
pub(super) struct Helpers {
    permits: Arc<Semaphore>,
}

impl Helpers {
    /// At most `num_threads` pieces of long work at once.
    pub(super) fn new(num_threads: usize) -> Self {
        Self { permits: Arc::new(Semaphore::new(num_threads)) }
    }

    /// Runs `work` here, or on a helper thread when `is_long`. A future that is dropped while it waits never runs its
    /// work; one that is dropped later leaves the work to end by itself.
    ///
    /// # Errors
    /// 500 when long work panics.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        is_long: bool,
        request_id: &str,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, ApiError> {
        if !is_long {
            return Ok(work());
        }
        let permit = Arc::clone(&self.permits).acquire_owned().await;
        let permit = permit.map_err(|error| ApiError::internal(request_id, &error))?;
        let task = tokio::task::spawn_blocking(move || {
            let result = work();
            drop(permit);
            result
        });
        task.await.map_err(|error| ApiError::internal(request_id, &error))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc;
    use std::time::Duration;

    use futures_util::FutureExt;

    use super::*;

    #[tokio::test]
    async fn short_work_runs_here_and_long_work_elsewhere() {
        let helpers = Helpers::new(1);
        let here = std::thread::current().id();
        assert_eq!(helpers.run(false, "r", || std::thread::current().id()).await.unwrap(), here);
        assert_ne!(helpers.run(true, "r", || std::thread::current().id()).await.unwrap(), here);
    }

    #[tokio::test]
    async fn work_whose_client_left_still_counts() {
        let helpers = Helpers::new(2);
        let running = Arc::new(AtomicUsize::new(0));
        let mut gates = Vec::new();
        for _ in 0..2 {
            let (gate, closed) = mpsc::channel::<()>();
            let running = running.clone();
            let work = move || {
                running.fetch_add(1, Ordering::SeqCst);
                // Ends when the test drops the gate.
                let _ = closed.recv();
            };
            // Polled once and dropped: the client has gone.
            assert!(helpers.run(true, "r", work).now_or_never().is_none());
            gates.push(gate);
        }
        while running.load(Ordering::SeqCst) < 2 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let third = helpers.run(true, "r", || 3);
        tokio::pin!(third);
        let early = tokio::time::timeout(Duration::from_millis(50), &mut third).await;
        assert!(early.is_err(), "a third began while two ran");
        gates.pop();
        assert_eq!(third.await.unwrap(), 3);
    }

    #[tokio::test]
    async fn a_panic_is_a_500_and_gives_its_place_back() {
        let helpers = Helpers::new(1);
        let error = helpers.run(true, "r", || panic!("on purpose")).await.map(|(): ()| ()).unwrap_err();
        assert_eq!(error.status(), 500);
        assert_eq!(helpers.run(true, "r", || 1).await.unwrap(), 1);
    }
}
