//! `hanse policy matrix`: which pods may talk to which.

use std::io::Write as _;
use std::process::ExitCode;

use hanse_policy::evaluate::{End, Query, Verdict, View};
use hanse_policy::inventory::{Cluster, EffectiveLabels, Endpoint, EndpointId, EndpointKind, Inventory};
use hanse_policy::model::ClusterName;
use hanse_policy::prepared::Prepared;
use hanse_policy::selector::Selector;
use hanse_policy::tri::Tri;
use serde::Serialize;

use super::load::{Loaded, Sources};
use super::question::{Place, ProtocolName};
use super::trace;
use crate::output::{self, Format};

/// More pods than this are listed pair by pair, since nobody reads wider tables.
const WIDEST: usize = 40;

/// Judges every pair of pods in each direction, on each port. Pods on the host's network and pods that ended are left
/// out.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    sources: Sources,
    /// A port as NUMBER or NUMBER/PROTOCOL; may be given several times.
    #[arg(long = "port", value_name = "PORT", required = true, value_delimiter = ',')]
    ports: Vec<PortName>,
    /// Only pods that this selector selects as sources (over effective labels).
    #[arg(long, value_name = "SELECTOR", default_value = "all()")]
    from: Selector,
    /// Only pods that this selector selects as destinations.
    #[arg(long, value_name = "SELECTOR", default_value = "all()")]
    to: Selector,
    /// The address family of the packets.
    #[arg(long, value_name = "4|6", value_parser = clap::value_parser!(u8).range(4..=6))]
    ip_version: Option<u8>,
    /// As if every staged policy were committed.
    #[arg(long)]
    staged: bool,
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

#[derive(Debug, Clone)]
pub struct PortName {
    pub port: u16,
    pub protocol: u8,
    protocol_name: String,
}

impl std::str::FromStr for PortName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (port, protocol) = text.split_once('/').unwrap_or((text, "TCP"));
        let port = port.parse().map_err(|_| format!("{port:?} is no port"))?;
        let number = ProtocolName::Name(protocol.to_owned()).number().map_err(|error| error.to_string())?;
        Ok(Self { port, protocol: number, protocol_name: protocol.to_ascii_uppercase() })
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct PairLine<'a> {
    from: &'a Place,
    to: &'a Place,
    protocol: &'a str,
    port: u16,
    verdict: &'static str,
}

struct Pod<'a> {
    place: Place,
    cluster: &'a ClusterName,
    id: &'a EndpointId,
    endpoint: &'a Endpoint,
}

impl Arguments {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let loaded = self.sources.load()?;
        let Loaded { policies, inventory, refused, .. } = &loaded;
        let view = if self.staged { View::Pending } else { View::Enforced };
        let prepared = Prepared::new(policies, inventory, view);
        let (sources, destinations) = (pods(inventory, &self.from), pods(inventory, &self.to));
        let judge = |from: &Pod<'_>, to: &Pod<'_>, port: &PortName| {
            self.query(from, to, port).map(|query| prepared.evaluate(&query).verdict)
        };
        let mut out = std::io::BufWriter::new(std::io::stdout().lock());
        if self.output == Format::Table && destinations.len() <= WIDEST {
            for port in &self.ports {
                writeln!(
                    out,
                    "{}/{}  (+ allow, - deny, blank: no shared address family)",
                    port.port, port.protocol_name
                )?;
                let mut table = output::table(["", "FROM \\ TO"]);
                let numbers = (1..=destinations.len()).map(|number| number.to_string());
                table.set_header(["".to_owned(), "FROM \\ TO".to_owned()].into_iter().chain(numbers));
                for from in &sources {
                    let at = destinations.iter().position(|to| to.place == from.place);
                    let mut row = vec![at.map_or(String::new(), |at| (at + 1).to_string()), from.place.to_string()];
                    row.extend(destinations.iter().map(|to| match judge(from, to, port) {
                        Some(Verdict::Allow) => "+".to_owned(),
                        Some(Verdict::Deny) => "-".to_owned(),
                        None => String::new(),
                    }));
                    table.add_row(row);
                }
                writeln!(out, "{table}\n")?;
                let unlisted =
                    destinations.iter().enumerate().filter(|(_, to)| sources.iter().all(|from| from.place != to.place));
                for (at, to) in unlisted {
                    writeln!(out, "{} {}", at + 1, to.place)?;
                }
            }
        } else {
            for from in &sources {
                for to in &destinations {
                    for port in &self.ports {
                        let Some(verdict) = judge(from, to, port) else { continue };
                        let verdict = trace::verdict(verdict);
                        if self.output == Format::Table {
                            writeln!(
                                out,
                                "{verdict:5}  {}  {}  {}/{}",
                                from.place, to.place, port.port, port.protocol_name
                            )?;
                            continue;
                        }
                        let (protocol, port) = (&*port.protocol_name, port.port);
                        let line = PairLine { from: &from.place, to: &to.place, protocol, port, verdict };
                        super::write_line(&mut out, self.output, &line)?;
                    }
                }
            }
        }
        out.flush()?;
        Ok(if *refused == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }

    /// `None` where the two share no address family.
    fn query(&self, from: &Pod<'_>, to: &Pod<'_>, port: &PortName) -> Option<Query> {
        let wanted = |v4: bool| self.ip_version.is_none_or(|version| (version == 4) == v4);
        let destination = to.endpoint.addresses.iter().find(|address| {
            wanted(address.is_ipv4()) && from.endpoint.addresses.iter().any(|from| from.is_ipv4() == address.is_ipv4())
        })?;
        let source = from.endpoint.addresses.iter().find(|address| address.is_ipv4() == destination.is_ipv4())?;
        let end = |pod: &Pod<'_>, address| End { address, pod: Some((pod.cluster.clone(), pod.id.clone())) };
        Some(Query {
            source: end(from, *source),
            destination: end(to, *destination),
            protocol: port.protocol,
            source_port: 40_000,
            destination_port: port.port,
            icmp: None,
        })
    }
}

fn pods<'a>(inventory: &'a Inventory, selector: &Selector) -> Vec<Pod<'a>> {
    let of_cluster = |(cluster, it): (&'a ClusterName, &'a Cluster)| {
        it.endpoints
            .iter()
            .filter(|(id, endpoint)| {
                id.kind == EndpointKind::Pod && !endpoint.addresses.is_empty() && !endpoint.host_network
            })
            .filter(|(id, endpoint)| {
                let labels = EffectiveLabels { cluster: it, id, endpoint, first_hand: true };
                selector.evaluate(&labels) == Tri::Yes
            })
            .map(|(id, endpoint)| {
                let place = Place::Pod {
                    cluster: Some(cluster.to_string()),
                    namespace: id.namespace.as_deref().unwrap_or_default().to_owned(),
                    pod: id.name.to_string(),
                };
                Pod { place, cluster, id, endpoint }
            })
            .collect::<Vec<_>>()
    };
    inventory.clusters.iter().flat_map(of_cluster).collect()
}
