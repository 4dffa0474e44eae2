//! The rules in force when an agent starts and while it runs, in a real kernel.

use std::io::Write as _;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hanse_agent::enforcer::{Enforcer, Options, Proofs, Started};
use hanse_agent::metrics::AgentMetrics;
use hanse_agent::{backend, pod_ranges, snapshot};
use hanse_dataplane::{Backend as _, Finding, Settings};
use hanse_protocol::reason::HookProblem;
use hanse_ruleset::{
    Action, Chain, EndpointId, Generation, LocalEndpoint, NodeConfig, Peer, Phase, Policy, PortRange, Rule, RuleSet,
    Tier, TierDefault,
};
use hanse_runtime::health::{Health, Writes};

use crate::net::{Net, address, ip, until};

/// Pods 2 and 3, which accept TCP to `port` and nothing else.
pub fn accepting(port: u16, number: u64) -> Arc<RuleSet> {
    let rule = Rule {
        action: Action::Allow,
        index: 0,
        unknown: false,
        family: None,
        protocol: Some(6),
        not_protocol: None,
        icmp: None,
        not_icmp: None,
        source: Peer::default(),
        destination: Peer { ports: vec![PortRange { first: port, last: port }], ..Peer::default() },
    };
    let policy = Policy { name: "NetworkPolicy a/web".into(), rules: vec![rule] };
    let tier = Tier { name: "default".into(), policies: vec![policy.id()], default: TierDefault::Deny };
    let chain = |tiers| Chain { phases: vec![Phase { name: "Local".into(), tiers }], profile_allows: true };
    let (ingress, open) = (chain(vec![tier]), chain(Vec::new()));
    let endpoint = |pod: u8| {
        let id = EndpointId { namespace: "a".into(), name: format!("p{pod}").into() };
        let addresses = vec![address(&format!("10.1.0.{pod}")), address(&format!("fd01::{pod}"))];
        let (ingress, egress, egress_to_node) = (ingress.id(), open.id(), open.id());
        (id.clone(), Arc::new(LocalEndpoint { id, addresses, ingress, egress, egress_to_node }))
    };
    let endpoints = [2, 3].map(endpoint).into();
    let node = NodeConfig { pod_ranges: ranges(), ..NodeConfig::default() };
    Arc::new(RuleSet {
        generation: Generation { term: 1, number },
        node,
        policies: [(policy.id(), Arc::new(policy))].into(),
        endpoints,
        chains: [(ingress.id(), Arc::new(ingress)), (open.id(), Arc::new(open))].into(),
        ..RuleSet::default()
    })
}

fn ranges() -> Vec<ipnet::IpNet> {
    ["10.1.0.0/24", "fd01::/64"].map(|net| net.parse().expect("a net")).into()
}

pub struct Node {
    pub net: Net,
    pub data: tempfile::TempDir,
}

impl Node {
    pub fn new() -> (Self, Vec<std::net::TcpListener>) {
        let mut net = Net::new();
        net.pod(2);
        net.pod(3);
        let listeners = ["10.1.0.3:80", "10.1.0.3:81", "[fd01::3]:80", "[fd01::3]:81"].map(|at| net.listen("p3", at));
        let node = Self { net, data: tempfile::tempdir().expect("a directory") };
        assert_eq!(node.open(), [true; 4], "without rules everything is open");
        (node, listeners.into())
    }

    pub fn options(&self) -> Options {
        Options {
            data: self.data.path().to_owned(),
            pod_ranges: ranges(),
            writes: Writes::new(&Health::default()),
            metrics: AgentMetrics::default(),
        }
    }

    fn start(&self) -> (Enforcer, Option<Arc<RuleSet>>) {
        let Started { enforcer, in_force, refused, .. } = self.start_with(self.options());
        assert_eq!(refused, []);
        (enforcer, in_force)
    }

    fn start_with(&self, options: Options) -> Started {
        self.net.within("node", || {
            let backend = backend::open(Settings::default()).expect("opened");
            Enforcer::start(backend, options).expect("started")
        })
    }

    /// Whether pod 3 is reached by pod 2: ports 80 and 81, IPv4 and then IPv6.
    fn open(&self) -> [bool; 4] {
        ["10.1.0.3:80", "10.1.0.3:81", "[fd01::3]:80", "[fd01::3]:81"].map(|at| self.net.connect("p2", at).is_some())
    }

