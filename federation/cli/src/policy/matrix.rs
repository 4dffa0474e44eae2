//! `hanse policy matrix`: the verdict for each pair of pods.

use std::cell::Cell as Shared;
use std::collections::{BTreeSet, HashMap};
use std::io::Write as _;
use std::net::IpAddr;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{bail, ensure};
use hanse_policy::diff::{Diff, Party, State};
use hanse_policy::evaluate::{Answer, Query, Verdict, View, has_ports};
use hanse_policy::explain::answer;
use hanse_policy::inventory::{Cluster, EffectiveLabels, EndpointId, EndpointKind, Labels, Stopped};
use hanse_policy::model::ClusterName;
use hanse_policy::placement::{Placement, Spot, dependence};
use hanse_policy::prepared::Prepared;
use hanse_policy::selector::Selector;
use hanse_policy::tri::Tri;
use hanse_policy::workload::common_name;
use serde::Serialize;

use super::answer::write_answer;
use super::live;
use super::load::{Loaded, Sources};
use crate::output::{self, Format};
use hanse_policy::explain::answer::AnswerVerdict;
use hanse_policy::explain::{ProtocolName, QueryEnd, protocol_name};
use hanse_proto::federation::v1 as pb;

/// With more columns than this, the table lists what each source reaches instead.
const WIDEST: usize = 40;
/// Lines below a table that explain `depends`; `-o json` has all.
const MAX_NOTES: usize = 10;

/// Evaluate all pairs of pods, on each port.
///
/// With --cluster, the verdicts come from directories of manifests; without it, from the members of the running federation.
/// Host-network pods and completed pods are omitted. The table groups pods that policy does not distinguish; JSON and YAML
/// have every pair. The verdict is that of policy: the kernel also allows traffic from a node to its own pods.
///
/// With --cluster, workloads that do not run are included, as "KIND/NAME". The addresses of their pods are unknown: if rules for
/// nets make a difference, the verdict is `depends`.
///
/// If an object was refused, or a member does not answer, each line of JSON has `incomplete: true`, and the exit code is 1.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
JSON, one object a line: {\"from\", \"to\", \"protocol\", \"port\", \"verdict\": \"allow|deny|depends\", \"dependsOn\": \"…\", \
\"decidedBy\": [\"…\"], \"notRunning\": [\"from\", \"to\"]}; the last three only where they apply. Exits 1 if no pod is \
selected, a pair has no verdict, or an object was refused.

Examples:
  hanse policy matrix --cluster shop=manifests/
  hanse policy matrix --port 8000 --cluster train=manifests/train \\
    --federation policies/
  hanse policy matrix --port 443,53/UDP --from \"app == 'web'\" \\
    --cluster train=manifests/train
  hanse policy matrix --port 8000 --context ./hub/admin.context -o json")]
pub struct Arguments {
    #[command(flatten)]
    sources: Sources,
    /// Port, as NUMBER or NUMBER/PROTOCOL; repeatable. Default with --cluster: the ports that the containers of each
    /// destination declare.
    #[arg(long = "port", value_name = "PORT", value_delimiter = ',')]
    ports: Vec<PortName>,
    /// Only sources that this selector selects (over effective labels).
    #[arg(long, value_name = "SELECTOR", default_value = "all()")]
    from: Selector,
    /// Only destinations that this selector selects.
    #[arg(long, value_name = "SELECTOR", default_value = "all()")]
    to: Selector,
    /// The address family of the packets.
    #[arg(long, value_name = "4|6", value_parser = ip_version)]
    ip_version: Option<u8>,
    /// Evaluate as if every staged policy were committed.
    #[arg(long)]
    staged: bool,
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

fn ip_version(text: &str) -> Result<u8, &'static str> {
    match text {
        "4" => Ok(4),
        "6" => Ok(6),
        _ => Err("expected 4 or 6"),
    }
}

#[derive(Debug, Clone)]
pub struct PortName {
    pub port: u16,
    pub protocol: u8,
    protocol_name: String,
}

impl std::fmt::Display for PortName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.port, self.protocol_name)
    }
}

