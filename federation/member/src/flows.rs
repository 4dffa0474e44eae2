//! Flow records: the kernel's verdicts on connections of this cluster's pods, with the verdicts of policy, in a file.
//!
//! Agents report verdicts with addresses. A record adds the identities of both ends, and the verdicts of the enforced and the staged
//! policies at the time of evaluation, seconds after the kernel's verdict. Only directions of this cluster's pods are evaluated, because
//! the member knows neither the policies of other clusters nor the pods there that its own policies do not select.
//!
//! A line is a [`Record`]. Two files are kept, `flows.jsonl` and its predecessor. Flows are best effort: those that arrive faster than they
//! can be evaluated or written are dropped and counted.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::net::IpAddr;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use hanse_policy::evaluate::{End, Query};
use hanse_policy::evaluator::Judge;
use hanse_policy::explain::answer::AnswerVerdict;
use hanse_policy::explain::{AnswerLine, has_ports, protocol_name};
use hanse_proto::agent::v1 as wire;
use hanse_protocol::MAX_FLOWS;
use hanse_runtime::files::private_folder;
use hanse_runtime::health::Writes;
use hanse_runtime::moment::rfc3339;
use hanse_runtime::rate_limit::RateLimit;
use serde::{Deserialize, Serialize};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::live::{Live, State};
use crate::metrics::FlowMetrics;

/// The maximum numbers of messages and of flows in the queue: at most 16 MB.
const MAX_MESSAGES: usize = 4_096;
const MAX_WAITING: usize = 64_000;
/// The rate limit per node, with a burst of ten: an agent sends a message every two seconds, and several after an interruption.
const PER_SECOND: f64 = 1.0;
/// The maximum count of one flow and of one message.
const MAX_COUNT: u64 = 10_000_000;
/// The minimum interval between batches. The interval is also at least nine times the duration of the last batch, so that flows use at
/// most a tenth of a processor.
const JUDGE_EVERY: Duration = Duration::from_secs(2);
const REST: u32 = 9;
/// The number of flows that are evaluated under one lock, about 3 ms. Compilations wait for the lock.
const AT_ONCE: usize = 256;
/// Lines are written in blocks of this size.
const WRITE_BYTES: usize = 1 << 20;
/// The size at which a new file is started: about 65,000 lines of 1 KiB.
const MAX_FILE_BYTES: u64 = 64 << 20;
/// The maximum number of labels per pod in a record.
const MAX_LABELS: usize = 32;
/// How far the times of a flow may be from the present: the error of a clock. An agent keeps flows for half a minute at most.
const MAX_SKEW: Duration = Duration::from_secs(3_600);

/// A message of a node's agent.
#[derive(Debug)]
pub struct FromNode {
    node: Arc<str>,
    flows: wire::Flows,
    /// Released when it was judged.
    _room: Option<OwnedSemaphorePermit>,
}

/// The queue of flows to be judged. Clones share it.
#[derive(Debug, Clone)]
pub struct Inbox {
    sender: mpsc::Sender<FromNode>,
    room: Arc<Semaphore>,
    /// By node.
    rate: Arc<Mutex<RateLimit<Arc<str>>>>,
}

impl Inbox {
    pub fn new() -> (Self, mpsc::Receiver<FromNode>) {
        let (sender, received) = mpsc::channel(MAX_MESSAGES);
        let rate = Arc::new(Mutex::new(RateLimit::new(PER_SECOND)));
        (Self { sender, room: Arc::new(Semaphore::new(MAX_WAITING)), rate }, received)
    }

    /// Queues the flows of a node.
    ///
    /// # Errors
    /// `RESOURCE_EXHAUSTED` when they may be sent again later.
    pub fn take(&self, node: Arc<str>, flows: wire::Flows) -> Result<(), Status> {
        if flows.flows.len() > MAX_FLOWS {
            return Err(Status::invalid_argument(format!("more than {MAX_FLOWS} flows")));
        }
        let full = || Status::resource_exhausted("too many flows: send them again later");
        let now = tokio::time::Instant::now();
        if !self.rate.lock().unwrap_or_else(PoisonError::into_inner).allows(Arc::clone(&node), now) {
            return Err(full());
        }
        let count = u32::try_from(flows.flows.len()).map_err(|_| full())?;
        let room = Arc::clone(&self.room).try_acquire_many_owned(count).map_err(|_| full())?;
        let message = FromNode { node, flows, _room: Some(room) };
        self.sender.try_send(message).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => full(),
            mpsc::error::TrySendError::Closed(_) => Status::unavailable("the member is stopping"),
        })
    }
}

