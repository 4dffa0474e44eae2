//! What each action does on a match that cannot be known, and what a federated Allow does.

use std::collections::BTreeSet;

use hanse_policy::evaluate::{Effect, End, Judgement, Query, Step, Verdict, View, evaluate};
use hanse_policy::inventory::*;
use hanse_policy::model::*;
use hanse_policy::prepared::Prepared;
use hanse_policy::selector::Selector;

/// Clusters `near`, which enforces, and `far`, each with one pod: `near/server`, and `far/gateway` with `role == 'gw'`.
fn inventory(change: impl FnOnce(&mut Inventory)) -> Inventory {
    let mut inventory = Inventory::default();
    for (cluster, name, address) in [("near", "server", "10.0.0.1"), ("far", "gateway", "10.1.0.1")] {
        let labels = Labels::from([("role".into(), if name == "gateway" { "gw" } else { "server" }.into())]);
        let ports = vec![NamedPort { name: "api".into(), protocol: 6, port: 8000 }];
        let addresses = vec![address.parse().expect("address")];
        let endpoint = Endpoint { labels: labels.into(), addresses, ports, ..Endpoint::default() };
        let namespaces = [("ns".into(), Namespace::default())].into();
        let of = Cluster { endpoints: [(pod(name), endpoint)].into(), namespaces, ..Cluster::default() };
        inventory.clusters.insert(cluster.into(), of);
    }
    change(&mut inventory);
    inventory
}

fn pod(name: &str) -> EndpointId {
    EndpointId { kind: EndpointKind::Pod, namespace: Some("ns".into()), name: name.into() }
}

fn rule(action: Action, source: EntityMatch) -> Rule {
    Rule {
        action,
        index: 0,
        ip_version: None,
        protocol: None,
        not_protocol: None,
        icmp: None,
        not_icmp: None,
        source,
        destination: EntityMatch::default(),
        http: None,
        not_understood: None,
    }
}

fn selection(text: &str) -> Option<Selection> {
    Some(Selection { clusters: ClusterScope::All, selector: Selector::parse(text).expect(text) })
}

fn from(text: &str) -> EntityMatch {
    EntityMatch { selection: selection(text), ..EntityMatch::default() }
}

/// One federated policy for the ingress of every pod, in a tier of `phase` with `default`.
fn federated(phase: Phase, default: TierDefault, rules: Vec<Rule>) -> PolicySet {
    let tier = TierId { phase, name: "tier".into() };
    let id = PolicyId { cluster: None, kind: PolicyKind::FederatedNetworkPolicy, namespace: None, name: "p".into() };
    let policy = Policy {
        id: id.clone(),
        tier: tier.clone(),
        order: Order(None),
        enforcers: ClusterScope::All,
        selector: Selector::all(),
        ingress: Some(rules),
        egress: None,
        staged: None,
        host_only: false,
    };
    let tiers = [(tier.clone(), Tier { id: tier, order: Order(None), default })].into();
    let federation = Layer { tiers, policies: [(id, policy)].into() };
    PolicySet { federation, ..PolicySet::default() }
}

fn query() -> Query {
    let end = |cluster: &str, name: &str, address: &str| End {
        address: address.parse().expect("address"),
        pod: Some((cluster.into(), pod(name))),
    };
    Query {
        source: end("far", "gateway", "10.1.0.1"),
        destination: end("near", "server", "10.0.0.1"),
        protocol: 6,
        source_port: 40_000,
        destination_port: 8000,
        icmp: None,
    }
}

fn ask(policies: &PolicySet, inventory: &Inventory) -> Judgement {
    evaluate(policies, inventory, &query(), View::Enforced).ingress.expect("the destination is a pod")
}

/// `(action, selector, default of the tier, verdict when known, verdict when the far cluster is stale)`.
const CASES: &[(Action, &str, TierDefault, Verdict, Verdict)] = {
    use Action::{Allow, Deny, Log, Pass};
    use TierDefault as Default;
    use Verdict::{Allow as Opens, Deny as Closes};
    &[
        (Allow, "role == 'gw'", Default::Deny, Opens, Closes),
        (Allow, "role != 'gw'", Default::Deny, Closes, Closes),
        (Allow, "role != 'x'", Default::Deny, Opens, Closes),
        (Deny, "role == 'gw'", Default::Pass, Closes, Closes),
        (Deny, "role == 'x'", Default::Pass, Opens, Closes),
        (Deny, "!has(role)", Default::Pass, Opens, Closes),
        (Pass, "role == 'gw'", Default::Deny, Opens, Closes),
        (Pass, "role == 'x'", Default::Pass, Opens, Closes),
        (Log, "role == 'gw'", Default::Pass, Opens, Opens),
        (Allow, "all()", Default::Deny, Opens, Closes),
    ]
};

