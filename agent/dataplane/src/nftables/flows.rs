//! Decisions of rules, as the kernel logs them (`linux/netfilter/nfnetlink_log.h`).
//!
//! The chains `log-…` copy the first bytes of the decided packet to a netlink group. The group identifies the decision, and the packet the
//! connection: its source is before, its destination after address translation. The kernel gathers packets for at most half a second.
//! Packets beyond the rate limits of the chains, and those that do not fit into the socket, are dropped and counted.
//!
//! A group has one listener in a network namespace, and ends with it. Without one, a log rule costs a look-up.

use std::io;
use std::net::IpAddr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hanse_ruleset::Enforcement;

use super::netlink::{Attributes, Batch, BatchError, CREATE, DUMP, Netlink, Received, attributes, list, text_of};
use super::render::log_chains;
use super::write::{DELETE_TABLE, NEW_CHAIN, NEW_RULE, NEW_TABLE};
use super::{FAMILY_INET, GET_CHAIN_RULES};
pub use crate::decisions::{Decided, Decision, Decisions};

/// The groups of allowed connections, of denied ones, and of cut ones: by a packet of the original direction, or by one of the reply
/// direction, whose ends are swapped.
pub const ALLOWED: u16 = 4739;
pub const DENIED: u16 = 4740;
pub const CUT: u16 = 4741;
pub const CUT_IN_REPLY: u16 = 4742;
/// Likewise, of connections that a node which only observes would deny or cut.
pub const OBSERVED: u16 = 4743;
pub const OBSERVED_IN_REPLY: u16 = 4744;
const GROUPS: [u16; 6] = [ALLOWED, DENIED, CUT, CUT_IN_REPLY, OBSERVED, OBSERVED_IN_REPLY];
/// Bytes of each packet: an IPv6 header, 80 bytes of extensions, and ports.
pub const COPIED_BYTES: u32 = 128;
/// The kernel sends gathered packets when they are this old, in hundredths of a second, or this many, or this many bytes: 100 packets of
/// 128 bytes, with as many bytes of attributes.
const GATHER_CENTISECONDS: u32 = 50;
const GATHER_PACKETS: u32 = 100;
const GATHER_BYTES: u32 = 32 * 1024;
/// The greatest age of a packet's timestamp: some drivers use other clocks.
const MAX_AGE: Duration = Duration::from_secs(60);
/// Extension headers of one packet that are read: more than real packets have.
const MAX_EXTENSIONS: usize = 8;

const SUBSYSTEM: u16 = 4 << 8;
const PACKET: u16 = SUBSYSTEM;
const CONFIGURE: u16 = SUBSYSTEM | 1;
/// `NFULA_…`.
const TIMESTAMP: u16 = 3;
const PAYLOAD: u16 = 9;
const SEQUENCE: u16 = 12;

/// Listens to the decisions in one network namespace.
#[derive(Debug)]
pub struct Flows {
    packets: Netlink,
    rules: Netlink,
    table: String,
    /// The number of the next packet of each group.
    next: [u32; GROUPS.len()],
    /// The counter of suppressed packets of each chain, at the last call.
    suppressed: [u64; 3],
}

impl Flows {
    /// Listens in the network namespace of the calling thread, to the rules of `table`.
    ///
    /// # Errors
    /// When the kernel does not support packet groups or log rules, when another process listens, or without privileges.
    pub fn open(table: &str) -> io::Result<Self> {
        const BIND: u8 = 1;
        const COPY_PACKET: u8 = 2;
        const NUMBERED: u16 = 1;
        let (mut packets, mut rules) = (Netlink::open()?, Netlink::open()?);
        try_rules(&mut rules, &format!("{table}-trial"))?;
        let [a, b, c, d] = COPIED_BYTES.to_be_bytes();
        let settings = Attributes::default()
            .u8(1, BIND)
            .bytes(2, &[a, b, c, d, COPY_PACKET, 0])
            .u32(3, GATHER_BYTES)
            .u32(4, GATHER_CENTISECONDS)
            .u32(5, GATHER_PACKETS)
            .u16(6, NUMBERED);
        for group in GROUPS {
            packets.change(CONFIGURE, group, &settings)?;
        }
        let mut flows = Self { packets, rules, table: table.into(), next: [0; GROUPS.len()], suppressed: [0; 3] };
        // Ignores what was suppressed before.
        flows.suppressed()?;
        Ok(flows)
    }

