//! Echo requests whose answers show whether a pod's packets pass the hooks.
//!
//! Each address gets two. One has the node's address: its answer shows that the pod is alive and that `prerouting` sees it. The other has
//! the address of another pod of the node: its answer takes the way of packets between the two pods, so `prerouting` must see it too, and
//! `forward` drops it. If it is not seen, as on a bridge without netfilter or behind a program that moves packets past it, no policy
//! between the two is enforced. The other pod then gets an answer to a request that it did not send, which its kernel ignores.

use std::io;
use std::net::{IpAddr, SocketAddr, SocketAddrV4, SocketAddrV6, UdpSocket};
use std::os::fd::AsRawFd as _;

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, SockaddrIn6, SockaddrLike, sendto, socket,
};

use super::render::{PROBE_ACROSS, PROBE_OWN};

const ICMP: u8 = 1;
const ICMP_V6: u8 = 58;
const ECHO: u8 = 8;
const ECHO_V6: u8 = 128;
const HOPS: u8 = 64;

/// Sends an echo request to `to`, with the source `from`, or else the address of the node.
///
/// # Errors
/// Without a route to `to`, or without privileges.
pub fn send_request(from: Option<IpAddr>, to: IpAddr) -> io::Result<()> {
    let (from, payload) = match from {
        Some(from) => (from, PROBE_ACROSS),
        None => (own_address_towards(to)?, PROBE_OWN),
    };
    let at = SocketAddr::new(to, 0);
    match (from, to, at) {
        (IpAddr::V4(from), IpAddr::V4(to), SocketAddr::V4(at)) => {
            send(AddressFamily::Inet, &packet_v4(from.octets(), to.octets(), payload), &address_v4(at))
        }
        (IpAddr::V6(from), IpAddr::V6(to), SocketAddr::V6(at)) => {
            send(AddressFamily::Inet6, &packet_v6(from.octets(), to.octets(), payload), &address_v6(at))
        }
        _ => Err(io::Error::other("the two ends are of different families")),
    }
}

fn address_v4(at: SocketAddrV4) -> SockaddrIn {
    at.into()
}

fn address_v6(at: SocketAddrV6) -> SockaddrIn6 {
    at.into()
}

/// The source address of this node's packets to `to`. Sends nothing.
fn own_address_towards(to: IpAddr) -> io::Result<IpAddr> {
    const DISCARD: u16 = 9;
    let any: IpAddr = if to.is_ipv4() { [0u8; 4].into() } else { [0u8; 16].into() };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect((to, DISCARD))?;
    Ok(socket.local_addr()?.ip())
}

/// Whether this process may send probes, which needs the capability NET_RAW.
///
/// # Errors
/// Why the system refuses.
pub fn check() -> io::Result<()> {
    socket(AddressFamily::Inet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Raw)?;
    Ok(())
}

/// A raw socket of this protocol number takes whole packets, with their header.
fn send(family: AddressFamily, packet: &[u8], to: &dyn SockaddrLike) -> io::Result<()> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(family, SockType::Raw, flags, SockProtocol::Raw)?;
    sendto(socket.as_raw_fd(), packet, to, MsgFlags::empty())?;
    Ok(())
}

fn echo(kind: u8, payload: [u8; 8], pseudo_header: &[u8]) -> Vec<u8> {
    let mut message = vec![kind, 0, 0, 0, 0, 0, 0, 1];
    message.extend(payload);
    let sum = checksum(&[pseudo_header, &message].concat());
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    message
}

/// RFC 791 and 792. The kernel fills in the header's checksum.
fn packet_v4(from: [u8; 4], to: [u8; 4], payload: [u8; 8]) -> Vec<u8> {
    let message = echo(ECHO, payload, &[]);
    let length = u16::try_from(20 + message.len()).expect("a probe is short").to_be_bytes();
    let mut packet = vec![0x45, 0, length[0], length[1], 0, 0, 0, 0, HOPS, ICMP, 0, 0];
    packet.extend(from);
    packet.extend(to);
    packet.extend(message);
    packet
}

/// RFC 8200 and 4443.
fn packet_v6(from: [u8; 16], to: [u8; 16], payload: [u8; 8]) -> Vec<u8> {
    let length = [0, 16];
    let pseudo_header = [&from[..], &to, &[0, 0, length[0], length[1], 0, 0, 0, ICMP_V6]].concat();
    let mut packet = vec![0x60, 0, 0, 0, length[0], length[1], ICMP_V6, HOPS];
    packet.extend(from);
    packet.extend(to);
    packet.extend(echo(ECHO_V6, payload, &pseudo_header));
    packet
}

/// RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | pair.get(1).copied().map_or(0, u32::from));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or_default()
}