#[test]
fn endpoints_of_a_stale_cluster_are_unknown() {
    let fresh = inventory(|_| {});
    let stale = inventory(|inventory| inventory.clusters.get_mut("far").expect("far").stale = true);
    for (action, selector, default, known, unknown) in CASES {
        let policies = federated(Phase::Baseline, *default, vec![rule(*action, from(selector))]);
        assert_eq!(ask(&policies, &fresh).verdict, *known, "{action:?} {selector}, known");
        let judgement = ask(&policies, &stale);
        assert_eq!(judgement.verdict, *unknown, "{action:?} {selector}, stale");
        if matches!(action, Action::Deny | Action::Pass) {
            assert!(matches!(judgement.trace[..], [Step::Rule { effect: Effect::DeniedUnknown, .. }]), "{judgement:?}");
        }
    }
}

#[test]
fn negation_keeps_unknown_unknown() {
    let stale = inventory(|inventory| inventory.clusters.get_mut("far").expect("far").stale = true);
    for (action, default) in [(Action::Allow, TierDefault::Deny), (Action::Deny, TierDefault::Pass)] {
        let source = EntityMatch { not_selection: selection("role == 'x'"), ..EntityMatch::default() };
        let policies = federated(Phase::Baseline, default, vec![rule(action, source)]);
        assert_eq!(ask(&policies, &stale).verdict, Verdict::Deny, "{action:?}");
    }
}

#[test]
fn label_with_a_key_outside_the_grant_is_unknown() {
    let granted = |keys: &[&str]| {
        let keys: BTreeSet<_> = keys.iter().map(|key| (*key).into()).collect();
        inventory(|inventory| {
            inventory.clusters.get_mut("far").expect("far").label_grant = LabelGrant::Keys(keys);
        })
    };
    for (selector, keys, verdict) in [
        ("role == 'gw'", &["role"][..], Verdict::Allow),
        ("role == 'gw'", &["app"], Verdict::Deny),
        ("!has(app)", &["app"], Verdict::Allow),
        ("!has(app)", &["role"], Verdict::Deny),
        // What the hub knows of an endpoint needs no grant.
        ("projectcalico.org/namespace == 'ns'", &[], Verdict::Allow),
        ("pcns.projectcalico.org/name == 'ns'", &[], Verdict::Allow),
        ("all()", &[], Verdict::Allow),
    ] {
        let policies = federated(Phase::Baseline, TierDefault::Deny, vec![rule(Action::Allow, from(selector))]);
        assert_eq!(ask(&policies, &granted(keys)).verdict, verdict, "{selector} with {keys:?}");
    }
}

#[test]
fn own_endpoints_are_never_unknown() {
    let own = inventory(|inventory| {
        let near = inventory.clusters.get_mut("near").expect("near");
        near.stale = true;
        near.label_grant = LabelGrant::Keys(BTreeSet::new());
    });
    let destination = from("role == 'server'");
    let rule = Rule { destination, ..rule(Action::Allow, EntityMatch::default()) };
    let policies = federated(Phase::Baseline, TierDefault::Deny, vec![rule]);
    assert_eq!(ask(&policies, &own).verdict, Verdict::Allow);
}

#[test]
fn named_port_of_a_stale_pod_is_unknown() {
    let source = EntityMatch { ports: vec![Port::Named("api".into())], ..EntityMatch::default() };
    let policies = federated(Phase::Baseline, TierDefault::Pass, vec![rule(Action::Deny, source)]);
    for (stale, verdict) in [(false, Verdict::Allow), (true, Verdict::Deny)] {
        let inventory = inventory(|inventory| {
            let far = inventory.clusters.get_mut("far").expect("far");
            far.stale = stale;
            // The source port of the question is the pod's port of that name only where it is stale.
            let ports = &mut far.endpoints.get_mut(&pod("gateway")).expect("gateway").ports;
            ports[0].port = if stale { 40_000 } else { 1 };
        });
        assert_eq!(ask(&policies, &inventory).verdict, verdict, "stale: {stale}");
    }
}

#[test]
fn unsupported_rule_part_is_unknown() {
    for (action, default, verdict) in [
        (Action::Allow, TierDefault::Deny, Verdict::Deny),
        (Action::Allow, TierDefault::Pass, Verdict::Allow),
        (Action::Deny, TierDefault::Pass, Verdict::Deny),
        (Action::Pass, TierDefault::Pass, Verdict::Deny),
        (Action::Log, TierDefault::Pass, Verdict::Allow),
    ] {
        let reasons: [fn(&mut Rule); 2] = [
            |rule| rule.not_understood = Some("a field of next year".into()),
            |rule| rule.http = Some(HttpMatch { methods: vec!["GET".into()], paths: Vec::new() }),
        ];
        for reason in reasons {
            let mut rule = rule(action, EntityMatch::default());
            reason(&mut rule);
            // Where the rest of the rule does not match, nothing is unknown.
            let elsewhere = Rule { protocol: Some(Protocol::Udp), ..rule.clone() };
            let judge = |rule| ask(&federated(Phase::Baseline, default, vec![rule]), &inventory(|_| {})).verdict;
            assert_eq!(judge(rule), verdict, "{action:?} {default:?}");
            let passes = default == TierDefault::Pass;
            assert_eq!(judge(elsewhere) == Verdict::Allow, passes, "{action:?} {default:?} of another protocol");
        }
    }
}

