//! Addresses and interfaces of this network namespace and of those that are connected to it by veth (`linux/rtnetlink.h`,
//! `linux/if_link.h`, `linux/if_addr.h`).

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::netlink::{Netlink, attributes, text_of};

const GET_LINK: u16 = 18;
const GET_ADDRESS: u16 = 22;
/// `IFLA_…`.
const NAME: u16 = 3;
const LINK_INFO: u16 = 18;
const LINK_NAMESPACE: u16 = 37;
const TARGET_NAMESPACE: u16 = 46;
/// `IFLA_INFO_KIND`.
const KIND: u16 = 1;
/// `IFA_…`.
const ADDRESS: u16 = 1;
const LOCAL: u16 = 2;
const TARGET_NAMESPACE_OF_ADDRESS: u16 = 10;
/// `IFF_…`.
const UP: u32 = 0x1;
const LOOPBACK: u32 = 0x8;
/// Kinds of interfaces that bypass the host's network stack.
const BESIDE: [&str; 5] = ["macvlan", "macvtap", "ipvlan", "ipvtap", "vlan"];

/// The addresses and namespaces.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Survey {
    /// Addresses of this namespace.
    pub own: BTreeSet<IpAddr>,
    /// Namespaces that are connected to this one by veth.
    pub behind: Vec<Behind>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Behind {
    pub addresses: BTreeSet<IpAddr>,
    /// Interfaces that lead out of it: veths to this namespace by their name here, and interfaces that bypass it by their name there.
    pub ways: Vec<String>,
}

/// Reads the kernel's tables. Costs two dumps and two more for each namespace.
///
/// # Errors
/// When the tables of this namespace cannot be read. Other namespaces that cannot be read are left out.
pub fn survey() -> io::Result<Survey> {
    let mut netlink = Netlink::open_route()?;
    let mut cables: BTreeMap<i32, Vec<String>> = BTreeMap::new();
    for link in links(&mut netlink, None)? {
        if let (Some(namespace), true) = (link.namespace, link.kind == "veth") {
            cables.entry(namespace).or_default().push(link.name);
        }
    }
    let mut survey = Survey { own: addresses(&mut netlink, None)?, behind: Vec::new() };
    for (namespace, mut ways) in cables {
        let (Ok(addresses), Ok(links)) =
            (addresses(&mut netlink, Some(namespace)), links(&mut netlink, Some(namespace)))
        else {
            continue;
        };
        // Hardware interfaces have no kind.
        let beside = |link: &Link| link.up && (link.kind.is_empty() || BESIDE.contains(&link.kind.as_str()));
        ways.extend(links.into_iter().filter(beside).map(|link| link.name));
        survey.behind.push(Behind { addresses, ways });
    }
    Ok(survey)
}

/// Addresses of this namespace.
///
/// # Errors
/// When the kernel's table cannot be read.
pub fn own_addresses() -> io::Result<BTreeSet<IpAddr>> {
    addresses(&mut Netlink::open_route()?, None)
}

struct Link {
    name: String,
    kind: String,
    /// Up, and not the loopback.
    up: bool,
    /// Where its other end is, when that is another namespace.
    namespace: Option<i32>,
}

fn links(netlink: &mut Netlink, target: Option<i32>) -> io::Result<Vec<Link>> {
    const HEADER: usize = 16;
    let mut body = vec![0; HEADER];
    push_target(&mut body, TARGET_NAMESPACE, target);
    let link = |message: Vec<u8>| {
        let flags = u32::from_ne_bytes(*message.get(8..)?.first_chunk()?);
        let parts = attributes(message.get(HEADER..)?);
        let info = parts.get(&LINK_INFO).map(|info| attributes(info)).unwrap_or_default();
        Some(Link {
            name: text_of(parts.get(&NAME)?),
            kind: info.get(&KIND).map(|kind| text_of(kind)).unwrap_or_default(),
            up: flags & UP != 0 && flags & LOOPBACK == 0,
            namespace: parts.get(&LINK_NAMESPACE).and_then(|id| id.first_chunk()).map(|id| i32::from_ne_bytes(*id)),
        })
    };
    Ok(netlink.dump(GET_LINK, &body)?.into_iter().filter_map(link).collect())
}

fn addresses(netlink: &mut Netlink, target: Option<i32>) -> io::Result<BTreeSet<IpAddr>> {
    const HEADER: usize = 8;
    let mut body = vec![0; HEADER];
    push_target(&mut body, TARGET_NAMESPACE_OF_ADDRESS, target);
    let address = |message: Vec<u8>| {
        let parts = attributes(message.get(HEADER..)?);
        let bytes = *parts.get(&LOCAL).or_else(|| parts.get(&ADDRESS))?;
        let v4 = <[u8; 4]>::try_from(bytes).map(|octets| Ipv4Addr::from(octets).into());
        v4.or_else(|_| <[u8; 16]>::try_from(bytes).map(|octets| Ipv6Addr::from(octets).into())).ok()
    };
    Ok(netlink.dump(GET_ADDRESS, &body)?.into_iter().filter_map(address).collect())
}

/// rtnetlink uses the machine's byte order.
fn push_target(body: &mut Vec<u8>, kind: u16, target: Option<i32>) {
    if let Some(target) = target {
        body.extend(8u16.to_ne_bytes());
        body.extend(kind.to_ne_bytes());
        body.extend(target.to_ne_bytes());
    }
}
