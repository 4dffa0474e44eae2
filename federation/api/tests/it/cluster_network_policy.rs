//! ClusterNetworkPolicy v1alpha2: what its schema refuses we refuse, with the field's path.

use crate::refusals;

fn check(spec: &str) -> Vec<String> {
    refusals(&format!(
        "apiVersion: policy.networking.k8s.io/v1alpha2\nkind: ClusterNetworkPolicy\nmetadata: {{name: p}}\nspec: {spec}\n"
    ))
}

fn of_rule(direction: &str, rule: &str) -> Vec<String> {
    check(&format!("{{tier: Admin, priority: 1, subject: {{namespaces: {{}}}}, {direction}: [{rule}]}}"))
}

#[test]
fn specs() {
    for spec in [
        "{tier: Admin, priority: 0, subject: {namespaces: {}}}",
        "{tier: Baseline, priority: 1000, subject: {pods: {podSelector: {}}}}",
        "{tier: Admin, priority: 5, subject: {pods: {namespaceSelector: {matchLabels: {a: b}}, podSelector: {}}}, ingress: []}",
        "{tier: Admin, priority: 5.0, subject: {namespaces: {}}}",
        "{tier: Admin, priority: 5, subject: {namespaces: {}}, ingress: null, egress: null}",
    ] {
        assert_eq!(check(spec), Vec::<String>::new(), "{spec}");
    }
    for (spec, field) in [
        ("{tier: admin, priority: 0, subject: {namespaces: {}}}", "spec.tier"),
        ("{tier: Admin, priority: -1, subject: {namespaces: {}}}", "spec.priority"),
        ("{tier: Admin, priority: 1001, subject: {namespaces: {}}}", "spec.priority"),
        ("{tier: Admin, priority: 0, subject: {}}", "spec.subject"),
        ("{tier: Admin, priority: 0, subject: {namespaces: {}, pods: {podSelector: {}}}}", "spec.subject"),
        ("{tier: Admin, priority: 0, subject: {pods: {namespaceSelector: {}}}}", "spec.subject.pods.podSelector"),
        ("{tier: Admin, priority: 0, subject: {pods: {podSelector: {}, more: {}}}}", "spec.subject.pods.more"),
        ("{tier: Admin, priority: '0', subject: {namespaces: {}}}", "spec.priority"),
        (
            "{tier: Admin, priority: 0, subject: {namespaces: {matchExpressions: [{key: a, operator: In}]}}}",
            "spec.subject.namespaces.matchExpressions[0].values",
        ),
    ] {
        assert_eq!(check(spec), [field], "{spec}");
    }
    for (missing, field) in [
        ("{priority: 0, subject: {namespaces: {}}}", "spec.tier"),
        ("{tier: Admin, subject: {namespaces: {}}}", "spec.priority"),
        ("{tier: Admin, priority: 0}", "spec.subject"),
        (
            "{tier: Admin, priority: 0, subject: {namespaces: {}}, egress: [{to: [{namespaces: {}}]}]}",
            "spec.egress[0].action",
        ),
        (
            "{tier: Admin, priority: 0, subject: {namespaces: {matchExpressions: [{operator: Exists}]}}}",
            "spec.subject.namespaces.matchExpressions[0].key",
        ),
    ] {
        assert_eq!(check(missing), [field], "{missing}");
    }
    let bare = "apiVersion: policy.networking.k8s.io/v1alpha2\nkind: ClusterNetworkPolicy\nmetadata: {name: p}\n";
    assert_eq!(refusals(bare), ["spec"]);
}

