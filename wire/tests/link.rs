//! Messages over real sockets: both directions, pieces, ends, and peers that do not read.

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use tandem_wire::{
    GroupKey, HANDSHAKE_TIMEOUT, Incarnation, Link, LinkReader, LinkWriter, MAX_FRAME, MAX_MESSAGE, Message,
    Purpose, WireError, accept, dial,
};

const SOON: Duration = Duration::from_secs(10);
const SENDER: Incarnation = Incarnation(0x1234_5678_9abc_def0);

fn links() -> (Link, Link) {
    let key = GroupKey::from_bytes(&[3; 32]).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (far, _) = listener.accept().unwrap();
    thread::scope(|scope| {
        let accepted = scope.spawn(|| accept(far, Some(&key), None, HANDSHAKE_TIMEOUT).unwrap());
        let dialled = dial(near, Some(&key), Purpose::Control, HANDSHAKE_TIMEOUT).unwrap();
        (dialled, accepted.join().unwrap().0)
    })
}

/// One direction of a link, and what keeps the other one open.
fn one_way() -> (LinkWriter, LinkReader, (LinkReader, LinkWriter)) {
    let (near, far) = links();
    let ((near_reader, near_writer), (far_reader, far_writer)) =
        (near.split().unwrap(), far.split().unwrap());
    (near_writer, far_reader, (near_reader, far_writer))
}

/// A bare socket to write frames on, and the reader at its other end.
fn raw() -> (TcpStream, LinkReader) {
    let (near, far) = links();
    (near.into_stream(), far.split().unwrap().0)
}

fn frame(payload: &[u8]) -> Vec<u8> {
    let mut bytes = (26 + payload.len() as u32).to_le_bytes().to_vec();
    bytes.extend(7u64.to_le_bytes());
    bytes.extend(SENDER.0.to_le_bytes());
    bytes.extend([9, 0]);
    bytes.extend(payload);
    bytes
}

fn receive(reader: &mut LinkReader) -> Message {
    reader.recv(SOON).unwrap().expect("a message arrives")
}

#[test]
fn messages_go_both_ways_in_order() {
    let (near, far) = links();
    thread::scope(|scope| {
        for link in [near, far] {
            scope.spawn(move || {
                let (mut reader, mut writer) = link.split().unwrap();
                for round in 0..200u64 {
                    let payload = vec![round as u8; round as usize * 37];
                    writer.send(round, SENDER, round as u8, &payload).unwrap();
                    let message = Message { epoch: round, sender: SENDER, kind: round as u8, payload };
                    assert_eq!(receive(&mut reader), message);
                }
            });
        }
    });
}

#[test]
fn a_long_message_arrives_whole() {
    let (mut writer, mut reader, _open) = one_way();
    for len in [MAX_FRAME - 30, MAX_FRAME - 29, 3 * MAX_FRAME + 5, MAX_MESSAGE] {
        let payload: Vec<u8> = (0..len).map(|i| (i % 253) as u8).collect();
        thread::scope(|scope| {
            scope.spawn(|| {
                writer.set_write_timeout(SOON);
                writer.send(1, SENDER, 2, &payload).unwrap();
            });
            let message = receive(&mut reader);
            assert!(message.payload == payload, "{len}");
        });
    }
    let error = writer.send(1, SENDER, 2, &vec![0; MAX_MESSAGE + 1]).unwrap_err();
    assert!(matches!(error, WireError::MessageTooLarge { len, .. } if len == MAX_MESSAGE + 1), "{error}");
    // Nothing of it was sent, so the link goes on.
    writer.send(3, SENDER, 4, b"next").unwrap();
    assert_eq!(receive(&mut reader).payload, b"next");
}

#[test]
fn what_follows_the_handshake_at_once_is_not_lost() {
    let key = GroupKey::from_bytes(&[3; 32]).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (far, _) = listener.accept().unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            let (link, _) = accept(far, Some(&key), None, HANDSHAKE_TIMEOUT).unwrap();
            let (_reader, mut writer) = link.split().unwrap();
            writer.send(1, SENDER, 1, b"at once").unwrap();
        });
        let link = dial(near, Some(&key), Purpose::Control, HANDSHAKE_TIMEOUT).unwrap();
        thread::sleep(Duration::from_millis(50));
        let (mut reader, _writer) = link.split().unwrap();
        assert_eq!(receive(&mut reader).payload, b"at once");
        assert!(matches!(reader.recv(SOON), Err(WireError::Closed)));
    });
}

