//! Who is at the other end: a mutual challenge and response, and all that is looked at of a stranger.
//!
//! ```text
//! dialer                                      acceptor
//!   hello(version, purpose, key?, nonce) ──▶
//!                                        ◀── hello(version, purpose, key?, nonce)
//!   proof = H(key, "D" ‖ hello ‖ hello)  ──▶
//!                                        ◀── proof = H(key, "A" ‖ hello ‖ hello), or 32 zero bytes: refused
//! ```
//!
//! A hello is 40 bytes, a proof 32; without keys there are no proofs. `H` is BLAKE3 under the purpose's key,
//! over both hellos as they were sent, the dialer's first. The dialer proves first, so an acceptor computes
//! nothing under the key for a stranger to collect; the role's letter makes a proof that is sent back
//! worthless; the nonces make an old one worthless. Each side sends its hello before it judges the other's,
//! so that both can say what does not fit. A later version keeps the size of the hello and the place of its
//! magic and version.

use std::fmt;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Duration;

use crate::deadline::{Deadline, socket_timeout};
use crate::error::{WireError, is_timeout};
use crate::key::GroupKey;
use crate::link::Link;
use crate::message::random_bytes;

/// How long a handshake should be given.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(2);

/// The version of the handshake and of the frames after it; two sides have to have the same.
pub const PROTOCOL_VERSION: u16 = 1;

const MAGIC: [u8; 4] = *b"TNDM";
const HELLO: usize = 40;
const PROOF: usize = 32;
const REFUSED: [u8; PROOF] = [0; PROOF];
const FLAG_KEY: u8 = 1;

/// What a connection is for. It is part of what both sides prove, so none can be passed off as one of another
/// purpose.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Purpose {
    /// Step plans, heartbeats and membership.
    Control,
    /// Data of collective operations.
    Collective,
}

/// Makes a link of a connection that this side has dialled, within `deadline` from now ([`HANDSHAKE_TIMEOUT`]
/// unless there is a reason). Without a key on both sides, both addresses have to be loopback.
///
/// # Errors
/// [`WireError::HandshakeTimeout`], [`WireError::Closed`], [`WireError::Hello`], [`WireError::Version`],
/// [`WireError::Purpose`], [`WireError::LocalKeyMissing`], [`WireError::PeerKeyMissing`],
/// [`WireError::KeyRequired`], [`WireError::WrongKey`], or [`WireError::Io`]; the connection is then closed.
pub fn dial(
    stream: TcpStream,
    key: Option<&GroupKey>,
    purpose: Purpose,
    deadline: Duration,
) -> Result<Link, WireError> {
    let mut wire = Wire::new(stream, deadline)?;
    let local = Hello::local(purpose.byte(), key);
    wire.write(&local.encode())?;
    let peer = Hello::decode(&wire.read()?)?;
    wire.judge(&local, &peer)?;
    if let Some(key) = key {
        let transcript = Transcript { key: key.for_purpose(purpose), dialer: &local, acceptor: &peer };
        wire.write(transcript.proof(Role::Dialer).as_bytes())?;
        if transcript.proof(Role::Acceptor) != blake3::Hash::from_bytes(wire.read()?) {
            return Err(WireError::WrongKey);
        }
    }
    wire.finish()
}

/// Makes a link of a connection that this side has accepted, within `deadline` from now, and says what it is
/// for. With `purpose`, no other one is accepted. The rules about keys are those of [`dial`].
///
/// # Errors
/// Those of [`dial`]; the connection is then closed.
pub fn accept(
    stream: TcpStream,
    key: Option<&GroupKey>,
    purpose: Option<Purpose>,
    deadline: Duration,
) -> Result<(Link, Purpose), WireError> {
    let mut wire = Wire::new(stream, deadline)?;
    let peer = Hello::decode(&wire.read()?)?;
    let local = Hello::local(purpose.map_or(peer.purpose, Purpose::byte), key);
    wire.write(&local.encode())?;
    let purpose = wire.judge(&local, &peer)?;
    if let Some(key) = key {
        let transcript = Transcript { key: key.for_purpose(purpose), dialer: &peer, acceptor: &local };
        // `Hash` compares in constant time.
        if transcript.proof(Role::Dialer) != blake3::Hash::from_bytes(wire.read()?) {
            // Tells the dialer why, if it still listens; what this side reports is the same either way.
            let _ = wire.write(&REFUSED);
            return Err(WireError::WrongKey);
        }
        wire.write(transcript.proof(Role::Acceptor).as_bytes())?;
    }
    Ok((wire.finish()?, purpose))
}

