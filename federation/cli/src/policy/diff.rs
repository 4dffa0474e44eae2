//! `hanse policy diff`: which pairs of workloads change verdict.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use hanse_policy::diff::{Change, Diff, Packets, Party, State};
use hanse_policy::evaluate::{Verdict, View};
use hanse_policy::explain::answer;
use hanse_policy::explain::protocol_name;
use hanse_policy::inventory::EndpointId;
use hanse_policy::model::ClusterName;
use hanse_policy::workload::common_name;
use serde::Serialize;

use super::answer::write_answer;
use super::load::{ClusterSource, Loaded, Sources};
use super::matrix::PortName;
use crate::output::{self, Format};

/// Default addresses outside the federation: documentation ranges (RFC 5737, RFC 3849).
const OUTSIDE: [&str; 2] = ["203.0.113.1", "2001:db8::1"];
/// Maximum number of rows of a table; `-o json` has all.
const MAX_ROWS: usize = 500;
/// Maximum number of pods of one state that the table names.
const MAX_NAMES: usize = 10;

/// Show which pairs of workloads change verdict between two states of manifests, or between enforced and staged policy.
///
/// Compares all pairs of pods of all clusters, and pods with addresses outside, over both IP versions and all protocols and
/// ports, from source port 40000. Pods that are alike in both states are reported together.
///
/// Workloads that do not run are included, as "KIND/NAME". If the verdict changes for some of the possible addresses of their
/// pods only, `condition` contains these. Pods that exist in one state only, as after renaming, are listed, but not compared.
///
/// Exits 1 if an object of either state was refused; with --exit-code, also if a verdict changes.
#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("second").args(["with", "with_federation", "staged"]).required(true).multiple(true))]
#[command(after_help = "\
JSON, one object a line: {\"from\", \"to\", \"ipVersion\", \"protocol\", \"ports\", \"icmp\", \"before\", \"after\", \"condition\", \"egress\", \
\"ingress\"}; the last line is {\"summary\": {\"opened\", \"closed\", \"incomplete\", \"onlyBefore\": [\"CLUSTER/NAMESPACE/NAME\"], \
\"onlyAfter\"}}, with the numbers of pairs.

Examples:
  hanse policy diff --cluster train=main/train --with train=branch/train \\
    --federation policies/
  hanse policy diff --cluster train=manifests/train \\
    --federation main/ --with-federation branch/ --exit-code
  hanse policy diff --cluster train=manifests/train --staged -o json")]
pub struct Arguments {
    #[command(flatten)]
    sources: Sources,
    /// The cluster in the second state, as NAME=DIR; repeatable.
    #[arg(long = "with", value_name = "NAME=DIR")]
    with: Vec<ClusterSource>,
    /// The manifests of the federation in the second state.
    #[arg(long, value_name = "DIR")]
    with_federation: Option<PathBuf>,
    /// The second state is the first one with all staged policies committed.
    #[arg(long, conflicts_with_all = ["with", "with_federation"])]
    staged: bool,
    /// Only these ports, as NUMBER or NUMBER/PROTOCOL. Default: all, in ranges that policy does not distinguish.
    #[arg(long = "port", value_name = "PORT", value_delimiter = ',')]
    ports: Vec<PortName>,
    /// Addresses outside the federation to compare.
    #[arg(long, value_name = "IP", default_values = OUTSIDE)]
    outside: Vec<IpAddr>,
    /// Exit 1 if a verdict changes.
    #[arg(long)]
    exit_code: bool,
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ChangeLine<'a> {
    from: Side<'a>,
    to: Side<'a>,
    ip_version: u8,
    /// A name, a number, or `other`: all protocols that no policy names.
    protocol: String,
    /// The first and the last of a range of ports.
    #[serde(skip_serializing_if = "Option::is_none")]
    ports: Option<(u16, u16)>,
    #[serde(skip_serializing_if = "Option::is_none")]
    icmp: Option<IcmpLine>,
    before: &'static str,
    after: &'static str,
    /// Only for these addresses of pods that do not run yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    condition: Option<&'a str>,
    /// The rule that decides in the second state.
    egress: &'a str,
    ingress: &'a str,
}

/// The last line.
#[derive(Serialize)]
struct Closing {
    summary: Summary,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Summary {
    /// Pairs.
    opened: u64,
    closed: u64,
    /// An object was refused, so that the result does not include it.
    incomplete: bool,
    /// Pods and workloads that exist in one state only.
    only_before: Vec<String>,
    only_after: Vec<String>,
}

/// Counts changes while they are printed.
#[derive(Default)]
struct Tally {
    /// Numbers of pairs that closed and opened.
    pairs: [u64; 2],
    /// Whether the last pair is counted among them.
    counted: [bool; 2],
    last: Option<(usize, usize)>,
}

impl Tally {
    fn add(&mut self, diff: &Diff<'_>, change: &Change) {
        let pair = (change.from, change.to);
        // A pair that changes over both IP versions, or in several ways, is one pair.
        if self.last.replace(pair) != Some(pair) {
            self.counted = [false; 2];
        }
        let is_open = usize::from(change.after.verdict == Verdict::Allow);
        if !std::mem::replace(&mut self.counted[is_open], true) {
            self.pairs[is_open] += pairs(diff, change);
        }
    }
}

#[derive(Serialize)]
struct IcmpLine {
    #[serde(rename = "type")]
    kind: u8,
    /// Absent: all codes that no policy names.
    #[serde(skip_serializing_if = "Option::is_none")]
    code: Option<u8>,
}

#[derive(Clone, Serialize)]
#[serde(untagged)]
enum Side<'a> {
    Pods { cluster: &'a str, namespace: &'a str, pods: Vec<&'a str> },
    Address { ip: String },
}

/// A row of the table: destination, packets and reason. Changes that differ in the source only are one row.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Row {
    closed: bool,
    to: usize,
    packets: String,
    reason: String,
}

/// Rows as they arrive; equal changes over both IP versions are one.
#[derive(Default)]
struct Rows {
    done: BTreeMap<Row, Vec<usize>>,
    /// The source and destination of the open rows, with the IP version of each.
    at: (usize, usize),
    open: Vec<(Row, u8)>,
}

impl Rows {
    fn add(&mut self, change: &Change, packets: String, reason: String) {
        if self.at != (change.from, change.to) {
            self.close();
            self.at = (change.from, change.to);
        }
        let closed = change.after.verdict == Verdict::Deny;
        let row = Row { closed, to: change.to, packets, reason };
        match self.open.iter_mut().find(|(open, _)| *open == row) {
            Some((_, version)) => *version = 0,
            None => self.open.push((row, change.ip_version)),
        }
    }

    fn close(&mut self) {
        for (row, version) in self.open.drain(..) {
            let packets = if version == 0 { row.packets } else { format!("IPv{version} {}", row.packets) };
            let froms = self.done.entry(Row { packets, ..row }).or_default();
            if froms.last() != Some(&self.at.0) {
                froms.push(self.at.0);
            }
        }
    }

    fn finish(mut self) -> BTreeMap<Row, Vec<usize>> {
        self.close();
        self.done
    }
}

impl Arguments {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let before = self.sources.load()?;
        let after = match self.staged {
            true => None,
            false => Some(self.sources.instead(&self.with, self.with_federation.as_deref())?.load()?),
        };
        let after_state = after.as_ref().unwrap_or(&before);
        let view = if self.staged { View::Pending } else { View::Enforced };
        let first = State { policies: &before.policies, inventory: &before.inventory, view: View::Enforced };
        let second = State { policies: &after_state.policies, inventory: &after_state.inventory, view };
        let only = self.ports.iter().map(|port| (port.protocol, port.port)).collect();
        let diff = Diff::new(first, second, &self.outside, only).with_pod_nets(&self.sources.pod_nets);
        if !diff.parties.iter().any(|party| matches!(party, Party::Pods { .. })) {
            let named = diff.unpaired.each_ref().map(|unpaired| some_names(unpaired));
            anyhow::bail!(
                "nothing was compared: the first has {}; the second has {}; none of them is in both states",
                named[0],
                named[1]
            );
        }
        let incomplete = before.is_incomplete() || after.as_ref().is_some_and(Loaded::is_incomplete);
        let mut tally = Tally::default();
        let printed = self.print(&diff, incomplete, &mut tally).and_then(|()| {
            let lines = [Some(&before), after.as_ref()].into_iter().flatten().filter_map(Loaded::incomplete_line);
            lines.filter(|_| self.output == Format::Table).try_for_each(output::line)
        });
        for (unpaired, which) in diff.unpaired.iter().zip(["first", "second"]) {
            if !unpaired.is_empty() {
                output::note(format_args!(
                    "note: {} in the {which} state only, not compared: {}",
                    output::count(unpaired.len(), "pod or workload").replace("pod or workloads", "pods or workloads"),
                    some_names(unpaired)
                ));
            }
        }
        let changed = tally.pairs != [0; 2];
        output::exit(printed, incomplete || self.exit_code && changed)
    }

    fn print(&self, diff: &Diff<'_>, incomplete: bool, tally: &mut Tally) -> anyhow::Result<()> {
        let mut out = std::io::BufWriter::new(output::stdout());
        let mut rows = Rows::default();
        diff.compare(|change| -> anyhow::Result<()> {
            tally.add(diff, &change);
            if self.output != Format::Table {
                return self.print_lines(&mut out, incomplete, diff, &change);
            }
            let (egress, ingress) = (change.after.egress.as_ref(), change.after.ingress.as_ref());
            let reason = match (change.after.verdict, egress, ingress) {
                (Verdict::Deny, Some(egress), _) if egress.verdict == Verdict::Deny => answer::reason(Some(egress)),
                (Verdict::Deny, _, ingress) => answer::reason(ingress),
                (Verdict::Allow, _, Some(ingress)) => answer::reason(Some(ingress)),
                (Verdict::Allow, egress, None) => answer::reason(egress),
            };
            let condition = change.condition.as_ref().map_or(String::new(), |condition| format!(", if {condition}"));
            rows.add(&change, described(&change.packets) + &condition, reason);
            Ok(())
        })?;
        let [closed, opened] = tally.pairs;
        match self.output {
            Format::Table => {
                table(diff, rows.finish(), &mut out)?;
                let text = match opened + closed {
                    0 => "no pair changes verdict".to_owned(),
                    _ => format!(
                        "{} opened, {closed} closed",
                        output::count(usize::try_from(opened).unwrap_or(usize::MAX), "pair")
                    ),
                };
                writeln!(out, "{text}")?;
            }
            Format::Json | Format::Yaml => {
                let [only_before, only_after] = diff.unpaired.each_ref().map(|it| it.iter().map(name).collect());
                let summary = Summary { opened, closed, incomplete, only_before, only_after };
                output::write(&mut out, self.output, &Closing { summary })?;
            }
        }
        Ok(out.flush()?)
    }

    fn print_lines(
        &self,
        out: &mut impl std::io::Write,
        incomplete: bool,
        diff: &Diff<'_>,
        change: &Change,
    ) -> anyhow::Result<()> {
        let (from, to) = (side(&diff.parties[change.from]), side(&diff.parties[change.to]));
        let egress = answer::reason(change.after.egress.as_ref());
        let ingress = answer::reason(change.after.ingress.as_ref());
        for packets in &change.packets {
            let line = ChangeLine {
                from: from.clone(),
                to: to.clone(),
                ip_version: change.ip_version,
                protocol: packets.protocol.map_or_else(|| "other".to_owned(), protocol_name),
                ports: packets.ports,
                icmp: packets.icmp.map(|(kind, code)| IcmpLine { kind, code }),
                before: answer::verdict(change.before),
                after: answer::verdict(change.after.verdict),
                condition: change.condition.as_deref(),
                egress: &egress,
                ingress: &ingress,
            };
            write_answer(out, self.output, incomplete, &line)?;
        }
        Ok(())
    }
}

