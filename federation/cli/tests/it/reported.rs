//! What members report, as the commands show it.

use std::time::{Duration, Instant};

use futures::channel::mpsc::{UnboundedSender, unbounded};
use hanse_proto::federation::v1 as pb;
use hanse_proto::federation::v1::exchange_client::ExchangeClient;
use hanse_proto::federation::v1::publish_request::Message;
use hanse_protocol::reason::{ExchangeProblem, Failure, Finding, HookProblem, Reason, Rejection, Subject, wire};
use prost::Message as _;
use serde_json::Value;
use tokio::sync::watch;

use crate::online::{TIER, World, member, policy};

/// A cluster that has joined, and a stream on which it reports what a test wants.
pub struct Reporter {
    cluster: String,
    stream: UnboundedSender<pb::PublishRequest>,
    /// Of the hub's own objects that the cluster was sent last.
    received: watch::Receiver<pb::Position>,
    _watching: UnboundedSender<pb::WatchRequest>,
}

impl Reporter {
    fn new(world: &World, cluster: &str) -> Self {
        let identity = world.join(cluster);
        let address = world.hub.address.to_string();
        let (stream, requests) = unbounded();
        let open = Message::Open(pb::PublishOpen { protocol: 1, epoch: 1, ..Default::default() });
        stream.unbounded_send(pb::PublishRequest { message: Some(open) }).expect("it is read");
        // It is not silent, however slow the test is.
        let beats = stream.clone();
        world.runtime.spawn(async move {
            let beat = || pb::PublishRequest { message: Some(Message::Heartbeat(pb::Heartbeat::default())) };
            while beats.unbounded_send(beat()).is_ok() {
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        });
        let (watching, watch_requests) = unbounded();
        let open = pb::watch_request::Message::Open(pb::WatchOpen { protocol: 1, ..pb::WatchOpen::default() });
        watching.unbounded_send(pb::WatchRequest { message: Some(open) }).expect("it is read");
        let (positions, received) = watch::channel(pb::Position::default());
        let channel = identity.clone();
        let hub = address.clone();
        world.runtime.spawn(async move {
            let connection = channel.hub_client().expect("a client").connect(&hub).await.expect("a hub");
            let mut client = ExchangeClient::new(connection.channel);
            let mut sent = client.watch(watch_requests).await.expect("it watches").into_inner();
            let mut own = false;
            while let Ok(Some(response)) = sent.message().await {
                match response.message {
                    Some(pb::watch_response::Message::Begin(begin)) => own = begin.origin.is_empty(),
                    Some(pb::watch_response::Message::End(end)) if own => {
                        positions.send_replace(end.position.unwrap_or_default());
                    }
                    _ => {}
                }
            }
        });
        world.runtime.spawn(async move {
            let connection = identity.hub_client().expect("a client").connect(&address).await.expect("a hub");
            let mut client = ExchangeClient::new(connection.channel);
            let mut answers = client.publish(requests).await.expect("it publishes").into_inner();
            while answers.message().await.is_ok_and(|answer| answer.is_some()) {}
        });
        Self { cluster: cluster.to_owned(), stream, received, _watching: watching }
    }

    /// Where the hub is, once the cluster was sent that.
    fn position(&self, world: &World) -> pb::Position {
        let revision = world.hanse(&["status", "-o", "json"]).json()["hubRevision"].as_u64().expect("a revision");
        let mut received = self.received.clone();
        let sent = received.wait_for(|at| at.revision >= revision);
        let sent = world.runtime.block_on(async { tokio::time::timeout(Duration::from_secs(20), sent).await });
        *sent.expect("in time").expect("it watches")
    }

    /// Reports, and waits until the hub shows it. The number of agents distinguishes reports.
    pub fn report(&self, world: &World, report: pb::Realisation) {
        let agents = report.agents;
        let message = Some(Message::Realisation(report.encode_to_vec().into()));
        self.stream.unbounded_send(pb::PublishRequest { message }).expect("it is read");
        let deadline = Instant::now() + Duration::from_secs(20);
        while status_of(world, &self.cluster)["agents"] != agents {
            assert!(Instant::now() < deadline, "not in time: {:?}", world.hanse(&["status"]));
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn status_of(world: &World, cluster: &str) -> Value {
    let status = world.hanse(&["status", "-o", "json"]).json();
    let of = |it: &&Value| it["name"] == cluster;
    status["items"].as_array().into_iter().flatten().find(of).cloned().unwrap_or_default()
}

/// Clears the screen, colours, rewrites the line above, sets the title, forges a row, turns words around.
const HOSTILE: &str =
    "\u{1b}[2J\u{1b}[31m\u{9b}1A\u{1b}]0;x\u{7}\r\nprod  accepted  yes\t0.1s\u{202e}evil\u{2066}\u{200b}\u{85}";

#[test]
fn control_characters_of_a_member_are_escaped() {
    let world = World::new();
    let manifests = format!("{TIER}{}{}", member("evil", "10.1.0.0/16"), policy("p", "platform", 1));
    assert_eq!(world.apply(&manifests, &[]).code, Some(0));
    let evil = Reporter::new(&world, "evil");
    let node = pb::NodePosition {
        node: HOSTILE.to_owned(),
        connected: true,
        errors: vec![error(HOSTILE, HOSTILE)],
        hooks: Some(wire::hooks(&HookProblem::ProbeNotSent(HOSTILE.to_owned()))),
        failure: Some(wire::failure(&Failure::Dataplane(HOSTILE.to_owned()))),
        unenforced: vec![unenforced(HOSTILE, HOSTILE, &Finding::SecondInterface(HOSTILE.to_owned()))],
        unenforced_total: 1,
        ..pb::NodePosition::default()
    };
    let refused = Some(pb::policy_state::State::Refused(HOSTILE.to_owned()));
    let report = pb::Realisation {
        nodes: vec![node],
        policies: vec![pb::PolicyState { policy: "p".to_owned(), state: refused, ..Default::default() }],
        agents: 1,
        problems: vec![wire::reason(&Reason::Exchange(ExchangeProblem::SelectionRejected(HOSTILE.to_owned())))],
        ..pb::Realisation::default()
    };
    evil.report(&world, report);
    let acts = |it: char| it.is_control() && it != '\n' || "\u{202e}\u{2066}\u{200b}".contains(it);
    for arguments in [
        &["status"][..],
        &["status", "-o", "json"],
        &["status", "-o", "yaml"],
        &["wait", "p"],
        &["wait", "p", "-o", "json"],
        &["wait", "p", "-o", "yaml"],
    ] {
        let done = world.hanse(arguments);
        let shown = format!("{}{}", done.out, done.err);
        assert!(shown.contains("\\u001b[2J"), "it is shown, escaped: {arguments:?} {done:?}");
        assert!(!shown.chars().any(acts), "{arguments:?} {done:?}");
        assert!(!shown.lines().any(|line| line.starts_with("prod")), "no forged row: {arguments:?} {done:?}");
    }
    // Programs read what was reported.
    let problems = status_of(&world, "evil")["problems"].to_string();
    assert!(
        problems.contains(&serde_json::to_string(HOSTILE).expect("JSON").trim_matches('"').to_owned()),
        "{problems}"
    );
}

/// A report of a cluster whose nodes enforce what the hub has.
pub fn in_sync(at: pb::Position, nodes: Vec<pb::NodePosition>) -> pb::Realisation {
    let agents = u32::try_from(nodes.len()).expect("few");
    let received = Some(at);
    pb::Realisation { hub: Some(at), received, nodes, agents, agents_current: agents, ..pb::Realisation::default() }
}

pub fn node(name: &str, at: pb::Position) -> pb::NodePosition {
    let (node, agent_version) = (name.to_owned(), "0.1.0".to_owned());
    let (hub_revision, term, number) = (at.revision, 3, 7);
    pb::NodePosition { node, hub_revision, connected: true, agent_version, term, number, ..pb::NodePosition::default() }
}

fn error(policy: &str, error: &str) -> pb::ObjectError {
    let subject = wire::subject(&Subject::FederatedPolicy(policy.to_owned()));
    let rejection = Rejection { error: error.to_owned(), set: None };
    pb::ObjectError { subject: Some(subject), at: None, reason: Some(wire::reason(&Reason::Rejection(rejection))) }
}

fn unenforced(namespace: &str, name: &str, finding: &Finding) -> pb::UnenforcedPod {
    let pod = hanse_proto::report::v1::Pod { namespace: namespace.to_owned(), name: name.to_owned() };
    pb::UnenforcedPod { pod: Some(pod), finding: Some(wire::finding(finding)) }
}

/// Pods that do not answer, each at an address of its own.
fn silent_pods(count: u8) -> Vec<pb::UnenforcedPod> {
    (0..count).map(|it| unenforced("x", &format!("p{it}"), &Finding::Silent([10, 1, 0, it].into()))).collect()
}

pub fn train() -> (World, Reporter, pb::Position) {
    let world = World::new();
    let manifests = format!("{TIER}{}{}", member("train", "10.1.0.0/16"), policy("p", "platform", 1));
    assert_eq!(world.apply(&manifests, &[]).code, Some(0));
    let train = Reporter::new(&world, "train");
    let at = train.position(&world);
    (world, train, at)
}

#[test]
fn status_names_the_node_that_lags_and_groups_what_repeats() {
    let (world, train, at) = train();
    let silent = pb::NodePosition { unenforced: silent_pods(150), unenforced_total: 150, ..node("node-1", at) };
    let gone = pb::NodePosition { hub_revision: 1, connected: false, age_ms: 180_000, ..node("node-2", at) };
    train.report(&world, in_sync(at, vec![silent, gone, node("node-3", at)]));
    let shown = world.hanse(&["status"]);
    let of = |text: &str| shown.out.lines().filter(|line| line.contains(text)).collect::<Vec<&str>>();
    assert_eq!(
        of("not proven"),
        [
            "train: node node-1: 150 pods: not enforced: not proven: no answer to the probe (x/p0, x/p1, x/p2, and 147 more)"
        ],
        "{shown:?}"
    );
    let [lags] = of("node-2")[..] else { panic!("{shown:?}") };
    assert!(
        lags.starts_with(
            "train: node node-2: its agent is not connected, last seen 3 m ago, at hub revision 1, newest is "
        ),
        "{lags}"
    );
    assert!(of("node-3").is_empty(), "{shown:?}");
    // Programs, and who describes the cluster, are given every pod.
    let nodes = status_of(&world, "train")["nodes"].clone();
    assert_eq!(nodes.as_array().map(Vec::len), Some(2), "{nodes:#}");
    assert_eq!(nodes[0]["problems"][0]["items"].as_array().map(Vec::len), Some(150));
    let described = world.hanse(&["describe", "cluster", "train"]);
    assert_eq!(described.out.lines().filter(|line| line.starts_with("  pod x/p")).count(), 150, "{described:?}");
    assert_eq!(world.hanse(&["status", "train"]).out.lines().nth(3).map(|line| line.starts_with("train")), Some(true));
    assert_eq!(world.hanse(&["status", "-o", "name"]).out, "train\n");
    assert!(world.hanse(&["status", "-o", "wide"]).out.contains("KEY EXCHANGE"));
    let unknown = world.hanse(&["status", "nowhere"]);
    assert!(unknown.code == Some(1) && unknown.err.contains("hanse cluster list"), "{unknown:?}");
}

#[test]
fn nodes_are_listed_with_position_age_version_and_problem() {
    let (world, train, at) = train();
    let refused = error("p", "no such set");
    let failing = pb::NodePosition { errors: vec![refused], ..node("node-1", at) };
    train.report(&world, in_sync(at, vec![node("node-2", at), failing]));
    assert_eq!(world.hanse(&["node", "list", "-o", "name"]).out, "train/node-1\ntrain/node-2\n");
    let table = world.hanse(&["node", "list", "train"]);
    let rows: Vec<Vec<&str>> = table.out.lines().map(|line| line.split_whitespace().collect()).collect();
    let revision = at.revision.to_string();
    assert_eq!(rows[1][..5], ["train", "node-1", "lagging", "3.7", &revision], "{table:?}");
    assert!(table.out.contains("p: no such set"), "{table:?}");
    assert_eq!(rows[2][..3], ["train", "node-2", "enforcing"], "{table:?}");
    let problems = world.hanse(&["node", "list", "--problems", "-o", "json"]).json();
    let [only] = &problems["items"].as_array().expect("a list")[..] else { panic!("{problems:#}") };
    assert_eq!((&only["node"], &only["agentVersion"]), (&"node-1".into(), &"0.1.0".into()));
    assert_eq!(
        only["problems"][0],
        serde_json::json!({
            "reason": "no such set", "code": "Rejected", "count": 1, "items": ["p"],
            "objects": [{"kind": "FederatedNetworkPolicy", "name": "p"}],
        })
    );
    let described = world.hanse(&["describe", "node", "train/node-1"]);
    assert!(described.out.contains("Generation:    3.7") && described.out.contains("no such set"), "{described:?}");
    for (unknown, code) in [
        (&["node", "list", "nowhere"][..], 1),
        (&["describe", "node", "train/gone"], 1),
        (&["describe", "node", "node-1"], 2),
    ] {
        let unknown = world.hanse(unknown);
        assert!(unknown.code == Some(code) && unknown.out.is_empty() && !unknown.err.is_empty(), "{unknown:?}");
    }
    // More than a page.
    let long = error("q", &"e".repeat(500));
    let many = (0..3_000)
        .map(|it| pb::NodePosition { errors: vec![long.clone(), long.clone()], ..node(&format!("n{it:04}"), at) });
    train.report(&world, in_sync(at, many.collect()));
    let names = world.hanse(&["node", "list", "train", "-o", "name"]).out;
    assert!(names.lines().map(str::to_owned).eq((0..3_000).map(|it| format!("train/n{it:04}"))), "each once, in order");
    let status = world.hanse(&["status"]);
    assert!(status.out.lines().count() < 50 && status.out.contains("more problems"), "{}", status.out.len());
}

#[test]
fn describe_shows_summary_enforcement_and_last_change() {
    let (world, train, at) = train();
    let behind = pb::NodePosition { hub_revision: 1, ..node("node-2", at) };
    train.report(&world, in_sync(at, vec![node("node-1", at), behind]));
    let shown = world.hanse(&["describe", "fnp", "p"]);
    assert_eq!(shown.code, Some(0), "{shown:?}");
    for expected in [
        "platform (Guard, order 1, default Pass)",
        "by user/admin (apply)",
        "  kind: FederatedNetworkPolicy",
        "1 of 2",
        "node node-2: at hub revision 1, newest is ",
    ] {
        assert!(shown.out.contains(expected), "{expected}: {}", shown.out);
    }
    let json = world.hanse(&["describe", "fnp/p", "-o", "json"]).json();
    assert_eq!((&json["clusters"][0]["state"], &json["clusters"][0]["nodesEnforcing"]), (&"lagging".into(), &1.into()));
    assert_eq!(json["lastChange"]["who"], "user/admin");
    let refused = error("p", "no such set");
    let failing = pb::NodePosition { errors: vec![refused], ..node("node-1", at) };
    train.report(&world, in_sync(at, vec![failing]));
    assert!(world.hanse(&["describe", "fnp", "p"]).out.contains("node node-1: no such set"));
    // A tier is enforced where every node is as far as the hub was when it was written.
    let tier = world.hanse(&["describe", "tier", "platform", "-o", "json"]).json();
    assert_eq!(tier["clusters"][0]["state"], "enforced", "{tier:#}");
    let cluster = world.hanse(&["describe", "cluster", "train", "-o", "json"]).json();
    assert_eq!((&cluster["name"], &cluster["nodes"][0]["node"]), (&"train".into(), &"node-1".into()));
    for (unknown, code) in [
        (&["describe", "fnp", "gone"][..], 1),
        (&["describe", "fnp"], 2),
        (&["describe", "king", "x"], 2),
        (&["describe", "cluster", "x"], 1),
    ] {
        let unknown = world.hanse(unknown);
        assert!(unknown.code == Some(code) && unknown.out.is_empty() && !unknown.err.is_empty(), "{unknown:?}");
    }
}

#[test]
fn wait_accepts_several_objects_reports_at_once_and_waits_for_deletion() {
    let (world, train, at) = train();
    let file = world.folder.path().join("files.yaml");
    let manifests = format!("{TIER}{}", policy("p", "platform", 1));
    std::fs::write(&file, manifests).expect("written");
    let file = file.to_str().expect("UTF-8");
    let wait = |arguments: &[&str]| world.hanse(&[&["wait", "--timeout", "1"], arguments].concat());
    // Less than the time between two reasons.
    let lags = wait(&["p"]);
    let first = lags.err.lines().next().unwrap_or_default();
    assert_eq!((lags.code, first), (Some(1), "FederatedNetworkPolicy/p waits for"), "{lags:?}");
    train.report(&world, in_sync(at, vec![node("node-1", at)]));
    for arguments in [&["p", "tier/platform"][..], &["--all"], &["-f", file], &["-f", file, "mc/train", "--all"]] {
        let done = wait(arguments);
        assert_eq!((done.code, done.err.as_str()), (Some(0), ""), "{arguments:?}: {done:?}");
        assert!(done.out.contains("FederatedNetworkPolicy/p is enforced"), "{arguments:?}: {done:?}");
    }
    assert_eq!(wait(&[]).code, Some(2), "nothing is named");
    assert_eq!(wait(&["p", "tier/gone"]).code, Some(1));
    let refused = error("p", "no such set");
    train.report(&world, in_sync(at, vec![node("n", at), pb::NodePosition { errors: vec![refused], ..node("m", at) }]));
    let refused = wait(&["p"]);
    assert!(refused.code == Some(2) && refused.err.contains("node m: no such set"), "{refused:?}");

    let there = wait(&["--for=deleted", "p"]);
    assert!(there.code == Some(1) && there.err.contains("the hub still has it"), "{there:?}");
    assert_eq!(world.hanse(&["delete", "fnp", "p"]).code, Some(0));
    let lags = wait(&["--for=deleted", "p"]);
    assert!(lags.code == Some(1) && lags.err.contains("train"), "nodes may still enforce it: {lags:?}");
    let at = train.position(&world);
    train.report(&world, in_sync(at, vec![node("n", at), node("m", at), node("o", at)]));
    let gone = wait(&["--for=deleted", "p", "-o", "json"]);
    assert_eq!((gone.code, &gone.json()["state"]), (Some(0), &"deleted".into()), "{gone:?}");
}

#[test]
fn get_watch_prints_objects_and_then_each_change() {
    use std::io::BufRead as _;
    let world = World::new();
    assert_eq!(world.apply(&format!("{TIER}{}", policy("p", "platform", 1)), &[]).code, Some(0));
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_hanse"));
    command.args(["get", "fnp", "--watch", "-o", "json"]).env("HANSE_CONTEXT", &world.context);
    let mut child = command.stdout(std::process::Stdio::piped()).spawn().expect("hanse starts");
    let mut lines = std::io::BufReader::new(child.stdout.take().expect("piped")).lines();
    let mut next = || {
        let line = lines.next().expect("a change").expect("UTF-8");
        let change: Value = serde_json::from_str(&line).expect("JSON");
        (change["type"].as_str().unwrap_or_default().to_owned(), change["object"].clone())
    };
    let (change, object) = next();
    assert_eq!((change.as_str(), &object["metadata"]["name"]), ("ADDED", &"p".into()));
    assert_eq!(world.apply(&policy("p", "platform", 2), &[]).code, Some(0));
    let (change, object) = next();
    assert_eq!((change.as_str(), &object["spec"]["order"]), ("MODIFIED", &2.into()));
    // Another kind is not watched.
    assert_eq!(world.apply(&member("train", "10.1.0.0/16"), &[]).code, Some(0));
    assert_eq!(world.apply(&policy("q", "platform", 1), &[]).code, Some(0));
    let (change, object) = next();
    assert_eq!((change.as_str(), &object["metadata"]["name"]), ("ADDED", &"q".into()));
    assert_eq!(world.hanse(&["delete", "fnp", "p"]).code, Some(0));
    let (change, object) = next();
    assert_eq!((change.as_str(), &object["metadata"]["name"]), ("DELETED", &"p".into()));
    child.kill().expect("it is ended");
    child.wait().expect("it has ended");
    assert_eq!(
        world.hanse(&["get", "-o", "name"]).out,
        "MemberCluster/train\nTier/platform\nFederatedNetworkPolicy/q\n"
    );
    let wide = world.hanse(&["get", "fnp", "-o", "wide"]);
    assert!(wide.out.contains("SELECTOR"), "{wide:?}");
}
