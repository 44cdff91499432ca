//! The way out: events of one request, from the step thread to whoever reads them.
//!
//! Each step sends at most one message per request. The channel is bounded; the engine looks for room before
//! it schedules a request, so sending never waits and what a step draws is never kept back. Only the end of a
//! choice, which the reader itself asked for, may find no room: it stays in the outlet's `unsent` and leaves
//! with the next message, or takes its place. A reader that makes room, or goes away, wakes the step thread by a command. A failure
//! needs no room at all: it is left beside the channel and read once the channel has closed.

use std::future::poll_fn;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{Arc, OnceLock, mpsc as std_mpsc};
use std::task::Context;

use tokio::sync::mpsc;

use crate::error::RequestFailure;
use crate::handle::Command;
use crate::relay::Relay;

/// Step messages that may wait in one stream before its request pauses, unless a test says otherwise.
pub(crate) const STREAM_CAPACITY: usize = 256;

/// What happened to a request in one step.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The prompt is computed; comes once, before any token.
    Started {
        /// Prompt tokens whose KV came from the prefix cache.
        cached_tokens: usize,
        /// When asked for: one entry per prompt token; the first is `None`, nothing precedes it.
        prompt_logprobs: Option<Vec<Option<TokenLogprobs>>>,
    },
    /// Every generated token, the one that stops the choice too.
    Token { choice: u32, token: u32, logprobs: Option<TokenLogprobs> },
    /// The last event of a choice; the stream ends with the last choice's.
    Finished { choice: u32, reason: FinishReason },
    /// The last event of the request, whatever its choices had reached.
    Failed(RequestFailure),
}

/// Why a choice ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// `Some`: one of `stop_token_ids` was drawn; it is the choice's last token. `None`: the model's
    /// end-of-sequence token was drawn (the last token again), or the reader called
    /// [`RequestStream::finish_choice`].
    Stop(Option<u32>),
    /// `max_tokens` was reached.
    Length,
}

/// A token's place in the raw distribution: before penalties, biases, temperature and truncation.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    pub token: u32,
    /// Natural logarithm.
    pub logprob: f32,
    /// 1 is the likeliest.
    pub rank: u32,
    /// The likeliest tokens, best first, as many as were asked for.
    pub top: Vec<(u32, f32)>,
}

/// The reader's end. Dropping it before the last event cancels the request.
pub struct RequestStream {
    serial: u64,
    seed: u64,
    receiver: mpsc::Receiver<Vec<Event>>,
    commands: std_mpsc::Sender<Command>,
    shared: Arc<StreamState>,
    relay: Arc<Relay>,
    /// Choices without a `Finished` event; 0 after the terminal event.
    unfinished_choices: u32,
}

/// The engine's end.
pub(crate) struct Outlet {
    sender: mpsc::Sender<Vec<Event>>,
    shared: Arc<StreamState>,
    unsent: Vec<Event>,
}

#[derive(Default)]
struct StreamState {
    /// The engine found the channel full and wants to hear about room.
    wants_room: AtomicBool,
    failure: OnceLock<RequestFailure>,
}

pub(crate) fn stream(
    serial: u64,
    seed: u64,
    choices: u32,
    commands: std_mpsc::Sender<Command>,
    relay: Arc<Relay>,
    capacity: usize,
) -> (Outlet, RequestStream) {
    let (sender, receiver) = mpsc::channel(capacity);
    let shared = Arc::new(StreamState::default());
    let outlet = Outlet { sender, shared: shared.clone(), unsent: Vec::new() };
    (outlet, RequestStream { serial, seed, receiver, commands, shared, relay, unfinished_choices: choices })
}

impl RequestStream {
    /// Events of the next step in which something happened; `None` after the terminal event. Cancel-safe.
    pub async fn next(&mut self) -> Option<Vec<Event>> {
        if self.unfinished_choices == 0 {
            return None;
        }
        let Self { receiver, relay, .. } = self;
        let received = poll_fn(|context| {
            let waker = relay.waker(context.waker());
            receiver.poll_recv(&mut Context::from_waker(&waker))
        });
        let received = received.await;
        self.note(received)
    }

    /// The same for threads outside of an async runtime.
    ///
    /// # Panics
    /// Inside an async runtime's thread.
    pub fn blocking_next(&mut self) -> Option<Vec<Event>> {
        if self.unfinished_choices == 0 {
            return None;
        }
        let received = self.receiver.blocking_recv();
        self.note(received)
    }

    /// Ends a choice whose text matched a stop string and counts it as stopped. Its `Finished` event still
    /// comes; tokens drawn meanwhile may come before it. Without effect on a choice that has ended.
    pub fn finish_choice(&self, choice: u32) {
        // A stopped engine has failed the request already.
        let _ = self.commands.send(Command::FinishChoice { serial: self.serial, choice });
    }