/// `cluster/namespace/name`.
fn name((cluster, id): &(&ClusterName, &EndpointId)) -> String {
    format!("{cluster}/{}/{}", id.namespace.as_deref().unwrap_or_default(), id.name)
}

/// The first of several, and how many more there are.
fn some_names(pods: &[(&ClusterName, &EndpointId)]) -> String {
    if pods.is_empty() {
        return "none".to_owned();
    }
    let named: Vec<String> = pods.iter().take(MAX_NAMES).map(name).collect();
    match pods.len().saturating_sub(MAX_NAMES) {
        0 => named.join(", "),
        more => format!("{} and {more} more; -o json lists all", named.join(", ")),
    }
}

/// Number of pairs of pods (or of a pod and an address outside) of a change.
fn pairs(diff: &Diff<'_>, change: &Change) -> u64 {
    let count = |party: usize| diff.parties[party].count().max(1) as u64;
    match change.from == change.to {
        // One template represents several pods.
        true => (count(change.from) * (count(change.from) - 1)).max(1),
        false => count(change.from) * count(change.to),
    }
}

fn side<'a>(party: &Party<'a>) -> Side<'a> {
    match party {
        Party::Address(ip) => Side::Address { ip: ip.to_string() },
        Party::Pods { cluster, members } => Side::Pods {
            cluster,
            namespace: members.first().and_then(|id| id.namespace.as_deref()).unwrap_or_default(),
            pods: members.iter().map(|id| &*id.name).collect(),
        },
    }
}