impl std::str::FromStr for PortName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (port, protocol) = text.split_once('/').unwrap_or((text, "TCP"));
        let port = port.parse::<u16>().ok().filter(|port| *port > 0);
        let port = port.ok_or_else(|| format!("{text:?} is not a port from 1 to 65535"))?;
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
    from: &'a QueryEnd,
    to: &'a QueryEnd,
    protocol: &'a str,
    port: u16,
    verdict: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    depends_on: Option<&'a str>,
    /// What decides in the cases that differ.
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    decided_by: &'a [String],
    /// The ends that do not run.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    not_running: Vec<&'static str>,
}

/// One pod, or several that policy does not distinguish.
struct Pod {
    place: QueryEnd,
    /// With --cluster: its identity, and another one of several.
    owner: Option<(ClusterName, EndpointId)>,
    other: Option<Box<Pod>>,
    title: String,
    addresses: Vec<IpAddr>,
    /// For workloads that do not run: whether they have an (unknown) IPv4 and IPv6 address.
    planned: [bool; 2],
    /// The ports that its containers declare.
    ports: BTreeSet<(u8, u16)>,
}

/// A destination, with a port.
struct Column<'p> {
    to: &'p Pod,
    port: PortName,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Cell {
    Allow,
    Deny,
    /// The condition, and the rules that decide.
    Depends {
        on: String,
        decided_by: Vec<String>,
    },
}

impl Cell {
    fn name(&self) -> &'static str {
        match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
            Self::Depends { .. } => "depends",
        }
    }
}

/// The verdicts of one source in every column; `None` if the two have no common address family.
type Row = Vec<Option<Cell>>;

impl Arguments {
    pub fn run(self, context: Option<&Path>) -> anyhow::Result<ExitCode> {
        if self.sources.is_live()? {
            ensure!(
                !self.ports.is_empty(),
                "--port is required without --cluster: members do not report the ports of containers"
            );
            let mut session = live::Session::open(context)?;
            let (pods, are_missing) = session.pods()?;
            ensure!(!pods.is_empty(), "no member reports a pod");
            let ends = [reported(&pods, &self.from), reported(&pods, &self.to)];
            let [sources, destinations] = self.selected(ends)?;
            let incomplete = Shared::new(are_missing);
            let printed = self.print(&sources, &destinations, &incomplete, |from, columns| {
                let (row, missing) = self.query(&mut session, from, columns)?;
                incomplete.set(incomplete.get() || missing > 0);
                Ok(row)
            });
            let line = || match incomplete.get() && self.output == Format::Table {
                true => output::line(
                    "incomplete: this answer does not include the clusters and pairs that are reported above",
                ),
                false => Ok(()),
            };
            return output::exit(printed.and_then(|()| line()), incomplete.get());
        }
        let loaded = self.sources.load()?;
        let Loaded { policies, inventory, .. } = &loaded;
        let view = if self.staged { View::Pending } else { View::Enforced };
        let prepared = Prepared::new(policies, inventory, view);
        let placement = Placement::new(policies, inventory, &self.sources.pod_nets);
        let ends = [&self.from, &self.to].map(|selector| read(&loaded, selector));
        let ends = self.selected(ends)?;
        let [sources, destinations] = match self.output {
            Format::Table => {
                let state = State { policies, inventory, view };
                let groups = Diff::new(state, state, &[], Vec::new()).parties;
                ends.map(|pods| grouped(pods, &groups))
            }
            Format::Json | Format::Yaml => ends,
        };
        let incomplete = Shared::new(loaded.is_incomplete());
        let printed = self.print(&sources, &destinations, &incomplete, |from, columns| {
            Ok(columns.iter().map(|column| self.judge(&prepared, &placement, from, column)).collect())
        });
        let incomplete = loaded.incomplete_line().filter(|_| self.output == Format::Table);
        output::exit(printed.and_then(|()| incomplete.map_or(Ok(()), output::line)), loaded.is_incomplete())
    }

