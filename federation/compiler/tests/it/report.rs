//! What a report says of each policy.

use std::collections::BTreeMap;

use hanse_compiler::{ClusterRecord, Compiler, Direction, Reason, Update};
use hanse_policy::inventory::{Endpoint, EndpointId, EndpointKind, LabelGrant};
use hanse_policy::model::*;
use hanse_policy::selector::Selector;

fn pod(cluster: &str, name: &str, labels: &[(&str, &str)], address: &str) -> Update {
    let labels = labels.iter().map(|(key, value)| ((*key).into(), (*value).into()));
    Update::Endpoint {
        cluster: Some(cluster.into()),
        id: EndpointId { kind: EndpointKind::Pod, namespace: Some("web".into()), name: name.into() },
        endpoint: Endpoint {
            labels: labels.collect(),
            addresses: vec![address.parse().unwrap()],
            node: Some("n".into()),
            ..Endpoint::default()
        },
    }
}

fn rule(index: u32, action: Action, source: EntityMatch) -> Rule {
    Rule {
        action,
        index,
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

fn policy(name: &str, selector: &str, ingress: Vec<Rule>) -> Policy {
    Policy {
        id: PolicyId { cluster: None, kind: PolicyKind::FederatedNetworkPolicy, namespace: None, name: name.into() },
        tier: TierId { phase: Phase::Guard, name: "t".into() },
        order: Order(None),
        enforcers: ClusterScope::All,
        selector: Selector::parse(selector).unwrap(),
        ingress: Some(ingress),
        egress: None,
        staged: None,
        host_only: false,
    }
}

#[test]
fn a_report_says_whom_a_policy_selects_where_and_what_is_ignored() {
    let mut compiler = Compiler::new("here");
    let grant = LabelGrant::Keys(["app".into()].into());
    let clusters = [("here", LabelGrant::All, false), ("there", LabelGrant::All, false), ("narrow", grant, false)];
    for (name, label_grant, stale) in clusters.into_iter().chain([("silent", LabelGrant::All, true)]) {
        let record = ClusterRecord { label_grant, stale, federated_allow_final: false };
        compiler.apply(Update::Cluster { name: name.into(), record });
    }
    let peer = [("app", "b"), ("role", "x")];
    for update in [
        pod("here", "a", &[("app", "a")], "10.0.0.1"),
        pod("here", "b", &peer, "10.0.0.2"),
        pod("there", "a", &[("app", "a")], "10.1.0.1"),
        pod("there", "b", &peer, "10.1.0.2"),
        pod("there", "c", &peer, "10.1.0.3"),
        pod("narrow", "b", &peer, "10.2.0.2"),
        pod("silent", "b", &[], "10.3.0.2"),
    ] {
        compiler.apply(update);
    }
    let selection = Selection { clusters: ClusterScope::All, selector: Selector::parse("role == 'x'").unwrap() };
    let from_role = EntityMatch { selection: Some(selection), ..EntityMatch::default() };
    let not_understood = Some("a field of next year".into());
    let v4_net = EntityMatch { nets: vec!["10.0.0.0/8".parse().unwrap()], ..EntityMatch::default() };
    let everything = policy(
        "everything",
        "app == 'a'",
        vec![
            rule(0, Action::Allow, from_role),
            Rule { not_understood: not_understood.clone(), ..rule(1, Action::Allow, EntityMatch::default()) },
            Rule { not_understood, ..rule(2, Action::Deny, EntityMatch::default()) },
            Rule { ip_version: Some(IpVersion::V6), ..rule(3, Action::Allow, v4_net) },
        ],
    );
    compiler.apply(Update::Policy(everything.clone()));
    let elsewhere = ClusterScope::Named(["there".into()].into());
    compiler.apply(Update::Policy(Policy { enforcers: elsewhere, ..policy("elsewhere", "all()", Vec::new()) }));
    compiler.apply(Update::Policy(Policy { host_only: true, ..policy("host", "all()", Vec::new()) }));
    let staged = Some(StagedAction::Set);
    compiler.apply(Update::Policy(Policy { staged, ..policy("staged", "all()", Vec::new()) }));
    compiler.apply(Update::Policy(policy("nobody", "app == 'nobody'", Vec::new())));
    compiler.commit();
    let report = compiler.report();

    let of = |name: &str| &report.policies[&policy(name, "all()", Vec::new()).id];
    let whole = |name: &str| -> Vec<(Option<(Direction, u32)>, Reason)> {
        of(name).ignored.iter().map(|it| (it.rule, it.reason.clone())).collect()
    };
    assert_eq!((of("everything").selects, of("everything").is_active), (1, true));
    let place = |rule| Some((Direction::Ingress, rule));
    let why = || "a field of next year".into();
    let ignored =
        [(place(1), Reason::NeverMatches(why())), (place(2), Reason::Denies(why())), (place(3), Reason::NoFamily)];
    assert_eq!(whole("everything"), ignored);
    let peers = &of("everything").peers;
    assert_eq!(peers.len(), 1);
    assert_eq!((peers[0].direction, peers[0].rule, &*peers[0].selector), (Direction::Ingress, 0, "role == \"x\""));
    // Certain, and possible beside those.
    let counts = [("here", (1, 0)), ("narrow", (0, 1)), ("silent", (0, 1)), ("there", (2, 0))];
    let counts: BTreeMap<ClusterName, _> = counts.map(|(name, count)| (name.into(), count)).into();
    assert_eq!(peers[0].clusters, counts);
    assert_eq!(whole("elsewhere"), [(None, Reason::EnforcedElsewhere)]);
    assert_eq!(whole("host"), [(None, Reason::HostOnly)]);
    assert_eq!(whole("staged"), [(None, Reason::Staged)]);
    assert_eq!(whole("nobody"), [(None, Reason::SelectsNothing)]);
    assert_eq!((of("nobody").selects, of("nobody").is_active), (0, false));
}
