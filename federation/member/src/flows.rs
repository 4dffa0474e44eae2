//! What the kernels of this cluster's nodes decided of connections, with what policy says of it, in a file.
//!
//! Agents tell decisions with addresses. Here each gets the identities of its ends, and both outcomes of policy, the enforced and the
//! staged one, as they are when it comes: seconds after the decision. Only directions of this cluster's pods are judged here; another
//! cluster's own policies are not known.
//!
//! A line is a [`Record`]. Two files are kept, `flows.jsonl` and the one before it. Nothing waits for them: what comes faster than it
//! can be judged or written is counted, and told as lost.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use hanse_policy::evaluate::{End, Query};
use hanse_policy::explain::{AnswerLine, Explainer, protocol_name};
use hanse_proto::agent::v1 as wire;
use hanse_runtime::files::private_folder;
use hanse_runtime::moment::rfc3339;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::metrics::FlowMetrics;
use crate::questions::{Answering, Known};

/// Flows of one message of an agent.
pub const MAX_FLOWS: usize = 2_000;
/// Messages that wait to be judged: of at most some 300 KB each.
const MAX_WAITING: usize = 32;
/// Flows are judged together, at least so long after the last ones. It takes a pass over all endpoints and policies, so
/// where that takes long, nine times as long passes between: a tenth of a processor at most.
const JUDGE_EVERY: Duration = Duration::from_secs(2);
const REST: u32 = 9;
/// A file that is longer is followed by the next: with about 1 KiB a line, some 65,000 lines.
const MAX_FILE_BYTES: u64 = 64 << 20;
/// How far a node's clock may be ahead.
const MAX_AHEAD: Duration = Duration::from_secs(3_600);

/// What an agent told.
#[derive(Debug)]
pub struct Told {
    pub node: Arc<str>,
    pub flows: wire::Flows,
}

/// Where agents' flows go in, and where they come out to be judged.
pub fn inbox() -> (mpsc::Sender<Told>, mpsc::Receiver<Told>) {
    mpsc::channel(MAX_WAITING)
}

/// A line of the file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record<'a> {
    pub first_at: String,
    pub last_at: String,
    /// Whose kernel decided.
    pub node: String,
    /// `allowed`, `denied` or `cut`.
    pub decision: String,
    /// How many connections were decided so.
    pub count: u64,
    pub from: Party,
    pub to: Party,
    /// A name or a number, as in a question.
    pub protocol: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// Of the last of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_port: Option<u16>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub icmp: Option<Icmp>,
    /// What policy says, as an answer of `hanse policy explain`; `none` in a direction whose pod is not this cluster's.
    #[serde(flatten)]
    pub policy: AnswerLine<'a>,
    /// What was compiled when it was judged.
    pub hub_revision: u64,
    pub local_revision: u64,
}

impl Record<'_> {
    /// Policy would say something else if what is staged were enforced.
    pub fn would_change(&self) -> bool {
        self.policy.verdict != self.policy.staged.verdict
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Icmp {
    #[serde(rename = "type")]
    pub kind: u8,
    pub code: u8,
}

/// One end: a pod with its address, or an address that no pod is known to own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Party {
    pub ip: IpAddr,
    #[serde(flatten, default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<Pod>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pod {
    pub cluster: String,
    pub namespace: String,
    #[serde(rename = "pod")]
    pub name: String,
    /// The pod's own, as far as they are known.
    #[serde(default, skip_serializing_if = "serde_json::Map::is_empty")]
    pub labels: serde_json::Map<String, serde_json::Value>,
}

impl std::fmt::Display for Party {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.pod {
            Some(pod) => write!(f, "{}/{}/{}", pod.cluster, pod.namespace, pod.name),
            None => self.ip.fmt(f),
        }
    }
}

