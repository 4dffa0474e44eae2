//! Single packets of any protocol, written by hand: sent into a namespace's stack as they are, and seen where they arrive.
//!
//! Every packet carries a number, so that what arrives late is still known for what it is. Nothing here waits: the kernel's
//! verdict on a packet is whether its number shows up.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd as _, OwnedFd};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, SockaddrIn, SockaddrIn6, recv, sendto,
    socket,
};

use crate::namespace::Namespace;

pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
pub const ICMP: u8 = 1;
pub const ICMPV6: u8 = 58;

/// Before the number in each payload.
const MAGIC: &[u8; 8] = b"HanseNo:";

/// The first packet of a connection: a TCP SYN, a datagram, an echo request, or bare payload of any other protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet {
    pub source: IpAddr,
    /// Of the source's family.
    pub destination: IpAddr,
    /// The IP protocol number.
    pub protocol: u8,
    /// Of TCP and UDP.
    pub source_port: u16,
    pub destination_port: u16,
    /// Type and code, of ICMP and ICMPv6.
    pub icmp: (u8, u8),
    pub number: u64,
}

impl Packet {
    /// From the IP header on.
    fn bytes(&self) -> Vec<u8> {
        let mut body = match self.protocol {
            TCP => {
                let mut header = vec![0; 20];
                header[4..8].copy_from_slice(&(self.number as u32).to_be_bytes());
                // Five words of header, SYN, some window.
                (header[12], header[13], header[14]) = (5 << 4, 2, 0xff);
                header
            }
            UDP => {
                let length = (8 + MAGIC.len() + 8) as u16;
                let mut header = vec![0; 8];
                header[4..6].copy_from_slice(&length.to_be_bytes());
                header
            }
            ICMP | ICMPV6 => {
                // The number is the identifier too, so that every echo is a connection of its own.
                let [.., high, low] = self.number.to_be_bytes();
                vec![self.icmp.0, self.icmp.1, 0, 0, high, low, 0, 1]
            }
            // Plain GRE begins so, and others may look like anything.
            _ => vec![0; 8],
        };
        if matches!(self.protocol, TCP | UDP) {
            body[..2].copy_from_slice(&self.source_port.to_be_bytes());
            body[2..4].copy_from_slice(&self.destination_port.to_be_bytes());
        }
        body.extend(MAGIC);
        body.extend(self.number.to_be_bytes());
        if let Some(at) = checksum_place(self.protocol) {
            // ICMP is the one that knows nothing of addresses.
            let pseudo = if self.protocol == ICMP { Vec::new() } else { self.pseudo_header(body.len()) };
            let sum = internet_checksum(&[pseudo.as_slice(), &body].concat());
            body[at..at + 2].copy_from_slice(&sum.to_be_bytes());
        }
        let mut packet = match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let length = (20 + body.len()) as u16;
                // The kernel fills in identification and checksum.
                let mut header = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, self.protocol, 0, 0];
                header[2..4].copy_from_slice(&length.to_be_bytes());
                header.extend(source.octets());
                header.extend(destination.octets());
                header
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                let mut header = vec![0x60, 0, 0, 0, 0, 0, self.protocol, 64];
                header[4..6].copy_from_slice(&(body.len() as u16).to_be_bytes());
                header.extend(source.octets());
                header.extend(destination.octets());
                header
            }
            _ => panic!("{} and {} are of two families", self.source, self.destination),
        };
        packet.extend(body);
        packet
    }

    fn pseudo_header(&self, length: usize) -> Vec<u8> {
        let mut header = Vec::new();
        for address in [self.source, self.destination] {
            match address {
                IpAddr::V4(address) => header.extend(address.octets()),
                IpAddr::V6(address) => header.extend(address.octets()),
            }
        }
        // One form serves both families: the sum does not depend on the position of the zeros.
        header.extend((length as u32).to_be_bytes());
        header.extend([0, 0, 0, self.protocol]);
        header
    }
}

/// Offset of the checksum in the header after that of IP.
fn checksum_place(protocol: u8) -> Option<usize> {
    match protocol {
        TCP => Some(16),
        UDP => Some(6),
        ICMP | ICMPV6 => Some(2),
        _ => None,
    }
}

