//! Messages as bytes, and bytes as messages again. No socket here, no clock.
//!
//! ```text
//! offset  0        4       12        28     29      30
//!         ├ length ┼ epoch ┼ sender ─┼ kind ┼ flags ┼ payload …
//!           u32      u64     u128      u8     u8
//! ```
//!
//! Little-endian. The length counts what follows it. Flag 1: more frames of this message follow. A frame is
//! at most [`MAX_FRAME`] bytes long, so a long message is several frames, all with the same epoch, sender and
//! kind, and a frame that is not its message's last one has a payload: otherwise a message could go on
//! forever without growing.

use crate::error::WireError;
use crate::message::{Incarnation, Message};

/// The longest frame, with its header: 1 MiB.
pub const MAX_FRAME: usize = 1 << 20;

/// The longest payload of a message: 64 MiB.
pub const MAX_MESSAGE: usize = 64 << 20;

/// Bytes of a frame before its payload.
pub(crate) const HEADER: usize = 30;

/// Bytes of the header that the length does not count: the length itself.
const LENGTH: usize = 4;

/// The longest payload of one frame.
pub(crate) const MAX_FRAME_PAYLOAD: usize = MAX_FRAME - HEADER;

const FLAG_MORE: u8 = 1;

/// The frames of one message in order, each a header and its part of `payload`. An empty payload is one
/// frame.
pub(crate) fn frames(
    epoch: u64,
    sender: Incarnation,
    kind: u8,
    payload: &[u8],
) -> impl Iterator<Item = ([u8; HEADER], &[u8])> {
    let num_frames = payload.len().div_ceil(MAX_FRAME_PAYLOAD).max(1);
    (0..num_frames).map(move |frame_idx| {
        let from = frame_idx * MAX_FRAME_PAYLOAD;
        let part = &payload[from..payload.len().min(from + MAX_FRAME_PAYLOAD)];
        let more = frame_idx + 1 < num_frames;
        (Header { epoch, sender, kind, more, payload_len: part.len() }.encode(), part)
    })
}

/// Puts messages together from bytes, however these are cut. After an error it must not be used again: where
/// the next frame begins is unknown.
pub(crate) struct Assembler {
    /// The longest payload that is taken.
    limit: usize,
    header: [u8; HEADER],
    /// Bytes of `header` that are there.
    header_len: usize,
    /// The frame whose payload is arriving.
    frame: Option<Rest>,
    /// The message those frames belong to; its payload holds what has arrived.
    message: Option<Message>,
}

/// What is still to come of a frame.
#[derive(Clone, Copy)]
struct Rest {
    payload_left: usize,
    more: bool,
}

impl Default for Assembler {
    fn default() -> Self {
        Self { limit: MAX_MESSAGE, header: [0; HEADER], header_len: 0, frame: None, message: None }
    }
}

impl Assembler {
    /// Takes no message with a payload of more than `limit` bytes from now on, nor any of more than [`MAX_MESSAGE`].
    pub(crate) fn set_limit(&mut self, limit: usize) {
        self.limit = limit.min(MAX_MESSAGE);
    }

    /// Whether every byte taken belongs to a message that was returned.
    pub(crate) fn is_empty(&self) -> bool {
        self.header_len == 0 && self.frame.is_none() && self.message.is_none()
    }

    /// Takes bytes from the front of `bytes` until a message is whole, which it returns, or none are left.
    pub(crate) fn take(&mut self, bytes: &mut &[u8]) -> Result<Option<Message>, WireError> {
        loop {
            let Some(rest) = self.frame else {
                let part = take_up_to(bytes, HEADER - self.header_len);
                self.header[self.header_len..self.header_len + part.len()].copy_from_slice(part);
                self.header_len += part.len();
                if self.header_len < HEADER {
                    return Ok(None);
                }
                self.header_len = 0;
                self.begin(Header::decode(&self.header)?)?;
                continue;
            };
            let part = take_up_to(bytes, rest.payload_left);
            append(&mut self.message.as_mut().expect("a frame belongs to a message").payload, part);
            let payload_left = rest.payload_left - part.len();
            if payload_left > 0 {
                self.frame = Some(Rest { payload_left, ..rest });
                return Ok(None);
            }
            self.frame = None;
            if !rest.more {
                return Ok(self.message.take());
            }
        }
    }