/// Judges and writes what comes, until `stop`.
pub async fn keep(
    mut told: mpsc::Receiver<Told>,
    answering: Answering,
    data: PathBuf,
    metrics: FlowMetrics,
    stop: CancellationToken,
) {
    let mut file = FlowFile::new(&data);
    loop {
        let first = tokio::select! {
            () = stop.cancelled() => return,
            first = told.recv() => match first {
                Some(first) => first,
                None => return,
            },
        };
        let mut batch = vec![first];
        while let Ok(more) = told.try_recv() {
            batch.push(more);
        }
        let lost: u64 = batch.iter().map(|it| it.flows.lost).fold(0, u64::saturating_add);
        let began = Instant::now();
        let answering = answering.clone();
        let work = move || {
            let mut lines = Lines::default();
            if let Some(known) = answering.known() {
                judge(&known, &batch, SystemTime::now(), |record| lines.add(record));
            }
            let written = file.append(&lines);
            (file, lines.count, written)
        };
        let Ok((again, count, written)) = tokio::task::spawn_blocking(work).await else { return };
        file = again;
        if let Err(error) = &written {
            tracing::error!(%error, path = %file.path().display(), "flows cannot be written, and are lost");
        }
        match written {
            Ok(()) => metrics.count(count, lost),
            Err(_) => metrics.count(0, lost.saturating_add(count)),
        }
        let wait = JUDGE_EVERY.max(began.elapsed() * REST);
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(wait) => {}
        }
    }
}