    fn nft(&self, command: &str) {
        ip(&format!("netns exec {} nft {command}", self.net.name("node")));
    }

    pub fn table(&self) -> String {
        let node = self.net.name("node");
        let list = ["netns", "exec", &node, "nft", "-a", "list", "table", "inet", "hanse"];
        let listed = Command::new("ip").args(list).output().expect("nft of nftables");
        String::from_utf8_lossy(&listed.stdout).into_owned()
    }
}

#[test]
fn start_without_rules_closes_pod_ranges() {
    let (node, _listeners) = Node::new();
    // A damaged snapshot is ignored.
    snapshot::write(&node.options().snapshot(), &accepting(80, 1)).expect("written");
    let mut bytes = std::fs::read(node.options().snapshot()).expect("read");
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(node.options().snapshot(), bytes).expect("written");
    let (_enforcer, in_force) = node.start();
    assert_eq!(in_force, None);
    assert_eq!(node.open(), [false; 4]);
    assert!(node.net.connect("node", "10.1.0.3:80").is_some(), "the node reaches its own pods");
}

fn stop(started: Started) {
    drop(started.enforcer);
    block_on(started.ended.wait());
}

/// Without rules in the kernel, as after a restart of the machine, and with a snapshot that is damaged.
fn forget(node: &Node) {
    node.nft("delete table inet hanse");
    std::fs::write(node.options().snapshot(), "no snapshot").expect("written");
}

#[test]
fn ranges_of_the_member_are_closed_at_every_start() {
    let (node, _listeners) = Node::new();
    let unknown = Options { pod_ranges: Vec::new(), ..node.options() };
    let start = |options: &Options| node.start_with(options.clone());
    let started = start(&unknown);
    assert!(started.open && node.open() == [true; 4], "nothing is known, which is reported");
    // The node enrols.
    block_on(started.enforcer.close(&ranges())).expect("closed");
    assert_eq!(node.open(), [false; 4]);
    stop(started);
    let started = start(&unknown);
    assert!(!started.open && node.open() == [false; 4], "what was closed stays closed");
    assert_eq!(snapshot::read(&unknown.snapshot()), None, "only rules of a member are saved");
    block_on(started.enforcer.apply(accepting(80, 1))).expect("applied");
    assert_eq!(node.open(), [true, false, true, false]);
    stop(started);
    forget(&node);
    let started = start(&unknown);
    assert_eq!((&started.in_force, started.open, &started.pod_ranges), (&None, false, &ranges()));
    assert_eq!(node.open(), [false; 4], "IPv4 and IPv6");
    stop(started);
    // The command line takes precedence.
    let given = Options { pod_ranges: ranges()[..1].to_vec(), ..node.options() };
    assert_eq!(start(&given).pod_ranges, ranges()[..1]);
    assert_eq!(node.open(), [false, false, true, true]);
}

#[test]
fn retries_to_write_pod_ranges_with_the_next_rules() {
    let (node, _listeners) = Node::new();
    let (enforcer, _) = node.start();
    // A directory has the file's name.
    let file = node.data.path().join("pod-ranges");
    std::fs::create_dir(&file).expect("made");
    block_on(enforcer.apply(accepting(80, 1))).expect("applied");
    assert!(file.is_dir());
    std::fs::remove_dir(file).expect("removed");
    block_on(enforcer.apply(accepting(80, 2))).expect("applied");
    assert_eq!(pod_ranges::read(node.data.path()), ranges());
}

#[test]
fn end_of_the_thread_is_reported() {
    let (node, _listeners) = Node::new();
    let Started { enforcer, ended, .. } = node.start_with(node.options());
    let (seen, sees) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        block_on(ended.wait());
        seen.send(())
    });
    block_on(enforcer.apply(accepting(80, 1))).expect("applied");
    assert!(sees.try_recv().is_err(), "it runs");
    drop(enforcer);
    sees.recv_timeout(Duration::from_secs(10)).expect("its end is reported");
}

