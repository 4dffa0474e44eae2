//! Netlink messages for netfilter: attributes, batches, and the socket.
//!
//! Formats: `linux/netlink.h`, `linux/netfilter/nfnetlink.h`. All netfilter integers are big-endian, all netlink headers
//! native.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::time::Duration;

use netlink_sys::{
    Socket, SocketAddr,
    protocols::{NETLINK_NETFILTER, NETLINK_ROUTE},
};
use nix::sys::time::{TimeVal, TimeValLike as _};

/// Flags of `nlmsghdr`.
pub const REQUEST: u16 = 0x1;
pub const ACK: u16 = 0x4;
pub const DUMP: u16 = 0x300;
pub const CREATE: u16 = 0x400;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const SUBSYSTEM_NFTABLES: u16 = 10;
/// Marks an attribute that contains attributes.
const NESTED: u16 = 0x8000;
const HEADER_BYTES: usize = 16;

/// Bytes of one receive: the kernel's dumps use buffers of at most 32 KiB, and acknowledgements contain the failed message.
const RECEIVE_BYTES: usize = 256 * 1024;
/// The requested send buffer: a batch of 250,000 set members of 32 bytes, twice.
const SEND_BUFFER_BYTES: usize = 16 * 1024 * 1024;

/// Attributes under construction.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Attributes(pub Vec<u8>);

impl Attributes {
    pub fn bytes(mut self, kind: u16, payload: &[u8]) -> Self {
        // Payloads are built here from bounded parts: names, elements in chunks.
        let length = u16::try_from(4 + payload.len()).expect("an attribute has less than 64 KiB");
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(payload);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    pub fn u8(self, kind: u16, value: u8) -> Self {
        self.bytes(kind, &[value])
    }

    pub fn u16(self, kind: u16, value: u16) -> Self {
        self.bytes(kind, &value.to_be_bytes())
    }

    pub fn u32(self, kind: u16, value: u32) -> Self {
        self.bytes(kind, &value.to_be_bytes())
    }

    pub fn u64(self, kind: u16, value: u64) -> Self {
        self.bytes(kind, &value.to_be_bytes())
    }

    pub fn text(self, kind: u16, text: &str) -> Self {
        let mut bytes = text.as_bytes().to_vec();
        bytes.push(0);
        self.bytes(kind, &bytes)
    }

    pub fn nest(self, kind: u16, inner: &Attributes) -> Self {
        self.bytes(kind | NESTED, &inner.0)
    }
}

/// Reads attributes up to one that is cut off.
pub fn attributes(mut bytes: &[u8]) -> BTreeMap<u16, &[u8]> {
    let mut found = BTreeMap::new();
    while let [l0, l1, k0, k1, ..] = *bytes {
        let length = usize::from(u16::from_ne_bytes([l0, l1]));
        let kind = u16::from_ne_bytes([k0, k1]) & 0x3fff;
        let Some(payload) = bytes.get(4..length) else { break };
        found.insert(kind, payload);
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    found
}

/// The entries of a list, whose attributes are all of one kind.
pub fn list(mut bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let [l0, l1, _, _, ..] = *bytes else { return None };
        let length = usize::from(u16::from_ne_bytes([l0, l1]));
        let payload = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(payload)
    })
}

pub fn text_of(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes.strip_suffix(&[0]).unwrap_or(bytes)).into_owned()
}

/// One message: a netfilter header and attributes.
fn push_message(into: &mut Vec<u8>, kind: u16, flags: u16, sequence: u32, family: u8, resource: u16, body: &[u8]) {
    let [high, low] = resource.to_be_bytes();
    push_header(into, kind, flags, sequence, 4 + body.len());
    into.extend([family, 0, high, low]);
    into.extend(body);
    into.resize(into.len().next_multiple_of(4), 0);
}

fn push_raw(into: &mut Vec<u8>, kind: u16, flags: u16, sequence: u32, body: &[u8]) {
    push_header(into, kind, flags, sequence, body.len());
    into.extend(body);
}