/// A line of the file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record<'a> {
    pub first_at: String,
    pub last_at: String,
    /// When identities and policy were added.
    pub judged_at: String,
    /// The node that decided.
    pub node: String,
    /// `allowed`, `denied`, `cut`, or `observed` where policy denies and the node only observes.
    pub decision: String,
    /// The number of connections.
    pub count: u64,
    pub from: Party,
    pub to: Party,
    /// A name or a number, as in a question.
    pub protocol: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// Of the last connection.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_port: Option<u16>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub icmp: Option<Icmp>,
    /// The verdicts of policy, as in an answer of `hanse policy explain`; `none` in a direction whose pod is not this cluster's.
    #[serde(flatten)]
    pub policy: AnswerLine<'a>,
    /// The revisions that were compiled when it was judged.
    pub hub_revision: u64,
    pub local_revision: u64,
}

impl Record<'_> {
    /// Whether the verdict would change if staged policies were enforced.
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

/// One end: a pod with its address, or an address without a known owner.
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
    /// The pod's own labels, as far as they are known, the first 32.
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

/// Judges and writes received flows, until `stop`.
pub async fn keep(
    received: &mut mpsc::Receiver<FromNode>,
    live: Live,
    data: PathBuf,
    metrics: FlowMetrics,
    writes: Writes,
    stop: CancellationToken,
) {
    let mut file = FlowFile::new(&data);
    loop {
        let mut batch = Vec::new();
        tokio::select! {
            () = stop.cancelled() => return,
            count = received.recv_many(&mut batch, MAX_MESSAGES) => if count == 0 { return },
        }
        let began = Instant::now();
        let all: u64 = batch.iter().map(decisions).fold(0, u64::saturating_add);
        let live = live.clone();
        let work = move || {
            let written = judge_into(&mut file, &live, &batch);
            (file, written)
        };
        let mut written = match tokio::task::spawn_blocking(work).await {
            Ok((again, written)) => {
                file = again;
                written
            }
            Err(error) => {
                tracing::error!(%error, "judging flows failed; they are dropped");
                file = FlowFile::new(&data);
                Written::default()
            }
        };
        let failed = written.failed.take();
        // A batch without records says nothing about the file.
        if failed.is_some() || written.records > 0 {
            writes.note("flows", &failed.map_or(Ok(()), Err));
        }
        metrics.count(written.records, all.saturating_sub(written.decisions));
        let wait = JUDGE_EVERY.max(began.elapsed() * REST);
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(wait) => {}
        }
    }
}

/// The number of decisions in a message.
fn decisions(received: &FromNode) -> u64 {
    let counts = received.flows.flows.iter().map(|flow| flow.count).chain([received.flows.missed]);
    counts.fold(0, u64::saturating_add).min(MAX_COUNT)
}

/// The result of a batch.
#[derive(Debug, Default)]
struct Written {
    records: u64,
    /// In the records.
    decisions: u64,
    failed: Option<io::Error>,
}

fn judge_into(file: &mut FlowFile, live: &Live, received: &[FromNode]) -> Written {
    let (mut lines, mut written) = (Lines::default(), Written::default());
    let mut write = |lines: &mut Lines| {
        let lines = std::mem::take(lines);
        match file.append(&lines) {
            Ok(()) => {
                written.records += lines.count;
                written.decisions = written.decisions.saturating_add(lines.decisions);
            }
            Err(error) => written.failed = Some(error),
        }
    };
    let flows: Vec<(&Arc<str>, &wire::Flow)> =
        received.iter().flat_map(|it| it.flows.flows.iter().map(move |flow| (&it.node, flow))).collect();
    for some in flows.chunks(AT_ONCE) {
        judge(&live.read(), some, SystemTime::now(), |record| lines.add(record));
        // Without the lock.
        if lines.bytes.len() >= WRITE_BYTES {
            write(&mut lines);
        }
    }
    write(&mut lines);
    written
}

