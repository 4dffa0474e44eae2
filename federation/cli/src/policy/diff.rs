//! `hanse policy diff`: which pairs of workloads change verdict.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use hanse_policy::evaluate::{Query, Verdict, View};
use hanse_policy::inventory::{EndpointKind, Inventory};
use hanse_policy::model::{PolicySet, Port, Protocol};
use hanse_policy::prepared::Prepared;
use serde::Serialize;

use super::load::{ClusterSource, Loaded, Sources};
use super::matrix::PortName;
use crate::output::{self, Format};
use hanse_policy::explain::answer;
use hanse_policy::explain::{Owners, Place, ProtocolName, Question};

/// Addresses that stand for the world, where none is given: documentation ranges (RFC 5737, RFC 3849).
const OUTSIDE: [&str; 2] = ["203.0.113.1", "2001:db8::1"];

/// Compares two states, or the enforced with the staged outcome, over every pair of pods (and with the world outside),
/// in all clusters.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    sources: Sources,
    /// Compare with these directories instead: NAME=DIR for each cluster.
    #[arg(long = "with", value_name = "NAME=DIR", required_unless_present_any = ["staged", "with_federation"])]
    with: Vec<ClusterSource>,
    /// Compare with this directory of the federation.
    #[arg(long, value_name = "DIR")]
    with_federation: Option<PathBuf>,
    /// Compare with the outcome if every staged policy were committed.
    #[arg(long, conflicts_with_all = ["with", "with_federation"])]
    staged: bool,
    /// Ports to ask about, as NUMBER or NUMBER/PROTOCOL; otherwise those that policies and pods name, with what lies
    /// beside each.
    #[arg(long = "port", value_name = "PORT", value_delimiter = ',')]
    ports: Vec<PortName>,
    /// Addresses that stand for the world outside.
    #[arg(long, value_name = "IP", default_values = OUTSIDE)]
    outside: Vec<String>,
    /// Exit 1 when a verdict changes.
    #[arg(long)]
    exit_code: bool,
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

#[derive(Serialize)]
struct ChangeLine<'a> {
    from: &'a Place,
    to: &'a Place,
    protocol: &'a str,
    port: u16,
    before: &'static str,
    after: &'static str,
    /// What decides now, for people.
    egress: String,
    ingress: String,
}

impl Arguments {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let before = self.sources.load()?;
        let after = match self.staged {
            true => None,
            false => Some(self.sources.instead(&self.with, self.with_federation.as_deref()).load()?),
        };
        let after_state = after.as_ref().unwrap_or(&before);
        let view = if self.staged { View::Pending } else { View::Enforced };
        let sides = [
            (Owners::new(&before.inventory), Prepared::new(&before.policies, &before.inventory, View::Enforced)),
            (Owners::new(&after_state.inventory), Prepared::new(&after_state.policies, &after_state.inventory, view)),
        ];
        let mut ports: BTreeSet<(u8, u16)> = self.ports.iter().map(|port| (port.protocol, port.port)).collect();
        if ports.is_empty() {
            ports = [&before, after_state].into_iter().flat_map(telling_ports).collect();
        }
        let mut places = pods(&before.inventory);
        let existing = pods(&after_state.inventory);
        places.retain(|place| existing.contains(place));
        let outside = places.len();
        places.extend(self.outside.iter().map(|ip| Place::Address { ip: ip.clone() }));

