//! `hanse policy matrix`: which pods may talk to which.

use std::collections::HashMap;
use std::io::Write as _;
use std::net::IpAddr;
use std::path::Path;
use std::process::ExitCode;

use hanse_policy::diff::{Diff, Party, State};
use hanse_policy::evaluate::{End, Query, View, has_ports};
use hanse_policy::inventory::{Cluster, EffectiveLabels, EndpointId, EndpointKind, Inventory, Labels};
use hanse_policy::model::ClusterName;
use hanse_policy::prepared::Prepared;
use hanse_policy::selector::Selector;
use hanse_policy::tri::Tri;
use hanse_policy::workload::common_name;
use serde::Serialize;

use super::live;
use super::load::{Loaded, Sources};
use crate::output::{self, Format};
use hanse_policy::explain::answer;
use hanse_policy::explain::{Place, ProtocolName};
use hanse_proto::federation::v1 as pb;

/// With more destinations than this, what each source reaches is listed, since nobody reads wider tables.
const WIDEST: usize = 40;

/// Judge every pair of pods, on each port.
///
/// From directories of manifests, or, without --cluster, by what the members know now. Pods on the host's network and pods
/// that ended are left out. A table shows pods that policy does not tell apart as one; JSON and YAML have every pair. The
/// verdict is what policy says, without what the kernel lets pass besides: what a node sends to its own pods.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  hanse policy matrix --port 8000 --cluster train=manifests/train --federation policies/
  hanse policy matrix --port 443,53/UDP --from \"app == 'web'\" --cluster train=manifests/train
  hanse policy matrix --port 8000 --context ./hub/admin.context -o json")]
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
    #[arg(long, value_name = "4|6", value_parser = ip_version)]
    ip_version: Option<u8>,
    /// As if every staged policy were committed.
    #[arg(long)]
    staged: bool,
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

fn ip_version(text: &str) -> Result<u8, &'static str> {
    match text {
        "4" => Ok(4),
        "6" => Ok(6),
        _ => Err("it is 4 or 6"),
    }
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
        let port = port.parse::<u16>().ok().filter(|port| *port > 0);
        let port = port.ok_or_else(|| format!("{text:?} names no port from 1 to 65535"))?;
        let number = ProtocolName::Name(protocol.to_owned()).number().map_err(|error| error.to_string())?;
        if !has_ports(number) {
            return Err(format!("protocol {protocol} has no ports"));
        }
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

/// A pod that is asked about, or several that policy does not tell apart.
struct Pod {
    place: Place,
    /// Offline: who it is, and another one of several.
    owner: Option<(ClusterName, EndpointId)>,
    other: Option<Box<Pod>>,
    title: String,
    addresses: Vec<IpAddr>,
}

/// The verdicts of one source towards every destination; `None` where the two share no address family.
type Row = Vec<Option<&'static str>>;

