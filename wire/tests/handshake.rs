//! The handshake against honest peers, wrong ones and hostile ones, over real sockets. Hostile sides are
//! written by hand from the documented layout, so the tests also hold the layout in place.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use tandem_wire::{GroupKey, HANDSHAKE_TIMEOUT, Link, PROTOCOL_VERSION, Purpose, WireError, accept, dial};

type Accepted = Result<(Link, Purpose), WireError>;

fn key(byte: u8) -> GroupKey {
    GroupKey::from_bytes(&[byte; 32]).unwrap()
}

fn pair_at(address: &str) -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind((address, 0)).unwrap();
    let dialer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (dialer, listener.accept().unwrap().0)
}

fn pair() -> (TcpStream, TcpStream) {
    pair_at("127.0.0.1")
}

/// Both honest sides, each with its key and purpose.
fn shake(
    dialer: (Option<&GroupKey>, Purpose),
    acceptor: (Option<&GroupKey>, Option<Purpose>),
) -> (Result<Link, WireError>, Accepted) {
    shake_over(pair(), dialer, acceptor)
}

fn shake_over(
    (near, far): (TcpStream, TcpStream),
    dialer: (Option<&GroupKey>, Purpose),
    acceptor: (Option<&GroupKey>, Option<Purpose>),
) -> (Result<Link, WireError>, Accepted) {
    thread::scope(|scope| {
        let accepted = scope.spawn(|| accept(far, acceptor.0, acceptor.1, HANDSHAKE_TIMEOUT));
        (dial(near, dialer.0, dialer.1, HANDSHAKE_TIMEOUT), accepted.join().unwrap())
    })
}

/// An acceptor with `key` for control connections, against a dialer that `play` plays.
fn against_dialer(key: Option<&GroupKey>, play: impl FnOnce(TcpStream)) -> Accepted {
    let (near, far) = pair();
    thread::scope(|scope| {
        let accepted = scope.spawn(|| accept(far, key, Some(Purpose::Control), HANDSHAKE_TIMEOUT));
        play(near);
        accepted.join().unwrap()
    })
}

/// A dialer with `key` for control connections, against an acceptor that `play` plays.
fn against_acceptor(key: Option<&GroupKey>, play: impl FnOnce(TcpStream)) -> Result<Link, WireError> {
    let (near, far) = pair();
    thread::scope(|scope| {
        let dialled = scope.spawn(|| dial(near, key, Purpose::Control, HANDSHAKE_TIMEOUT));
        play(far);
        dialled.join().unwrap()
    })
}

fn hello(version: u16, purpose: u8, flags: u8) -> [u8; 40] {
    let mut bytes = [0x5a; 40];
    bytes[..4].copy_from_slice(b"TNDM");
    bytes[4..6].copy_from_slice(&version.to_le_bytes());
    bytes[6] = purpose;
    bytes[7] = flags;
    bytes
}