/// `cluster/namespace/name`; for several pods, their common prefix and their number.
fn title(party: &Party<'_>) -> String {
    match side(party) {
        Side::Address { ip } => format!("outside ({ip})"),
        Side::Pods { cluster, namespace, pods } => match pods.len() {
            // Names of workloads have a kind before them.
            1 if pods[0].contains('/') => format!("{cluster}/{namespace}/{} (not running)", pods[0]),
            1 => format!("{cluster}/{namespace}/{}", pods[0]),
            many if pods.iter().all(|pod| pod.contains('/')) => {
                format!("{cluster}/{namespace}/{} ({many} workloads, not running)", common_name(pods))
            }
            many => format!("{cluster}/{namespace}/{} ({many} pods)", common_name(pods)),
        },
    }
}

fn table(diff: &Diff<'_>, rows: BTreeMap<Row, Vec<usize>>, out: &mut impl std::io::Write) -> anyhow::Result<()> {
    if rows.is_empty() {
        return Ok(());
    }
    // Changes that differ in the destination only are one row, too: a default deny closes all pairs.
    let mut merged: Vec<(Row, Vec<usize>, Vec<usize>)> = Vec::new();
    let mut known: BTreeMap<(bool, String, String, Vec<usize>), usize> = BTreeMap::new();
    for (row, froms) in rows {
        let at =
            *known.entry((row.closed, row.packets.clone(), row.reason.clone(), froms.clone())).or_insert(merged.len());
        let to = row.to;
        match merged.get_mut(at) {
            Some((.., tos)) => tos.push(to),
            None => merged.push((row, froms, vec![to])),
        }
    }
    let names = |parties: &[usize]| {
        let shown: Vec<String> = parties.iter().take(3).map(|it| title(&diff.parties[*it])).collect();
        let more = parties.len().saturating_sub(3);
        output::Cell::lines(shown.into_iter().chain((more > 0).then(|| format!("and {more} more"))))
    };
    let mut table = output::table(["", "FROM", "TO", "PACKETS", "DECIDED BY"]);
    for (row, froms, tos) in merged.iter().take(MAX_ROWS) {
        let change = if row.closed { "- closed" } else { "+ opened" };
        let (packets, reason) = (row.packets.as_str().into(), row.reason.as_str().into());
        table.add_row([change.into(), names(froms), names(tos), packets, reason]);
    }
    writeln!(out, "{table}\n")?;
    if merged.len() > MAX_ROWS {
        writeln!(out, "{} more rows; -o json has all\n", merged.len() - MAX_ROWS)?;
    }
    Ok(())
}