    /// Waits for the next packets, at most `limit`, and passes their decisions to `receive`. Returns how many were dropped: a gap is
    /// known with the packet behind it.
    ///
    /// # Errors
    /// When netlink fails.
    pub fn wait(&mut self, limit: Duration, mut receive: impl FnMut(Decided)) -> io::Result<u64> {
        let (mut dropped, now) = (0, SystemTime::now);
        self.packets.wait(limit, |message| {
            let (gap, decided) = take(&mut self.next, message, now());
            dropped += gap;
            decided.into_iter().for_each(&mut receive);
        })?;
        Ok(dropped)
    }

    /// How many decisions rate limits have suppressed since the last call. Those just before the whole table is written are not known.
    ///
    /// # Errors
    /// When netlink fails.
    pub fn suppressed(&mut self) -> io::Result<u64> {
        let mut sum = 0;
        for (chain, last) in log_chains(Enforcement::Enforce).iter().zip(&mut self.suppressed) {
            let query = Attributes::default().text(1, &self.table).text(2, &chain.name);
            let now = match self.rules.query(GET_CHAIN_RULES, DUMP, FAMILY_INET, &query) {
                Ok(rules) => rules.iter().filter_map(|rule| counted(&rule.body, &self.table, &chain.name)).sum(),
                Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
                Err(error) => return Err(error),
            };
            // The counter of a new rule starts at 0.
            sum += if now < *last { now } else { now - *last };
            *last = now;
        }
        Ok(sum)
    }
}

/// [`Flows`] that can be opened again.
#[derive(Debug)]
pub struct Listener {
    table: String,
    flows: Option<Flows>,
}

impl Listener {
    /// See [`Flows::open`].
    pub fn open(table: &str) -> io::Result<Self> {
        Ok(Self { table: table.into(), flows: Some(Flows::open(table)?) })
    }

    fn flows(&mut self) -> io::Result<&mut Flows> {
        self.flows.as_mut().ok_or_else(|| io::ErrorKind::NotConnected.into())
    }
}

impl Decisions for Listener {
    fn reopen(&mut self) -> io::Result<()> {
        // A group has one listener: the former one ends first.
        self.flows = None;
        self.flows = Some(Flows::open(&self.table)?);
        Ok(())
    }

    fn wait(&mut self, limit: Duration, receive: &mut dyn FnMut(Decided)) -> io::Result<u64> {
        self.flows()?.wait(limit, receive)
    }

    fn suppressed(&mut self) -> io::Result<u64> {
        self.flows()?.suppressed()
    }
}

/// How many decisions were dropped before a message, or with it, and its decision. `next`: as in [`Flows`].
fn take(next: &mut [u32; GROUPS.len()], message: &Received, now: SystemTime) -> (u64, Option<Decided>) {
    let group = GROUPS.iter().position(|group| *group == message.resource);
    let Some(at) = group.filter(|_| message.kind == PACKET) else { return (0, None) };
    let parts = attributes(&message.body);
    let mut dropped = 0;
    if let Some(number) = parts.get(&SEQUENCE).and_then(|bytes| bytes.first_chunk()) {
        let number = u32::from_be_bytes(*number);
        dropped = u64::from(number.wrapping_sub(next[at]));
        next[at] = number.wrapping_add(1);
    }
    let time = time_of(parts.get(&TIMESTAMP).copied().unwrap_or_default(), now);
    let decided =
        parts.get(&PAYLOAD).and_then(|bytes| PacketEnds::read(bytes)).map(|ends| ends.decided(GROUPS[at], time));
    (dropped + u64::from(decided.is_none()), decided)
}