fn push_header(into: &mut Vec<u8>, kind: u16, flags: u16, sequence: u32, body_length: usize) {
    let length = u32::try_from(HEADER_BYTES + body_length).expect("a message has less than 4 GiB");
    into.extend(length.to_ne_bytes());
    into.extend(kind.to_ne_bytes());
    into.extend(flags.to_ne_bytes());
    into.extend(sequence.to_ne_bytes());
    into.extend(0u32.to_ne_bytes());
}

/// Messages that take effect together or not at all. Each has a tag, which identifies it in a refusal.
#[derive(Debug)]
pub struct Batch<T> {
    bytes: Vec<u8>,
    tags: Vec<T>,
}

impl<T: Clone> Batch<T> {
    pub fn new() -> Self {
        let mut bytes = Vec::new();
        push_message(&mut bytes, BATCH_BEGIN, REQUEST, 0, 0, SUBSYSTEM_NFTABLES, &[]);
        Self { bytes, tags: Vec::new() }
    }

    pub fn push(&mut self, tag: T, message: u16, flags: u16, family: u8, body: &Attributes) {
        self.tags.push(tag);
        let sequence = u32::try_from(self.tags.len()).expect("a batch has less than 4 Gi messages");
        // The acknowledgement of the first message is the end of the answer.
        let flags = if sequence == 1 { flags | ACK } else { flags };
        push_message(
            &mut self.bytes,
            (SUBSYSTEM_NFTABLES << 8) | message,
            flags | REQUEST,
            sequence,
            family,
            0,
            &body.0,
        );
    }

    /// Of every message, in order.
    #[cfg(test)]
    pub fn tags(&self) -> &[T] {
        &self.tags
    }

    pub fn is_empty(&self) -> bool {
        self.tags.is_empty()
    }
}

/// Why a batch did not take effect.
#[derive(Debug, thiserror::Error)]
pub enum BatchError<T> {
    #[error("access the kernel over netlink")]
    Io(#[source] io::Error),
    /// The messages that the kernel refused, and why. Nothing took effect.
    #[error("the kernel refused {} messages of the batch, first with: {}", .0.len(), .0.first().map_or_else(String::new, |(_, error)| error.to_string()))]
    Refused(Vec<(T, io::Error)>),
}

/// A message from the kernel.
#[derive(Debug)]
pub struct Received {
    /// The port of the socket that caused it; 0 where the kernel itself did.
    pub port: u32,
    /// Behind the netfilter header.
    pub body: Vec<u8>,
    /// The address family of the netfilter header.
    pub family: u8,
    /// The subsystem, and what the message is in it.
    pub kind: u16,
    /// What the netfilter header calls the resource: a group of packets.
    pub resource: u16,
}

#[derive(Debug)]
pub struct Netlink {
    socket: Socket,
    port: u32,
    sequence: u32,
}

impl Netlink {
    /// Opens netfilter.
    pub fn open() -> io::Result<Self> {
        Self::open_protocol(NETLINK_NETFILTER)
    }

    /// Opens interfaces and addresses. The kernel checks requests strictly.
    pub fn open_route() -> io::Result<Self> {
        let netlink = Self::open_protocol(NETLINK_ROUTE)?;
        netlink.socket.set_netlink_get_strict_chk(true)?;
        Ok(netlink)
    }

    fn open_protocol(protocol: isize) -> io::Result<Self> {
        let mut socket = Socket::new(protocol)?;
        let port = socket.bind_auto()?.port_number();
        let fd = descriptor(&socket);
        // Only root of the host may exceed the system's limit.
        if nix::sys::socket::setsockopt(&fd, nix::sys::socket::sockopt::SndBufForce, &SEND_BUFFER_BYTES).is_err() {
            let _ = nix::sys::socket::setsockopt(&fd, nix::sys::socket::sockopt::SndBuf, &SEND_BUFFER_BYTES);
        }
        let _ = nix::sys::socket::setsockopt(&fd, nix::sys::socket::sockopt::RcvBufForce, &SEND_BUFFER_BYTES);
        Ok(Self { socket, port, sequence: 0x4000_0000 })
    }