fn read<const N: usize>(stream: &mut TcpStream) -> [u8; N] {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

/// Everything until the peer closes, in order or not.
fn read_to_end(stream: &mut TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut byte = [0];
    loop {
        match stream.read(&mut byte) {
            Ok(0) => return bytes,
            Ok(_) => bytes.push(byte[0]),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return bytes,
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn equal_keys_make_a_link_for_the_dialers_purpose() {
    let key = key(1);
    for purpose in [Purpose::Control, Purpose::Collective] {
        for expected in [None, Some(purpose)] {
            let (dialled, accepted) = shake((Some(&key), purpose), (Some(&key), expected));
            let (dialled, (accepted, found)) = (dialled.unwrap(), accepted.unwrap());
            assert_eq!(found, purpose);
            assert_eq!(dialled.local_addr(), accepted.peer_addr());
            assert_eq!(dialled.peer_addr(), accepted.local_addr());
            let streams = [dialled.into_stream(), accepted.into_stream()];
            for stream in streams {
                assert!(stream.nodelay().unwrap());
                assert_eq!((stream.read_timeout().unwrap(), stream.write_timeout().unwrap()), (None, None));
            }
        }
    }
}

#[test]
fn a_socket_that_does_not_block_is_made_to() {
    let (near, far) = pair();
    near.set_nonblocking(true).unwrap();
    far.set_nonblocking(true).unwrap();
    let key = key(1);
    let (dialled, accepted) =
        shake_over((near, far), (Some(&key), Purpose::Control), (Some(&key), Some(Purpose::Control)));
    dialled.unwrap();
    accepted.unwrap();
}

#[test]
fn loopback_needs_no_key() {
    let (dialled, accepted) = shake((None, Purpose::Control), (None, None));
    dialled.unwrap();
    accepted.unwrap();
}

/// This machine's address on a network, if it has one. Nothing is sent to the address that is asked about.
fn address_off_loopback() -> Option<String> {
    let socket = UdpSocket::bind("0.0.0.0:0").ok()?;
    socket.connect("192.0.2.1:9").ok()?;
    let address = socket.local_addr().ok()?.ip();
    (!address.is_loopback() && !address.is_unspecified()).then(|| address.to_string())
}

#[test]
fn other_addresses_need_a_key() {
    let Some(address) = address_off_loopback() else {
        eprintln!("skipped: this machine has only loopback addresses");
        return;
    };
    let (dialled, accepted) =
        shake_over(pair_at(&address), (None, Purpose::Control), (None, Some(Purpose::Control)));
    for error in [dialled.unwrap_err(), accepted.unwrap_err()] {
        assert!(matches!(error, WireError::KeyRequired { .. }), "{error}");
        assert!(error.to_string().contains(&address), "{error}");
    }
    let key = key(1);
    let (dialled, accepted) =
        shake_over(pair_at(&address), (Some(&key), Purpose::Control), (Some(&key), Some(Purpose::Control)));
    dialled.unwrap();
    accepted.unwrap();
}

#[test]
fn both_sides_learn_which_one_lacks_the_key() {
    let key = key(1);
    let (dialled, accepted) = shake((Some(&key), Purpose::Control), (None, None));
    assert!(matches!(dialled, Err(WireError::PeerKeyMissing)));
    assert!(matches!(accepted, Err(WireError::LocalKeyMissing)));
    let (dialled, accepted) = shake((None, Purpose::Control), (Some(&key), None));
    assert!(matches!(dialled, Err(WireError::LocalKeyMissing)));
    assert!(matches!(accepted, Err(WireError::PeerKeyMissing)));
}

#[test]
fn both_sides_learn_that_their_keys_differ() {
    let (dialled, accepted) = shake((Some(&key(1)), Purpose::Control), (Some(&key(2)), None));
    assert!(matches!(dialled, Err(WireError::WrongKey)));
    assert!(matches!(accepted, Err(WireError::WrongKey)));
}

#[test]
fn both_sides_learn_that_their_purposes_differ() {
    for key in [None, Some(&key(1))] {
        let (dialled, accepted) = shake((key, Purpose::Collective), (key, Some(Purpose::Control)));
        let (here, there) = (Purpose::Collective, Purpose::Control);
        let error = dialled.unwrap_err();
        assert!(
            matches!(error, WireError::Purpose { local, peer } if (local, peer) == (here, there)),
            "{error}"
        );
        let error = accepted.unwrap_err();
        assert!(
            matches!(error, WireError::Purpose { local, peer } if (local, peer) == (there, here)),
            "{error}"
        );
    }
}

#[test]
fn both_sides_learn_that_their_versions_differ() {
    let key = key(1);
    let next = PROTOCOL_VERSION + 1;
    let accepted = against_dialer(Some(&key), |mut stream| {
        // What else differs does not matter: only the version's place is sure.
        stream.write_all(&hello(next, 0xee, 0xff)).unwrap();
        let answer = read_to_end(&mut stream);
        assert_eq!(answer.len(), 40, "a hello and nothing else");
        assert_eq!(answer[..6], [b"TNDM", &PROTOCOL_VERSION.to_le_bytes()[..]].concat());
    });
    let error = accepted.unwrap_err();
    assert!(matches!(error, WireError::Version { local: PROTOCOL_VERSION, peer } if peer == next), "{error}");
    let dialled = against_acceptor(Some(&key), |mut stream| {
        stream.write_all(&hello(next, 0xee, 0xff)).unwrap();
        let sent = read_to_end(&mut stream);
        assert_eq!(sent.len(), 40, "a hello and nothing else");
        assert_eq!(sent[..6], [b"TNDM", &PROTOCOL_VERSION.to_le_bytes()[..]].concat());
    });
    let error = dialled.unwrap_err();
    assert!(matches!(error, WireError::Version { local: PROTOCOL_VERSION, peer } if peer == next), "{error}");
}

#[test]
fn unknown_purposes_and_flags_are_refused() {
    for (purpose, flags) in [(0, 0), (3, 0), (255, 0), (1, 2), (1, 0x80)] {
        for expected in [None, Some(Purpose::Control)] {
            let (mut near, far) = pair();
            near.write_all(&hello(PROTOCOL_VERSION, purpose, flags)).unwrap();
            let error = accept(far, None, expected, HANDSHAKE_TIMEOUT).unwrap_err();
            assert!(matches!(error, WireError::Hello { .. }), "{purpose} {flags}: {error}");
        }
        let (near, mut far) = pair();
        far.write_all(&hello(PROTOCOL_VERSION, purpose, flags)).unwrap();
        let error = dial(near, None, Purpose::Control, HANDSHAKE_TIMEOUT).unwrap_err();
        assert!(matches!(error, WireError::Hello { .. }), "{purpose} {flags}: {error}");
    }
}

/// The documented proof, computed apart from the crate.
fn proof(secret: &[u8], role: &[u8; 1], dialer: &[u8; 40], acceptor: &[u8; 40]) -> [u8; 32] {
    let key = blake3::derive_key("tandem wire v1 handshake of a control connection", secret);
    let seen = [&role[..], dialer, acceptor].concat();
    *blake3::keyed_hash(&key, &seen).as_bytes()
}

#[test]
fn proofs_are_the_documented_ones() {
    let key = key(1);
    let mine = hello(PROTOCOL_VERSION, 1, 1);
    let accepted = against_dialer(Some(&key), |mut stream| {
        stream.write_all(&mine).unwrap();
        let theirs = read::<40>(&mut stream);
        stream.write_all(&proof(&[1; 32], b"D", &mine, &theirs)).unwrap();
        assert_eq!(read::<32>(&mut stream), proof(&[1; 32], b"A", &mine, &theirs));
    });
    accepted.unwrap();
    let dialled = against_acceptor(Some(&key), |mut stream| {
        let theirs = read::<40>(&mut stream);
        stream.write_all(&mine).unwrap();
        assert_eq!(read::<32>(&mut stream), proof(&[1; 32], b"D", &theirs, &mine));
        stream.write_all(&proof(&[1; 32], b"A", &theirs, &mine)).unwrap();
    });
    dialled.unwrap();
}

#[test]
fn every_bit_of_a_proof_counts() {
    let key = key(1);
    for bit in 0..256 {
        let mine = hello(PROTOCOL_VERSION, 1, 1);
        let accepted = against_dialer(Some(&key), |mut stream| {
            stream.write_all(&mine).unwrap();
            let theirs = read::<40>(&mut stream);
            let mut wrong = proof(&[1; 32], b"D", &mine, &theirs);
            wrong[bit / 8] ^= 1 << (bit % 8);
            stream.write_all(&wrong).unwrap();
            assert_eq!(read_to_end(&mut stream), [0; 32]);
        });
        assert!(matches!(accepted, Err(WireError::WrongKey)), "bit {bit}");
    }
}

#[test]
fn a_stranger_learns_nothing_under_the_key() {
    let accepted = against_dialer(Some(&key(1)), |mut stream| {
        stream.write_all(&hello(PROTOCOL_VERSION, 1, 1)).unwrap();
        read::<40>(&mut stream);
        // The acceptor waits for the proof and sends none of its own before.
        stream.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        let error = stream.read(&mut [0]).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut), "{error}");
        stream.set_read_timeout(None).unwrap();
        stream.write_all(&[0x77; 32]).unwrap();
        assert_eq!(read_to_end(&mut stream), [0; 32]);
    });
    assert!(matches!(accepted, Err(WireError::WrongKey)));
}

#[test]
fn a_dialers_own_proof_does_not_convince_it() {
    let dialled = against_acceptor(Some(&key(1)), |mut stream| {
        let theirs = read::<40>(&mut stream);
        stream.write_all(&theirs).unwrap();
        let proof = read::<32>(&mut stream);
        stream.write_all(&proof).unwrap();
    });
    assert!(matches!(dialled, Err(WireError::WrongKey)));
}

#[test]
fn what_was_heard_before_convinces_nobody() {
    let key = key(1);
    // A stranger between the two sides hears one good handshake.
    let (near, mut middle_near) = pair();
    let (mut middle_far, far) = pair();
    let (hello, proof) = thread::scope(|scope| {
        let dialled = scope.spawn(|| dial(near, Some(&key), Purpose::Control, HANDSHAKE_TIMEOUT));
        let accepted = scope.spawn(|| accept(far, Some(&key), None, HANDSHAKE_TIMEOUT));
        let hello = read::<40>(&mut middle_near);
        middle_far.write_all(&hello).unwrap();
        middle_near.write_all(&read::<40>(&mut middle_far)).unwrap();
        let proof = read::<32>(&mut middle_near);
        middle_far.write_all(&proof).unwrap();
        middle_near.write_all(&read::<32>(&mut middle_far)).unwrap();
        dialled.join().unwrap().unwrap();
        accepted.join().unwrap().unwrap();
        (hello, proof)
    });
    let accepted = against_dialer(Some(&key), |mut stream| {
        stream.write_all(&hello).unwrap();
        read::<40>(&mut stream);
        stream.write_all(&proof).unwrap();
        assert_eq!(read_to_end(&mut stream), [0; 32]);
    });
    assert!(matches!(accepted, Err(WireError::WrongKey)));
}

#[test]
fn a_connection_cannot_be_passed_off_as_one_of_another_purpose() {
    let key = key(1);
    let (near, mut middle_near) = pair();
    let (mut middle_far, far) = pair();
    thread::scope(|scope| {
        let dialled = scope.spawn(|| dial(near, Some(&key), Purpose::Control, HANDSHAKE_TIMEOUT));
        let accepted = scope.spawn(|| accept(far, Some(&key), None, HANDSHAKE_TIMEOUT));
        let mut hello = read::<40>(&mut middle_near);
        hello[6] = 2;
        middle_far.write_all(&hello).unwrap();
        let mut hello = read::<40>(&mut middle_far);
        hello[6] = 1;
        middle_near.write_all(&hello).unwrap();
        middle_far.write_all(&read::<32>(&mut middle_near)).unwrap();
        middle_near.write_all(&read::<32>(&mut middle_far)).unwrap();
        assert!(matches!(dialled.join().unwrap(), Err(WireError::WrongKey)));
        assert!(matches!(accepted.join().unwrap(), Err(WireError::WrongKey)));
    });
}

#[test]
fn garbage_is_refused_at_once() {
    let garbage = b"GET / HTTP/1.1\r\nHost: tandem.example.org:7400\r\nAccept: */*\r\n\r\n";
    let start = Instant::now();
    let accepted = against_dialer(None, |mut stream| {
        stream.write_all(garbage).unwrap();
        assert_eq!(read_to_end(&mut stream), b"", "a stranger gets no answer");
    });
    assert!(matches!(accepted, Err(WireError::Hello { .. })));
    let dialled = against_acceptor(None, |mut stream| stream.write_all(garbage).unwrap());
    assert!(matches!(dialled, Err(WireError::Hello { .. })));
    assert!(start.elapsed() < HANDSHAKE_TIMEOUT);
}

#[test]
fn a_handshake_that_breaks_off_is_closed() {
    let key = key(1);
    let hello = hello(PROTOCOL_VERSION, 1, 1);
    for len in 0..hello.len() {
        let accepted = against_dialer(Some(&key), |mut stream| stream.write_all(&hello[..len]).unwrap());
        assert!(matches!(accepted, Err(WireError::Closed)), "{len}");
        let dialled = against_acceptor(Some(&key), |mut stream| stream.write_all(&hello[..len]).unwrap());
        assert!(matches!(dialled, Err(WireError::Closed)), "{len}");
    }
    let accepted = against_dialer(Some(&key), |mut stream| {
        stream.write_all(&hello).unwrap();
        read::<40>(&mut stream);
        stream.write_all(&[1; 31]).unwrap();
    });
    assert!(matches!(accepted, Err(WireError::Closed)));
}

/// How long a handshake of 300 ms takes against a peer that `play` plays, and how it ends.
fn timed(is_dialer: bool, play: impl FnOnce(TcpStream)) -> (Duration, WireError) {
    let (near, far) = pair();
    let key = key(1);
    let deadline = Duration::from_millis(300);
    thread::scope(|scope| {
        let shaking = scope.spawn(|| {
            let start = Instant::now();
            let error = if is_dialer {
                dial(near, Some(&key), Purpose::Control, deadline).unwrap_err()
            } else {
                accept(near, Some(&key), None, deadline).unwrap_err()
            };
            (start.elapsed(), error)
        });
        play(far);
        shaking.join().unwrap()
    })
}

fn assert_timed_out((elapsed, error): (Duration, WireError)) {
    assert!(matches!(error, WireError::HandshakeTimeout), "{error}");
    assert!(elapsed >= Duration::from_millis(300), "{elapsed:?}");
    assert!(elapsed < Duration::from_millis(1500), "{elapsed:?}");
}

#[test]
fn silence_ends_at_the_deadline() {
    for is_dialer in [true, false] {
        let mut held = None;
        assert_timed_out(timed(is_dialer, |stream| held = Some(stream)));
    }
}

#[test]
fn a_byte_now_and_then_ends_at_the_deadline() {
    for is_dialer in [true, false] {
        // 72 bytes at one each 100 ms would take 7 s.
        let start = Instant::now();
        assert_timed_out(timed(is_dialer, |mut stream| {
            for byte in hello(PROTOCOL_VERSION, 1, 1) {
                if stream.write_all(&[byte]).is_err() {
                    break;
                }
                thread::sleep(Duration::from_millis(100));
            }
        }));
        assert!(start.elapsed() < Duration::from_secs(3), "the connection is closed at the deadline");
    }
}

#[test]
fn a_peer_that_says_hello_and_no_more_ends_at_the_deadline() {
    for is_dialer in [true, false] {
        let mut held = None;
        assert_timed_out(timed(is_dialer, |mut stream| {
            stream.write_all(&hello(PROTOCOL_VERSION, 1, 1)).unwrap();
            held = Some(stream);
        }));
    }
}