    /// The sources and the destinations.
    ///
    /// # Errors
    /// When there are none: an empty matrix would look like one that allows nothing.
    fn selected(&self, ends: [Vec<Pod>; 2]) -> anyhow::Result<[Vec<Pod>; 2]> {
        for (pods, (option, selector)) in ends.iter().zip([("--from", &self.from), ("--to", &self.to)]) {
            ensure!(!pods.is_empty(), "{option} selects no pod with an address of its own: {}", selector.shown());
        }
        Ok(ends)
    }

    /// Groups of columns that are shown together, each with its title.
    fn pages<'p>(&self, destinations: &'p [Pod]) -> anyhow::Result<Vec<(String, Vec<Column<'p>>)>> {
        if !self.ports.is_empty() {
            let page = |port: &PortName| {
                let columns = destinations.iter().map(|to| Column { to, port: port.clone() }).collect();
                (port.to_string(), columns)
            };
            return Ok(self.ports.iter().map(page).collect());
        }
        let silent = destinations.iter().filter(|to| to.ports.is_empty()).count();
        if silent == destinations.len() {
            bail!("no destination declares a container port: use --port");
        }
        if silent > 0 {
            let what = output::count(silent, "destination");
            output::note(format_args!(
                "note: {what} without a declared container port omitted; use --port to include them"
            ));
        }
        let columns = destinations.iter().flat_map(|to| {
            let port = |(protocol, port): &(u8, u16)| {
                let protocol_name = protocol_name(*protocol);
                Column { to, port: PortName { port: *port, protocol: *protocol, protocol_name } }
            };
            to.ports.iter().map(port)
        });
        Ok(vec![("declared ports".to_owned(), columns.collect())])
    }

    /// `incomplete`: whether the answer is known to be incomplete; a row may set it.
    fn print(
        &self,
        sources: &[Pod],
        destinations: &[Pod],
        incomplete: &Shared<bool>,
        mut row: impl FnMut(&Pod, &[Column<'_>]) -> anyhow::Result<Row>,
    ) -> anyhow::Result<()> {
        let mut out = std::io::BufWriter::new(output::stdout());
        let pages = self.pages(destinations)?;
        let mut is_answered = false;
        if self.output == Format::Table {
            for (title, columns) in &pages {
                let rows = sources.iter().map(|from| row(from, columns)).collect::<anyhow::Result<Vec<Row>>>()?;
                is_answered |= rows.iter().flatten().any(Option::is_some);
                write!(out, "{title}")?;
                let ports = self.ports.is_empty();
                match columns.len() <= WIDEST {
                    true => grid(&mut out, sources, columns, &rows, ports)?,
                    false => reachable(&mut out, sources, columns, &rows, ports)?,
                }
                notes(&mut out, sources, columns, &rows)?;
            }
            out.flush()?;
            return answered(is_answered);
        }
        let rows = sources.iter().map(|from| pages.iter().map(|(_, columns)| row(from, columns)).collect());
        // Live, each line says whether any is missing, which is known when all are there.
        let rows: Box<dyn Iterator<Item = anyhow::Result<Vec<Row>>>> = match self.sources.is_live()? {
            true => Box::new(rows.collect::<Vec<_>>().into_iter()),
            false => Box::new(rows),
        };
        for (from, rows) in sources.iter().zip(rows) {
            let rows = rows?;
            // All ports of a destination together.
            let mut cells: Vec<(&Column<'_>, &Option<Cell>)> =
                pages.iter().zip(&rows).flat_map(|((_, columns), row)| columns.iter().zip(row)).collect();
            let place = |column: &Column<'_>| destinations.iter().position(|to| std::ptr::eq(to, column.to));
            cells.sort_by_cached_key(|(column, _)| place(column));
            for (Column { to, port }, cell) in cells {
                let Some(cell) = cell else { continue };
                is_answered = true;
                let ends = [("from", from.is_planned()), ("to", to.is_planned())];
                let (depends_on, decided_by) = match cell {
                    Cell::Depends { on, decided_by } => (Some(&**on), &decided_by[..]),
                    Cell::Allow | Cell::Deny => (None, &[][..]),
                };
                let line = PairLine {
                    from: &from.place,
                    to: &to.place,
                    protocol: &port.protocol_name,
                    port: port.port,
                    verdict: cell.name(),
                    depends_on,
                    decided_by,
                    not_running: ends.iter().filter(|(_, planned)| *planned).map(|(end, _)| *end).collect(),
                };
                write_answer(&mut out, self.output, incomplete.get(), &line)?;
            }
        }
        out.flush()?;
        answered(is_answered)
    }

    /// The family of the packets, IPv4 or not; `None` if the two have none in common.
    fn is_v4(&self, from: &Pod, to: &Pod) -> Option<bool> {
        let wanted = |v4: bool| self.ip_version.is_none_or(|version| (version == 4) == v4);
        let has = |pod: &Pod, v4: bool| {
            pod.planned[usize::from(!v4)] || pod.addresses.iter().any(|address| address.is_ipv4() == v4)
        };
        // The destination's primary family, if it has one.
        let of_addresses = to.addresses.iter().map(IpAddr::is_ipv4);
        let of_planned = [true, false].into_iter().filter(|_| to.is_planned());
        of_addresses.chain(of_planned).find(|v4| wanted(*v4) && has(from, *v4) && has(to, *v4))
    }

    fn judge(
        &self,
        prepared: &Prepared<'_>,
        placement: &Placement<'_>,
        from: &Pod,
        Column { to, port }: &Column<'_>,
    ) -> Option<Cell> {
        // A pod always reaches itself; of several alike, what counts is one and another.
        let to: &Pod = match &to.other {
            Some(other) if from.place == to.place => other,
            _ => to,
        };
        let v4 = self.is_v4(from, to)?;
        let spot = |pod: &Pod| Spot {
            address: pod.addresses.iter().find(|it| it.is_ipv4() == v4).copied(),
            pod: pod.owner.clone(),
        };
        let Some(cases) = placement.cases(&spot(from), &spot(to), v4).filter(|cases| !cases.is_empty()) else {
            let on = "the address: the rules have too many nets to try".to_owned();
            return Some(Cell::Depends { on, decided_by: Vec::new() });
        };
        let query = |source, destination| Query {
            source,
            destination,
            protocol: port.protocol,
            source_port: 40_000,
            destination_port: port.port,
            icmp: None,
        };
        let answers: Vec<Answer> =
            cases.iter().map(|case| prepared.evaluate(&query(case.source.clone(), case.destination.clone()))).collect();
        let verdicts: Vec<Verdict> = answers.iter().map(|answer| answer.verdict).collect();
        Some(match (dependence(&cases, &verdicts), verdicts[0]) {
            (Some(on), _) => Cell::Depends { on, decided_by: answer::reasons(&answers) },
            (None, Verdict::Allow) => Cell::Allow,
            (None, Verdict::Deny) => Cell::Deny,
        })
    }

    /// A row as the members answer it, and the number of pairs without an answer, which are reported on standard error.
    fn query(&self, session: &mut live::Session, from: &Pod, columns: &[Column<'_>]) -> anyhow::Result<(Row, usize)> {
        let query = |Column { to, port }: &Column<'_>| {
            let version = if self.is_v4(from, to)? { 4 } else { 6 };
            let (from, to, protocol, port) = (&from.place, &to.place, port.protocol, port.port);
            let query = LiveQuery { from, to, protocol, port, ip_version: version };
            Some(serde_json::to_string(&query).expect("names and numbers are JSON"))
        };
        let queries: Vec<Option<String>> = columns.iter().map(query).collect();
        let sent: Vec<String> = queries.iter().flatten().cloned().collect();
        let (mut verdicts, mut unanswered) = (Vec::new(), 0);
        session.explain(&sent, |at, line| {
            verdicts.push(match line {
                Ok(line) => {
                    let verdict = if self.staged { line.staged.verdict } else { line.verdict };
                    Some(if verdict == AnswerVerdict::Allow { Cell::Allow } else { Cell::Deny })
                }
                Err(error) => {
                    unanswered += 1;
                    output::note(format_args!("{}: {error}", sent[at]));
                    None
                }
            });
            Ok(())
        })?;
        let mut verdicts = verdicts.into_iter();
        Ok((queries.iter().map(|query| query.as_ref().and_then(|_| verdicts.next().flatten())).collect(), unanswered))
    }
}

/// # Errors
/// When no pair was answered.
fn answered(is_answered: bool) -> anyhow::Result<()> {
    ensure!(
        is_answered,
        "no pair of pods has a verdict: no two pods have a common IP version, or their members did not answer"
    );
    Ok(())
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct LiveQuery<'a> {
    from: &'a QueryEnd,
    to: &'a QueryEnd,
    protocol: u8,
    port: u16,
    ip_version: u8,
}

fn read(loaded: &Loaded, selector: &Selector) -> Vec<Pod> {
    let of_cluster = |(cluster, it): (&ClusterName, &Cluster)| {
        it.endpoints
            .iter()
            .filter(|(id, endpoint)| id.kind == EndpointKind::Pod && endpoint.is_reachable())
            .filter(|(id, endpoint)| {
                let labels = EffectiveLabels { cluster: it, id, endpoint, first_hand: true };
                selector.evaluate(&labels) == Tri::Yes
            })
            .map(|(id, endpoint)| {
                let namespace = id.namespace.as_deref().unwrap_or_default();
                let owner = (cluster.clone(), id.clone());
                let ports = loaded.declared.get(&owner).cloned().unwrap_or_default();
                let mut pod = Pod::new(place(cluster, namespace, &id.name), Some(owner), endpoint.addresses.clone());
                pod.ports = ports;
                if let Some(planned) = &endpoint.planned {
                    pod.planned = [true, false].map(|v4| planned.has_family(v4));
                    pod.title.push_str(match planned.stopped {
                        None => " (not running)",
                        Some(Stopped::NoReplicas) => " (not running, replicas: 0)",
                        Some(Stopped::Suspended) => " (not running, suspended)",
                    });
                }
                pod
            })
            .collect::<Vec<_>>()
    };
    loaded.inventory.clusters.iter().flat_map(of_cluster).collect()
}

/// The pods of a running federation, as their members report them.
fn reported(pods: &[pb::PodInfo], selector: &Selector) -> Vec<Pod> {
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
    fn is_planned(&self) -> bool {
        self.planned != [false; 2]
    }

    fn new(place: QueryEnd, owner: Option<(ClusterName, EndpointId)>, addresses: Vec<IpAddr>) -> Self {
        let title = place.to_string();
        Self { place, owner, other: None, title, addresses, planned: [false; 2], ports: BTreeSet::new() }
    }
}

/// Groups pods that policy does not distinguish.
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
            let what = if members[0].is_planned() { "workloads, not running" } else { "pods" };
            Some(format!("{cluster}/{namespace}/{} ({many} {what})", common_name(names)))
        });
        let ports = members.iter().flat_map(|pod| &pod.ports).copied().collect();
        let other = (many > 1).then(|| Box::new(members.swap_remove(1)));
        let first = members.swap_remove(0);
        Pod { title: title.flatten().unwrap_or_else(|| first.title.clone()), other, ports, ..first }
    };
    found.into_iter().map(one).collect()
}