    /// The number of this socket in events about its changes.
    pub fn port(&self) -> u32 {
        self.port
    }

    /// Commits a batch and waits for the answer.
    pub fn commit<T: Clone>(&mut self, mut batch: Batch<T>) -> Result<(), BatchError<T>> {
        if batch.is_empty() {
            return Ok(());
        }
        push_message(&mut batch.bytes, BATCH_END, REQUEST, 0, 0, SUBSYSTEM_NFTABLES, &[]);
        let kernel = SocketAddr::new(0, 0);
        self.socket.send_to(&std::mem::take(&mut batch.bytes), &kernel, 0).map_err(BatchError::Io)?;
        let mut refused: Vec<(T, io::Error)> = Vec::new();
        let mut answered = false;
        while !answered {
            let (datagram, _) = self.receive(0).map_err(BatchError::Io)?;
            for message in messages(&datagram) {
                let Some((sequence, error)) = message.acknowledgement() else { continue };
                match (usize::try_from(sequence).ok().and_then(|at| batch.tags.get(at.checked_sub(1)?)), error) {
                    (_, None) => answered |= sequence == 1,
                    (Some(tag), Some(error)) => {
                        answered |= sequence == 1;
                        refused.push((tag.clone(), error));
                    }
                    // The batch as a whole, such as a lack of privileges or of buffer.
                    (None, Some(error)) => return Err(BatchError::Io(error)),
                }
            }
        }
        // All refusals of a batch are in the socket now.
        while let Ok((datagram, _)) = self.receive(libc_dontwait()) {
            for message in messages(&datagram) {
                if let Some((sequence, Some(error))) = message.acknowledgement()
                    && let Some(tag) = usize::try_from(sequence).ok().and_then(|at| batch.tags.get(at.checked_sub(1)?))
                {
                    refused.push((tag.clone(), error));
                }
            }
        }
        if refused.is_empty() { Ok(()) } else { Err(BatchError::Refused(refused)) }
    }

    /// Requests a dump, or one object, and returns the answers.
    pub fn query(&mut self, kind: u16, flags: u16, family: u8, body: &Attributes) -> io::Result<Vec<Received>> {
        let mut bytes = Vec::new();
        push_message(&mut bytes, kind, REQUEST | flags, self.sequence + 1, family, 0, &body.0);
        self.request(&bytes, flags, |message| message.received())
    }

    /// Requests a change of a resource, and waits until it is done.
    pub fn change(&mut self, kind: u16, resource: u16, body: &Attributes) -> io::Result<()> {
        let mut bytes = Vec::new();
        push_message(&mut bytes, kind, REQUEST | ACK, self.sequence + 1, 0, resource, &body.0);
        self.request(&bytes, ACK, |_| ()).map(drop)
    }

    /// Requests a dump of other objects than netfilter's. `body` starts with the family's own header, and so do the answers.
    pub fn dump(&mut self, kind: u16, body: &[u8]) -> io::Result<Vec<Vec<u8>>> {
        let mut bytes = Vec::new();
        push_raw(&mut bytes, kind, REQUEST | DUMP, self.sequence + 1, body);
        self.request(&bytes, DUMP, |message| message.payload.to_vec())
    }