/// Packets for people: `TCP 80, 443; UDP all`.
fn described(packets: &[Packets]) -> String {
    let mut by_protocol: BTreeMap<(u8, String), Vec<String>> = BTreeMap::new();
    let mut whole = 0;
    for it in packets {
        let name = match it.protocol {
            None => "others".to_owned(),
            // Each IP version has its own.
            Some(58) => "ICMP".to_owned(),
            Some(number) => protocol_name(number),
        };
        let text = match (it.ports, it.icmp) {
            (Some((0, u16::MAX)), _) | (None, None) => {
                whole += 1;
                "all".to_owned()
            }
            (Some((low, high)), _) if low == high => low.to_string(),
            (Some((low, high)), _) => format!("{low}-{high}"),
            (None, Some((kind, Some(code)))) => format!("type {kind} code {code}"),
            (None, Some((kind, None))) => format!("type {kind}"),
        };
        // TCP first, protocols without a name last.
        let rank = match it.protocol {
            Some(6) => 0,
            Some(17) => 1,
            Some(_) => 2,
            None => 3,
        };
        by_protocol.entry((rank, name)).or_default().push(text);
    }
    let everything = whole == packets.len() && packets.iter().any(|it| it.protocol.is_none());
    if everything {
        return "all".to_owned();
    }
    let parts = by_protocol.into_iter().map(|((_, name), texts)| format!("{name} {}", texts.join(", ")));
    parts.collect::<Vec<_>>().join("; ")
}