    fn begin(&mut self, header: Header) -> Result<(), WireError> {
        let message = self.message.get_or_insert_with(|| Message {
            epoch: header.epoch,
            sender: header.sender,
            kind: header.kind,
            payload: Vec::new(),
        });
        if (message.epoch, message.sender, message.kind) != (header.epoch, header.sender, header.kind) {
            return Err(WireError::Frame { reason: "it contradicts the frames before it in its message" });
        }
        // Neither summand is past its own limit, so the sum cannot wrap.
        let len = message.payload.len() + header.payload_len;
        if len > self.limit {
            return Err(WireError::MessageTooLarge { len, limit: self.limit });
        }
        self.frame = Some(Rest { payload_left: header.payload_len, more: header.more });
        Ok(())
    }
}

fn take_up_to<'a>(bytes: &mut &'a [u8], most: usize) -> &'a [u8] {
    let (part, rest) = bytes.split_at(most.min(bytes.len()));
    *bytes = rest;
    part
}

/// Appends with memory for at most twice what has arrived, and never for more than the longest message.
fn append(payload: &mut Vec<u8>, part: &[u8]) {
    let len = payload.len() + part.len();
    if len > payload.capacity() {
        let capacity = len.max((2 * payload.len()).min(MAX_MESSAGE));
        payload.reserve_exact(capacity - payload.len());
    }
    payload.extend_from_slice(part);
}

/// A frame without its payload.
struct Header {
    epoch: u64,
    sender: Incarnation,
    kind: u8,
    more: bool,
    payload_len: usize,
}

impl Header {
    fn encode(&self) -> [u8; HEADER] {
        let len = u32::try_from(HEADER - LENGTH + self.payload_len).expect("a frame is at most MAX_FRAME");
        let mut bytes = [0; HEADER];
        bytes[0..4].copy_from_slice(&len.to_le_bytes());
        bytes[4..12].copy_from_slice(&self.epoch.to_le_bytes());
        bytes[12..28].copy_from_slice(&self.sender.0.to_le_bytes());
        bytes[28] = self.kind;
        bytes[29] = if self.more { FLAG_MORE } else { 0 };
        bytes
    }

    fn decode(bytes: &[u8; HEADER]) -> Result<Self, WireError> {
        let len = u32::from_le_bytes(field(bytes, 0));
        let payload_len = (len as usize)
            .checked_sub(HEADER - LENGTH)
            .filter(|payload_len| *payload_len <= MAX_FRAME_PAYLOAD)
            .ok_or(WireError::FrameLength { len })?;
        let flags = bytes[29];
        if flags & !FLAG_MORE != 0 {
            return Err(WireError::Frame { reason: "it has unknown flags" });
        }
        let more = flags & FLAG_MORE != 0;
        if more && payload_len == 0 {
            return Err(WireError::Frame { reason: "it is empty and not its message's last" });
        }
        Ok(Self {
            epoch: u64::from_le_bytes(field(bytes, 4)),
            sender: Incarnation(u128::from_le_bytes(field(bytes, 12))),
            kind: bytes[28],
            more,
            payload_len,
        })
    }
}

