//! One wake of the readers' thread per step.
//!
//! A step has news for many streams. To wake each reader from the step thread takes a system call every time, and a thread
//! that serves them all falls asleep again between two of them. So while a step's events go out, wakes are gathered; at
//! the end one task of the readers' runtime, [`carry`], is woken and wakes the others from there. Wakes at other times
//! take no detour, nor does any while there is no such task.

use std::future::poll_fn;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

/// Shared by the step thread, the streams and the carrier.
#[derive(Default)]
pub(crate) struct Relay(Mutex<State>);

#[derive(Default)]
struct State {
    /// Of the task that carries wakes over, while there is one.
    carrier: Option<Waker>,
    is_gathering: bool,
    gathered: Vec<Waker>,
}

/// Gathers wakes until it is dropped.
pub(crate) struct Gathering<'a>(&'a Relay);

/// Wakes its reader by way of the relay.
struct Relayed {
    relay: Arc<Relay>,
    reader: Waker,
}

/// Wakes readers of gathered wakes, as a task of their own runtime. Never ends; dropping it is safe at any time.
pub(crate) async fn carry(relay: Arc<Relay>) {
    let relay = Carrier(relay);
    let mut wakers = Vec::new();
    poll_fn(|context| {
        relay.0.take_over(context, &mut wakers);
        wakers.drain(..).for_each(Waker::wake);
        Poll::<()>::Pending
    })
    .await;
}

/// Unregisters when its task ends.
struct Carrier(Arc<Relay>);

impl Drop for Carrier {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.carrier = None;
        let left = std::mem::take(&mut state.gathered);
        drop(state);
        left.into_iter().for_each(Waker::wake);
    }
}

impl Relay {
    pub(crate) fn gather(&self) -> Gathering<'_> {
        self.lock().is_gathering = true;
        Gathering(self)
    }

    /// A waker to be given to a stream in the reader's stead.
    pub(crate) fn waker(self: &Arc<Self>, reader: &Waker) -> Waker {
        Arc::new(Relayed { relay: self.clone(), reader: reader.clone() }).into()
    }

    fn take_over(&self, context: &Context<'_>, wakers: &mut Vec<Waker>) {
        let mut state = self.lock();
        std::mem::swap(&mut state.gathered, wakers);
        match &mut state.carrier {
            Some(carrier) => carrier.clone_from(context.waker()),
            none => *none = Some(context.waker().clone()),
        }
    }

    /// Every critical section is a few plain moves: a panic elsewhere leaves the state whole.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Gathering<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.is_gathering = false;
        if !state.gathered.is_empty()
            && let Some(carrier) = state.carrier.clone()
        {
            drop(state);
            carrier.wake();
        }
    }
}

impl Wake for Relayed {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        let mut state = self.relay.lock();
        if state.is_gathering && state.carrier.is_some() {
            state.gathered.push(self.reader.clone());
        } else {
            drop(state);
            self.reader.wake_by_ref();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    impl Count {
        fn get(&self) -> usize {
            self.0.load(Ordering::SeqCst)
        }
    }

    #[test]
    fn a_step_wakes_the_carrier_once_and_the_carrier_the_readers() {
        let relay = Arc::new(Relay::default());
        let (reader, carrier) = (Arc::new(Count::default()), Arc::new(Count::default()));
        let relayed = relay.waker(&reader.clone().into());

        // Nobody carries: at once.
        let gathering = relay.gather();
        relayed.wake_by_ref();
        assert_eq!(reader.get(), 1);
        drop(gathering);

        let mut task = Box::pin(carry(relay.clone()));
        let waker = carrier.clone().into();
        let mut context = Context::from_waker(&waker);
        assert!(task.as_mut().poll(&mut context).is_pending());
        let gathering = relay.gather();
        (0..3).for_each(|_| relayed.wake_by_ref());
        assert_eq!((reader.get(), carrier.get()), (1, 0));
        drop(gathering);
        assert_eq!((reader.get(), carrier.get()), (1, 1));
        assert!(task.as_mut().poll(&mut context).is_pending());
        assert_eq!((reader.get(), carrier.get()), (4, 1));

        // Between steps, and in a step that wakes nobody.
        relayed.wake_by_ref();
        drop(relay.gather());
        assert_eq!((reader.get(), carrier.get()), (5, 1));

        // A carrier that goes away leaves nobody asleep.
        let gathering = relay.gather();
        relayed.wake_by_ref();
        drop(task);
        assert_eq!(reader.get(), 6);
        relayed.wake_by_ref();
        drop(gathering);
        assert_eq!(reader.get(), 7);
    }

    #[test]
    fn a_panic_while_gathering_does_not_keep_wakes_back() {
        let relay = Arc::new(Relay::default());
        let (reader, carrier) = (Arc::new(Count::default()), Arc::new(Count::default()));
        let mut task = pin!(carry(relay.clone()));
        let waker = carrier.clone().into();
        assert!(task.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
        let relayed = relay.waker(&reader.clone().into());
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let _gathering = relay.gather();
            relayed.wake_by_ref();
            panic!("in a step");
        }));
        assert!(result.is_err());
        assert_eq!((reader.get(), carrier.get()), (0, 1));
        relayed.wake_by_ref();
        assert_eq!(reader.get(), 1);
    }
}