/// Shows what agents told, with identities and policy. What is no flow is left out.
fn judge(known: &Known, told: &[Told], now: SystemTime, mut show: impl FnMut(&Record<'_>)) {
    let explainer = Explainer::new(&known.policies, &known.inventory);
    for it in told {
        for flow in it.flows.flows.iter().take(MAX_FLOWS) {
            let Some(packet) = packet(flow, |address| explainer.end(address, &known.cluster)) else { continue };
            let explanation = explainer.explain_packet(&packet);
            let own = |end| known.own_stream(&packet, end);
            let line = explanation.line().with_own_streams(own(&packet.source), own(&packet.destination));
            // Of another cluster's pod its member knows the rest.
            let ours = |end: &End| end.pod.as_ref().is_some_and(|(cluster, _)| *cluster == known.cluster);
            let judged = |end| ours(end).then(|| line.clone());
            let mut policy = AnswerLine::joined(judged(&packet.source), judged(&packet.destination));
            if !ours(&packet.source) && !ours(&packet.destination) {
                (policy.verdict, policy.staged.verdict) = ("none".into(), "none".into());
            }
            if let Some(record) = record(known, &it.node, flow, &packet, policy, now) {
                show(&record);
            }
        }
    }
}

/// `None`: it is none.
fn packet(flow: &wire::Flow, end: impl Fn(IpAddr) -> End) -> Option<Query> {
    let (source, destination) = (address(&flow.source)?, address(&flow.destination)?);
    let icmp = match &flow.icmp {
        Some(icmp) => Some((icmp.r#type.try_into().ok()?, icmp.code.unwrap_or(0).try_into().ok()?)),
        None => None,
    };
    (source.is_ipv4() == destination.is_ipv4()).then_some(())?;
    Some(Query {
        source: end(source),
        destination: end(destination),
        protocol: flow.protocol.try_into().ok()?,
        source_port: flow.source_port.try_into().ok()?,
        destination_port: flow.port.try_into().ok()?,
        icmp,
    })
}

fn record<'a>(
    known: &Known,
    node: &str,
    flow: &wire::Flow,
    packet: &Query,
    policy: AnswerLine<'a>,
    now: SystemTime,
) -> Option<Record<'a>> {
    let decision = match flow.decision() {
        wire::Decision::Allowed => "allowed",
        wire::Decision::Denied => "denied",
        wire::Decision::Cut => "cut",
        wire::Decision::Unspecified => return None,
    };
    let at = |ms| {
        let at = SystemTime::UNIX_EPOCH.checked_add(Duration::from_millis(ms));
        rfc3339(at.filter(|at| *at < now + MAX_AHEAD).unwrap_or(now))
    };
    let has_ports = packet.destination_port != 0 || packet.source_port != 0;
    Some(Record {
        first_at: at(flow.first_ms),
        last_at: at(flow.last_ms),
        node: node.to_owned(),
        decision: decision.to_owned(),
        count: flow.count,
        from: party(known, &packet.source),
        to: party(known, &packet.destination),
        protocol: protocol_name(packet.protocol),
        port: has_ports.then_some(packet.destination_port),
        source_port: has_ports.then_some(packet.source_port),
        icmp: packet.icmp.map(|(kind, code)| Icmp { kind, code }),
        policy,
        hub_revision: known.hub_revision,
        local_revision: known.local_revision,
    })
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    match *bytes {
        [a, b, c, d] => Some(IpAddr::from([a, b, c, d])),
        _ => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
    }
}

fn party(known: &Known, end: &End) -> Party {
    let pod = end.pod.as_ref().map(|(cluster, id)| {
        let endpoint = known.inventory.clusters.get(cluster).and_then(|cluster| cluster.endpoints.get(id));
        let labels = endpoint.into_iter().flat_map(|endpoint| endpoint.labels.iter());
        Pod {
            cluster: cluster.to_string(),
            namespace: id.namespace.as_deref().unwrap_or_default().to_owned(),
            name: id.name.to_string(),
            labels: labels.map(|(key, value)| (key.to_string(), (**value).into())).collect(),
        }
    });
    Party { ip: end.address, pod }
}

#[derive(Debug, Default)]
struct Lines {
    bytes: Vec<u8>,
    count: u64,
}

impl Lines {
    fn add(&mut self, record: &Record<'_>) {
        serde_json::to_writer(&mut self.bytes, record).expect("a record is JSON, and memory takes all");
        self.bytes.push(b'\n');
        self.count += 1;
    }
}

/// The newest records, and those before them, each a line.
#[derive(Debug)]
struct FlowFile {
    folder: PathBuf,
    open: Option<(File, u64)>,
    most: u64,
}

const NEWEST: &str = "flows.jsonl";
const BEFORE: &str = "flows.1.jsonl";

impl FlowFile {
    fn new(data: &Path) -> Self {
        Self { folder: data.join("flows"), open: None, most: MAX_FILE_BYTES }
    }

    fn path(&self) -> PathBuf {
        self.folder.join(NEWEST)
    }

    fn append(&mut self, lines: &Lines) -> io::Result<()> {
        let (mut file, mut length) = match self.open.take() {
            Some(open) => open,
            None => {
                private_folder(&self.folder)?;
                let file = OpenOptions::new().append(true).create(true).mode(0o600).open(self.path())?;
                let length = file.metadata()?.len();
                // A line that a crash cut off is no beginning of the next.
                (&file).write_all(if length > 0 { b"\n" } else { b"" })?;
                (file, length)
            }
        };
        if length > 0 && length + lines.bytes.len() as u64 > self.most {
            fs::rename(self.path(), self.folder.join(BEFORE))?;
            file = OpenOptions::new().append(true).create_new(true).mode(0o600).open(self.path())?;
            length = 0;
        }
        file.write_all(&lines.bytes)?;
        self.open = Some((file, length + lines.bytes.len() as u64));
        Ok(())
    }
}

/// The newest `last` records of those that `wanted` wants, the oldest first. Lines that are no records are left out.
///
/// # Errors
/// When there is no file, or it cannot be read.
pub fn read(data: &Path, last: usize, wanted: impl Fn(&Record<'_>) -> bool) -> io::Result<Vec<Record<'static>>> {
    let folder = data.join("flows");
    let newest = File::open(folder.join(NEWEST))?;
    let before = match File::open(folder.join(BEFORE)) {
        Ok(before) => Some(before),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(error),
    };
    let mut found = VecDeque::new();
    for file in before.into_iter().chain([newest]) {
        for line in BufReader::new(file).split(b'\n') {
            let Ok(record) = serde_json::from_slice::<Record<'static>>(&line?) else { continue };
            if wanted(&record) {
                if found.len() == last {
                    found.pop_front();
                }
                found.push_back(record);
            }
        }
    }
    Ok(found.into())
}

#[cfg(test)]
mod tests {
    use hanse_k8s_api::assemble_cluster;
    use hanse_k8s_api::manifest::{self, Manifests};
    use hanse_policy::inventory::Inventory;
    use hanse_policy::model::PolicySet;

    use super::*;

    fn pod(namespace: &str, name: &str, ips: &[&str]) -> String {
        let ips: Vec<String> = ips.iter().map(|ip| format!("{{ip: \"{ip}\"}}")).collect();
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}, labels: {{app: {name}}}}}\n\
             status: {{podIPs: [{}]}}\n---\n",
            ips.join(", ")
        )
    }

    /// To `b` only `a` may, on port 80; staged is that `b` exchanges nothing with anybody.
    const POLICIES: &str = "\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: to-b, namespace: train}
spec:
  podSelector: {matchLabels: {app: b}}
  ingress: [{from: [{podSelector: {matchLabels: {app: a}}}], ports: [{port: 80}]}]