#[test]
fn start_applies_the_last_snapshot() {
    let (node, _listeners) = Node::new();
    snapshot::write(&node.options().snapshot(), &accepting(80, 7)).expect("written");
    let (_enforcer, in_force) = node.start();
    assert_eq!(in_force, Some(accepting(80, 7)));
    assert_eq!(node.open(), [true, false, true, false]);
}

#[test]
fn agent_starts_without_a_member_and_leaves_its_rules_when_killed() {
    let (node, listeners) = Node::new();
    snapshot::write(&node.options().snapshot(), &accepting(80, 7)).expect("written");
    // Connections that nobody accepts would fill the queues of the listeners before the agent has started.
    let open = || {
        let open = node.open();
        listeners.iter().for_each(|listener| while listener.accept().is_ok() {});
        open
    };
    let inside = node.net.name("node");
    let (mut before, closed) = (None, [true, false, true, false]);
    for start in 0..2 {
        // It has not enrolled, and there is no member.
        let mut agent = Command::new("ip")
            .args(["netns", "exec", &inside, env!("CARGO_BIN_EXE_hanse-agent"), "run", "--node", "n"])
            .args(["--member", "10.1.0.2:1", "--enrol", "10.1.0.2:2", "--token-file", "/absent", "--data"])
            .arg(node.data.path())
            .spawn()
            .expect("started");
        // A process takes a while to start on a machine that does more than this.
        let end = Instant::now() + Duration::from_secs(60);
        let enforced = std::iter::repeat_with(open).find(|open| *open == closed || Instant::now() > end);
        agent.kill().and_then(|()| agent.wait()).expect("killed");
        assert_eq!(enforced, Some(closed), "start {start}: {}", node.table());
        assert_eq!(open(), closed, "start {start}: its rules stay");
        // Without what packets and epochs change, and without handles.
        let changes = |line: &&str| ["counter", "ct mark", "elements = { 0x"].iter().any(|part| line.contains(part));
        let table = node.table();
        let lines = table.lines().filter(|line| !changes(line)).filter_map(|line| line.split(" # handle").next());
        let rules: Vec<String> = lines.map(str::to_owned).collect();
        assert_eq!(*before.get_or_insert_with(|| rules.clone()), rules, "a start writes the same rules");
    }
}

#[test]
fn unknown_rules_stay_until_the_next_apply() {
    let (node, _listeners) = Node::new();
    node.net.driver().apply(&accepting(81, 3)).expect("applied");
    // Of another generation than the snapshot, which is older.
    snapshot::write(&node.options().snapshot(), &accepting(80, 2)).expect("written");
    let before = node.table();
    let (enforcer, in_force) = node.start();
    assert_eq!(in_force, None, "the rules are not known");
    assert_eq!(node.table(), before, "nothing is changed");
    assert_eq!(node.open(), [false, true, false, true]);
    block_on(enforcer.apply(accepting(80, 4))).expect("applied");
    assert_eq!(node.open(), [true, false, true, false]);
}

#[test]
fn start_repairs_damaged_rules() {
    let (node, _listeners) = Node::new();
    node.net.driver().apply(&accepting(80, 3)).expect("applied");
    snapshot::write(&node.options().snapshot(), &accepting(80, 3)).expect("written");
    let element =
        "delete element inet hanse ingress4 { 10.1.0.3 }; add element inet hanse ingress4 { 10.1.0.3 : accept }";
    let all = [true; 4];
    for (damage, opens) in [
        ("flush chain inet hanse forward", all),
        ("add table inet hanse { flags dormant; }", all),
        (element, [true, true, true, false]),
    ] {
        node.nft(damage);
        assert_eq!(node.open(), opens, "{damage}: what it does");
        let started = node.start_with(node.options());
        assert_eq!(started.in_force, Some(accepting(80, 3)));
        assert_eq!(node.open(), [true, false, true, false], "{damage}");
        stop(started);
    }
}