/// Calls `show` with the records of flows, each with the node that reported it. Malformed flows are left out, and flows of
/// this cluster's pods of which none is on the reporting node: a node reports its own pods' flows only, and the address of a
/// pod that has moved belongs to another.
fn judge(state: &State, flows: &[(&Arc<str>, &wire::Flow)], now: SystemTime, mut show: impl FnMut(&Record<'_>)) {
    let judge = state.judge();
    for (node, flow) in flows {
        let Some(packet) = packet(flow, |address| judge.end(address)) else { continue };
        let is_local = |end| judge.node_of(end);
        let nodes: Vec<Option<&Arc<str>>> =
            [&packet.source, &packet.destination].into_iter().filter_map(is_local).collect();
        let in_ranges = |end: &End| state.is_in_ranges(node, end.address);
        let is_here = match nodes.is_empty() {
            true => in_ranges(&packet.source) || in_ranges(&packet.destination),
            false => nodes.contains(&Some(*node)),
        };
        if !is_here {
            continue;
        }
        let explanation = judge.explain(&packet);
        let own = |end| state.own_stream(&judge, &packet, end);
        let line = explanation.line().with_own_streams(own(&packet.source), own(&packet.destination));
        // The other cluster's member judges the direction of a pod there.
        let judged = |end| is_local(end).map(|_| line.clone());
        let mut policy = AnswerLine::joined(judged(&packet.source), judged(&packet.destination));
        if nodes.is_empty() {
            (policy.verdict, policy.staged.verdict) = (AnswerVerdict::None, AnswerVerdict::None);
        }
        if let Some(record) = record((state, &judge), node, flow, &packet, policy, now) {
            show(&record);
        }
    }
}

/// The packet of a flow; `None`: the flow is malformed.
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
    (state, judge): (&State, &Judge<'_>),
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
        wire::Decision::Observed => "observed",
        wire::Decision::Unspecified => return None,
    };
    let at = |ms| {
        let at = SystemTime::UNIX_EPOCH.checked_add(Duration::from_millis(ms)).unwrap_or(now + MAX_SKEW);
        rfc3339(at.clamp(now.checked_sub(MAX_SKEW).unwrap_or(SystemTime::UNIX_EPOCH), now + MAX_SKEW))
    };
    let has_ports = has_ports(packet.protocol);
    Some(Record {
        first_at: at(flow.first_ms),
        last_at: at(flow.last_ms),
        judged_at: rfc3339(now),
        node: node.to_owned(),
        decision: decision.to_owned(),
        count: flow.count.min(MAX_COUNT),
        from: party(judge, &packet.source),
        to: party(judge, &packet.destination),
        protocol: protocol_name(packet.protocol),
        port: has_ports.then_some(packet.destination_port),
        source_port: has_ports.then_some(packet.source_port),
        icmp: packet.icmp.map(|(kind, code)| Icmp { kind, code }),
        policy,
        hub_revision: state.hub_revision,
        local_revision: state.local_revision,
    })
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    match *bytes {
        [a, b, c, d] => Some(IpAddr::from([a, b, c, d])),
        _ => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
    }
}

fn party(judge: &Judge<'_>, end: &End) -> Party {
    let pod = end.pod.as_ref().map(|(cluster, id)| Pod {
        cluster: cluster.to_string(),
        namespace: id.namespace.as_deref().unwrap_or_default().to_owned(),
        name: id.name.to_string(),
        labels: judge.labels_of(end).take(MAX_LABELS).map(|(key, value)| (key.to_owned(), (**value).into())).collect(),
    });
    Party { ip: end.address, pod }
}

#[derive(Debug, Default)]
struct Lines {
    bytes: Vec<u8>,
    count: u64,
    /// In the lines.
    decisions: u64,
}

impl Lines {
    fn add(&mut self, record: &Record<'_>) {
        serde_json::to_writer(&mut self.bytes, record).expect("a record serializes to JSON");
        self.bytes.push(b'\n');
        self.count += 1;
        self.decisions = self.decisions.saturating_add(record.count);
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

/// The newest `last` records that `wanted` accepts, the oldest first. Lines that are not records are skipped.
///
/// # Errors
/// When there is no file, or a file cannot be read.
pub fn read(data: &Path, last: usize, wanted: impl Fn(&Record<'_>) -> bool) -> io::Result<Vec<Record<'static>>> {
    let open = |name| match File::open(data.join("flows").join(name)) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    };
    let (newest, mut before) = (open(NEWEST)?, open(BEFORE)?);
    if newest.is_none() && before.is_none() {
        let missing = if data.is_dir() { "there are no flows yet" } else { "the folder does not exist" };
        return Err(io::Error::new(io::ErrorKind::NotFound, missing));
    }
    // The newest became the one before in between.
    if let (Some(a), Some(b)) = (&newest, &before)
        && a.metadata()?.ino() == b.metadata()?.ino()
    {
        before = None;
    }
    let mut found = VecDeque::new();
    for file in before.into_iter().chain(newest) {
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
    use hanse_api::assemble_cluster;
    use hanse_api::manifest::{self, Manifests};
    use hanse_compiler::Update;
    use hanse_policy::inventory::Inventory;
    use hanse_policy::model::PolicySet;

    use super::*;

    fn pod(namespace: &str, name: &str, ips: &[&str]) -> String {
        let ips: Vec<String> = ips.iter().map(|ip| format!("{{ip: \"{ip}\"}}")).collect();
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}, labels: {{app: {name}}}}}\n\
             spec: {{nodeName: 'n'}}\nstatus: {{podIPs: [{}]}}\n---\n",
            ips.join(", ")
        )
    }