#[test]
fn rules() {
    let long = "n".repeat(100);
    let peers = |count: usize| vec!["{namespaces: {}}"; count].join(", ");
    for (direction, rule) in [
        ("ingress", "{action: Accept, from: [{namespaces: {}}]}".to_owned()),
        ("ingress", format!("{{name: {long}, action: Pass, from: [{}]}}", peers(25))),
        ("ingress", "{action: Deny, from: [{pods: {podSelector: {}}}], protocols: [{destinationNamedPort: http}]}".to_owned()),
        (
            "egress",
            "{action: Deny, to: [{networks: [10.0.0.1/8, 'fd00::/8']}, {nodes: {}}], protocols: [{tcp: {destinationPort: {number: 80}}}, \
             {udp: {destinationPort: {range: {start: 1, end: 65535}}}}, {sctp: {destinationPort: {number: 1}}}]}"
                .to_owned(),
        ),
        ("egress", "{action: Accept, to: [{domainNames: [example.org, '*.example.org', a.b.]}]}".to_owned()),
        // What an API server stores, and this version does not understand: it fails closed.
        ("ingress", "{action: Deny, from: [{namespaces: {}}], hours: night}".to_owned()),
        ("ingress", "{action: Deny, from: [{namespaces: {matchExpressions: [{key: a, operator: Like}]}}]}".to_owned()),
        ("egress", "{action: Deny, to: [{pods: {podSelector: {matchLabels: {'a b': c}}}}, {nodes: {matchFields: {}}}]}".to_owned()),
        (
            "egress",
            "{action: Deny, to: [{namespaces: {}}], protocols: [{udp: {destinationPort: {range: {start: 1, end: 5, step: 2}}}}]}".to_owned(),
        ),
    ] {
        assert_eq!(of_rule(direction, &rule), Vec::<String>::new(), "{rule}");
    }
    for (direction, rule, field) in [
        ("ingress", "{action: Allow, from: [{namespaces: {}}]}".to_owned(), ".action"),
        ("ingress", format!("{{name: {long}n, action: Pass, from: [{{namespaces: {{}}}}]}}"), ".name"),
        ("ingress", "{action: Deny, from: []}".to_owned(), ".from"),
        ("ingress", "{action: Deny}".to_owned(), ".from"),
        ("egress", format!("{{action: Deny, to: [{}]}}", peers(26)), ".to"),
        ("ingress", "{action: Deny, from: [{networks: [10.0.0.0/8]}]}".to_owned(), ".from[0]"),
        ("ingress", "{action: Deny, from: [{namespaces: {}, pods: {podSelector: {}}}]}".to_owned(), ".from[0]"),
        ("ingress", "{action: Deny, from: [{pods: {}}]}".to_owned(), ".from[0].pods.podSelector"),
        ("ingress", "{action: Deny, from: [{}]}".to_owned(), ".from[0]"),
        ("egress", "{action: Deny, to: [{namespaces: {}}, {}]}".to_owned(), ".to[1]"),
        ("egress", "{action: Deny, to: [{namespaces: {}}], protocols: [{}]}".to_owned(), ".protocols[0]"),
        ("egress", "{action: Deny, to: [{networks: []}]}".to_owned(), ".to[0].networks"),
        ("egress", "{action: Deny, to: [{networks: [10.0.0.1]}]}".to_owned(), ".to[0].networks[0]"),
        // What CEL's isCIDR refuses.
        ("egress", "{action: Deny, to: [{networks: [010.0.0.0/8]}]}".to_owned(), ".to[0].networks[0]"),
        ("egress", "{action: Deny, to: [{networks: [10.0.0.0/08]}]}".to_owned(), ".to[0].networks[0]"),
        ("egress", "{action: Deny, to: [{networks: [10.0.0.0/33]}]}".to_owned(), ".to[0].networks[0]"),
        ("egress", "{action: Deny, to: [{networks: ['::ffff:10.0.0.0/104']}]}".to_owned(), ".to[0].networks[0]"),
        ("egress", "{action: Deny, to: [{networks: ['fe80::1%eth0/64']}]}".to_owned(), ".to[0].networks[0]"),
        ("egress", "{action: Deny, to: [{namespaces: {}}], protocols: [{tcp: {}}]}".to_owned(), ".protocols[0].tcp"),
        ("egress", "{action: Deny, to: [{namespaces: {matchLabels: {a: 1}}}]}".to_owned(), ".to[0].namespaces.matchLabels.a"),
        (
            "egress",
            "{action: Deny, to: [{namespaces: {}}], protocols: [{sctp: {destinationPort: {number: '80'}}}]}".to_owned(),
            ".protocols[0].sctp.destinationPort.number",
        ),
        ("egress", "{action: Deny, to: [{networks: [10.0.0.0/8, 10.0.0.0/8]}]}".to_owned(), ".to[0].networks[1]"),
        ("egress", "{action: Accept, to: [{domainNames: [localhost]}]}".to_owned(), ".to[0].domainNames[0]"),
        ("egress", "{action: Accept, to: [{domainNames: ['a.*.org']}]}".to_owned(), ".to[0].domainNames[0]"),
        ("egress", "{action: Deny, to: [{namespaces: {}}], protocols: []}".to_owned(), ".protocols"),
        (
            "egress",
            "{action: Deny, to: [{namespaces: {}}], protocols: [{tcp: {destinationPort: {}}}]}".to_owned(),
            ".protocols[0].tcp.destinationPort",
        ),
        (
            "egress",
            "{action: Deny, to: [{namespaces: {}}], protocols: [{tcp: {destinationPort: {number: 0}}}]}".to_owned(),
            ".protocols[0].tcp.destinationPort.number",
        ),
        (
            "egress",
            "{action: Deny, to: [{namespaces: {}}], protocols: [{udp: {destinationPort: {range: {start: 5, end: 5}}}}]}".to_owned(),
            ".protocols[0].udp.destinationPort.range",
        ),
        (
            "egress",
            "{action: Deny, to: [{namespaces: {}}], protocols: [{tcp: {destinationPort: {number: 1}}, udp: {destinationPort: {number: 1}}}]}".to_owned(),
            ".protocols[0]",
        ),
        ("egress", "{action: Deny, to: [{nodes: {}}], protocols: [{destinationNamedPort: http}]}".to_owned(), ""),
    ] {
        assert_eq!(of_rule(direction, &rule), [format!("spec.{direction}[0]{field}")], "{rule}");
    }
    let many = vec!["{action: Deny, from: [{namespaces: {}}]}"; 26].join(", ");
    assert_eq!(of_rule("ingress", &many), ["spec.ingress"]);
}