        let mut changed = 0;
        let mut table = output::table(["FROM", "TO", "PORT", "BEFORE", "AFTER", "EGRESS", "INGRESS"]);
        let mut out = std::io::BufWriter::new(std::io::stdout().lock());
        for (at, from) in places.iter().enumerate() {
            for (to_at, to) in places.iter().enumerate() {
                if at >= outside && to_at >= outside {
                    continue;
                }
                for version in [4, 6] {
                    let base = Question {
                        from: from.clone(),
                        to: to.clone(),
                        protocol: Some(ProtocolName::Number(6)),
                        port: Some(0),
                        source_port: None,
                        icmp: None,
                        ip_version: Some(version),
                    };
                    let packets = sides.each_ref().map(|(owners, _)| owners.packet(&base).ok());
                    let [Some(first), Some(second)] = packets else { continue };
                    for (protocol, port) in &ports {
                        let with =
                            |packet: &Query| Query { protocol: *protocol, destination_port: *port, ..packet.clone() };
                        let (was, is) = (sides[0].1.evaluate(&with(&first)), sides[1].1.evaluate(&with(&second)));
                        if was.verdict == is.verdict {
                            continue;
                        }
                        changed += 1;
                        let name = protocol_name(*protocol);
                        let line = ChangeLine {
                            from,
                            to,
                            protocol: &name,
                            port: *port,
                            before: answer::verdict(was.verdict),
                            after: answer::verdict(is.verdict),
                            egress: answer::reason(is.egress.as_ref()),
                            ingress: answer::reason(is.ingress.as_ref()),
                        };
                        if self.output != Format::Table {
                            super::write_line(&mut out, self.output, &line)?;
                            continue;
                        }
                        let opened = if is.verdict == Verdict::Allow { "allow (opened)" } else { "deny (closed)" };
                        let place = [from.to_string(), to.to_string(), format!("{port}/{name}")];
                        let verdicts = [line.before.to_owned(), opened.to_owned(), line.egress, line.ingress];
                        table.add_row(place.into_iter().chain(verdicts));
                    }
                }
            }
        }
        if self.output == Format::Table {
            match changed {
                0 => writeln!(out, "no pair changes verdict")?,
                _ => writeln!(out, "{table}")?,
            }
        }
        out.flush()?;
        let refused = before.refused + after.as_ref().map_or(0, |after| after.refused);
        Ok(if refused > 0 || self.exit_code && changed > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS })
    }
}

fn pods(inventory: &Inventory) -> Vec<Place> {
    let of_cluster = |(cluster, it): (&hanse_policy::model::ClusterName, &hanse_policy::inventory::Cluster)| {
        let pods = it.endpoints.iter().filter(|(id, pod)| id.kind == EndpointKind::Pod && !pod.addresses.is_empty());
        let places = pods.map(|(id, _)| Place::Pod {
            cluster: Some(cluster.to_string()),
            namespace: id.namespace.as_deref().unwrap_or_default().to_owned(),
            pod: id.name.to_string(),
        });
        places.collect::<Vec<_>>()
    };
    inventory.clusters.iter().flat_map(of_cluster).collect()
}

/// The ports at which a verdict can change: ends of ranges, what lies beside them, and the named ports of pods; for each
/// protocol that is spoken of.
fn telling_ports(loaded: &Loaded) -> BTreeSet<(u8, u16)> {
    let PolicySet { federation, clusters } = &loaded.policies;
    let policies = [federation].into_iter().chain(clusters.values()).flat_map(|layer| layer.policies.values());
    let mut ports = BTreeSet::from([1]);
    let mut protocols = BTreeSet::from([6]);
    for rule in policies.flat_map(|policy| [&policy.ingress, &policy.egress]).flatten().flatten() {
        let spoken = [rule.protocol, rule.not_protocol].into_iter().flatten().map(Protocol::number);
        protocols.extend(spoken.filter(|number| matches!(number, 6 | 17 | 33 | 132 | 136)));
        for port in rule.destination.ports.iter().chain(&rule.destination.not_ports) {
            if let Port::Range(first, last) = port {
                ports.extend([first.saturating_sub(1), *first, *last, last.saturating_add(1)]);
            }
        }
    }
    let endpoints = loaded.inventory.clusters.values().flat_map(|cluster| cluster.endpoints.values());
    ports.extend(endpoints.flat_map(|endpoint| endpoint.ports.iter().map(|port| port.port)));
    protocols.into_iter().flat_map(|protocol| ports.iter().map(move |port| (protocol, *port))).collect()
}

fn protocol_name(number: u8) -> String {
    match number {
        6 => "TCP".to_owned(),
        17 => "UDP".to_owned(),
        132 => "SCTP".to_owned(),
        136 => "UDPLite".to_owned(),
        number => number.to_string(),
    }
}
