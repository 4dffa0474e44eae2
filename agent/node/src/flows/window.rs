//! The sums of equal decisions.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::UNIX_EPOCH;

use hanse_dataplane::{Decided, Decision};
use hanse_proto::agent::v1 as wire;
use hanse_protocol::MAX_FLOWS;

/// Flows of one source and decision in a window: it takes ten pods that scan ports to fill a window.
pub const MAX_OF_SOURCE: usize = 200;

/// What equal decisions have in common.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FlowKey {
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    port: u16,
    icmp: Option<(u8, u8)>,
    decision: Decision,
}

#[derive(Debug, Clone)]
pub struct Sum {
    /// Of the last decision.
    source_port: u16,
    count: u64,
    first_ms: u64,
    last_ms: u64,
}

/// The decisions of some time.
#[derive(Debug, Default)]
pub struct Window {
    pub sums: HashMap<FlowKey, Sum>,
    /// The number of sums of each source and decision; at most one entry for each sum.
    pub of_source: HashMap<(IpAddr, Decision), usize>,
    pub missed: u64,
}

impl Window {
    pub fn add(&mut self, decided: Decided) {
        let Decided { decision, source, destination, protocol, port, source_port, icmp, at } = decided;
        let at = at.duration_since(UNIX_EPOCH).map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX));
        let key = FlowKey { source, destination, protocol, port, icmp, decision };
        if let Some(sum) = self.sums.get_mut(&key) {
            sum.count += 1;
            sum.first_ms = sum.first_ms.min(at);
            // Decisions of the two directions arrive in different order.
            if at >= sum.last_ms {
                (sum.last_ms, sum.source_port) = (at, source_port);
            }
        } else if self.sums.len() < MAX_FLOWS
            && self.of_source.get(&(source, decision)).is_none_or(|sums| *sums < MAX_OF_SOURCE)
        {
            *self.of_source.entry((source, decision)).or_default() += 1;
            self.sums.insert(key, Sum { source_port, count: 1, first_ms: at, last_ms: at });
        } else {
            self.missed += 1;
        }
    }

    pub fn message(self) -> wire::Flows {
        let mut sums: Vec<(FlowKey, Sum)> = self.sums.into_iter().collect();
        sums.sort_by(|(a, a_sum), (b, b_sum)| (a_sum.first_ms, a).cmp(&(b_sum.first_ms, b)));
        wire::Flows { flows: sums.into_iter().map(|(key, sum)| flow(&key, &sum)).collect(), missed: self.missed }
    }
}

fn flow(key: &FlowKey, sum: &Sum) -> wire::Flow {
    let bytes = |address: IpAddr| match address {
        IpAddr::V4(address) => address.octets().to_vec().into(),
        IpAddr::V6(address) => address.octets().to_vec().into(),
    };
    let decision = match key.decision {
        Decision::Allowed => wire::Decision::Allowed,
        Decision::Denied => wire::Decision::Denied,
        Decision::Cut => wire::Decision::Cut,
        Decision::Observed => wire::Decision::Observed,
    };
    wire::Flow {
        source: bytes(key.source),
        destination: bytes(key.destination),
        protocol: key.protocol.into(),
        port: key.port.into(),
        source_port: sum.source_port.into(),
        icmp: key.icmp.map(|(kind, code)| wire::Icmp { r#type: kind.into(), code: Some(code.into()) }),
        decision: decision.into(),
        count: sum.count,
        first_ms: sum.first_ms,
        last_ms: sum.last_ms,
    }
}