/// The name of a column; with the port if columns differ in it.
fn column_title(Column { to, port }: &Column<'_>, with_port: bool) -> String {
    if with_port { format!("{} {port}", to.title) } else { to.title.clone() }
}

/// A cell for each source and column, the columns by number.
fn grid(
    out: &mut impl std::io::Write,
    sources: &[Pod],
    columns: &[Column<'_>],
    rows: &[Row],
    ports: bool,
) -> anyhow::Result<()> {
    let has = |cell: &dyn Fn(&Option<Cell>) -> bool| rows.iter().flatten().any(cell);
    let blank = if has(&Option::is_none) { "   blank: no common address family" } else { "" };
    let depends =
        if has(&|cell| matches!(cell, Some(Cell::Depends { .. }))) { "   ? depends on an address" } else { "" };
    writeln!(out, "   + allow   . deny{depends}{blank}\n")?;
    let numbers = (1..=columns.len()).map(|number| number.to_string());
    let mut table = output::table(["#".to_owned(), "FROM \\ TO".to_owned()].into_iter().chain(numbers));
    for (from, row) in sources.iter().zip(rows) {
        let at = columns.iter().position(|column| column.to.place == from.place && !ports);
        let mut cells = vec![at.map_or(String::new(), |at| (at + 1).to_string()), from.title.clone()];
        cells.extend(row.iter().map(|verdict| match verdict {
            Some(Cell::Allow) => "+".to_owned(),
            Some(Cell::Deny) => ".".to_owned(),
            Some(Cell::Depends { .. }) => "?".to_owned(),
            None => String::new(),
        }));
        table.add_row(cells);
    }
    writeln!(out, "{table}\n")?;
    let is_named = |column: &Column<'_>| !ports && sources.iter().any(|from| from.place == column.to.place);
    for (at, column) in columns.iter().enumerate().filter(|(_, column)| !is_named(column)) {
        writeln!(out, "{} {}", at + 1, output::one_line(&column_title(column, ports)))?;
    }
    Ok(())
}

/// For too many columns: what each source reaches, or what it does not reach, whichever is shorter.
fn reachable(
    out: &mut impl std::io::Write,
    sources: &[Pod],
    columns: &[Column<'_>],
    rows: &[Row],
    ports: bool,
) -> anyhow::Result<()> {
    writeln!(out, "\n")?;
    let mut table = output::table(["FROM", "REACHES", ""]);
    for (from, row) in sources.iter().zip(rows) {
        let with = |wanted: &str| -> Vec<String> {
            let those = row.iter().zip(columns).filter(|(cell, _)| cell.as_ref().is_some_and(|it| it.name() == wanted));
            those.map(|(_, column)| column_title(column, ports)).collect()
        };
        let (allowed, denied, depends) = (with("allow"), with("deny"), with("depends"));
        let (what, mut listed) = match (allowed.len(), denied.len() + depends.len()) {
            (_, 0) => ("all".to_owned(), Vec::new()),
            (0, _) if depends.is_empty() => ("nothing".to_owned(), Vec::new()),
            (a, d) if a <= d => (format!("{a} of {}", a + d), allowed),
            (a, d) => (format!("{a} of {}, not", a + d), denied),
        };
        listed.extend(depends.iter().map(|title| format!("? {title}")));
        table.add_row([from.title.as_str().into(), what.into(), output::Cell::lines(listed)]);
    }
    writeln!(out, "{table}\n")?;
    Ok(())
}

/// Explains the verdicts `depends`.
fn notes(out: &mut impl std::io::Write, sources: &[Pod], columns: &[Column<'_>], rows: &[Row]) -> anyhow::Result<()> {
    let mut count = 0;
    for (from, row) in sources.iter().zip(rows) {
        for (column, cell) in columns.iter().zip(row) {
            let Some(Cell::Depends { on, decided_by }) = cell else { continue };
            count += 1;
            if count <= MAX_NOTES {
                let mut text = format!("? {} to {} depends on {on}", from.title, column_title(column, true));
                if !decided_by.is_empty() {
                    text.push_str(&format!(" ({})", decided_by.join("; or ")));
                }
                writeln!(out, "{}", output::one_line(&text))?;
            }
        }
    }
    if count > MAX_NOTES {
        writeln!(out, "? {} more; -o json has all", count - MAX_NOTES)?;
    }
    Ok(())
}

fn place(cluster: &str, namespace: &str, pod: &str) -> QueryEnd {
    QueryEnd::Pod { cluster: Some(cluster.to_owned()), namespace: namespace.to_owned(), pod: pod.to_owned() }
}