#[test]
fn federated_allow_ends_its_phase_unless_final() {
    let mut policies = federated(Phase::Guard, TierDefault::Deny, vec![rule(Action::Allow, EntityMatch::default())]);
    // The cluster's own tier denies everything.
    let id = PolicyId {
        cluster: Some("near".into()),
        kind: PolicyKind::CalicoGlobalNetworkPolicy,
        namespace: None,
        name: "closed".into(),
    };
    let closed = Policy {
        id: id.clone(),
        tier: TierId { phase: Phase::Local, name: "default".into() },
        order: Order(None),
        enforcers: ClusterScope::Local,
        selector: Selector::all(),
        ingress: Some(Vec::new()),
        egress: None,
        staged: None,
        host_only: false,
    };
    policies.clusters.insert("near".into(), Layer { policies: [(id, closed)].into(), ..Layer::default() });
    let left = ask(&policies, &inventory(|_| {}));
    assert_eq!(left.verdict, Verdict::Deny);
    assert!(matches!(left.trace[0], Step::Rule { effect: Effect::Left, .. }), "{left:?}");
    let last = inventory(|inventory| inventory.clusters.get_mut("near").expect("near").federated_allow_final = true);
    let ended = ask(&policies, &last);
    assert_eq!(ended.verdict, Verdict::Allow);
    assert!(matches!(ended.trace[..], [Step::Rule { effect: Effect::Acted, .. }]), "{ended:?}");
}

/// Of a policy in a tier that denies: its subject, action and source, the verdict, and that before a policy that allows.
#[test]
fn labels_set_at_run_time_never_allow() {
    let planned = |keys: &[&str]| Planned {
        lacks_family: [false; 2],
        several: true,
        stopped: None,
        run_time_labels: keys.iter().map(|key| (*key).into()).collect(),
        certain_labels: Default::default(),
        run_time_ports: false,
    };
    let inventory = inventory(|inventory| {
        for (cluster, name) in [("near", "server"), ("far", "gateway")] {
            let owner = inventory.clusters.get_mut(cluster).expect("a cluster");
            let endpoint = owner.endpoints.get_mut(&pod(name)).expect("a pod");
            endpoint.planned = Some(planned(&["hash"]));
        }
    });
    use Action::{Allow, Deny, Pass};
    for (subject, action, source, alone, before_allow) in [
        ("all()", Allow, "all()", Verdict::Allow, Verdict::Allow),
        ("has(other)", Deny, "all()", Verdict::Allow, Verdict::Allow),
        // Its peers may be selected.
        ("all()", Allow, "has(hash)", Verdict::Deny, Verdict::Allow),
        ("all()", Allow, "!has(hash)", Verdict::Deny, Verdict::Allow),
        ("all()", Allow, "hash != 'x'", Verdict::Deny, Verdict::Allow),
        ("all()", Deny, "has(hash)", Verdict::Deny, Verdict::Deny),
        ("all()", Deny, "!has(hash)", Verdict::Deny, Verdict::Deny),
        ("all()", Pass, "has(hash)", Verdict::Deny, Verdict::Deny),
        // It may be for the pod.
        ("has(hash)", Allow, "all()", Verdict::Deny, Verdict::Allow),
        ("!has(hash)", Allow, "all()", Verdict::Deny, Verdict::Allow),
        ("has(hash)", Deny, "all()", Verdict::Deny, Verdict::Deny),
        ("!has(hash)", Deny, "all()", Verdict::Deny, Verdict::Deny),
    ] {
        let mut policies = federated(Phase::Baseline, TierDefault::Deny, vec![rule(action, from(source))]);
        let (id, mut policy) = policies.federation.policies.pop_first().expect("the policy");
        policy.selector = Selector::parse(subject).expect(subject);
        policy.order = Order(Some(1.0));
        let mut second = policy.clone();
        policies.federation.policies.insert(id, policy);
        let both = |policies: &PolicySet| {
            let judgement = ask(policies, &inventory);
            let prepared = Prepared::new(policies, &inventory, View::Enforced).evaluate(&query());
            assert_eq!(prepared.ingress.as_ref(), Some(&judgement), "{subject} {action:?} {source}");
            judgement.verdict
        };
        assert_eq!(both(&policies), alone, "{subject} {action:?} {source}");
        second.id.name = "q".into();
        second.order = Order(Some(2.0));
        second.selector = Selector::all();
        second.ingress = Some(vec![rule(Allow, from("all()"))]);
        policies.federation.policies.insert(second.id.clone(), second);
        assert_eq!(both(&policies), before_allow, "{subject} {action:?} {source}, then all");
    }
}