#[test]
fn a_frame_cut_at_any_byte_is_kept_until_the_rest_comes() {
    let bytes = frame(b"payload");
    let (mut stream, mut reader) = raw();
    for cut in 1..bytes.len() {
        stream.write_all(&bytes[..cut]).unwrap();
        assert_eq!(reader.recv(Duration::from_millis(2)).unwrap(), None, "{cut}");
        stream.write_all(&bytes[cut..]).unwrap();
        let message = receive(&mut reader);
        assert_eq!((message.epoch, message.sender, message.kind), (7, SENDER, 9));
        assert_eq!(message.payload, b"payload");
    }
}

#[test]
fn messages_that_come_together_are_handed_out_one_by_one() {
    let (mut stream, mut reader) = raw();
    stream.write_all(&[frame(b"a"), frame(b""), frame(b"c"), frame(b"d")[..20].to_vec()].concat()).unwrap();
    for payload in [&b"a"[..], b"", b"c"] {
        assert_eq!(receive(&mut reader).payload, payload);
    }
    assert_eq!(reader.recv(Duration::ZERO).unwrap(), None);
    stream.write_all(&frame(b"d")[20..]).unwrap();
    assert_eq!(receive(&mut reader).payload, b"d");
    // The socket has been read empty, so only the buffer can hold the second of two.
    stream.write_all(&[frame(b"e"), frame(b"f")].concat()).unwrap();
    assert_eq!(receive(&mut reader).payload, b"e");
    drop(stream);
    assert_eq!(reader.recv(Duration::ZERO).unwrap().unwrap().payload, b"f");
    assert!(matches!(reader.recv(SOON), Err(WireError::Closed)));
}

#[test]
fn waiting_ends_at_the_timeout_whatever_trickles_in() {
    let (mut stream, mut reader) = raw();
    let start = Instant::now();
    assert_eq!(reader.recv(Duration::from_millis(120)).unwrap(), None);
    assert!(start.elapsed() >= Duration::from_millis(120));

    thread::scope(|scope| {
        let trickle = scope.spawn(|| {
            for byte in frame(&[5; 20]) {
                stream.write_all(&[byte]).unwrap();
                thread::sleep(Duration::from_millis(20));
            }
        });
        let start = Instant::now();
        assert_eq!(reader.recv(Duration::from_millis(200)).unwrap(), None);
        let elapsed = start.elapsed();
        assert!(elapsed >= Duration::from_millis(200) && elapsed < Duration::from_millis(700), "{elapsed:?}");
        assert_eq!(receive(&mut reader).payload, [5; 20]);
        trickle.join().unwrap();
    });
}

#[test]
fn a_timeout_of_zero_takes_what_is_there() {
    let (mut stream, mut reader) = raw();
    let start = Instant::now();
    for _ in 0..1000 {
        assert_eq!(reader.recv(Duration::ZERO).unwrap(), None);
    }
    // A kernel tick for each would take a second or more.
    assert!(start.elapsed() < Duration::from_millis(700), "{:?}", start.elapsed());
    stream.write_all(&frame(&[4; 100_000])).unwrap();
    let message = loop {
        if let Some(message) = reader.recv(Duration::ZERO).unwrap() {
            break message;
        }
    };
    assert_eq!(message.payload, [4; 100_000]);
    drop(stream);
    assert!(matches!(reader.recv(Duration::ZERO), Err(WireError::Closed)));
}

#[test]
fn a_spinning_reader_receives_the_same_and_keeps_its_deadline() {
    let (mut writer, mut reader, _open) = one_way();
    for spin in [Duration::from_micros(50), Duration::MAX] {
        reader.set_spin(spin);
        let start = Instant::now();
        assert_eq!(reader.recv(Duration::from_millis(50)).unwrap(), None);
        let elapsed = start.elapsed();
        assert!(elapsed >= Duration::from_millis(50) && elapsed < Duration::from_secs(1), "{elapsed:?}");
        thread::scope(|scope| {
            scope.spawn(|| {
                for len in [0, 1, 300_000] {
                    thread::sleep(Duration::from_millis(5));
                    writer.send(1, SENDER, 1, &vec![6; len]).unwrap();
                }
            });
            for len in [0, 1, 300_000] {
                assert!(receive(&mut reader).payload == vec![6; len], "{len}");
            }
        });
    }
}

#[test]
fn the_end_of_the_stream_is_closed_between_and_inside_frames() {
    for cut in [0, 3, 30, 33] {
        let (mut stream, mut reader) = raw();
        stream.write_all(&frame(b"whole")).unwrap();
        stream.write_all(&frame(b"whole")[..cut]).unwrap();
        drop(stream);
        assert_eq!(receive(&mut reader).payload, b"whole");
        for _ in 0..2 {
            assert!(matches!(reader.recv(SOON), Err(WireError::Closed)), "{cut}");
        }
    }
}

