//! Objects as Calico stores them, `crd.projectcalico.org/v1`: what Calico enforces is in force, whatever a schema of today
//! says of it. The clauses are those of Calico 3.32: the conversion from the stored form (`libcalico-go`,
//! `backend/k8s/resources/resources.go`, `names/policy.go`), to what Felix reads
//! (`backend/syncersv1/updateprocessors/rules.go`, `api/pkg/lib/numorstring`), and Felix's reading of it
//! (`felix/calc/policy_sorter.go`, `felix/rules`).

use hanse_api::manifest::{Manifests, read_bytes};
use hanse_api::{Object, assemble_cluster};
use hanse_policy::inventory::Cluster;
use hanse_policy::model::{Action, Layer, Order, Policy, Port, Protocol, StagedAction, TierDefault};

use crate::refusals;

fn stored(kind: &str, metadata: &str, rest: &str) -> String {
    format!("apiVersion: crd.projectcalico.org/v1\nkind: {kind}\nmetadata: {metadata}\n{rest}\n---\n")
}

fn assembled(text: &str) -> (Cluster, Layer) {
    let mut read = Manifests::default();
    read_bytes(&"stored.yaml".into(), text.as_bytes(), &mut read);
    assert!(read.diagnostics.is_empty() && read.skipped.is_empty(), "{text}: {:?}", read.diagnostics);
    let state = assemble_cluster(&"c".into(), read.objects);
    assert!(state.diagnostics.is_empty(), "{text}: {:?}", state.diagnostics);
    (state.cluster, state.layer)
}

/// The only policy of a text.
fn policy(kind: &str, spec: &str) -> Policy {
    let (_, layer) = assembled(&stored(kind, "{name: p, namespace: web}", &format!("spec: {spec}")));
    layer.policies.into_values().next().expect("a policy")
}

/// The only ingress rule of a stored policy.
fn rule(rule: &str) -> hanse_policy::model::Rule {
    let policy = policy("GlobalNetworkPolicy", &format!("{{ingress: [{rule}]}}"));
    let mut rules = policy.ingress.unwrap_or_else(|| panic!("{rule}: no ingress"));
    assert_eq!(rules.len(), 1, "{rule}");
    rules.remove(0)
}

#[test]
fn types_are_both_unless_some_are_stored() {
    for (spec, both) in [
        ("{}", (true, true)),
        ("{types: []}", (true, true)),
        ("{types: null}", (true, true)),
        ("{ingress: [{action: Allow}]}", (true, true)),
        ("{egress: [{action: Allow}]}", (true, true)),
        ("{types: [Ingress]}", (true, false)),
        ("{types: [egress]}", (false, true)),
        ("{types: [INGRESS, Ingress]}", (true, false)),
        ("{types: [Ingress, Both]}", (true, false)),
        ("{types: [Both]}", (false, false)),
    ] {
        for kind in ["NetworkPolicy", "GlobalNetworkPolicy", "StagedNetworkPolicy", "StagedGlobalNetworkPolicy"] {
            let policy = policy(kind, spec);
            assert_eq!((policy.ingress.is_some(), policy.egress.is_some()), both, "{kind} {spec}");
        }
    }
    let (_, layer) = assembled(&stored("GlobalNetworkPolicy", "{name: p}", ""));
    let policy = layer.policies.values().next().expect("a policy without a spec is of everything");
    assert!(policy.ingress.is_some() && policy.egress.is_some() && policy.acts());
}