    /// The request's seed: the client's, or the one drawn at submission.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Keeps count of what the reader was told, so that no stream ends without a terminal event.
    fn note(&mut self, received: Option<Vec<Event>>) -> Option<Vec<Event>> {
        let Some(events) = received else {
            self.unfinished_choices = 0;
            let failure = self.shared.failure.get().cloned().unwrap_or_else(RequestFailure::stopped);
            return Some(vec![Event::Failed(failure)]);
        };
        let finished = events.iter().filter(|event| matches!(event, Event::Finished { .. })).count();
        self.unfinished_choices = self.unfinished_choices.saturating_sub(finished as u32);
        // Pairs with the fence in `has_room`: room is made above, the wish is read below.
        fence(Ordering::SeqCst);
        if self.shared.wants_room.swap(false, Ordering::SeqCst) {
            let _ = self.commands.send(Command::Wake);
        }
        Some(events)
    }
}

impl Drop for RequestStream {
    fn drop(&mut self) {
        if self.unfinished_choices > 0 {
            let _ = self.commands.send(Command::Cancel { serial: self.serial });
        }
    }
}

impl Outlet {
    /// Adds to the step's message.
    pub(crate) fn push(&mut self, event: Event) {
        self.unsent.push(event);
    }

    /// Hands the step's message over; false when it has to wait for room.
    pub(crate) fn flush(&mut self) -> bool {
        if self.unsent.is_empty() {
            return true;
        }
        if !self.has_room_for(1) {
            return false;
        }
        // An error means that the reader is gone; its cancellation is on the way.
        let _ = self.sender.try_send(std::mem::take(&mut self.unsent));
        true
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.sender.is_closed()
    }

    /// Ends the stream, with a failure or after its last event; the reader sees it once it has read what was
    /// sent before.
    pub(crate) fn end(self, failure: Option<RequestFailure>) {
        // Dropping `self` closes the channel after the failure is in place.
        if let Some(failure) = failure {
            let _ = self.shared.failure.set(failure);
        }
    }

    /// Whether nothing waits to be handed over.
    pub(crate) fn is_flushed(&self) -> bool {
        self.unsent.is_empty()
    }

    /// Whether the reader has room for the events of one more step, behind another message if one is still to go. When not, it wakes the
    /// step thread once it has read.
    pub(crate) fn has_room(&self, behind_another: bool) -> bool {
        self.has_room_for(1 + usize::from(behind_another))
    }

    fn has_room_for(&self, messages: usize) -> bool {
        // Only the step thread sends: room seen before a step is there after it.
        if self.sender.capacity() >= messages {
            return true;
        }
        // The wish first, then a second look: a reader that read in between either sees the wish or made this
        // room.
        self.shared.wants_room.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        self.sender.capacity() >= messages
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CAPACITY: usize = 8;

    fn token(token: u32) -> Event {
        Event::Token { choice: 0, token, logprobs: None }
    }

    #[test]
    fn a_full_stream_asks_for_room_and_loses_nothing() {
        let (commands, inbox) = std_mpsc::channel();
        let (mut outlet, mut reader) = stream(5, 1, 1, commands, Arc::default(), CAPACITY);
        for i in 0..CAPACITY as u32 {
            outlet.push(token(i));
            assert!(outlet.flush());
        }
        assert!(!outlet.has_room(false));
        outlet.push(Event::Finished { choice: 0, reason: FinishReason::Length });
        assert!(!outlet.flush());
        assert_eq!(reader.blocking_next(), Some(vec![token(0)]));
        assert!(matches!(inbox.try_recv(), Ok(Command::Wake)));
        assert!(outlet.flush());
        for i in 1..CAPACITY as u32 {
            assert_eq!(reader.blocking_next(), Some(vec![token(i)]));
        }
        assert!(matches!(reader.blocking_next().unwrap()[0], Event::Finished { .. }));
        assert_eq!(reader.blocking_next(), None);
        drop(reader);
        assert!(inbox.try_recv().is_err(), "a stream read to its end cancels nothing");
    }

    #[test]
    fn a_failure_reaches_even_a_full_stream() {
        let (commands, _inbox) = std_mpsc::channel();
        let (mut outlet, mut reader) = stream(5, 1, 2, commands, Arc::default(), CAPACITY);
        for i in 0..CAPACITY as u32 {
            outlet.push(token(i));
            outlet.flush();
        }
        outlet.end(Some(RequestFailure::panicked()));
        let mut last = None;
        while let Some(events) = reader.blocking_next() {
            last = Some(events);
        }
        assert_eq!(last, Some(vec![Event::Failed(RequestFailure::panicked())]));
    }

    #[test]
    fn an_outlet_dropped_without_a_word_is_a_failure() {
        let (commands, _inbox) = std_mpsc::channel();
        let (outlet, mut reader) = stream(5, 1, 1, commands, Arc::default(), CAPACITY);
        drop(outlet);
        assert!(matches!(reader.blocking_next().unwrap()[0], Event::Failed(_)));
        assert_eq!(reader.blocking_next(), None);
    }

    #[test]
    fn dropping_an_unfinished_stream_cancels() {
        let (commands, inbox) = std_mpsc::channel();
        let (outlet, reader) = stream(5, 1, 1, commands, Arc::default(), CAPACITY);
        drop(reader);
        assert!(outlet.is_closed());
        assert!(matches!(inbox.try_recv(), Ok(Command::Cancel { serial: 5 })));
    }
}