fn field<const N: usize>(bytes: &[u8; HEADER], from: usize) -> [u8; N] {
    bytes[from..from + N].try_into().expect("a header's fields lie inside it")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message(kind: u8, payload: &[u8]) -> Message {
        let (epoch, sender) = (u64::from(kind) << 40 | 7, Incarnation(u128::from(kind) << 90 | 5));
        Message { epoch, sender, kind, payload: payload.to_vec() }
    }

    fn encode(message: &Message) -> Vec<u8> {
        let frames = frames(message.epoch, message.sender, message.kind, &message.payload);
        frames.flat_map(|(header, part)| [&header[..], part].concat()).collect()
    }

    /// The frames of `message` with at most `most` bytes of payload each, which the protocol allows as well.
    fn encode_in_parts(message: &Message, most: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut parts: Vec<&[u8]> = message.payload.chunks(most).collect();
        if parts.is_empty() {
            parts.push(&[]);
        }
        for (i, part) in parts.iter().enumerate() {
            let Message { epoch, sender, kind, .. } = *message;
            let more = i + 1 < parts.len();
            bytes.extend(Header { epoch, sender, kind, more, payload_len: part.len() }.encode());
            bytes.extend(*part);
        }
        bytes
    }

    /// All messages of `chunks`, checking after each chunk that memory is in proportion to what has arrived.
    fn assemble<'a>(chunks: impl IntoIterator<Item = &'a [u8]>) -> Result<Vec<Message>, WireError> {
        let mut assembler = Assembler::default();
        let mut messages = Vec::new();
        let mut arrived = 0;
        for mut chunk in chunks {
            arrived += chunk.len();
            while let Some(message) = assembler.take(&mut chunk)? {
                messages.push(message);
            }
            assert!(chunk.is_empty(), "bytes are left without a message");
            let held = assembler.message.as_ref().map_or(0, |message| message.payload.capacity());
            assert!(held <= 2 * arrived && held <= MAX_MESSAGE, "{held} bytes held for {arrived}");
        }
        Ok(messages)
    }

    fn refusal(bytes: &[u8]) -> WireError {
        assemble([bytes]).unwrap_err()
    }

    #[test]
    fn the_layout_is_the_documented_one() {
        let message = Message { epoch: 0x0102, sender: Incarnation(0x0304), kind: 5, payload: vec![6, 7] };
        let mut bytes = vec![28, 0, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0, 4, 3];
        bytes.extend([0; 14]);
        bytes.extend([5, 0, 6, 7]);
        assert_eq!(encode(&message), bytes);
    }

    #[test]
    fn messages_split_at_any_two_bytes_are_whole_again() {
        let messages = [message(1, b"one"), message(2, b""), message(3, b"three, in parts")];
        let bytes = [encode(&messages[0]), encode(&messages[1]), encode_in_parts(&messages[2], 4)].concat();
        for first in 0..=bytes.len() {
            for second in first..=bytes.len() {
                let chunks = [&bytes[..first], &bytes[first..second], &bytes[second..]];
                assert_eq!(assemble(chunks).unwrap(), messages, "{first} {second}");
            }
        }
        assert_eq!(assemble(bytes.chunks(1)).unwrap(), messages);
    }

    #[test]
    fn a_message_is_cut_into_as_few_frames_as_it_can_be() {
        for (len, num_frames) in [
            (0, 1),
            (1, 1),
            (MAX_FRAME_PAYLOAD, 1),
            (MAX_FRAME_PAYLOAD + 1, 2),
            (2 * MAX_FRAME_PAYLOAD, 2),
            (MAX_MESSAGE, 65),
        ] {
            let payload: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
            let message = message(9, &payload);
            let bytes = encode(&message);
            assert_eq!(bytes.len(), len + num_frames * HEADER);
            assert_eq!(assemble(bytes.chunks(64 * 1024)).unwrap(), [message], "{len}");
        }
    }

    #[test]
    fn impossible_lengths_are_refused() {
        let header = |len: u32| {
            let mut bytes = encode(&message(1, b""));
            bytes[..4].copy_from_slice(&len.to_le_bytes());
            bytes
        };
        let longest = (MAX_FRAME - LENGTH) as u32;
        for len in [0, 1, 25, longest + 1, u32::MAX / 2, u32::MAX] {
            let error = refusal(&header(len));
            assert!(matches!(error, WireError::FrameLength { len: named } if named == len), "{error}");
        }
        for len in [26, 27, longest] {
            assemble([&header(len)[..]]).unwrap();
        }
    }

    #[test]
    fn a_message_past_the_limit_is_refused_at_the_frame_that_crosses_it() {
        let frame = |more, payload_len| {
            let (epoch, sender, kind) = (1, Incarnation(1), 1);
            let mut bytes = Header { epoch, sender, kind, more, payload_len }.encode().to_vec();
            bytes.resize(HEADER + payload_len, 0);
            bytes
        };
        let full = frame(true, MAX_FRAME_PAYLOAD);
        let mut assembler = Assembler::default();
        for _ in 0..64 {
            assert!(assembler.take(&mut &full[..]).unwrap().is_none());
        }
        let room = MAX_MESSAGE - 64 * MAX_FRAME_PAYLOAD;
        assert!(assembler.take(&mut &frame(true, room)[..]).unwrap().is_none());
        assert_eq!(assembler.message.as_ref().unwrap().payload.capacity(), MAX_MESSAGE);
        // Its header alone is enough.
        let error = assembler.take(&mut &frame(false, 1)[..HEADER]).unwrap_err();
        assert!(
            matches!(error, WireError::MessageTooLarge { len, limit: MAX_MESSAGE } if len == MAX_MESSAGE + 1),
            "{error}"
        );

        let mut strict = Assembler::default();
        strict.set_limit(9);
        assert!(strict.take(&mut &frame(false, 9)[..]).unwrap().is_some());
        let error = strict.take(&mut &frame(true, 10)[..HEADER]).unwrap_err();
        assert!(matches!(error, WireError::MessageTooLarge { len: 10, limit: 9 }), "{error}");
    }

    #[test]
    fn a_frame_that_contradicts_its_message_is_refused() {
        let first = |more| Header { epoch: 1, sender: Incarnation(2), kind: 3, more, payload_len: 1 };
        let start = [&first(true).encode()[..], b"x"].concat();
        let next = |header: Header| [&start[..], &header.encode(), b"y"].concat();
        assert_eq!(assemble([&next(first(false))[..]]).unwrap()[0].payload, b"xy");
        for other in [
            Header { epoch: 2, ..first(false) },
            Header { sender: Incarnation(3), ..first(false) },
            Header { kind: 4, ..first(false) },
        ] {
            assert!(matches!(refusal(&next(other)), WireError::Frame { .. }));
        }
        let empty = next(Header { payload_len: 0, ..first(true) });
        assert!(matches!(refusal(&empty), WireError::Frame { .. }));
        // A last frame may be empty: it ends the message.
        let end = Header { payload_len: 0, ..first(false) }.encode();
        assert_eq!(assemble([&start[..], &end]).unwrap()[0].payload, b"x");
    }

    #[test]
    fn unknown_flags_are_refused() {
        for bit in 1..8 {
            let mut bytes = encode(&message(1, b"x"));
            bytes[29] |= 1 << bit;
            assert!(matches!(refusal(&bytes), WireError::Frame { .. }), "bit {bit}");
        }
    }

    #[test]
    fn every_bit_of_valid_frames_may_flip() {
        let messages = [message(1, b"first"), message(2, &[9; 40])];
        let bytes = [encode_in_parts(&messages[0], 2), encode(&messages[1])].concat();
        let (mut refused, mut changed) = (0, 0);
        for bit in 0..8 * bytes.len() {
            let mut mutated = bytes.clone();
            mutated[bit / 8] ^= 1 << (bit % 8);
            match assemble(mutated.chunks(7)) {
                Ok(read) => {
                    assert_ne!(read, messages, "bit {bit} is in no field");
                    changed += 1;
                }
                Err(_) => refused += 1,
            }
        }
        // Bits of a payload cannot be noticed here; most bits of a header of several frames can.
        assert!(refused > 300 && changed > 300, "{refused} refused, {changed} changed");
    }

    fn any_message() -> impl Strategy<Value = (Message, usize)> {
        let payload = prop::collection::vec(any::<u8>(), 0..300);
        let fields = (any::<u64>(), any::<u128>(), any::<u8>(), payload, 1..300usize);
        fields.prop_map(|(epoch, sender, kind, payload, part)| {
            (Message { epoch, sender: Incarnation(sender), kind, payload }, part)
        })
    }

    proptest! {
        #[test]
        fn any_chunking_yields_the_same_messages(
            sent in prop::collection::vec(any_message(), 0..6),
            chunk_lens in prop::collection::vec(1..200usize, 1..40),
        ) {
            let bytes: Vec<u8> =
                sent.iter().flat_map(|(message, part)| encode_in_parts(message, *part)).collect();
            let mut rest = &bytes[..];
            let chunks = chunk_lens.iter().cycle().map_while(|len| {
                (!rest.is_empty()).then(|| take_up_to(&mut rest, *len))
            });
            let received = assemble(chunks).unwrap();
            prop_assert_eq!(received, sent.into_iter().map(|(message, _)| message).collect::<Vec<_>>());
        }

        #[test]
        fn any_bytes_are_taken_or_refused_within_the_bound(
            bytes in prop::collection::vec(any::<u8>(), 0..600), chunk_len in 1..100usize,
        ) {
            // `assemble` checks the bound; whether it refuses is up to the bytes.
            let _ = assemble(bytes.chunks(chunk_len));
        }

        #[test]
        fn frames_with_any_changes_are_taken_or_refused_within_the_bound(
            sent in prop::collection::vec(any_message(), 1..4),
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
            cut in any::<prop::sample::Index>(),
            chunk_len in 1..100usize,
        ) {
            let mut bytes: Vec<u8> =
                sent.iter().flat_map(|(message, part)| encode_in_parts(message, *part)).collect();
            for (place, value) in changes {
                let place = place.index(bytes.len());
                bytes[place] = value;
            }
            bytes.truncate(cut.index(bytes.len()) + 1);
            let _ = assemble(bytes.chunks(chunk_len));
        }
    }
}