/// A connection during the handshake.
struct Wire {
    stream: TcpStream,
    deadline: Deadline,
    local: SocketAddr,
    peer: SocketAddr,
}

impl Wire {
    fn new(stream: TcpStream, deadline: Duration) -> Result<Self, WireError> {
        let deadline = Deadline::after(deadline);
        // Timeouts mean something only to a socket that blocks; one from a polled listener may not.
        stream.set_nonblocking(false).map_err(WireError::io)?;
        stream.set_nodelay(true).map_err(WireError::io)?;
        let local = stream.local_addr().map_err(WireError::io)?;
        let peer = stream.peer_addr().map_err(WireError::io)?;
        Ok(Self { stream, deadline, local, peer })
    }

    /// Whether the two hellos can make a link, and for which purpose.
    fn judge(&self, local: &Hello, peer: &Hello) -> Result<Purpose, WireError> {
        if local.version != peer.version {
            return Err(WireError::Version { local: local.version, peer: peer.version });
        }
        if peer.flags & !FLAG_KEY != 0 {
            return Err(WireError::Hello { reason: "unknown flags" });
        }
        let unknown = WireError::Hello { reason: "unknown purpose" };
        let theirs = Purpose::from_byte(peer.purpose).ok_or(unknown)?;
        // An acceptor that takes any purpose has taken the peer's.
        let ours =
            Purpose::from_byte(local.purpose).expect("it is one of ours, or the peer's, which is known");
        if ours != theirs {
            return Err(WireError::Purpose { local: ours, peer: theirs });
        }
        match (local.has_key(), peer.has_key()) {
            (false, true) => Err(WireError::LocalKeyMissing),
            (true, false) => Err(WireError::PeerKeyMissing),
            (false, false) if !are_loopback(self.local.ip(), self.peer.ip()) => {
                Err(WireError::KeyRequired { local: self.local, peer: self.peer })
            }
            _ => Ok(ours),
        }
    }

    /// Exactly `N` bytes: what follows the handshake stays in the socket.
    fn read<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let mut bytes = [0; N];
        let mut len = 0;
        while len < N {
            let remaining = self.deadline.remaining().ok_or(WireError::HandshakeTimeout)?;
            self.stream.set_read_timeout(Some(socket_timeout(remaining))).map_err(WireError::io)?;
            match self.stream.read(&mut bytes[len..]) {
                Ok(0) => return Err(WireError::Closed),
                Ok(read) => len += read,
                Err(error) if is_timeout(&error) => {}
                Err(error) => return Err(WireError::io(error)),
            }
        }
        Ok(bytes)
    }

    fn write(&mut self, mut bytes: &[u8]) -> Result<(), WireError> {
        while !bytes.is_empty() {
            let remaining = self.deadline.remaining().ok_or(WireError::HandshakeTimeout)?;
            self.stream.set_write_timeout(Some(socket_timeout(remaining))).map_err(WireError::io)?;
            match self.stream.write(bytes) {
                Ok(0) => return Err(WireError::Closed),
                Ok(written) => bytes = &bytes[written..],
                Err(error) if is_timeout(&error) => {}
                Err(error) => return Err(WireError::io(error)),
            }
        }
        Ok(())
    }

    fn finish(self) -> Result<Link, WireError> {
        self.stream.set_read_timeout(None).map_err(WireError::io)?;
        self.stream.set_write_timeout(None).map_err(WireError::io)?;
        Ok(Link::new(self.stream, self.local, self.peer))
    }
}

/// The first bytes of each side: magic, version, purpose, flags, nonce. Kept as they came, since the proofs
/// cover them.
struct Hello {
    version: u16,
    purpose: u8,
    flags: u8,
    nonce: [u8; 32],
}

impl Hello {
    fn local(purpose: u8, key: Option<&GroupKey>) -> Self {
        let flags = if key.is_some() { FLAG_KEY } else { 0 };
        Self { version: PROTOCOL_VERSION, purpose, flags, nonce: random_bytes() }
    }

    fn has_key(&self) -> bool {
        self.flags & FLAG_KEY != 0
    }

    fn encode(&self) -> [u8; HELLO] {
        let mut bytes = [0; HELLO];
        bytes[0..4].copy_from_slice(&MAGIC);
        bytes[4..6].copy_from_slice(&self.version.to_le_bytes());
        bytes[6] = self.purpose;
        bytes[7] = self.flags;
        bytes[8..].copy_from_slice(&self.nonce);
        bytes
    }