    /// Enforced: only `a` may connect to `b`, on port 80. Staged: `b` is isolated.
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
    fn live() -> Live {
        let cluster = |name: &str, text: &str| {
            let mut read = Manifests::default();
            manifest::read_bytes(&"f.yaml".into(), text.as_bytes(), &mut read);
            assert_eq!(read.diagnostics, []);
            assemble_cluster(&name.into(), read.objects)
        };
        let pods = pod("train", "a", &["10.1.0.1"]) + &pod("train", "b", &["10.1.0.2", "fd01::2"]);
        let own = cluster("c", &(pods + POLICIES));
        let other = cluster("a", &(pod("serve", "x", &["10.1.0.2"]) + &pod("serve", "z", &["10.2.0.9"])));
        let policies = PolicySet { clusters: [("c".into(), own.layer)].into(), ..PolicySet::default() };
        let inventory = Inventory {
            clusters: [("c".into(), own.cluster), ("a".into(), other.cluster)].into(),
            ..Inventory::default()
        };
        let live = Live::new("c".into());
        {
            let mut state = live.write();
            let all = Update::all_of(&"c".into(), &policies, &inventory);
            all.into_iter().for_each(|update| state.compiler.apply(update));
            state.compiler.commit();
            (state.hub_revision, state.local_revision) = (7, 9);
            state.pod_ranges.insert("n".into(), vec!["10.1.0.0/24".parse().expect("a range")]);
            state.pod_ranges.insert("without-ranges".into(), Vec::new());
        }
        live
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

    fn from_node(node: &str, flows: Vec<wire::Flow>) -> FromNode {
        FromNode { node: node.into(), flows: wire::Flows { flows, missed: 0 }, _room: None }
    }

    fn judged(flows: Vec<wire::Flow>) -> Vec<Record<'static>> {
        let node: Arc<str> = "n".into();
        let flows: Vec<_> = flows.iter().map(|flow| (&node, flow)).collect();
        let mut lines = Lines::default();
        judge(&live().read(), &flows, NOW + Duration::from_secs(1_800_000_100), |record| lines.add(record));
        let text = String::from_utf8(lines.bytes).expect("text");
        text.lines().map(|line| serde_json::from_str(line).expect("a record")).collect()
    }