/// RFC 1071.
fn internet_checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// The number that a packet (from the IP header on) carries, if it was sent by this module and is not an answer.
fn number(packet: &[u8]) -> Option<u64> {
    let (protocol, start) = match packet.first()? >> 4 {
        4 => (*packet.get(9)?, usize::from(packet[0] & 0xf) * 4),
        _ => (*packet.get(6)?, 40),
    };
    let header = if protocol == TCP { 20 } else { 8 };
    let payload = packet.get(start + header..)?.strip_prefix(MAGIC)?;
    payload.first_chunk().map(|bytes| u64::from_be_bytes(*bytes))
}

/// Where packets start: sockets inside a namespace that take whole packets.
#[derive(Debug)]
pub struct Sender {
    v4: OwnedFd,
    v6: OwnedFd,
}

impl Sender {
    pub fn open(namespace: &Namespace) -> io::Result<Self> {
        let open =
            |family| Ok::<_, io::Error>(socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Raw)?);
        namespace.enter(|| Ok::<_, io::Error>(Self { v4: open(AddressFamily::Inet)?, v6: open(AddressFamily::Inet6)? }))
    }

    /// Hands the packet to the namespace's routing; its source may be any address.
    pub fn send(&self, packet: &Packet) -> io::Result<()> {
        let bytes = packet.bytes();
        let sent = match packet.destination {
            IpAddr::V4(to) => sendto(
                self.v4.as_raw_fd(),
                &bytes,
                &SockaddrIn::from(std::net::SocketAddrV4::new(to, 0)),
                MsgFlags::empty(),
            ),
            IpAddr::V6(to) => {
                let to = SockaddrIn6::from(std::net::SocketAddrV6::new(to, 0, 0, 0));
                sendto(self.v6.as_raw_fd(), &bytes, &to, MsgFlags::empty())
            }
        };
        Ok(sent.map(drop)?)
    }
}

/// Sees every packet that enters a namespace, before the namespace processes it.
#[derive(Debug)]
pub struct Tap {
    sockets: [OwnedFd; 2],
}

impl Tap {
    pub fn open(namespace: &Namespace) -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let open = |protocol| Ok::<_, io::Error>(socket(AddressFamily::Packet, SockType::Datagram, flags, protocol)?);
        namespace
            .enter(|| Ok::<_, io::Error>(Self { sockets: [open(SockProtocol::EthIp)?, open(SockProtocol::EthIpv6)?] }))
    }

    /// The numbers of the packets that have come since the last call.
    pub fn arrived(&self) -> io::Result<Vec<u64>> {
        let mut numbers = Vec::new();
        let mut buffer = [0; 256];
        for socket in &self.sockets {
            loop {
                match recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                    Ok(length) => numbers.extend(number(&buffer[..length])),
                    Err(nix::errno::Errno::EAGAIN) => break,
                    Err(error) => return Err(error.into()),
                }
            }
        }
        Ok(numbers)
    }
}

/// Forgets every connection that the namespace tracks.
pub fn forget_connections(namespace: &Namespace) -> io::Result<()> {
    // A request to delete (2) of the connection tracking subsystem (1), acknowledged, that names no connection:
    // linux/netlink.h, linux/netfilter/nfnetlink_conntrack.h.
    const LENGTH: u32 = 20;
    let mut request = Vec::new();
    request.extend(LENGTH.to_ne_bytes());
    request.extend((1u16 << 8 | 2).to_ne_bytes());
    request.extend(((libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16).to_ne_bytes());
    request.extend([0; 12]);
    namespace.enter(|| {
        let protocol = SockProtocol::NetlinkNetFilter;
        let socket = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?;
        sendto(socket.as_raw_fd(), &request, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
        let mut answer = [0; 256];
        let length = recv(socket.as_raw_fd(), &mut answer, MsgFlags::empty())?;
        // The header of 16 bytes, then the error number: 0 is done.
        match answer[..length].get(16..20).and_then(|bytes| bytes.first_chunk()) {
            Some(error) if i32::from_ne_bytes(*error) == 0 => Ok(()),
            Some(error) => Err(io::Error::from_raw_os_error(-i32::from_ne_bytes(*error))),
            None => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    })
}
