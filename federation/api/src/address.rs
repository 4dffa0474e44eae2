//! Addresses, CIDRs and protocols as API servers read them.

use std::net::IpAddr;

use ipnet::IpNet;

/// A CIDR; host bits are masked, and an IPv4 net mapped into IPv6 is the IPv4 net.
pub fn parse_net(text: &str) -> Result<IpNet, String> {
    let parse = || {
        let (address, prefix) = text.split_once('/')?;
        let address: IpAddr = address.parse().ok()?;
        let is_plain = prefix == "0" || prefix.starts_with(|first: char| ('1'..='9').contains(&first));
        let prefix: u8 = is_plain.then(|| prefix.parse().ok())??;
        let net = IpNet::new(address, prefix).ok()?.trunc();
        match (address.to_canonical(), prefix.checked_sub(96)) {
            (IpAddr::V4(mapped), Some(prefix)) if address.is_ipv6() => {
                Some(IpNet::new(mapped.into(), prefix).ok()?.trunc())
            }
            _ => Some(net),
        }
    };
    parse().ok_or_else(|| format!("\"{text}\" is not a CIDR, such as 10.9.8.0/24 or 2001:db8::/64"))
}

/// A CIDR as API servers accept it in an `ipBlock` and for a node: numbers of an IPv4 address, and the prefix, may have leading zeros.
pub fn parse_block(text: &str) -> Result<IpNet, String> {
    let Some((address, prefix)) = text.split_once('/') else { return parse_net(text) };
    let digits = prefix.trim_start_matches('0');
    let prefix = if digits.is_empty() && !prefix.is_empty() { "0" } else { digits };
    parse_net(&format!("{}/{prefix}", without_zeros(address))).map_err(|_| parse_net(text).err().unwrap_or_default())
}

/// An address in any spelling, zeros before the numbers of an IPv4 address included (API servers stored them once); one
/// of IPv4 mapped into IPv6 is the IPv4 address.
pub fn parse_address(text: &str) -> Option<IpAddr> {
    let parsed = text.parse::<IpAddr>().or_else(|_| without_zeros(text).parse());
    parsed.ok().map(|address| address.to_canonical())
}

/// `010.0.0.1` as `10.0.0.1`: the numbers are decimal all the same.
pub fn without_zeros(text: &str) -> String {
    let number = |part: &str| match part.trim_start_matches('0') {
        "" if !part.is_empty() => "0".to_owned(),
        rest => rest.to_owned(),
    };
    let (before, address) = text.rsplit_once(':').map_or(("", text), |(before, _)| text.split_at(before.len() + 1));
    if !address.contains('.') {
        return text.to_owned();
    }
    format!("{before}{}", address.split('.').map(number).collect::<Vec<_>>().join("."))
}

/// The protocols that Kubernetes names on ports.
pub fn protocol_number(name: &str) -> Option<u8> {
    match name {
        "TCP" => Some(6),
        "UDP" => Some(17),
        "SCTP" => Some(132),
        _ => None,
    }
}
