//! NetworkPolicy, clause by clause.

use std::sync::Arc;

use hanse_api::{Manifests, assemble_cluster, read_bytes};
use hanse_policy::model::{Policy, Port, Protocol};

fn policy(spec: &str) -> Result<Policy, Vec<String>> {
    let text = format!(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: p, namespace: a}}\nspec: {spec}\n"
    );
    let mut read = Manifests::default();
    read_bytes(&Arc::from("f"), text.as_bytes(), &mut read);
    if !read.diagnostics.is_empty() {
        return Err(read.diagnostics.iter().map(|it| format!("{}: {}", it.field, it.message)).collect());
    }
    let state = assemble_cluster(&"c".into(), read.objects);
    Ok(state.layer.policies.into_values().next().expect("one policy"))
}

#[test]
fn types_default_by_the_sections() {
    for (spec, ingress, egress) in [
        ("{podSelector: {}}", true, false),
        ("{podSelector: {}, egress: []}", true, false),
        ("{podSelector: {}, egress: null}", true, false),
        ("{podSelector: {}, egress: [{}]}", true, true),
        ("{podSelector: {}, policyTypes: [Egress]}", false, true),
        ("{podSelector: {}, policyTypes: [Egress], ingress: [{}]}", false, true),
        ("{podSelector: {}, policyTypes: [Ingress, Egress]}", true, true),
        ("{}", true, false),
    ] {
        let policy = policy(spec).expect(spec);
        assert_eq!((policy.ingress.is_some(), policy.egress.is_some()), (ingress, egress), "{spec}");
    }
}

#[test]
fn ports_by_protocol() {
    for (ports, expected) in [
        ("[]", vec![(None, vec![])]),
        ("[{}]", vec![(Some(Protocol::Tcp), vec![])]),
        ("[{protocol: UDP}]", vec![(Some(Protocol::Udp), vec![])]),
        (
            "[{port: 80}, {port: 90, endPort: 99}]",
            vec![(Some(Protocol::Tcp), vec![Port::Range(80, 80), Port::Range(90, 99)])],
        ),
        ("[{port: 80}, {}]", vec![(Some(Protocol::Tcp), vec![])]),
        ("[{port: http}]", vec![(Some(Protocol::Tcp), vec![Port::Named("http".into())])]),
        (
            "[{port: 53, protocol: UDP}, {port: 53}, {protocol: SCTP}]",
            vec![
                (Some(Protocol::Tcp), vec![Port::Range(53, 53)]),
                (Some(Protocol::Udp), vec![Port::Range(53, 53)]),
                (Some(Protocol::Sctp), vec![]),
            ],
        ),
    ] {
        let policy = policy(&format!("{{podSelector: {{}}, ingress: [{{ports: {ports}}}]}}")).expect(ports);
        let rules = policy.ingress.expect("of ingress");
        let found: Vec<_> = rules.into_iter().map(|rule| (rule.protocol, rule.destination.ports)).collect();
        assert_eq!(found, expected, "{ports}");
    }
}

