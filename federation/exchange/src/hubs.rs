//! The addresses of the hub's replicas, and which of them a cluster prefers.
//!
//! A replica announces its addresses, and the hub sends all of them to members. An address says where to connect, and nothing else:
//! the certificate of a hub identifies it.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, Ipv6Addr};

use crate::model::first_bits;

/// Most addresses in a list of the hub's replicas: a member has a connection to each of them.
pub const MAX_HUBS: usize = 32;
/// Most addresses that one replica announces: such as one inside of its cluster, and one outside.
pub const MAX_ANNOUNCED: usize = 4;
/// Most bytes of a host's name (RFC 1035), and of one of its labels.
const MAX_HOST_BYTES: usize = 253;
const MAX_LABEL_BYTES: usize = 63;

/// A text is not an address of a hub.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("expected HOST:PORT, such as hub-0.hub.hanse.svc:7443, 192.0.2.1:7443 or [2001:db8::1]:7443")]
pub struct AddressError;

/// Reads an address of a hub, HOST:PORT. HOST is a DNS name, an IPv4 address, or an IPv6 address in brackets. Names are returned in
/// lower case.
///
/// # Errors
/// When it has another form.
pub fn read(text: &str) -> Result<String, AddressError> {
    let (host, port) = text.rsplit_once(':').ok_or(AddressError)?;
    let is_port = port.len() <= 5 && port.bytes().all(|it| it.is_ascii_digit());
    let port: u16 = port.parse().ok().filter(|port| is_port && *port > 0).ok_or(AddressError)?;
    if let Some(host) = host.strip_prefix('[') {
        let host: Ipv6Addr = host.strip_suffix(']').and_then(|host| host.parse().ok()).ok_or(AddressError)?;
        return Ok(format!("[{host}]:{port}"));
    }
    if let Ok(host) = host.parse::<Ipv4Addr>() {
        return Ok(format!("{host}:{port}"));
    }
    let is_label = |label: &str| {
        (1..=MAX_LABEL_BYTES).contains(&label.len())
            && label.bytes().all(|it| it.is_ascii_alphanumeric() || it == b'-' || it == b'_')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    // Digits alone in the last label are a malformed IPv4 address.
    let is_name = host.len() <= MAX_HOST_BYTES
        && host.split('.').all(is_label)
        && host.rsplit('.').next().is_some_and(|last| !last.bytes().all(|it| it.is_ascii_digit()));
    if is_name { Ok(format!("{}:{port}", host.to_ascii_lowercase())) } else { Err(AddressError) }
}

/// The readable addresses of a list, in order, at most [`MAX_HUBS`], and how many others it has.
pub fn read_list<T: AsRef<str>>(list: &[T]) -> (BTreeSet<String>, usize) {
    let (mut addresses, mut refused) = (BTreeSet::new(), 0);
    for text in list {
        match read(text.as_ref()) {
            Ok(address) if addresses.len() < MAX_HUBS || addresses.contains(&address) => _ = addresses.insert(address),
            Ok(_) | Err(_) => refused += 1,
        }
    }
    (addresses, refused)
}

/// How much a cluster prefers a hub to others: it watches the reachable one of the greatest weight (rendezvous hashing). Clusters
/// spread evenly, and the end of a replica moves its own clusters only, evenly to all others.
pub fn weight(cluster: &str, address: &str) -> u64 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&(cluster.len() as u64).to_le_bytes()).update(cluster.as_bytes()).update(address.as_bytes());
    first_bits(&hasher.finalize())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn reads_names_and_addresses_only() {
        for (text, expected) in [
            ("Hub-0.Hub.hanse.svc:7443", "hub-0.hub.hanse.svc:7443"),
            ("localhost:1", "localhost:1"),
            ("192.0.2.1:65535", "192.0.2.1:65535"),
            ("[2001:DB8:0::1]:7443", "[2001:db8::1]:7443"),
        ] {
            assert_eq!(read(text).as_deref(), Ok(expected));
        }
        let long = format!("{}:1", ["a"; 128].join("."));
        let label = format!("{}:1", "a".repeat(64));
        for text in [
            "",
            "hub",
            "hub:",
            ":7443",
            "hub:0",
            "hub:65536",
            "hub:+1",
            "hub:07443x",
            "hub:000001",
            "-hub:1",
            "hub-.a:1",
            "a..b:1",
            "hub.:1",
            "h ub:1",
            "hub/a:1",
            "user@hub:1",
            "1.2.3:1",
            "1.2.3.256:1",
            "2001:db8::1:7443",
            "[::1:1",
            "[fe80::1%1]:1",
            "hub\n:1",
            "hüb:1",
            &long,
            &label,
        ] {
            assert_eq!(read(text), Err(AddressError), "{text:?}");
        }
    }

    #[test]
    fn a_list_has_a_limit_and_drops_what_it_cannot_read() {
        let many: Vec<String> = (0..40).map(|number| format!("hub-{number}:7443")).collect();
        let (addresses, refused) = read_list(&many);
        assert_eq!((addresses.len(), refused), (MAX_HUBS, 40 - MAX_HUBS));
        let (addresses, refused) = read_list(&["a:1", "A:1", "nothing", "b:2"]);
        assert_eq!((addresses, refused), (BTreeSet::from(["a:1".to_owned(), "b:2".to_owned()]), 1));
    }

    #[test]
    fn clusters_spread_over_replicas_and_only_those_of_a_lost_one_move() {
        let hubs = ["hub-0:1", "hub-1:1", "hub-2:1"];
        let best = |cluster: &str, hubs: &[&'static str]| {
            hubs.iter().copied().max_by_key(|hub| weight(cluster, hub)).expect("one")
        };
        let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
        let mut moved: BTreeMap<&str, usize> = BTreeMap::new();
        for number in 0..1_000 {
            let cluster = format!("cluster-{number}");
            let before = best(&cluster, &hubs);
            *counts.entry(before).or_default() += 1;
            let after = best(&cluster, &hubs[..2]);
            if before == hubs[2] {
                *moved.entry(after).or_default() += 1;
            } else {
                assert_eq!(before, after);
            }
        }
        assert!(counts.len() == 3 && counts.values().all(|count| (270..=400).contains(count)), "{counts:?}");
        assert!(moved.len() == 2 && moved.values().all(|count| (110..=220).contains(count)), "{moved:?}");
    }
}