#[test]
fn a_name_with_its_tier_is_the_policy_without_it() {
    for (name, annotation, expected) in [
        ("default.z", None, "default.z"),
        ("default.z", Some("{}"), "z"),
        ("default.z", Some("null"), "z"),
        ("default.z", Some(r#"{"creationTimestamp":null}"#), "z"),
        ("default.z", Some(r#"{"name":"default.z"}"#), "default.z"),
        ("default.z", Some(r#"{"name":"y"}"#), "y"),
        ("default.z", Some(r#"{"name":"Y y"}"#), "default.z"),
        ("security.z", Some("{}"), "security.z"),
        ("default-z", Some("{}"), "default-z"),
        ("ossg.default.z", Some("{}"), "ossg.default.z"),
    ] {
        let annotations =
            annotation.map_or(String::new(), |it| format!(", annotations: {{projectcalico.org/metadata: '{it}'}}"));
        let metadata = format!("{{name: {name}, namespace: web{annotations}}}");
        for kind in ["NetworkPolicy", "GlobalNetworkPolicy", "StagedNetworkPolicy", "StagedGlobalNetworkPolicy"] {
            let (_, layer) = assembled(&stored(kind, &metadata, "spec: {}"));
            let names: Vec<&str> = layer.policies.keys().map(|id| &*id.name).collect();
            assert_eq!(names, [expected], "{kind} {metadata}");
        }
        for kind in ["Tier", "NetworkSet", "StagedKubernetesNetworkPolicy"] {
            let mut read = Manifests::default();
            read_bytes(&"stored.yaml".into(), stored(kind, &metadata, "spec: {}").as_bytes(), &mut read);
            let stored_name = match read.objects.first().map(|it| &it.object) {
                Some(Object::Tier(tier)) => &tier.id.name,
                Some(Object::NetworkSet(id, _)) => &id.name,
                Some(Object::Policy(policy)) => &policy.local_id().name,
                other => panic!("{kind}: {other:?}"),
            };
            let cut = expected == "z";
            assert_eq!(&**stored_name, if cut { name } else { expected }, "{kind} {metadata}");
        }
    }
    // As the same object at both groups, and as what a staged one replaces.
    let both = stored(
        "NetworkPolicy",
        "{name: default.z, namespace: web, annotations: {projectcalico.org/metadata: '{}'}}",
        "spec: {}",
    ) + "apiVersion: projectcalico.org/v3\nkind: NetworkPolicy\nmetadata: {name: z, namespace: web}\nspec: {}\n";
    let mut read = Manifests::default();
    read_bytes(&"stored.yaml".into(), both.as_bytes(), &mut read);
    assert_eq!(assemble_cluster(&"c".into(), read.objects).diagnostics.len(), 1);
    let staged = stored(
        "StagedNetworkPolicy",
        "{name: default.z, namespace: web, annotations: {projectcalico.org/metadata: '{}'}}",
        "spec: {stagedAction: Delete, order: 5}",
    ) + &stored(
        "NetworkPolicy",
        "{name: default.z, namespace: web, annotations: {projectcalico.org/metadata: '{}'}}",
        "spec: {}",
    );
    let (_, layer) = assembled(&staged);
    let target = layer.policies.keys().find_map(hanse_policy::model::PolicyId::commits_to).expect("a staged policy");
    assert!(layer.policies.contains_key(&target));
}

#[test]
fn metadata_that_is_no_json_is_refused() {
    let metadata =
        |annotation: &str| format!("{{name: p, annotations: {{projectcalico.org/metadata: '{annotation}'}}}}");
    for (annotation, fields) in [
        (r#"{"name": "p", "labels": {"a": "b"}, "ownerReferences": [{}], "managedFields": []}"#, vec![]),
        ("name: p", vec!["metadata.annotations"]),
        (r#"{"labels": {"a": "x y"}}"#, vec!["metadata.labels"]),
        (r#"{"annotations": {"hanse.dev/peers": "Somewhere"}}"#, vec!["metadata.annotations"]),
    ] {
        assert_eq!(refusals(&stored("GlobalNetworkPolicy", &metadata(annotation), "spec: {}")), fields, "{annotation}");
    }
}

#[test]
fn rules_are_read_as_felix_reads_them() {
    for (text, action, protocol) in [
        ("{action: Allow, protocol: tcp}", Action::Allow, Some(Protocol::Tcp)),
        ("{action: deny, protocol: Udp}", Action::Deny, Some(Protocol::Udp)),
        ("{action: PASS, protocol: icmpv6}", Action::Pass, Some(Protocol::IcmpV6)),
        ("{action: log, protocol: UDPLITE}", Action::Log, Some(Protocol::UdpLite)),
        ("{action: '', protocol: '6'}", Action::Allow, Some(Protocol::Number(6))),
        ("{protocol: sctp, destination: {ports: ['80', '1:2', '0090']}}", Action::Allow, Some(Protocol::Sctp)),
        ("{action: Deny, protocol: icmp, icmp: {type: 8}}", Action::Deny, Some(Protocol::Icmp)),
        ("{action: Deny, protocol: '1', icmp: {type: 8}}", Action::Deny, Some(Protocol::Number(1))),
        ("{action: Deny, notICMP: {code: 3}}", Action::Deny, None),
        ("{action: Deny, ipVersion: 6, source: {nets: [10.0.0.0/8]}}", Action::Deny, None),
        ("{action: Deny, http: {methods: [GET, GET], paths: [{exact: x}]}}", Action::Deny, None),
        ("{action: Deny, source: {serviceAccounts: {names: [a, a]}}}", Action::Deny, None),
        ("{action: Deny, metadata: {annotations: {'a b': c}}}", Action::Deny, None),
        ("{action: Deny, source: {services: {name: a, namespace: b}, nets: [10.0.0.0/8]}}", Action::Deny, None),
        ("{action: Deny, destination: {services: {name: a, namespace: b}}}", Action::Deny, None),
    ] {
        let rule = rule(text);
        assert_eq!((rule.action, rule.protocol, &rule.not_understood), (action, protocol, &None), "{text}");
    }
    let nets = |text: &str| -> Vec<String> {
        let rule = rule(&format!("{{action: Deny, source: {{nets: {text}}}, destination: {{notNets: {text}}}}}"));
        assert_eq!((&rule.source.nets, rule.not_understood), (&rule.destination.not_nets, None), "{text}");
        rule.source.nets.iter().map(ToString::to_string).collect()
    };
    for (text, expected) in [
        ("[10.0.0.1]", vec!["10.0.0.1/32"]),
        ("['fd00::1']", vec!["fd00::1/128"]),
        ("['::ffff:10.0.0.1']", vec!["10.0.0.1/32"]),
        ("[10.0.0.1/8]", vec!["10.0.0.0/8"]),
        ("['fd00::1/08']", vec!["fd00::/8"]),
        ("[10.0.0.0/8, 'fd00::/8', 10.0.0.0/8]", vec!["10.0.0.0/8", "fd00::/8", "10.0.0.0/8"]),
        ("[0.0.0.0/0, '::/0']", vec!["0.0.0.0/0", "::/0"]),
        ("['::ffff:10.0.0.1/104']", vec!["10.0.0.0/8"]),
    ] {
        assert_eq!(nets(text), expected, "{text}");
    }
    let long: Vec<String> = (0..300).map(|at| format!("10.0.{}.{}/32", at / 250, at % 250)).collect();
    assert_eq!(nets(&format!("[{}]", long.join(", "))).len(), 300);
    let many = policy("GlobalNetworkPolicy", &format!("{{ingress: [{}]}}", vec!["{action: Deny}"; 2_000].join(", ")));
    assert_eq!(many.ingress.map(|rules| rules.len()), Some(2_000));
    let names = rule("{action: Deny, protocol: TCP, destination: {ports: [UPPER, under_score]}}");
    assert_eq!(names.destination.ports, [Port::Named("UPPER".into()), Port::Named("under_score".into())]);
}

/// Felix knows none of these, and an API server of Calico stored none: nothing may open for them, and nothing else of the
/// policy goes out of force.
#[test]
fn what_has_no_meaning_in_a_rule_makes_that_rule_unknown() {
    for (text, action, why) in [
        ("{action: Drop}", Action::Deny, "spec.ingress[0].action"),
        ("{action: Deny, ipVersion: 5}", Action::Deny, "spec.ingress[0].ipVersion"),
        ("{action: Deny, protocol: any}", Action::Deny, "spec.ingress[0].protocol"),
        ("{action: Allow, protocol: 0}", Action::Allow, "spec.ingress[0].protocol"),
        ("{action: Deny, notProtocol: 256}", Action::Deny, "spec.ingress[0].notProtocol"),
        ("{action: Deny, destination: {ports: [80]}}", Action::Deny, "spec.ingress[0].destination.ports"),
        (
            "{action: Deny, protocol: TCP, destination: {ports: ['9:8']}}",
            Action::Deny,
            "spec.ingress[0].destination.ports[0]",
        ),
        (
            "{action: Deny, protocol: TCP, destination: {ports: [0]}}",
            Action::Deny,
            "spec.ingress[0].destination.ports[0]",
        ),
        ("{action: Deny, icmp: {type: 8}}", Action::Deny, "spec.ingress[0].icmp"),
        ("{action: Deny, protocol: ICMP, icmp: {type: 300}}", Action::Deny, "spec.ingress[0].icmp.type"),
        ("{action: Deny, source: {nets: [ten]}}", Action::Deny, "spec.ingress[0].source.nets[0]"),
        ("{action: Deny, source: {selector: has(}}", Action::Deny, "spec.ingress[0].source.selector"),
        ("{action: Deny, source: {services: {}}}", Action::Deny, "spec.ingress[0].source.services.name"),
    ] {
        let rule = rule(text);
        let said = rule.not_understood.as_deref().unwrap_or_else(|| panic!("{text}: understood"));
        assert_eq!((rule.action, said.split(": ").next()), (action, Some(why)), "{text}");
    }
    let policy = policy("NetworkPolicy", "{ingress: [{action: Drop}, {action: Deny}], egress: [{action: Allow}]}");
    let unknown = |rules: &Option<Vec<hanse_policy::model::Rule>>| -> Vec<bool> {
        rules.iter().flatten().map(|rule| rule.not_understood.is_some()).collect()
    };
    assert_eq!((unknown(&policy.ingress), unknown(&policy.egress)), (vec![true, false], vec![false]));
}

#[test]
fn policies_are_not_judged_by_the_schema_of_today() {
    let long = format!("{{selector: \"{}\"}}", "has(aaaa) || ".repeat(200) + "has(b)");
    for (kind, spec) in [
        ("GlobalNetworkPolicy", "{doNotTrack: true}"),
        ("GlobalNetworkPolicy", "{preDNAT: true, doNotTrack: true, egress: [{action: Allow}]}"),
        ("GlobalNetworkPolicy", "{performanceHints: [Fast, Fast], stagedAction: Set, tier: A_B}"),
        ("GlobalNetworkPolicy", "{selector: global(), namespaceSelector: global(), serviceAccountSelector: global()}"),
        ("NetworkPolicy", "{applyOnForward: true, doNotTrack: true, namespaceSelector: all()}"),
        ("StagedNetworkPolicy", "{stagedAction: ''}"),
        ("StagedKubernetesNetworkPolicy", "{podSelector: {}, policyTypes: [], stagedAction: Delete}"),
        ("StagedKubernetesNetworkPolicy", "{podSelector: {}, policyTypes: [Egress, Egress]}"),
        ("NetworkPolicy", &long),
    ] {
        policy(kind, spec);
    }
    // A namespaced policy has no such fields: Calico reads it without them.
    let np = policy("NetworkPolicy", "{doNotTrack: true, namespaceSelector: none == 'x', ingress: [{action: Deny}]}");
    assert!(np.acts() && !np.selector.canonical.contains("none"), "{}", np.selector);
    // `global()` holds for the pods that a policy applies to.
    let global = policy("GlobalNetworkPolicy", "{namespaceSelector: global()}");
    assert_eq!(&*global.selector.canonical, "has(projectcalico.org/namespace)");
    assert_eq!(policy("StagedNetworkPolicy", "{stagedAction: Remove}").staged, Some(StagedAction::Set));
    // A selector without meaning is one without a policy: Felix has none then.
    assert_eq!(refusals(&stored("GlobalNetworkPolicy", "{name: p}", "spec: {selector: 'has('}")), ["spec.selector"]);
}

#[test]
fn sets_and_tiers_are_what_is_stored() {
    for kind in ["NetworkSet", "GlobalNetworkSet"] {
        let spec = "spec: {nets: [10.0.0.1, 10.0.0.1, 10.0.0.1/8, 'fd00::1/08', ten, '0000:0000:0000:0000:0000:ffff:255.255.255.255/128']}";
        let (cluster, _) =
            assembled(&stored(kind, "{name: s, namespace: web, labels: {projectcalico.org/namespace: x}}", spec));
        let set = cluster.endpoints.values().next().expect("a set");
        let nets: Vec<String> = set.nets.iter().map(ToString::to_string).collect();
        assert_eq!(nets, ["10.0.0.1/32", "10.0.0.1/32", "10.0.0.0/8", "fd00::/8", "255.255.255.255/32"], "{kind}");
    }
    for (name, spec, order, default) in [
        ("t", "{}", None, TierDefault::Deny),
        ("t", "{order: 5, defaultAction: Allow}", Some(5.0), TierDefault::Deny),
        ("t", "{order: null, defaultAction: Pass}", None, TierDefault::Pass),
        ("default", "{}", None, TierDefault::Deny),
        ("kube-admin", "{order: 7}", Some(7.0), TierDefault::Deny),
        ("a.b", "{order: 1}", Some(1.0), TierDefault::Deny),
    ] {
        let (_, layer) = assembled(&stored("Tier", &format!("{{name: {name}}}"), &format!("spec: {spec}")));
        let tier = layer.tiers.values().next().expect("a tier");
        assert_eq!((&*tier.id.name, tier.order, tier.default), (name, Order(order), default), "{name} {spec}");
    }
}