#[test]
fn peers_look_where_they_say() {
    const PODS: &str = r#"projectcalico.org/orchestrator == "k8s""#;
    for (peer, expected) in [
        ("{podSelector: {}}", format!(r#"({PODS} && projectcalico.org/namespace == "a")"#)),
        ("{namespaceSelector: {}}", format!("({PODS} && has(projectcalico.org/namespace))")),
        (
            "{namespaceSelector: {matchLabels: {t: x}}, podSelector: {matchExpressions: [{key: k, operator: NotIn, values: [w, v]}]}}",
            format!(r#"({PODS} && pcns.t == "x" && k not in {{"v", "w"}})"#),
        ),
        (
            "{podSelector: {matchLabels: {k: ''}}}",
            format!(r#"({PODS} && projectcalico.org/namespace == "a" && k == "")"#),
        ),
    ] {
        let policy = policy(&format!("{{podSelector: {{}}, ingress: [{{from: [{peer}]}}]}}")).expect(peer);
        let rules = policy.ingress.expect("of ingress");
        let selection = rules[0].source.selection.as_ref().expect("a selection");
        assert_eq!(&*selection.selector.canonical, expected, "{peer}");
    }
}

#[test]
fn an_empty_rule_list_allows_nothing_and_an_empty_rule_everything() {
    assert_eq!(policy("{podSelector: {}, ingress: []}").expect("valid").ingress, Some(vec![]));
    let rules = policy("{podSelector: {}, ingress: [{}]}").expect("valid").ingress.expect("of ingress");
    assert_eq!((rules.len(), &rules[0].source, &rules[0].destination), (1, &Default::default(), &Default::default()));
}

#[test]
fn what_an_api_server_refuses_is_refused_with_the_field() {
    for (spec, field) in [
        ("{ingress: [{ports: [{protocol: ICMP}]}]}", "spec.ingress[0].ports[0].protocol"),
        ("{ingress: [{ports: [{port: 0}]}]}", "spec.ingress[0].ports[0].port"),
        ("{ingress: [{ports: [{port: 70000}]}]}", "spec.ingress[0].ports[0].port"),
        ("{ingress: [{ports: [{port: '80'}]}]}", "spec.ingress[0].ports[0].port"),
        ("{ingress: [{ports: [{port: UPPER}]}]}", "spec.ingress[0].ports[0].port"),
        ("{ingress: [{ports: [{endPort: 80}]}]}", "spec.ingress[0].ports[0].endPort"),
        ("{ingress: [{ports: [{port: http, endPort: 80}]}]}", "spec.ingress[0].ports[0].endPort"),
        ("{ingress: [{ports: [{port: 80, endPort: 79}]}]}", "spec.ingress[0].ports[0].endPort"),
        ("{ingress: [{from: [{}]}]}", "spec.ingress[0].from[0]"),
        ("{ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8}, podSelector: {}}]}]}", "spec.ingress[0].from[0]"),
        ("{ingress: [{from: [{ipBlock: {cidr: ten}}]}]}", "spec.ingress[0].from[0].ipBlock.cidr"),
        (
            "{ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [11.0.0.0/9]}}]}]}",
            "spec.ingress[0].from[0].ipBlock.except[0]",
        ),
        (
            "{ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.0.0.0/8]}}]}]}",
            "spec.ingress[0].from[0].ipBlock.except[0]",
        ),
        ("{policyTypes: [Both]}", "spec.policyTypes[0]"),
        ("{podSelector: {matchExpressions: [{key: a, operator: In}]}}", "spec.podSelector.matchExpressions[0].values"),
        (
            "{podSelector: {matchExpressions: [{key: a, operator: Exists, values: [b]}]}}",
            "spec.podSelector.matchExpressions[0].values",
        ),
        (
            "{podSelector: {matchExpressions: [{key: a, operator: Gt, values: ['1']}]}}",
            "spec.podSelector.matchExpressions[0].operator",
        ),
        ("{podSelector: {matchLabels: {'a b': c}}}", "spec.podSelector.matchLabels"),
        ("{podSelecter: {}}", "spec.podSelecter"),
        ("{ingress: [{ports: [{port: ''}]}]}", "spec.ingress[0].ports[0].port"),
        ("{ingress: [{ports: [{port: -1}]}]}", "spec.ingress[0].ports[0].port"),
        ("{ingress: [{ports: [{port: 80.5}]}]}", "spec.ingress[0].ports[0].port"),
        ("{ingress: [{ports: [{port: a-very-long-name}]}]}", "spec.ingress[0].ports[0].port"),
        ("{ingress: [{ports: [{port: 80, endPort: 65536}]}]}", "spec.ingress[0].ports[0].endPort"),
        ("{ingress: [{ports: [{protocol: tcp}]}]}", "spec.ingress[0].ports[0].protocol"),
        ("{ingress: [{from: [{ipBlock: {}}]}]}", "spec.ingress[0].from[0].ipBlock.cidr"),
        ("{ingress: [{from: [{ipBlock: {cidr: 10.0.0.0}}]}]}", "spec.ingress[0].from[0].ipBlock.cidr"),
        ("{ingress: [{from: [{ipBlock: {cidr: 10.0.0.256/8}}]}]}", "spec.ingress[0].from[0].ipBlock.cidr"),
        ("{ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/}}]}]}", "spec.ingress[0].from[0].ipBlock.cidr"),
        (
            "{ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: ['fd00::/64']}}]}]}",
            "spec.ingress[0].from[0].ipBlock.except[0]",
        ),
        ("{policyTypes: [Ingress, Egress, Ingress]}", "spec.policyTypes"),
        ("{podSelector: {matchLabels: {a: 'b c'}}}", "spec.podSelector.matchLabels"),
        ("{podSelector: {matchLabels: {a/b/c: d}}}", "spec.podSelector.matchLabels"),
        ("{podSelector: {matchLabels: {UP/b: d}}}", "spec.podSelector.matchLabels"),
        ("{podSelector: {matchLabels: {a: 1}}}", "spec.podSelector.matchLabels.a"),
        (
            "{podSelector: {matchExpressions: [{key: a, operator: In, values: [ok, -bad]}]}}",
            "spec.podSelector.matchExpressions[0].values[1]",
        ),
        ("{ingress: [{to: []}]}", "spec.ingress[0].to"),
    ] {
        let errors = policy(spec).expect_err(spec);
        assert!(errors.len() == 1 && errors[0].starts_with(&format!("{field}: ")), "{spec}: {errors:?}");
    }
}

#[test]
fn host_bits_of_a_block_are_masked() {
    let policy = policy("{egress: [{to: [{ipBlock: {cidr: 10.1.2.3/16, except: [10.1.2.3/24]}}]}]}").expect("valid");
    let rule = &policy.egress.expect("of egress")[0];
    assert_eq!(rule.destination.nets, ["10.1.0.0/16".parse().expect("a net")]);
    assert_eq!(rule.destination.not_nets, ["10.1.2.0/24".parse().expect("a net")]);
}

/// A limit in an unknown field must not be read as unlimited.
#[test]
fn a_field_that_is_unknown_refuses_the_policy_wherever_it_stands() {
    for (spec, field) in [
        ("{podSelector: {}, more: 1}", "spec.more"),
        ("{podSelector: {more: 1}}", "spec.podSelector.more"),
        ("{podSelector: {}, ingress: [{from: [], more: 1}]}", "spec.ingress[0].more"),
        ("{podSelector: {}, egress: [{to: [], more: 1}]}", "spec.egress[0].more"),
        ("{podSelector: {}, ingress: [{from: [{podSelector: {}, more: 1}]}]}", "spec.ingress[0].from[0].more"),
        (
            "{podSelector: {}, ingress: [{from: [{podSelector: {more: 1}}]}]}",
            "spec.ingress[0].from[0].podSelector.more",
        ),
        (
            "{podSelector: {}, ingress: [{from: [{namespaceSelector: {more: 1}}]}]}",
            "spec.ingress[0].from[0].namespaceSelector.more",
        ),
        (
            "{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, more: 1}}]}]}",
            "spec.ingress[0].from[0].ipBlock.more",
        ),
        (
            "{podSelector: {}, ingress: [{from: [{podSelector: {matchExpressions: [{key: a, operator: Exists, more: 1}]}}]}]}",
            "spec.ingress[0].from[0].podSelector.matchExpressions[0].more",
        ),
        ("{podSelector: {}, ingress: [{ports: [{port: 80, more: 1}]}]}", "spec.ingress[0].ports[0].more"),
    ] {
        let refused = policy(spec).expect_err(spec);
        assert!(refused.len() == 1 && refused[0].starts_with(&format!("{field}: ")), "{spec}: {refused:?}");
    }
}

/// Peers and ports are multiplied: what fits into one object must not exhaust the memory of the reader.
#[test]
fn refuses_what_becomes_too_large() {
    let peers = |number: usize| vec!["{podSelector: {}}"; number].join(", ");
    let ports = |number: usize| (1..=number).map(|it| format!("{{port: {it}}}")).collect::<Vec<_>>().join(", ");
    let blocks: Vec<String> =
        (0..50_000).map(|it| format!("{{ipBlock: {{cidr: 10.{}.{}.0/25}}}}", it / 256, it % 256)).collect();
    let blocks = blocks.join(", ");
    for (spec, fits) in [
        (format!("{{ingress: [{{from: [{}], ports: [{}]}}]}}", peers(1_000), ports(100)), true),
        (format!("{{ingress: [{{from: [{}], ports: [{}]}}]}}", peers(1_000), ports(101)), false),
        (format!("{{ingress: [{{from: [{}]}}, {{from: [{}]}}]}}", peers(5_000), peers(5_000)), true),
        (format!("{{ingress: [{{from: [{}]}}, {{from: [{}]}}]}}", peers(5_000), peers(5_001)), false),
        // Blocks share rules, but each protocol has rules of its own.
        (format!("{{ingress: [{{from: [{blocks}]}}], egress: [{{to: [{blocks}]}}]}}"), true),
        (
            format!(
                "{{ingress: [{{from: [{blocks}]}}], egress: [{{to: [{blocks}], ports: [{{}}, {{protocol: UDP}}]}}]}}"
            ),
            false,
        ),
    ] {
        let read = policy(&spec);
        assert_eq!(read.is_ok(), fits, "{} bytes: {:?}", spec.len(), read.err());
        if let Err(errors) = read {
            assert!(errors.len() == 1 && errors[0].contains(": is too large: "), "{errors:?}");
        }
    }
    // 25,000 peers with 20,000 ports would be 500,000,000 of them.
    let text = format!(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: p, namespace: a}}\nspec: {{ingress: [{{from: [{}], ports: [{}]}}]}}\n",
        peers(25_000),
        ports(20_000)
    );
    let mut read = Manifests::of_api_server();
    read_bytes(&Arc::from("f"), text.as_bytes(), &mut read);
    let state = assemble_cluster(&"c".into(), read.partial);
    let closed = state.layer.policies.into_values().next().expect("a policy");
    assert_eq!((closed.ingress, closed.egress), (Some(Vec::new()), None), "it allows nothing");
}
