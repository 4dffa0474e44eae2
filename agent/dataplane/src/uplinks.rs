//! Interfaces that lead out of the node: those with a route to more than one address outside of the node's pod ranges.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

/// Reads the routes in the network namespace of the calling thread. A table that cannot be read gives no uplink: the sources of all
/// packets are checked then.
pub fn detect(pod_ranges: &[IpNet]) -> Vec<String> {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let (v4, v6) = (read("/proc/thread-self/net/route"), read("/proc/thread-self/net/ipv6_route"));
    from_tables(&v4, &v6, pod_ranges)
}

fn from_tables(v4: &str, v6: &str, pod_ranges: &[IpNet]) -> Vec<String> {
    let routes = v4.lines().skip(1).filter_map(parse_v4).chain(v6.lines().filter_map(parse_v6));
    let leads_out = |net: &IpNet| {
        let own = match net {
            IpNet::V4(net) => net.prefix_len() == 32 || net.addr().is_loopback() || net.addr().is_multicast(),
            IpNet::V6(net) => {
                let address = net.addr();
                net.prefix_len() == 128
                    || address.is_unicast_link_local()
                    || address.is_multicast()
                    || address.is_loopback()
            }
        };
        !own && !pod_ranges.iter().any(|range| range.contains(net))
    };
    let names = routes.filter(|(name, net)| name != "lo" && leads_out(net)).map(|(name, _)| name);
    names.collect::<BTreeSet<_>>().into_iter().collect()
}

/// `Iface Destination Gateway Flags RefCnt Use Metric Mask …`, hexadecimal in the machine's byte order.
fn parse_v4(line: &str) -> Option<(String, IpNet)> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    let address = |text: &str| u32::from_str_radix(text, 16).ok().map(|bits| Ipv4Addr::from(bits.to_ne_bytes()));
    let (destination, mask) = (address(fields.get(1)?)?, address(fields.get(7)?)?);
    let net = IpNet::with_netmask(destination.into(), mask.into()).ok()?;
    Some(((*fields.first()?).to_owned(), net))
}

/// `destination prefix source prefix gateway metric references uses flags device`, hexadecimal.
fn parse_v6(line: &str) -> Option<(String, IpNet)> {
    const REJECT: u32 = 0x200;
    let fields: Vec<&str> = line.split_whitespace().collect();
    let flags = u32::from_str_radix(fields.get(8)?, 16).ok()?;
    if flags & REJECT != 0 {
        return None;
    }
    let destination = u128::from_str_radix(fields.first()?, 16).ok().map(Ipv6Addr::from)?;
    let prefix = u8::from_str_radix(fields.get(1)?, 16).ok()?;
    Some(((*fields.get(9)?).to_owned(), IpNet::new(IpAddr::V6(destination), prefix).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interfaces_with_routes_to_pods_are_not_uplinks() {
        let v4 = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n\
                  eth0\t00000000\t0101A8C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n\
                  eth1\t0001A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n\
                  pod1\t0200010A\t00000000\t0005\t0\t0\t0\tFFFFFFFF\t0\t0\t0\n\
                  cni0\t0000010A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n";
        let v6 = "fe800000000000000000000000000000 40 00000000000000000000000000000000 00 00000000000000000000000000000000 00000100 00000001 00000000 00000001 pod2\n\
                  fd090000000000000000000000000000 40 00000000000000000000000000000000 00 00000000000000000000000000000000 00000100 00000001 00000000 00000001 eth2\n";
        let ranges = ["10.1.0.0/24".parse().expect("a net")];
        assert_eq!(from_tables(v4, v6, &ranges), ["eth0", "eth1", "eth2"]);
    }
}