#[test]
fn repairs_drift_when_idle_and_with_the_next_generation() {
    let (node, _listeners) = Node::new();
    let (enforcer, _) = node.start();
    block_on(enforcer.apply(accepting(80, 1))).expect("applied");
    node.nft("flush chain inet hanse forward");
    // Port 81 alone: three more refused connections take long enough that drift may be repaired meanwhile.
    let closed = || node.net.connect("p2", "10.1.0.3:81").is_none().then_some(());
    assert!(until(closed).is_some(), "while it is idle: {}", node.table());
    assert_eq!(node.open(), [true, false, true, false]);
    node.nft("flush chain inet hanse forward");
    block_on(enforcer.apply(accepting(80, 2))).expect("applied");
    assert_eq!(node.open(), [true, false, true, false], "with the next generation");
}

/// Another program takes the table, so that the kernel denies every change of it.
#[test]
fn reports_rules_that_cannot_be_restored() {
    let (node, _listeners) = Node::new();
    let (enforcer, _) = node.start();
    block_on(enforcer.apply(accepting(80, 1))).expect("applied");
    let reaches =
        |wanted: &dyn Fn(&Proofs) -> bool| until(|| wanted(&enforcer.proofs().borrow()).then_some(())).is_some();
    assert!(reaches(&|it| *it == Proofs::default()), "{:?}", enforcer.proofs());
    let inside = node.net.name("node");
    let owner = Command::new("ip").args(["netns", "exec", &inside, "nft", "-i"]).stdin(Stdio::piped()).spawn();
    let mut owner = owner.expect("nft of nftables");
    let mut commands = owner.stdin.take().expect("piped");
    writeln!(commands, "delete table inet hanse; add table inet hanse {{ flags owner; }}").expect("written");
    let not_restored = HookProblem::NotRestored("table: Operation not permitted (os error 1)".to_owned());
    assert!(reaches(&|it| it.hooks.as_ref() == Some(&not_restored)), "{:?}", enforcer.proofs());
    // The table ends with its owner.
    drop(commands);
    owner.wait().expect("ended");
    assert!(reaches(&|it| *it == Proofs::default()), "{:?}", enforcer.proofs());
    assert_eq!(node.open(), [true, false, true, false]);
}

#[test]
fn writes_the_snapshot_soon_after_an_apply() {
    let (node, _listeners) = Node::new();
    let (enforcer, _) = node.start();
    block_on(enforcer.apply(accepting(80, 1))).expect("applied");
    block_on(enforcer.apply(accepting(81, 2))).expect("applied");
    let kept = || snapshot::read(&node.options().snapshot()).filter(|rules| *rules == *accepting(81, 2));
    assert!(until(kept).is_some());
}

#[test]
fn reports_pods_that_are_not_proven() {
    let (node, _listeners) = Node::new();
    node.net.sysctl("p3", "net.ipv4.icmp_echo_ignore_all=1");
    let (enforcer, _) = node.start();
    assert_eq!(**enforcer.proofs().borrow(), Proofs::default(), "there is no pod yet");
    block_on(enforcer.apply(accepting(80, 1))).expect("applied");
    let id = |name: &str| EndpointId { namespace: "a".into(), name: name.into() };
    let silent = Finding::Silent([10, 1, 0, 3].into());
    let wanted = Proofs { hooks: None, unenforced: [(id("p3"), silent)].into() };
    assert!(until(|| (**enforcer.proofs().borrow() == wanted).then_some(())).is_some(), "{:?}", enforcer.proofs());
    // It is probed again.
    node.net.sysctl("p3", "net.ipv4.icmp_echo_ignore_all=0");
    let proven = || (**enforcer.proofs().borrow() == Proofs::default()).then_some(());
    assert!(until(proven).or_else(|| until(proven)).is_some(), "{:?}", enforcer.proofs());
}

#[test]
fn proves_pods_during_constant_changes() {
    let (node, _listeners) = Node::new();
    let (enforcer, _) = node.start();
    let (mut number, mut was_unproven) = (0, false);
    let proven = until(|| {
        number += 1;
        block_on(enforcer.apply(accepting(80 + u16::from(number % 2 == 0), number))).expect("applied");
        // Before the first probe there is no finding either.
        let wrong = **enforcer.proofs().borrow() != Proofs::default();
        was_unproven |= wrong;
        (was_unproven && !wrong).then_some(())
    });
    let proofs = enforcer.proofs().borrow().clone();
    assert!(proven.is_some() && number > 5, "{number} changes, {proofs:?}");
}

pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().expect("a runtime").block_on(future)
}