impl Arguments {
    pub fn run(self, context: Option<&Path>) -> anyhow::Result<ExitCode> {
        if self.sources.is_live()? {
            let mut session = live::Session::open(context)?;
            let pods = session.pods()?;
            let (sources, destinations) = (told(&pods, &self.from), told(&pods, &self.to));
            let mut unanswered = 0;
            self.print(&sources, &destinations, |from, port| {
                let (row, missing) = self.ask(&mut session, from, &destinations, port)?;
                unanswered += missing;
                Ok(row)
            })?;
            return Ok(if unanswered == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        let loaded = self.sources.load()?;
        let Loaded { policies, inventory, refused, .. } = &loaded;
        let view = if self.staged { View::Pending } else { View::Enforced };
        let prepared = Prepared::new(policies, inventory, view);
        let ends = [&self.from, &self.to].map(|selector| read(inventory, selector));
        let [sources, destinations] = match self.output {
            Format::Table => {
                let state = State { policies, inventory, view };
                let groups = Diff::new(state, state, &[], Vec::new()).parties;
                ends.map(|pods| grouped(pods, &groups))
            }
            Format::Json | Format::Yaml => ends,
        };
        self.print(&sources, &destinations, |from, port| {
            let judge = |to| self.query(from, to, port).map(|query| answer::verdict(prepared.evaluate(&query).verdict));
            Ok(destinations.iter().map(judge).collect())
        })?;
        Ok(if *refused == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }

    fn print(
        &self,
        sources: &[Pod],
        destinations: &[Pod],
        mut row: impl FnMut(&Pod, &PortName) -> anyhow::Result<Row>,
    ) -> anyhow::Result<()> {
        let mut out = std::io::BufWriter::new(output::stdout());
        if self.output == Format::Table {
            if sources.is_empty() || destinations.is_empty() {
                writeln!(out, "no pod is selected")?;
            }
            for port in self.ports.iter().filter(|_| !sources.is_empty() && !destinations.is_empty()) {
                let rows = sources.iter().map(|from| row(from, port)).collect::<anyhow::Result<Vec<Row>>>()?;
                write!(out, "{}/{}", port.port, port.protocol_name)?;
                match destinations.len() <= WIDEST {
                    true => grid(&mut out, sources, destinations, &rows)?,
                    false => reachable(&mut out, sources, destinations, &rows)?,
                }
            }
            return Ok(out.flush()?);
        }
        for from in sources {
            let rows = self.ports.iter().map(|port| row(from, port)).collect::<anyhow::Result<Vec<Row>>>()?;
            for (at, to) in destinations.iter().enumerate() {
                for (port, row) in self.ports.iter().zip(&rows) {
                    let Some(verdict) = row[at] else { continue };
                    let (protocol, port) = (&*port.protocol_name, port.port);
                    let line = PairLine { from: &from.place, to: &to.place, protocol, port, verdict };
                    output::write(&mut out, self.output, &line)?;
                }
            }
        }
        Ok(out.flush()?)
    }

    /// The addresses between which packets go; `None` where the two share no address family.
    fn addresses(&self, from: &Pod, to: &Pod) -> Option<(IpAddr, IpAddr)> {
        let wanted = |v4: bool| self.ip_version.is_none_or(|version| (version == 4) == v4);
        let destination = to.addresses.iter().find(|address| {
            wanted(address.is_ipv4()) && from.addresses.iter().any(|from| from.is_ipv4() == address.is_ipv4())
        })?;
        let source = from.addresses.iter().find(|address| address.is_ipv4() == destination.is_ipv4())?;
        Some((*source, *destination))
    }

    fn query(&self, from: &Pod, to: &Pod, port: &PortName) -> Option<Query> {
        // A pod always reaches itself; of several alike, what counts is one and another.
        let to = match &to.other {
            Some(other) if from.place == to.place => other,
            _ => to,
        };
        let (source, destination) = self.addresses(from, to)?;
        let end = |pod: &Pod, address| End { address, pod: pod.owner.clone() };
        Some(Query {
            source: end(from, source),
            destination: end(to, destination),
            protocol: port.protocol,
            source_port: 40_000,
            destination_port: port.port,
            icmp: None,
        })
    }

    /// A row by the members' word, and how many pairs had no answer; those are named on standard error.
    fn ask(
        &self,
        session: &mut live::Session,
        from: &Pod,
        to: &[Pod],
        port: &PortName,
    ) -> anyhow::Result<(Row, usize)> {
        let query = |to: &Pod| {
            let version = if self.addresses(from, to)?.1.is_ipv4() { 4 } else { 6 };
            let (from, to, protocol, port) = (&from.place, &to.place, port.protocol, port.port);
            let query = LiveQuery { from, to, protocol, port, ip_version: version };
            Some(serde_json::to_string(&query).expect("names and numbers are JSON"))
        };
        let queries: Vec<Option<String>> = to.iter().map(query).collect();
        let asked: Vec<String> = queries.iter().flatten().cloned().collect();
        let (mut verdicts, mut unanswered) = (Vec::new(), 0);
        session.explain(&asked, |at, line| {
            verdicts.push(match line {
                Ok(line) => {
                    let verdict = if self.staged { line.staged.verdict } else { line.verdict };
                    Some(if verdict == "allow" { "allow" } else { "deny" })
                }
                Err(error) => {
                    unanswered += 1;
                    output::note(format_args!("hanse: {}: {error}", asked[at]));
                    None
                }
            });
            Ok(())
        })?;
        let mut verdicts = verdicts.into_iter();
        Ok((queries.iter().map(|query| query.as_ref().and_then(|_| verdicts.next().flatten())).collect(), unanswered))
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct LiveQuery<'a> {
    from: &'a Place,
    to: &'a Place,
    protocol: u8,
    port: u16,
    ip_version: u8,
}

fn read(inventory: &Inventory, selector: &Selector) -> Vec<Pod> {
    let of_cluster = |(cluster, it): (&ClusterName, &Cluster)| {
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
                let namespace = id.namespace.as_deref().unwrap_or_default();
                let owner = Some((cluster.clone(), id.clone()));
                Pod::new(place(cluster, namespace, &id.name), owner, endpoint.addresses.clone())
            })
            .collect::<Vec<_>>()
    };
    inventory.clusters.iter().flat_map(of_cluster).collect()
}

/// Those of a federation that runs, by what their members tell.
fn told(pods: &[pb::PodInfo], selector: &Selector) -> Vec<Pod> {
    let selected = |pod: &&pb::PodInfo| {
        let labels: Labels =
            pod.labels.iter().map(|(key, value)| (key.as_str().into(), value.as_str().into())).collect();
        !pod.addresses.is_empty() && !pod.host_network && selector.evaluate(&labels) == Tri::Yes
    };
    let address = |bytes: &[u8]| match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
        _ => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
    };
    let pod = |pod: &pb::PodInfo| {
        let addresses = pod.addresses.iter().filter_map(|it| address(it)).collect();
        Pod::new(place(&pod.cluster, &pod.namespace, &pod.name), None, addresses)
    };
    pods.iter().filter(selected).map(pod).collect()
}

impl Pod {
    fn new(place: Place, owner: Option<(ClusterName, EndpointId)>, addresses: Vec<IpAddr>) -> Self {
        let title = place.to_string();
        Self { place, owner, other: None, title, addresses }
    }
}

/// One for all that policy does not tell apart.
fn grouped(pods: Vec<Pod>, groups: &[Party<'_>]) -> Vec<Pod> {
    let mut group_of = HashMap::new();
    for (at, party) in groups.iter().enumerate() {
        if let Party::Pods { cluster, members } = party {
            group_of.extend(members.iter().map(|id| ((&***cluster, *id), at)));
        }
    }
    let mut found: Vec<(Option<usize>, Vec<Pod>)> = Vec::new();
    let mut places = HashMap::new();
    for pod in pods {
        let group = pod.owner.as_ref().and_then(|(cluster, id)| group_of.get(&(&**cluster, id)).copied());
        let at = group.map_or(found.len(), |group| *places.entry(group).or_insert(found.len()));
        match found.get_mut(at) {
            Some((_, members)) => members.push(pod),
            None => found.push((group, vec![pod])),
        }
    }
    let one = |(_, mut members): (Option<usize>, Vec<Pod>)| {
        let many = members.len();
        let title = (many > 1).then(|| {
            let names = members.iter().filter_map(|pod| Some(&*pod.owner.as_ref()?.1.name));
            let (cluster, id) = members[0].owner.as_ref()?;
            let namespace = id.namespace.as_deref().unwrap_or_default();
            Some(format!("{cluster}/{namespace}/{} ({many} pods)", common_name(names)))
        });
        let other = (many > 1).then(|| Box::new(members.swap_remove(1)));
        let first = members.swap_remove(0);
        Pod { title: title.flatten().unwrap_or_else(|| first.title.clone()), other, ..first }
    };
    found.into_iter().map(one).collect()
}

/// A cell for each pair, the destinations by number.
fn grid(out: &mut impl std::io::Write, sources: &[Pod], destinations: &[Pod], rows: &[Row]) -> anyhow::Result<()> {
    let blank = rows.iter().flatten().any(Option::is_none);
    writeln!(out, "   + allow   . deny{}\n", if blank { "   blank: no shared address family" } else { "" })?;
    let numbers = (1..=destinations.len()).map(|number| number.to_string());
    let mut table = output::table(["#".to_owned(), "FROM \\ TO".to_owned()].into_iter().chain(numbers));
    for (from, row) in sources.iter().zip(rows) {
        let at = destinations.iter().position(|to| to.place == from.place);
        let mut cells = vec![at.map_or(String::new(), |at| (at + 1).to_string()), from.title.clone()];
        cells.extend(row.iter().map(|verdict| match verdict {
            Some("allow") => "+".to_owned(),
            Some(_) => ".".to_owned(),
            None => String::new(),
        }));
        table.add_row(cells);
    }
    writeln!(out, "{table}\n")?;
    for (at, to) in destinations.iter().enumerate().filter(|(_, to)| sources.iter().all(|from| from.place != to.place))
    {
        writeln!(out, "{} {}", at + 1, output::one_line(&to.title))?;
    }
    Ok(())
}

/// Too many for a grid: for each source what it reaches, or what it does not, whichever is shorter.
fn reachable(out: &mut impl std::io::Write, sources: &[Pod], destinations: &[Pod], rows: &[Row]) -> anyhow::Result<()> {
    writeln!(out, "\n")?;
    let mut table = output::table(["FROM", "REACHES", ""]);
    for (from, row) in sources.iter().zip(rows) {
        let with = |wanted: &str| -> Vec<&str> {
            let those = row.iter().zip(destinations).filter(|(verdict, _)| **verdict == Some(wanted));
            those.map(|(_, to)| to.title.as_str()).collect()
        };
        let (allowed, denied) = (with("allow"), with("deny"));
        let (what, listed) = match (allowed.len(), denied.len()) {
            (_, 0) => ("all".to_owned(), Vec::new()),
            (0, _) => ("nothing".to_owned(), Vec::new()),
            (a, d) if a <= d => (format!("{a} of {}", a + d), allowed),
            (a, d) => (format!("{a} of {}, not", a + d), denied),
        };
        table.add_row([from.title.as_str().into(), what.into(), output::Cell::lines(listed)]);
    }
    writeln!(out, "{table}\n")?;
    Ok(())
}

fn place(cluster: &str, namespace: &str, pod: &str) -> Place {
    Place::Pod { cluster: Some(cluster.to_owned()), namespace: namespace.to_owned(), pod: pod.to_owned() }
}