/// Creates and removes the log rules in one transaction: a kernel that refuses them would refuse the whole table.
fn try_rules(netlink: &mut Netlink, table: &str) -> io::Result<()> {
    let (mut batch, name) = (Batch::new(), Attributes::default().text(1, table));
    let no_set = |_: usize| (String::new(), 0);
    batch.push((), NEW_TABLE, CREATE, FAMILY_INET, &name);
    let chains = log_chains(Enforcement::Enforce);
    for chain in &chains {
        batch.push((), NEW_CHAIN, CREATE, FAMILY_INET, &name.clone().text(3, &chain.name));
    }
    for (chain, rule) in chains.iter().flat_map(|chain| chain.rules.iter().map(move |rule| (chain, rule))) {
        let expressions = rule.expressions.iter();
        let expressions = expressions.fold(Attributes::default(), |list, it| list.nest(1, &it.encode(&no_set)));
        batch.push((), NEW_RULE, CREATE, FAMILY_INET, &name.clone().text(2, &chain.name).nest(4, &expressions));
    }
    batch.push((), DELETE_TABLE, 0, FAMILY_INET, &name);
    match netlink.commit(batch) {
        Ok(()) => Ok(()),
        Err(BatchError::Io(error)) => Err(error),
        Err(BatchError::Refused(refused)) => {
            Err(refused.into_iter().next().map_or(io::ErrorKind::Other.into(), |it| it.1))
        }
    }
}

/// The packets of the counter of a rule of `chain`.
fn counted(rule: &[u8], table: &str, chain: &str) -> Option<u64> {
    let rule = attributes(rule);
    (text_of(rule.get(&1)?) == table && text_of(rule.get(&2)?) == chain).then_some(())?;
    list(rule.get(&4)?).find_map(|expression| {
        let expression = attributes(expression);
        (text_of(expression.get(&1)?) == "counter").then_some(())?;
        let counter = attributes(expression.get(&2)?);
        Some(u64::from_be_bytes(*counter.get(&2)?.first_chunk()?))
    })
}

/// A timestamp of seconds and microseconds; `now` where it is missing or impossible.
fn time_of(stamp: &[u8], now: SystemTime) -> SystemTime {
    let word = |at: usize| Some(u64::from_be_bytes(*stamp.get(at..)?.first_chunk()?));
    let time = word(0).zip(word(8)).and_then(|(seconds, micros)| {
        let since = Duration::from_secs(seconds).checked_add(Duration::from_micros(micros))?;
        UNIX_EPOCH.checked_add(since)
    });
    time.filter(|time| now.duration_since(*time).is_ok_and(|age| age <= MAX_AGE)).unwrap_or(now)
}

/// The ends of a packet.
#[derive(Debug, Clone, PartialEq, Eq)]
struct PacketEnds {
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    source_port: u16,
    port: u16,
    icmp: Option<(u8, u8)>,
}