    fn decode(bytes: &[u8; HELLO]) -> Result<Self, WireError> {
        if bytes[0..4] != MAGIC {
            return Err(WireError::Hello { reason: "it does not begin with TNDM" });
        }
        let version = u16::from_le_bytes([bytes[4], bytes[5]]);
        let nonce = bytes[8..].try_into().expect("a hello ends in 32 bytes of nonce");
        Ok(Self { version, purpose: bytes[6], flags: bytes[7], nonce })
    }
}

/// What both sides have seen, under their key.
struct Transcript<'a> {
    key: &'a [u8; 32],
    dialer: &'a Hello,
    acceptor: &'a Hello,
}

#[derive(Clone, Copy)]
enum Role {
    Dialer,
    Acceptor,
}

impl Transcript<'_> {
    fn proof(&self, role: Role) -> blake3::Hash {
        let role = match role {
            Role::Dialer => b"D",
            Role::Acceptor => b"A",
        };
        let mut hasher = blake3::Hasher::new_keyed(self.key);
        hasher.update(role).update(&self.dialer.encode()).update(&self.acceptor.encode());
        hasher.finalize()
    }
}

impl Purpose {
    fn byte(self) -> u8 {
        match self {
            Self::Control => 1,
            Self::Collective => 2,
        }
    }

    fn from_byte(byte: u8) -> Option<Self> {
        [Self::Control, Self::Collective].into_iter().find(|purpose| purpose.byte() == byte)
    }
}

impl fmt::Display for Purpose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Control => "control",
            Self::Collective => "collectives",
        })
    }
}

/// Whether a connection between these addresses cannot leave the machine. An IPv4 address inside an IPv6 one
/// counts as what it stands for.
fn are_loopback(local: IpAddr, peer: IpAddr) -> bool {
    local.to_canonical().is_loopback() && peer.to_canonical().is_loopback()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loopback_addresses_do_without_a_key() {
        let are = |local: &str, peer: &str| are_loopback(local.parse().unwrap(), peer.parse().unwrap());
        assert!(are("127.0.0.1", "127.0.0.1"));
        assert!(are("127.0.0.1", "127.255.255.254"));
        assert!(are("::1", "::1"));
        assert!(are("::ffff:127.0.0.1", "::ffff:127.0.0.1"));
        assert!(!are("127.0.0.1", "10.0.0.1"));
        assert!(!are("10.0.0.1", "127.0.0.1"));
        assert!(!are("10.0.0.1", "10.0.0.1"));
        assert!(!are("::ffff:10.0.0.1", "::1"));
        assert!(!are("fe80::1", "fe80::1"));
        assert!(!are("0.0.0.0", "0.0.0.0"));
        assert!(!are("::", "::"));
    }

    #[test]
    fn a_hello_comes_back_as_it_was() {
        let hello = Hello { version: 0x1234, purpose: 0x56, flags: 0x78, nonce: random_bytes() };
        let bytes = hello.encode();
        assert_eq!(Hello::decode(&bytes).unwrap().encode(), bytes);
        for place in 0..MAGIC.len() {
            let mut broken = bytes;
            broken[place] ^= 0x20;
            assert!(matches!(Hello::decode(&broken), Err(WireError::Hello { .. })));
        }
    }

    #[test]
    fn a_proof_depends_on_everything_it_covers() {
        let key = GroupKey::from_bytes(&[1; 32]).unwrap();
        let other_key = GroupKey::from_bytes(&[2; 32]).unwrap();
        let [a, b, c] = [1, 2, 2].map(|purpose| Hello::local(purpose, Some(&key)));
        let proof = |key: &GroupKey, purpose, dialer, acceptor, role| {
            *Transcript { key: key.for_purpose(purpose), dialer, acceptor }.proof(role).as_bytes()
        };
        let (control, collective) = (Purpose::Control, Purpose::Collective);
        let proofs = [
            proof(&key, control, &a, &b, Role::Dialer),
            proof(&key, control, &a, &b, Role::Acceptor),
            proof(&key, collective, &a, &b, Role::Dialer),
            proof(&other_key, control, &a, &b, Role::Dialer),
            proof(&key, control, &b, &a, Role::Dialer),
            proof(&key, control, &a, &c, Role::Dialer),
            proof(&key, control, &c, &b, Role::Dialer),
        ];
        for (i, one) in proofs.iter().enumerate() {
            assert!(proofs[..i].iter().all(|other| other != one), "{i}");
        }
        assert_eq!(proofs[0], proof(&key, control, &a, &b, Role::Dialer));
    }
}