/// What this version does not know makes the rule unknown, in every part of it that may grow.
#[test]
fn a_part_that_is_not_known_is_not_taken_for_nothing() {
    use hanse_api::{Manifests, assemble_cluster, read_bytes};
    for (rule, is_known) in [
        ("{action: Accept, to: [{namespaces: {}}]}", true),
        ("{action: Accept, to: [{more: {}}]}", false),
        ("{action: Accept, to: [{namespaces: {}}, {more: {}}]}", false),
        ("{action: Accept, to: [{pods: {podSelector: {}, more: {}}}]}", false),
        ("{action: Accept, to: [{namespaces: {}}], protocols: [{more: {}}]}", false),
        ("{action: Accept, to: [{namespaces: {}}], protocols: [{tcp: {more: {}}}]}", false),
        (
            "{action: Accept, to: [{namespaces: {}}], protocols: [{tcp: {destinationPort: {number: 80}, more: {}}}]}",
            false,
        ),
        ("{action: Accept, to: [{namespaces: {}}], protocols: [{tcp: {destinationPort: {more: {}}}}]}", false),
        ("{action: Accept, to: [{namespaces: {}}], protocols: [{tcp: {destinationPort: {number: 80}}}]}", true),
    ] {
        let text = format!(
            "apiVersion: policy.networking.k8s.io/v1alpha2\nkind: ClusterNetworkPolicy\nmetadata: {{name: p}}\n\
             spec: {{tier: Admin, priority: 1, subject: {{namespaces: {{}}}}, egress: [{rule}]}}\n"
        );
        let mut read = Manifests::default();
        read_bytes(&"f".into(), text.as_bytes(), &mut read);
        let state = assemble_cluster(&"c".into(), read.objects);
        let policy = state.layer.policies.values().next().unwrap_or_else(|| panic!("{rule}: {:?}", read.diagnostics));
        let rules = policy.egress.as_deref().expect("of egress");
        assert_eq!(rules.iter().all(|rule| rule.not_understood.is_none()), is_known, "{rule}");
    }
}
