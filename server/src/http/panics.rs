//! A panic in one request ends that request, with a 500, and nothing else.

use std::future::{Future, poll_fn};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::task::Poll;

/// A future panicked. The panic hook has written the message to the log.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[error("a handler panicked")]
pub(super) struct Panicked;

/// Runs `future` and turns its panic into an error.
///
/// What the future borrows may be half changed after a panic: the caller must only drop it.
pub(super) async fn catch<F: Future>(future: F) -> Result<F::Output, Panicked> {
    let mut future = pin!(future);
    poll_fn(|context| match catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(context))) {
        Ok(polled) => polled.map(Ok),
        Err(_) => Poll::Ready(Err(Panicked)),
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panic_after_an_await_is_caught() {
        let panics = async {
            tokio::task::yield_now().await;
            assert_eq!(1, 2, "expected by this test");
        };
        assert_eq!(catch(panics).await, Err(Panicked));
        assert_eq!(catch(async { 7 }).await, Ok(7));
    }
}