    #[test]
    fn a_flow_has_both_outcomes_in_the_directions_of_local_pods() {
        for (source, destination, port, ends, verdicts) in [
            ("10.1.0.1", "10.1.0.2", 80, ["c/train/a", "c/train/b"], ["allow", "allow", "allow", "deny"]),
            ("10.1.0.1", "10.1.0.2", 81, ["c/train/a", "c/train/b"], ["deny", "allow", "deny", "deny"]),
            ("10.1.0.2", "8.8.8.8", 53, ["c/train/b", "8.8.8.8"], ["allow", "allow", "none", "deny"]),
            ("fd01::2", "fd02::1", 53, ["c/train/b", "fd02::1"], ["allow", "allow", "none", "deny"]),
            // The other cluster's member judges its pods.
            ("10.2.0.9", "10.1.0.2", 80, ["a/serve/z", "c/train/b"], ["deny", "none", "deny", "deny"]),
            ("10.1.0.1", "10.2.0.9", 80, ["c/train/a", "a/serve/z"], ["allow", "allow", "none", "allow"]),
            ("10.1.0.99", "8.8.8.8", 80, ["10.1.0.99", "8.8.8.8"], ["none", "none", "none", "none"]),
        ] {
            let [record] = &judged(vec![flow(source, destination, port)])[..] else { panic!("one record") };
            let of = &record.policy;
            assert_eq!([record.from.to_string(), record.to.to_string()], ends);
            let found = [of.verdict, of.egress.verdict, of.ingress.verdict, of.staged.verdict];
            assert_eq!(found.map(|it| it.to_string()), verdicts, "{source} {destination}");
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
            ("judgedAt", "2027-01-15T08:01:40Z".into()),
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
    fn skips_malformed_flows() {
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
        let wrong = &judged(vec![wire::Flow { first_ms: 1, last_ms: u64::MAX, ..good }])[0];
        let window = (&*wrong.first_at, &*wrong.last_at);
        assert_eq!(window, ("2027-01-15T07:01:40Z", "2027-01-15T09:01:40Z"), "times are at most an hour from now");
        let ping =
            wire::Flow { protocol: 1, port: 0, source_port: 0, icmp: icmp(8), ..flow("10.1.0.1", "10.1.0.2", 0) };
        let ping = &judged(vec![ping])[0];
        assert_eq!((&*ping.protocol, ping.port, &ping.icmp), ("ICMP", None, &Some(Icmp { kind: 8, code: 0 })));
    }

    #[test]
    fn a_node_reports_flows_of_its_own_pods_only() {
        let count = |node: &str, flow: wire::Flow| {
            let mut count = 0;
            judge(&live().read(), &[(&node.into(), &flow)], NOW, |_| count += 1);
            count
        };
        for (source, destination) in [("10.1.0.1", "10.1.0.2"), ("10.1.0.1", "8.8.8.8"), ("10.2.0.9", "10.1.0.2")] {
            let flow = flow(source, destination, 80);
            assert_eq!((count("n", flow.clone()), count("other", flow)), (1, 0), "{source} {destination}");
        }
        for (source, destination, here) in [
            ("10.1.0.99", "8.8.8.8", 1),
            ("8.8.8.8", "10.1.0.99", 1),
            ("10.1.9.9", "8.8.8.8", 0),
            ("10.2.0.9", "8.8.8.8", 0),
        ] {
            let flow = flow(source, destination, 80);
            let counts = ["n", "other", "without-ranges"].map(|node| count(node, flow.clone()));
            assert_eq!(counts, [here, 0, 1], "{source} {destination}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_node_above_its_rate_does_not_block_others() {
        let (inbox, mut received) = Inbox::new();
        let message = |flows: usize| wire::Flows { flows: vec![flow("10.1.0.1", "10.1.0.2", 80); flows], missed: 0 };
        let take = |node: &str, flows: usize| inbox.take(node.into(), message(flows)).map_err(|status| status.code());
        let full = Err(tonic::Code::ResourceExhausted);
        assert_eq!(take("a", MAX_FLOWS + 1), Err(tonic::Code::InvalidArgument));
        let taken = (0..99).take_while(|_| take("a", MAX_FLOWS).is_ok()).count();
        assert_eq!(taken, 10);
        assert_eq!((take("a", 1), take("b", 1)), (full, Ok(())));
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!((take("a", 1), take("a", 1)), (Ok(()), full));
        // Many small messages find room; of large ones so many as fit.
        assert!((0..1_000).all(|node| take(&format!("small-{node}"), 2) == Ok(())));
        let large = (0..99).take_while(|node| take(&format!("large-{node}"), MAX_FLOWS) == Ok(())).count();
        assert_eq!(large, (MAX_WAITING - 10 * MAX_FLOWS - 2 - 2_000) / MAX_FLOWS);
        drop(received.recv().await);
        assert_eq!(take("later", MAX_FLOWS), Ok(()), "what is taken makes room");
        drop(received);
        assert_eq!(take("last", 1), Err(tonic::Code::Unavailable));
    }

    #[test]
    fn dropped_flows_are_counted_by_decisions() {
        let folder = tempfile::tempdir().expect("a folder");
        let bad = wire::Flow { source: Vec::new().into(), ..flow("10.1.0.1", "10.1.0.2", 80) };
        let mut received = from_node("n", vec![flow("10.1.0.1", "10.1.0.2", 80), bad]);
        received.flows.missed = 5;
        assert_eq!(decisions(&received), 3 + 3 + 5);
        let batch = [received];
        let written = judge_into(&mut FlowFile::new(folder.path()), &live(), &batch);
        assert_eq!((written.records, written.decisions, written.failed.is_some()), (1, 3, false));
        // Where nothing can be written.
        let file = folder.path().join("file");
        File::create(&file).expect("made");
        let written = judge_into(&mut FlowFile::new(&file), &live(), &batch);
        assert_eq!((written.records, written.decisions, written.failed.is_some()), (0, 0, true));
        let endless = wire::Flow { count: u64::MAX, ..flow("10.1.0.1", "10.1.0.2", 80) };
        assert_eq!(decisions(&from_node("n", vec![endless.clone(), endless])), MAX_COUNT);
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
        let none = |data: &Path| read(data, 9, |_| true).expect_err("none yet").to_string();
        assert_eq!(none(folder.path()), "there are no flows yet");
        assert_eq!(none(&folder.path().join("other")), "the folder does not exist");
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