    /// Sends a request of the next sequence number, and reads until its answer is complete.
    fn request<T>(&mut self, request: &[u8], flags: u16, read: impl Fn(&Message<'_>) -> T) -> io::Result<Vec<T>> {
        self.sequence += 1;
        self.socket.send_to(request, &SocketAddr::new(0, 0), 0)?;
        let mut found = Vec::new();
        loop {
            let (datagram, _) = self.receive(0)?;
            for message in messages(&datagram) {
                if message.sequence != self.sequence {
                    continue;
                }
                match message.kind {
                    NLMSG_DONE => return Ok(found),
                    NLMSG_ERROR => match message.acknowledgement() {
                        Some((_, Some(error))) => return Err(error),
                        _ => return Ok(found),
                    },
                    _ => found.push(read(&message)),
                }
            }
            if flags & (DUMP | ACK) == 0 {
                return Ok(found);
            }
        }
    }

    /// Joins a group of events.
    pub fn subscribe(&mut self, group: u32) -> io::Result<()> {
        self.socket.add_membership(group)
    }

    /// Passes every received event to `look`; `false` when some were dropped. Never waits.
    pub fn events(&mut self, mut look: impl FnMut(&Received)) -> io::Result<bool> {
        loop {
            match self.receive(libc_dontwait()) {
                Ok((datagram, _)) => messages(&datagram).for_each(|message| look(&message.received())),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(true),
                Err(error) if error.raw_os_error() == Some(nix::errno::Errno::ENOBUFS as i32) => return Ok(false),
                Err(error) => return Err(error),
            }
        }
    }

    /// Waits for events, at most `limit`, and passes the first ones to `look`. Dropped events are not reported.
    pub fn wait(&mut self, limit: Duration, mut look: impl FnMut(&Received)) -> io::Result<()> {
        // A timeout of 0 would wait without end.
        let micros = limit.as_micros().clamp(1_000, 3_600_000_000);
        let limit = TimeVal::microseconds(i64::try_from(micros).unwrap_or(i64::MAX));
        nix::sys::socket::setsockopt(&descriptor(&self.socket), nix::sys::socket::sockopt::ReceiveTimeout, &limit)?;
        match self.receive(0) {
            Ok((datagram, _)) => messages(&datagram).for_each(|message| look(&message.received())),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) if error.raw_os_error() == Some(nix::errno::Errno::ENOBUFS as i32) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn receive(&self, flags: i32) -> io::Result<(Vec<u8>, SocketAddr)> {
        let mut buffer = Vec::with_capacity(RECEIVE_BYTES);
        loop {
            match self.socket.recv_from(&mut buffer, flags) {
                // Only messages of the kernel are accepted.
                Ok((_, from)) if from.port_number() != 0 => buffer.clear(),
                Ok((_, from)) => return Ok((buffer, from)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

fn libc_dontwait() -> i32 {
    nix::sys::socket::MsgFlags::MSG_DONTWAIT.bits()
}

/// The descriptor of the socket, for socket options.
fn descriptor(socket: &Socket) -> BorrowedFd<'_> {
    #[expect(unsafe_code, reason = "the socket's own type lends its descriptor only as a number")]
    // SAFETY: the descriptor is open as long as the socket, which is borrowed as long as what is returned.
    unsafe {
        BorrowedFd::borrow_raw(socket.as_raw_fd())
    }
}

struct Message<'a> {
    kind: u16,
    sequence: u32,
    port: u32,
    payload: &'a [u8],
}

impl Message<'_> {
    /// The number of the acknowledged message, and its error.
    fn acknowledgement(&self) -> Option<(u32, Option<io::Error>)> {
        if self.kind != NLMSG_ERROR {
            return None;
        }
        let code = i32::from_ne_bytes(self.payload.get(..4)?.try_into().ok()?);
        Some((self.sequence, (code != 0).then(|| io::Error::from_raw_os_error(-code))))
    }

    fn received(&self) -> Received {
        Received {
            port: self.port,
            body: self.payload.get(4..).unwrap_or_default().to_vec(),
            family: self.payload.first().copied().unwrap_or_default(),
            kind: self.kind,
            resource: self.payload.get(2..4).map_or(0, |bytes| u16::from_be_bytes([bytes[0], bytes[1]])),
        }
    }
}

fn messages(mut bytes: &[u8]) -> impl Iterator<Item = Message<'_>> {
    std::iter::from_fn(move || {
        let header: &[u8; HEADER_BYTES] = bytes.first_chunk()?;
        let word = |at: usize| u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let length = usize::try_from(word(0)).ok()?;
        let payload = bytes.get(HEADER_BYTES..length)?;
        let message =
            Message { kind: u16::from_ne_bytes([header[4], header[5]]), sequence: word(8), port: word(12), payload };
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    })
}