---
apiVersion: projectcalico.org/v3
kind: StagedNetworkPolicy
metadata: {name: closed, namespace: train}
spec: {selector: app == 'b', order: 1, ingress: [{action: Deny}], egress: [{action: Deny}]}
";

    /// The cluster `c`, and what is known of `d`, of which a pod has an address of `train/b` too.
    fn known() -> Known {
        let cluster = |name: &str, text: &str| {
            let mut read = Manifests::default();
            manifest::read_bytes(&"f.yaml".into(), text.as_bytes(), &mut read);
            assert_eq!(read.diagnostics, []);
            assemble_cluster(&name.into(), &read.objects)
        };
        let pods = pod("train", "a", &["10.1.0.1"]) + &pod("train", "b", &["10.1.0.2", "fd01::2"]);
        let own = cluster("c", &(pods + POLICIES));
        let other = cluster("a", &(pod("serve", "x", &["10.1.0.2"]) + &pod("serve", "y", &["10.2.0.9"])));
        Known {
            version: 1,
            policies: PolicySet { clusters: [("c".into(), own.layer)].into(), ..PolicySet::default() },
            inventory: Inventory {
                clusters: [("c".into(), own.cluster), ("a".into(), other.cluster)].into(),
                ..Inventory::default()
            },
            cluster: "c".into(),
            own_streams: Default::default(),
            hub_revision: 7,
            local_revision: 9,
        }
    }

    fn flow(source: &str, destination: &str, port: u32) -> wire::Flow {
        let octets = |text: &str| match text.parse().expect("an address") {
            IpAddr::V4(address) => address.octets().to_vec().into(),
            IpAddr::V6(address) => address.octets().to_vec().into(),
        };
        wire::Flow {
            source: octets(source),
            destination: octets(destination),
            protocol: 6,
            port,
            source_port: 40_000,
            decision: wire::Decision::Allowed.into(),
            count: 3,
            first_ms: 1_800_000_000_000,
            last_ms: 1_800_000_001_000,
            ..wire::Flow::default()
        }
    }

    const NOW: SystemTime = SystemTime::UNIX_EPOCH;

    fn judged(flows: Vec<wire::Flow>) -> Vec<Record<'static>> {
        let told = Told { node: "n".into(), flows: wire::Flows { flows, lost: 0 } };
        let mut lines = Lines::default();
        judge(&known(), &[told], NOW + Duration::from_secs(1_800_000_100), |record| lines.add(record));
        let text = String::from_utf8(lines.bytes).expect("text");
        text.lines().map(|line| serde_json::from_str(line).expect("a record")).collect()
    }

    #[test]
    fn a_flow_has_both_outcomes_in_the_directions_that_are_known_here() {
        for (source, destination, port, ends, verdicts) in [
            ("10.1.0.1", "10.1.0.2", 80, ["c/train/a", "c/train/b"], ["allow", "allow", "allow", "deny"]),
            ("10.1.0.1", "10.1.0.2", 81, ["c/train/a", "c/train/b"], ["deny", "allow", "deny", "deny"]),
            ("10.1.0.2", "8.8.8.8", 53, ["c/train/b", "8.8.8.8"], ["allow", "allow", "none", "deny"]),
            ("fd01::2", "fd02::1", 53, ["c/train/b", "fd02::1"], ["allow", "allow", "none", "deny"]),
            // The other cluster's member knows what its pods may.
            ("10.2.0.9", "10.1.0.2", 80, ["a/serve/y", "c/train/b"], ["deny", "none", "deny", "deny"]),
            ("10.1.0.1", "10.2.0.9", 80, ["c/train/a", "a/serve/y"], ["allow", "allow", "none", "allow"]),
            ("10.1.0.99", "8.8.8.8", 80, ["10.1.0.99", "8.8.8.8"], ["none", "none", "none", "none"]),
        ] {
            let [record] = &judged(vec![flow(source, destination, port)])[..] else { panic!("one record") };
            let of = &record.policy;
            assert_eq!([record.from.to_string(), record.to.to_string()], ends);
            let found = [&of.verdict, &of.egress.verdict, &of.ingress.verdict, &of.staged.verdict];
            assert_eq!(found, verdicts, "{source} {destination}");
            assert_eq!(record.would_change(), verdicts[0] != verdicts[3]);
        }
    }

    #[test]
    fn a_record_is_a_line_of_json() {
        let records = judged(vec![flow("10.1.0.1", "10.1.0.2", 80)]);
        let mut value = serde_json::to_value(&records[0]).expect("JSON");
        let staged = value["staged"]["ingress"]["trace"].take();
        assert_eq!(staged[0]["policy"]["name"], "closed");
        for (key, expected) in [
            ("firstAt", serde_json::json!("2027-01-15T08:00:00Z")),
            ("lastAt", "2027-01-15T08:00:01Z".into()),
            ("node", "n".into()),
            ("decision", "allowed".into()),
            ("count", 3.into()),
            (
                "from",
                serde_json::json!({
                    "ip": "10.1.0.1", "cluster": "c", "namespace": "train", "pod": "a", "labels": {"app": "a"}
                }),
            ),
            ("protocol", "TCP".into()),
            ("port", 80.into()),
            ("sourcePort", 40_000.into()),
            ("hubRevision", 7.into()),
            ("localRevision", 9.into()),
        ] {
            assert_eq!(value[key], expected, "{key}");
        }
        let unowned = judged(vec![flow("10.1.0.1", "8.8.8.8", 80)]);
        assert_eq!(serde_json::to_value(&unowned[0].to).expect("JSON"), serde_json::json!({"ip": "8.8.8.8"}));
    }

    #[test]
    fn what_is_no_flow_is_left_out() {
        let good = flow("10.1.0.1", "10.1.0.2", 80);
        let icmp = |kind| Some(wire::Icmp { r#type: kind, code: None });
        for bad in [
            wire::Flow { source: vec![1, 2, 3].into(), ..good.clone() },
            wire::Flow { destination: vec![0; 16].into(), ..good.clone() },
            wire::Flow { protocol: 256, ..good.clone() },
            wire::Flow { port: 65_536, ..good.clone() },
            wire::Flow { icmp: icmp(256), ..good.clone() },
            wire::Flow { decision: 0, ..good.clone() },
            wire::Flow { decision: 99, ..good.clone() },
        ] {
            assert_eq!(judged(vec![bad.clone(), good.clone()]).len(), 1, "{bad:?}");
        }
        let ahead = judged(vec![wire::Flow { last_ms: u64::MAX, ..good }]);
        assert_eq!(ahead[0].last_at, "2027-01-15T08:01:40Z", "a node's clock is not believed far ahead");
        let ping =
            wire::Flow { protocol: 1, port: 0, source_port: 0, icmp: icmp(8), ..flow("10.1.0.1", "10.1.0.2", 0) };
        let ping = &judged(vec![ping])[0];
        assert_eq!((&*ping.protocol, ping.port, &ping.icmp), ("ICMP", None, &Some(Icmp { kind: 8, code: 0 })));
    }

    #[test]
    fn two_files_are_kept_and_read_as_one() {
        let folder = tempfile::tempdir().expect("a folder");
        let records = judged((1..=12).map(|port| flow("10.1.0.1", "10.1.0.2", port)).collect());
        let mut lines: [Lines; 4] = Default::default();
        records.iter().enumerate().for_each(|(at, record)| lines[at / 3].add(record));
        let ports = |last, wanted: fn(&Record<'_>) -> bool| -> Vec<u16> {
            let read = read(folder.path(), last, wanted).expect("there is a file");
            read.iter().filter_map(|record| record.port).collect()
        };
        assert_eq!(read(folder.path(), 9, |_| true).expect_err("none yet").kind(), io::ErrorKind::NotFound);
        // Room for two of these in each.
        let most = lines[0].bytes.len() as u64 * 2 + 20;
        let mut file = FlowFile { most, ..FlowFile::new(folder.path()) };
        file.append(&lines[0]).expect("written");
        assert_eq!(ports(99, |_| true), [1, 2, 3]);
        // A crash in the middle of a line.
        let path = file.path();
        OpenOptions::new().append(true).open(&path).and_then(|mut it| it.write_all(b"{\"first")).expect("written");
        let mut file = FlowFile { most, ..FlowFile::new(folder.path()) };
        for (lines, expected) in lines[1..].iter().zip([6, 9, 12]) {
            file.append(lines).expect("written");
            assert_eq!(ports(99, |_| true), (1..=expected).collect::<Vec<_>>());
        }
        assert_eq!(ports(2, |_| true), [11, 12]);
        assert_eq!(ports(2, |record| record.port.is_some_and(|port| port % 4 == 0)), [8, 12]);
        file.append(&lines[0]).expect("written");
        assert_eq!(ports(99, |_| true), [7, 8, 9, 10, 11, 12, 1, 2, 3], "the oldest file is gone");
        use std::os::unix::fs::PermissionsExt as _;
        assert_eq!(path.metadata().expect("there").permissions().mode() & 0o777, 0o600);
    }
}