impl PacketEnds {
    /// From the first bytes of a packet, which the kernel has defragmented.
    fn read(packet: &[u8]) -> Option<Self> {
        let (source, destination, protocol, behind) = match packet.first()? >> 4 {
            4 => Self::read_v4(packet)?,
            6 => Self::read_v6(packet)?,
            _ => return None,
        };
        let mut ends = Self { source, destination, protocol, source_port: 0, port: 0, icmp: None };
        match (protocol, source) {
            // TCP, UDP, DCCP, SCTP, UDP-Lite.
            (6 | 17 | 33 | 132 | 136, _) => {
                let [a, b, c, d] = *behind.first_chunk()?;
                (ends.source_port, ends.port) = (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
            }
            (1, IpAddr::V4(_)) | (58, IpAddr::V6(_)) => {
                let [kind, code] = *behind.first_chunk()?;
                ends.icmp = Some((kind, code));
            }
            _ => {}
        }
        Some(ends)
    }

    /// RFC 791.
    fn read_v4(packet: &[u8]) -> Option<(IpAddr, IpAddr, u8, &[u8])> {
        const NOT_THE_FIRST: u16 = 0x1fff;
        let header: &[u8; 20] = packet.first_chunk()?;
        let length = usize::from(header[0] & 0xf) * 4;
        let address = |at: usize| Some(IpAddr::from(<[u8; 4]>::try_from(header.get(at..at + 4)?).ok()?));
        let whole = length >= 20 && u16::from_be_bytes([header[6], header[7]]) & NOT_THE_FIRST == 0;
        whole.then_some(())?;
        Some((address(12)?, address(16)?, header[9], packet.get(length..)?))
    }

    /// RFC 8200, with the extensions of RFC 4302, 6275, 7401 and 5533.
    fn read_v6(packet: &[u8]) -> Option<(IpAddr, IpAddr, u8, &[u8])> {
        const NOT_THE_FIRST: u16 = 0xfff8;
        let header: &[u8; 40] = packet.first_chunk()?;
        let address = |at: usize| Some(IpAddr::from(<[u8; 16]>::try_from(header.get(at..at + 16)?).ok()?));
        let (mut protocol, mut behind) = (header[6], &packet[40..]);
        for _ in 0..=MAX_EXTENSIONS {
            let length = match protocol {
                // Hop-by-hop, routing, destination, mobility, host identity, shim6: units of 8 bytes, without the first.
                0 | 43 | 60 | 135 | 139 | 140 => (usize::from(*behind.get(1)?) + 1) * 8,
                // Authentication: units of 4 bytes, without the first two.
                51 => (usize::from(*behind.get(1)?) + 2) * 4,
                // A fragment that is the whole packet (RFC 6946).
                44 if u16::from_be_bytes([*behind.get(2)?, *behind.get(3)?]) & NOT_THE_FIRST == 0 => 8,
                44 => return None,
                _ => return Some((address(8)?, address(24)?, protocol, behind)),
            };
            (protocol, behind) = (*behind.first()?, behind.get(length..)?);
        }
        None
    }

    fn decided(self, group: u16, at: SystemTime) -> Decided {
        let decision = match group {
            ALLOWED => Decision::Allowed,
            DENIED => Decision::Denied,
            OBSERVED | OBSERVED_IN_REPLY => Decision::Observed,
            _ => Decision::Cut,
        };
        let Self { source, destination, protocol, source_port, port, icmp } = self;
        match group {
            CUT_IN_REPLY | OBSERVED_IN_REPLY => Decided {
                decision,
                source: destination,
                destination: source,
                protocol,
                port: source_port,
                source_port: port,
                icmp: icmp.map(|(kind, code)| (request_of(source, kind), code)),
                at,
            },
            _ => Decided { decision, source, destination, protocol, port, source_port, icmp, at },
        }
    }
}

/// The type of the request that a message of type `kind` answers (RFC 792, 950 and 4443).
fn request_of(from: IpAddr, kind: u8) -> u8 {
    match (from, kind) {
        (IpAddr::V4(_), 0) => 8,
        (IpAddr::V4(_), 14 | 16 | 18) => kind - 1,
        (IpAddr::V6(_), 129) => 128,
        _ => kind,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn v4(options: usize, protocol: u8, behind: &[u8]) -> Vec<u8> {
        let mut packet = vec![0x45 + u8::try_from(options).expect("few"), 0, 0, 0, 0, 0, 0x40, 0, 64, protocol, 0, 0];
        packet.extend([10, 1, 0, 2, 10, 1, 0, 3]);
        packet.extend(vec![1; options * 4]);
        packet.extend(behind);
        packet
    }

    fn v6(protocol: u8, behind: &[u8]) -> Vec<u8> {
        let mut packet = vec![0x60, 0, 0, 0, 0, 0, protocol, 64];
        for last in [2, 3] {
            packet.extend([0xfd, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last]);
        }
        packet.extend(behind);
        packet
    }

    fn decided(group: u16, packet: &[u8]) -> Option<Decided> {
        PacketEnds::read(packet).map(|ends| ends.decided(group, UNIX_EPOCH))
    }

    /// Source, destination, port, source port and ICMP as text.
    fn text(group: u16, packet: &[u8]) -> String {
        decided(group, packet).map_or("nothing".into(), |it| {
            let icmp = it.icmp.map(|(kind, code)| format!(" icmp {kind}/{code}")).unwrap_or_default();
            format!(
                "{:?} {} {}:{} to {}:{}{icmp}",
                it.decision, it.protocol, it.source, it.source_port, it.destination, it.port
            )
        })
    }

    #[test]
    fn reads_the_ends_of_a_connection_from_a_packet() {
        const PORTS: [u8; 4] = [0x9c, 0x40, 0, 80];
        let extensions = |last: &[u8]| [&[43, 0, 0, 0, 0, 0, 0, 0, 51, 1][..], &[0; 14], last].concat();
        let cases = [
            (ALLOWED, v4(0, 6, &PORTS), "Allowed 6 10.1.0.2:40000 to 10.1.0.3:80"),
            (DENIED, v4(10, 132, &PORTS), "Denied 132 10.1.0.2:40000 to 10.1.0.3:80"),
            (CUT, v4(0, 17, &PORTS), "Cut 17 10.1.0.2:40000 to 10.1.0.3:80"),
            (CUT_IN_REPLY, v4(0, 17, &PORTS), "Cut 17 10.1.0.3:80 to 10.1.0.2:40000"),
            (ALLOWED, v4(0, 47, &[]), "Allowed 47 10.1.0.2:0 to 10.1.0.3:0"),
            (DENIED, v4(0, 1, &[8, 0]), "Denied 1 10.1.0.2:0 to 10.1.0.3:0 icmp 8/0"),
            (CUT_IN_REPLY, v4(0, 1, &[0, 0]), "Cut 1 10.1.0.3:0 to 10.1.0.2:0 icmp 8/0"),
            (CUT_IN_REPLY, v4(0, 1, &[14, 0]), "Cut 1 10.1.0.3:0 to 10.1.0.2:0 icmp 13/0"),
            (ALLOWED, v6(6, &PORTS), "Allowed 6 fd01::2:40000 to fd01::3:80"),
            (CUT_IN_REPLY, v6(58, &[129, 0]), "Cut 58 fd01::3:0 to fd01::2:0 icmp 128/0"),
            // Hop-by-hop, then routing, then authentication of 12 bytes.
            (
                ALLOWED,
                v6(
                    0,
                    &[
                        43, 0, 0, 0, 0, 0, 0, 0, 51, 0, 0, 0, 0, 0, 0, 0, 6, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x9c,
                        0x40, 0, 80,
                    ],
                ),
                "Allowed 6 fd01::2:40000 to fd01::3:80",
            ),
            (ALLOWED, v6(44, &[17, 0, 0, 1, 0, 0, 0, 0, 0x9c, 0x40, 0, 80]), "Allowed 17 fd01::2:40000 to fd01::3:80"),
            // A fragment, cut off, without a version, with an impossible length, and with more extensions than are read.
            (ALLOWED, v6(44, &[17, 0, 0, 8, 0, 0, 0, 0, 0x9c, 0x40, 0, 80]), "nothing"),
            (ALLOWED, [&v4(0, 6, &PORTS)[..6], &[0, 1], &v4(0, 6, &PORTS)[8..]].concat(), "nothing"),
            (ALLOWED, v4(0, 6, &PORTS[..3]), "nothing"),
            (ALLOWED, v6(58, &[128]), "nothing"),
            (ALLOWED, vec![0x50; 60], "nothing"),
            (ALLOWED, [&[0x44], &v4(0, 6, &PORTS)[1..]].concat(), "nothing"),
            (ALLOWED, v6(60, &[&[60, 0, 0, 0, 0, 0, 0, 0].repeat(9)[..], &extensions(&PORTS)].concat()), "nothing"),
        ];
        for (group, packet, wanted) in cases {
            assert_eq!(text(group, &packet), wanted, "{packet:x?}");
        }
    }

    #[test]
    fn counts_gaps_and_unreadable_packets_as_dropped() {
        let packet = v4(0, 6, &[0x9c, 0x40, 0, 80]);
        let message = |kind, resource, number: u32, packet: &[u8]| Received {
            port: 0,
            body: Attributes::default().u32(SEQUENCE, number).bytes(PAYLOAD, packet).0,
            family: 2,
            kind,
            resource,
        };
        let mut next = [0; GROUPS.len()];
        for (message, dropped, is_decision) in [
            (message(PACKET, ALLOWED, 0, &packet), 0, true),
            (message(PACKET, ALLOWED, 3, &packet), 2, true),
            (message(PACKET, DENIED, 0, &packet), 0, true),
            (message(PACKET, ALLOWED, 4, &packet[..10]), 1, false),
            (message(PACKET, ALLOWED, 6, &[]), 2, false),
            (message(PACKET, ALLOWED, 7, &packet), 0, true),
            // Another program's group, and a message that is not a packet.
            (message(PACKET, 1, 9, &packet), 0, false),
            (message(3, ALLOWED, 9, &packet), 0, false),
        ] {
            let (gap, decided) = take(&mut next, &message, UNIX_EPOCH);
            assert_eq!((gap, decided.is_some()), (dropped, is_decision), "{message:?}");
        }
        // The numbers wrap around.
        next = [u32::MAX; GROUPS.len()];
        let after = [u32::MAX, 1].map(|number| take(&mut next, &message(PACKET, CUT, number, &packet), UNIX_EPOCH).0);
        assert_eq!(after, [0, 1]);
    }

    #[test]
    fn replaces_impossible_timestamps() {
        let now = UNIX_EPOCH + Duration::from_secs(1_000);
        let stamp = |seconds: u64, micros: u64| [seconds.to_be_bytes(), micros.to_be_bytes()].concat();
        let before = |micros| now - Duration::from_micros(micros);
        for (stamp, wanted) in [
            (stamp(999, 500_000), before(500_000)),
            (stamp(941, 0), before(59_000_000)),
            (stamp(939, 0), now),
            (stamp(1_000, 1), now),
            (stamp(u64::MAX, u64::MAX), now),
            (stamp(999, 0)[..15].to_vec(), now),
            (Vec::new(), now),
        ] {
            assert_eq!(time_of(&stamp, now), wanted, "{stamp:x?}");
        }
    }

    proptest! {
        #[test]
        fn reads_arbitrary_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..200), version in 3u8..8) {
            for group in GROUPS {
                let _ = decided(group, &bytes);
                let mut with_version = bytes.clone();
                if let Some(first) = with_version.first_mut() {
                    *first = (version << 4) | (*first & 0xf);
                }
                let _ = decided(group, &with_version);
            }
            let _ = counted(&bytes, "hanse", "log-allowed");
            let _ = time_of(&bytes, SystemTime::now());
        }

        /// The bytes behind valid headers are arbitrary.
        #[test]
        fn reads_cut_off_packets_like_whole_ones_or_not_at_all(
            behind in proptest::collection::vec(any::<u8>(), 0..100), protocol: u8, end in 0usize..140, six: bool
        ) {
            let whole = if six { v6(protocol, &behind) } else { v4(0, protocol, &behind) };
            if let Some(cut_off) = PacketEnds::read(&whole[..end.min(whole.len())]) {
                prop_assert_eq!(Some(cut_off), PacketEnds::read(&whole));
            }
        }
    }
}