#[test]
fn a_reader_that_met_a_broken_frame_reads_nothing_more() {
    let (mut stream, mut reader) = raw();
    let mut broken = frame(b"");
    broken[..4].copy_from_slice(&u32::MAX.to_le_bytes());
    stream.write_all(&[frame(b"good"), broken, frame(b"after")].concat()).unwrap();
    assert_eq!(receive(&mut reader).payload, b"good");
    let error = reader.recv(SOON).unwrap_err();
    assert!(matches!(error, WireError::FrameLength { len: u32::MAX }), "{error}");
    assert!(matches!(reader.recv(SOON), Err(WireError::Closed)));
}

#[test]
fn closing_wakes_both_sides() {
    let (writer, mut far_reader, (mut near_reader, mut far_writer)) = one_way();
    thread::scope(|scope| {
        let near = scope.spawn(|| near_reader.recv(SOON));
        let far = scope.spawn(|| far_reader.recv(SOON));
        thread::sleep(Duration::from_millis(50));
        let start = Instant::now();
        writer.close();
        assert!(matches!(near.join().unwrap(), Err(WireError::Closed)));
        assert!(matches!(far.join().unwrap(), Err(WireError::Closed)));
        assert!(start.elapsed() < Duration::from_secs(2));
    });
    // The first write may still be taken by the socket; the reset it earns is seen by a later one.
    let mut closed = None;
    for _ in 0..100 {
        if let Err(error) = far_writer.send(1, SENDER, 1, b"late") {
            closed = Some(error);
            break;
        }
        thread::sleep(Duration::from_millis(10));
    }
    assert!(matches!(closed, Some(WireError::Closed)), "{closed:?}");
}

#[test]
fn a_peer_that_does_not_read_stalls_within_the_write_timeout() {
    let (mut writer, _reader, (mut near_reader, _far_writer)) = one_way();
    let timeout = Duration::from_millis(300);
    writer.set_write_timeout(timeout);
    let payload = vec![0; MAX_FRAME / 2];
    let (elapsed, error) = loop {
        let start = Instant::now();
        if let Err(error) = writer.send(1, SENDER, 1, &payload) {
            break (start.elapsed(), error);
        }
        assert!(start.elapsed() < timeout + Duration::from_secs(1));
    };
    assert!(matches!(error, WireError::Stalled), "{error}");
    assert!(elapsed >= timeout && elapsed < timeout + Duration::from_secs(1), "{elapsed:?}");
    // The message may be cut, so the link is over in both directions.
    assert!(matches!(writer.send(1, SENDER, 1, b""), Err(WireError::Closed)));
    assert!(matches!(writer.try_clone().unwrap().send(1, SENDER, 1, b""), Err(WireError::Closed)));
    assert!(matches!(near_reader.recv(SOON), Err(WireError::Closed)));
}

#[test]
fn a_writer_that_waits_is_woken_by_close() {
    let (mut writer, _reader, _open) = one_way();
    writer.set_write_timeout(SOON);
    let closer = writer.try_clone().unwrap();
    thread::scope(|scope| {
        let sending = scope.spawn(move || {
            let payload = vec![0; MAX_FRAME / 2];
            loop {
                if let Err(error) = writer.send(1, SENDER, 1, &payload) {
                    return error;
                }
            }
        });
        thread::sleep(Duration::from_millis(300));
        let start = Instant::now();
        closer.close();
        let error = sending.join().unwrap();
        assert!(matches!(error, WireError::Closed), "{error}");
        assert!(start.elapsed() < Duration::from_secs(2));
    });
}

#[test]
fn messages_of_clones_never_mix() {
    let (writer, mut reader, _open) = one_way();
    let payload = |kind: u8| vec![kind; 100_000 + usize::from(kind) * MAX_FRAME];
    thread::scope(|scope| {
        for kind in 0..3u8 {
            let mut writer = writer.try_clone().unwrap();
            writer.set_write_timeout(SOON);
            scope.spawn(move || {
                for epoch in 0..5 {
                    writer.send(epoch, Incarnation(kind.into()), kind, &payload(kind)).unwrap();
                }
            });
        }
        let mut next = [0; 3];
        for _ in 0..15 {
            let message = receive(&mut reader);
            let kind = message.kind;
            assert_eq!(message.sender, Incarnation(kind.into()));
            assert_eq!(message.epoch, next[usize::from(kind)]);
            assert!(message.payload == payload(kind));
            next[usize::from(kind)] += 1;
        }
        assert_eq!(next, [5; 3]);
    });
}
