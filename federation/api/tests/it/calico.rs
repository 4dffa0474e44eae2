//! What Calico's schema and validator refuse we refuse, with the field's path; what they accept we accept.

use crate::refusals;

/// `kind`, its name and its `spec` → the fields that are complained of.
fn check(kind: &str, name: &str, spec: &str) -> Vec<String> {
    let metadata = format!("{{name: \"{name}\", namespace: web}}");
    refusals(&format!("apiVersion: projectcalico.org/v3\nkind: {kind}\nmetadata: {metadata}\nspec: {spec}\n"))
}

fn accepts(kind: &str, cases: &[&str]) {
    for spec in cases {
        assert_eq!(check(kind, "p", spec), Vec::<String>::new(), "{kind} {spec}");
    }
}

fn refuses(kind: &str, cases: &[(&str, &str)]) {
    for (spec, field) in cases {
        assert_eq!(check(kind, "p", spec), [*field], "{kind} {spec}");
    }
}

/// A rule in ingress of a NetworkPolicy: `None` where it is accepted, else the field below the rule.
fn rule_refusals(rule: &str) -> Vec<String> {
    check("NetworkPolicy", "p", &format!("{{ingress: [{rule}]}}"))
}

#[test]
fn rules() {
    for rule in [
        "{action: Allow}",
        "{action: Log, ipVersion: 6}",
        "{action: Allow, protocol: TCP, destination: {ports: [80, '80', '0080', '1:65535', http, a-b-9, 5-c, abcdefghijklmno]}}",
        "{action: Allow, protocol: 132, destination: {notPorts: [80]}}",
        "{action: Allow, protocol: '6', source: {ports: ['5:5']}}",
        "{action: Allow, protocol: UDPLite}",
        "{action: Allow, protocol: 255, notProtocol: 1}",
        "{action: Allow, destination: {ports: [http], notPorts: [dns]}}",
        "{action: Allow, protocol: ICMP, icmp: {type: 254, code: 255}, ipVersion: 4}",
        "{action: Allow, protocol: ICMPv6, icmp: {type: 0}, ipVersion: 6}",
        "{action: Allow, protocol: ICMP, icmp: {}}",
        "{action: Allow, protocol: 1, icmp: {type: 8}, ipVersion: 4}",
        "{action: Allow, protocol: 58, icmp: {type: 128}, notProtocol: 6}",
        "{action: Deny, protocol: TCP, notICMP: {type: 8}}",
        "{action: Allow, notICMP: {type: 8}}",
        "{action: Allow, source: {nets: [10.0.0.0/8, 10.0.0.1/32]}, destination: {notNets: [0.0.0.0/1]}}",
        "{action: Allow, source: {nets: ['::/0']}, ipVersion: 6}",
        "{action: Allow, source: {nets: [0.0.0.0/0]}}",
        "{action: Allow, source: {namespaceSelector: global(), selector: has(zone)}}",
        "{action: Allow, source: {namespaceSelector: ' global( )'}}",
        "{action: Allow, source: {notSelector: global()}}",
        "{action: Allow, source: {serviceAccounts: {names: [a, a.b], selector: all()}}}",
        "{action: Allow, source: {serviceAccounts: {names: [a, a]}}}",
        "{action: Deny, source: {nets: ['::ffff:10.0.0.0/104', 10.0.0.0/08]}}",
        "{action: Deny, source: {nets: ['::ffff:10.0.0.1/128']}, ipVersion: 4}",
        "{action: Deny, destination: {notNets: ['::ffff:0:0/96', 0.0.0.0/00]}}",
        "{action: Allow, source: {services: {name: front}}}",
        "{action: Allow, source: {services: {name: front, namespace: other}, ports: [80]}, protocol: TCP}",
        "{action: Allow, http: {methods: [GET, BREW], paths: [{exact: /a}, {prefix: /b, exact: ''}]}}",
        "{action: Allow, protocol: TCP, http: {}}",
        "{action: Allow, protocol: 6, http: {methods: [GET]}}",
        "{action: Allow, source: {nets: [10.0.0.0/8], notNets: [10.0.0.0/8]}, destination: {nets: [10.0.0.0/8]}}",
        "{action: Allow, metadata: {annotations: {Some.where/Key: any thing}}}",
        "{action: Allow, source: null, destination: null, http: null}",
    ] {
        assert_eq!(rule_refusals(rule), Vec::<String>::new(), "{rule}");
    }
    for (rule, field) in [
        ("{}", "action"),
        ("{action: allow}", "action"),
        ("{action: Allow, ipVersion: 5}", "ipVersion"),
        ("{action: Allow, protocol: tcp}", "protocol"),
        ("{action: Allow, protocol: any}", "protocol"),
        ("{action: Allow, protocol: 0}", "protocol"),
        ("{action: Allow, protocol: 256}", "protocol"),
        ("{action: Allow, notProtocol: GRE}", "notProtocol"),
        ("{action: Allow, destination: {ports: [80]}}", "destination.ports"),
        ("{action: Allow, destination: {ports: [http, 80]}}", "destination.ports"),
        ("{action: Allow, notProtocol: UDP, source: {notPorts: [80]}}", "source.notPorts"),
        ("{action: Allow, protocol: ICMP, destination: {ports: [http]}}", "destination.ports"),
        ("{action: Allow, protocol: UDPLite, destination: {ports: [80]}}", "destination.ports"),
        ("{action: Allow, protocol: TCP, destination: {ports: [0]}}", "destination.ports[0]"),
        ("{action: Allow, protocol: TCP, destination: {ports: [65536]}}", "destination.ports[0]"),
        ("{action: Allow, protocol: TCP, destination: {ports: [1, '9:8']}}", "destination.ports[1]"),
        ("{action: Allow, protocol: TCP, destination: {ports: ['0:8']}}", "destination.ports[0]"),
        ("{action: Allow, protocol: TCP, destination: {ports: [a, 'a b']}}", "destination.ports[1]"),
        ("{action: Allow, protocol: TCP, destination: {ports: [UPPER]}}", "destination.ports[0]"),
        ("{action: Allow, protocol: TCP, destination: {ports: [under_score]}}", "destination.ports[0]"),
        ("{action: Allow, protocol: TCP, destination: {ports: [a.b]}}", "destination.ports[0]"),
        ("{action: Allow, protocol: TCP, destination: {ports: [-x]}}", "destination.ports[0]"),
        ("{action: Allow, protocol: TCP, destination: {ports: [x-]}}", "destination.ports[0]"),
        ("{action: Allow, protocol: TCP, destination: {ports: [a--b]}}", "destination.ports[0]"),
        ("{action: Allow, protocol: TCP, destination: {ports: [9000-9010]}}", "destination.ports[0]"),
        ("{action: Allow, protocol: TCP, source: {notPorts: [abcdefghijklmnop]}}", "source.notPorts[0]"),
        ("{action: Allow, protocol: TCP, source: {ports: ['']}}", "source.ports[0]"),
        ("{action: Allow, icmp: {type: 8}}", "icmp"),
        ("{action: Allow, protocol: TCP, icmp: {type: 8}}", "icmp"),
        ("{action: Allow, protocol: '1', icmp: {type: 8}}", "icmp"),
        ("{action: Allow, protocol: 17, icmp: {type: 8}}", "icmp"),
        ("{action: Allow, protocol: '+6'}", "protocol"),
        ("{action: Allow, protocol: 1, ipVersion: 6}", "ipVersion"),
        ("{action: Allow, protocol: 58, ipVersion: 4}", "ipVersion"),
        ("{action: Allow, notProtocol: 58, ipVersion: 4}", "ipVersion"),
        ("{action: Allow, protocol: ICMP, icmp: {code: 0}}", "icmp.code"),
        ("{action: Allow, protocol: ICMP, icmp: {type: 255}}", "icmp.type"),
        ("{action: Allow, protocol: ICMP, icmp: {type: 3, code: 256}}", "icmp.code"),
        ("{action: Allow, notICMP: {code: 0}}", "notICMP.code"),
        ("{action: Allow, protocol: ICMP, ipVersion: 6}", "ipVersion"),
        ("{action: Allow, protocol: ICMPv6, ipVersion: 4}", "ipVersion"),
        ("{action: Allow, notProtocol: ICMP, ipVersion: 6}", "ipVersion"),
        ("{action: Allow, source: {nets: [10.0.0.1]}}", "source.nets[0]"),
        ("{action: Allow, source: {nets: [10.0.0.1/8]}}", "source.nets[0]"),
        ("{action: Allow, source: {nets: [10.0.0.0/33]}}", "source.nets[0]"),
        ("{action: Allow, source: {nets: ['010.0.0.0/8']}}", "source.nets[0]"),
        ("{action: Deny, source: {nets: ['::ffff:10.0.0.1/104']}}", "source.nets[0]"),
        ("{action: Deny, source: {nets: ['::ffff:0:0/95']}}", "source.nets[0]"),
        ("{action: Deny, source: {nets: ['fe80::%eth0/64']}}", "source.nets[0]"),
        ("{action: Deny, source: {nets: [10.0.0.0/+8]}}", "source.nets[0]"),
        ("{action: Deny, source: {nets: ['::ffff:10.0.0.0/104']}, ipVersion: 6}", "ipVersion"),
        ("{action: Deny, source: {notNets: ['10.00.0.0/16']}}", "source.notNets[0]"),
        ("{action: Allow, source: {notNets: [0.0.0.0/0]}}", "source.notNets[0]"),
        ("{action: Allow, destination: {notNets: ['::/0']}}", "destination.notNets[0]"),
        ("{action: Allow, destination: {notNets: ['0::0/00']}}", "destination.notNets[0]"),
        ("{action: Allow, source: {nets: [10.0.0.0/8]}, ipVersion: 6}", "ipVersion"),
        ("{action: Allow, source: {nets: [10.0.0.0/8, 11.0.0.0/8, 10.0.0.0/8]}}", "source.nets[2]"),
        ("{action: Allow, destination: {notNets: [10.0.0.0/8, 10.0.0.0/8]}}", "destination.notNets[1]"),
        ("{action: Allow, source: {selector: has(}}", "source.selector"),
        ("{action: Allow, source: {selector: global()}}", "source.selector"),
        ("{action: Allow, source: {namespaceSelector: global() && has(a)}}", "source.namespaceSelector"),
        ("{action: Allow, source: {namespaceSelector: '!global()'}}", "source.namespaceSelector"),
        ("{action: Allow, source: {namespaceSelector: '!!global()'}}", "source.namespaceSelector"),
        ("{action: Allow, source: {namespaceSelector: (global())}}", "source.namespaceSelector"),
        ("{action: Allow, source: {namespaceSelector: \"a == 'global('\"}}", "source.namespaceSelector"),
        ("{action: Allow, source: {notSelector: a = b}}", "source.notSelector"),
        ("{action: Allow, source: {serviceAccounts: {selector: a}}}", "source.serviceAccounts.selector"),
        ("{action: Allow, source: {services: {}}}", "source.services.name"),
        ("{action: Allow, source: {services: {name: A}}}", "source.services.name"),
        ("{action: Allow, source: {services: {name: a}, selector: all()}}", "source.services"),
        ("{action: Allow, source: {services: {name: a}, notSelector: all()}}", "source.services"),
        ("{action: Allow, source: {services: {name: a}, namespaceSelector: all()}}", "source.services"),
        ("{action: Allow, source: {services: {name: a}, serviceAccounts: {}}}", "source.services"),
        ("{action: Allow, source: {services: {name: a}, nets: [10.0.0.0/8]}}", "source.services"),
        ("{action: Allow, destination: {services: {name: a}}}", "destination.services"),
        ("{action: Deny, http: {methods: [GET]}}", "http"),
        ("{action: Allow, protocol: UDP, http: {methods: [GET]}}", "http"),
        ("{action: Allow, protocol: '6', http: {methods: [GET]}}", "http"),
        ("{action: Allow, http: {methods: [GET, GET]}}", "http.methods[1]"),
        ("{action: Allow, http: {paths: [{}]}}", "http.paths[0]"),
        ("{action: Allow, http: {paths: [{exact: /a, prefix: /b}]}}", "http.paths[0]"),
        ("{action: Allow, http: {paths: [{exact: a}]}}", "http.paths[0]"),
        ("{action: Allow, http: {paths: [{prefix: '/a?b'}]}}", "http.paths[0]"),
        ("{action: Allow, http: {paths: [{prefix: '/a b'}]}}", "http.paths[0]"),
        ("{action: Allow, metadata: {annotations: {'a b': c}}}", "metadata.annotations"),
    ] {
        assert_eq!(rule_refusals(rule), [format!("spec.ingress[0].{field}")], "{rule}");
    }
    assert_eq!(
        rule_refusals("{action: Allow, source: {nets: [10.0.0.0/8]}, destination: {notNets: ['fd00::/8']}}"),
        ["spec.ingress[0]"]
    );
}

/// A field that is unknown refuses the object: what it would limit must not be taken for unlimited.
#[test]
fn fields_that_are_not_known() {
    for (rule, field) in [
        ("{action: Allow, destination: {domains: [example.org]}}", "destination.domains"),
        ("{action: Allow, source: {networks: {name: a}}}", "source.networks"),
        ("{action: Allow, dscp: 4}", "dscp"),
        ("{action: Allow, source: {clusterSelector: all()}}", "source.clusterSelector"),
    ] {
        assert_eq!(rule_refusals(rule), [format!("spec.ingress[0].{field}")], "{rule}");
    }
    refuses(
        "GlobalNetworkPolicy",
        &[("{selecter: all()}", "spec.selecter"), ("{clusterSelector: a}", "spec.clusterSelector")],
    );
}

#[test]
fn an_object_needs_a_spec() {
    for (kind, expected) in [
        ("NetworkPolicy", vec!["spec"]),
        ("GlobalNetworkPolicy", vec!["spec"]),
        ("StagedKubernetesNetworkPolicy", vec!["spec"]),
        ("Tier", vec!["spec"]),
        ("GlobalNetworkSet", vec!["spec"]),
        ("HostEndpoint", vec![]),
    ] {
        let text = format!("apiVersion: projectcalico.org/v3\nkind: {kind}\nmetadata: {{name: p, namespace: web}}\n");
        assert_eq!(refusals(&text), expected, "{kind}");
    }
}

/// Lists without a bound of their own cost no more than their length.
#[test]
fn long_lists_are_refused_quickly() {
    let many: Vec<String> = (0..200_000).map(|at| format!("m{at}")).collect();
    let many = many.join(", ");
    assert_eq!(
        rule_refusals(&format!("{{action: Allow, http: {{methods: [{many}]}}}}")),
        ["spec.ingress[0].http.methods"]
    );
    assert_eq!(rule_refusals(&format!("{{action: Allow, source: {{serviceAccounts: {{names: [{many}]}}}}}}")), [""; 0]);
}

#[test]
fn egress_rules() {
    accepts(
        "NetworkPolicy",
        &["{egress: [{action: Allow, destination: {services: {name: a}}}]}", "{types: [Egress, Ingress]}"],
    );
    refuses(
        "NetworkPolicy",
        &[
            ("{egress: [{action: Allow, source: {services: {name: a}}}]}", "spec.egress[0].source.services"),
            ("{egress: [{action: Allow, http: {methods: [GET]}}]}", "spec.egress[0].http"),
            (
                "{egress: [{action: Allow, protocol: TCP, destination: {services: {name: a}, ports: [80]}}]}",
                "spec.egress[0].destination.services",
            ),
        ],
    );
}

#[test]
fn policies() {
    let many = |rule: &str, times: usize| format!("{{ingress: [{}]}}", vec![rule; times].join(", "));
    accepts(
        "GlobalNetworkPolicy",
        &[
            "{}",
            "{order: -1.5, tier: security, selector: '', types: [Ingress]}",
            "{namespaceSelector: a == 'b', serviceAccountSelector: all(), performanceHints: [AssumeNeededOnEveryNode]}",
            "{doNotTrack: true, applyOnForward: true, ingress: [{action: Allow, http: {methods: [GET]}}]}",
            "{preDNAT: true, applyOnForward: true, types: [Ingress]}",
            &many("{action: Allow}", 1024),
            &format!("{{selector: \"{}\"}}", "has(aaaa) || ".repeat(78) + "has(aaaaa)"),
        ],
    );
    refuses(
        "GlobalNetworkPolicy",
        &[
            ("{order: x}", "spec.order"),
            ("{tier: A_B}", "spec.tier"),
            ("{types: []}", "spec.types"),
            ("{types: [Both]}", "spec.types[0]"),
            ("{types: [Ingress, Ingress]}", "spec.types[1]"),
            ("{selector: global()}", "spec.selector"),
            ("{selector: \"a == 'global('\"}", "spec.selector"),
            ("{namespaceSelector: global()}", "spec.namespaceSelector"),
            ("{serviceAccountSelector: global()}", "spec.serviceAccountSelector"),
            ("{doNotTrack: true, preDNAT: true, applyOnForward: true}", "spec.preDNAT"),
            ("{doNotTrack: true}", "spec.applyOnForward"),
            ("{preDNAT: true}", "spec.applyOnForward"),
            ("{preDNAT: true, applyOnForward: true, types: [Egress]}", "spec.preDNAT"),
            ("{preDNAT: true, applyOnForward: true, egress: [{action: Allow}]}", "spec.preDNAT"),
            ("{performanceHints: [Fast]}", "spec.performanceHints[0]"),
            ("{performanceHints: [AssumeNeededOnEveryNode, AssumeNeededOnEveryNode]}", "spec.performanceHints[1]"),
            ("{stagedAction: Set}", "spec.stagedAction"),
            (
                "{ingress: [{action: Allow, source: {services: {name: a}}}]}",
                "spec.ingress[0].source.services.namespace",
            ),
            (&many("{action: Allow}", 1025), "spec.ingress"),
            (&format!("{{selector: \"{}\"}}", "has(aaaa) || ".repeat(78) + "has(aaaaaaaaaaaaaa)"), "spec.selector"),
        ],
    );
    refuses(
        "NetworkPolicy",
        &[("{applyOnForward: true}", "spec.applyOnForward"), ("{namespaceSelector: all()}", "spec.namespaceSelector")],
    );
}

#[test]
fn names_and_metadata() {
    let refused = |kind: &str, name: &str| check(kind, name, "{}").contains(&"metadata.name".to_owned());
    for (kind, name, expected) in [
        ("NetworkPolicy", "a", false),
        ("NetworkPolicy", &"a".repeat(200), false),
        ("GlobalNetworkPolicy", &format!("{}.{}", "a".repeat(100), "b".repeat(100)), false),
        ("GlobalNetworkPolicy", &"a".repeat(254), true),
        ("NetworkPolicy", "default.a-9", false),
        ("NetworkPolicy", "a.b.c", true),
        ("NetworkPolicy", "knp.default.a.b.c", false),
        ("NetworkPolicy", "A", true),
        ("NetworkPolicy", "-a", true),
        ("GlobalNetworkPolicy", "security.a", false),
        ("GlobalNetworkPolicy", "knp.default.a", true),
        ("GlobalNetworkPolicy", "a_b", true),
        ("StagedGlobalNetworkPolicy", "a.b.c", true),
        ("NetworkSet", "a.b.c", false),
        ("NetworkSet", "a/b", true),
        ("Tier", "a", false),
        ("Tier", "a.b", true),
        ("Tier", &"a".repeat(64), true),
        ("StagedKubernetesNetworkPolicy", "a.b.c", false),
    ] {
        assert_eq!(refused(kind, name), expected, "{kind} {name}");
    }
    let with = |metadata: &str| {
        refusals(&format!(
            "apiVersion: projectcalico.org/v3\nkind: NetworkSet\nmetadata: {{name: 'n', namespace: web, {metadata}}}\nspec: {{}}\n"
        ))
    };
    assert_eq!(with("labels: {a: b, c.d/e: ''}, annotations: {A.b/C: 'x y'}"), Vec::<String>::new());
    assert_eq!(with("labels: {projectcalico.org/namespace: x}"), ["metadata.labels"]);
    assert_eq!(with("labels: {a: 'x y'}"), ["metadata.labels"]);
    assert_eq!(with("annotations: {a b: c}"), ["metadata.annotations"]);
}

#[test]
fn tiers_and_sets() {
    accepts(
        "Tier",
        &["{}", "{order: 5}", "{order: 5, defaultAction: Pass}", "{defaultAction: Deny}", "{defaultAction: null}"],
    );
    refuses(
        "Tier",
        &[
            ("{defaultAction: Allow}", "spec.defaultAction"),
            ("{defaultAction: Log}", "spec.defaultAction"),
            ("{defaultAction: ''}", "spec.defaultAction"),
        ],
    );
    for (name, spec, fields) in [
        ("default", "{order: 1000000}", vec![]),
        ("default", "{order: 1000000, defaultAction: Deny}", vec![]),
        ("default", "{}", vec!["spec.order"]),
        ("default", "{order: 1000000, defaultAction: Pass}", vec!["spec.defaultAction"]),
        ("kube-admin", "{order: 1000, defaultAction: Pass}", vec![]),
        ("kube-admin", "{order: 1000}", vec!["spec.defaultAction"]),
        ("kube-baseline", "{order: 10000000, defaultAction: Pass}", vec![]),
        ("kube-baseline", "{order: 1000, defaultAction: Pass}", vec!["spec.order"]),
    ] {
        assert_eq!(check("Tier", name, spec), fields, "{name} {spec}");
    }
    let many: Vec<String> = (0..1000).map(|at| format!("10.{}.{}.0/24", at / 250, at % 250)).collect();
    accepts(
        "GlobalNetworkSet",
        &[
            "{}",
            "{nets: [10.0.0.1, 10.0.0.1/8, 'fd00::1', 'fd00::1/8', 10.0.0.0/09, '::ffff:10.0.0.1', '::ffff:10.0.0.0/104']}",
            "{nets: ['ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff/128']}",
            &format!("{{nets: [{}]}}", many.join(", ")),
        ],
    );
    refuses(
        "NetworkSet",
        &[
            ("{nets: [10.0.0.0/8, ten]}", "spec.nets[1]"),
            ("{nets: [10.0.0.1, 10.0.0.2, 10.0.0.1]}", "spec.nets[2]"),
            // 48 characters.
            ("{nets: ['ffff:ffff:ffff:ffff:ffff:ffff:255.255.255.25/128']}", "spec.nets[0]"),
        ],
    );
}

#[test]
fn staged() {
    accepts(
        "StagedNetworkPolicy",
        &[
            "{stagedAction: Delete, tier: default}",
            "{stagedAction: Delete, order: null, selector: '', ingress: null}",
            "{stagedAction: Learn}",
            "{selector: all()}",
        ],
    );
    accepts(
        "StagedKubernetesNetworkPolicy",
        &[
            "{stagedAction: Delete}",
            "{stagedAction: Delete, podSelector: {}}",
            "{podSelector: {}, policyTypes: [Egress, Ingress]}",
            "{podSelector: {}, policyTypes: null}",
        ],
    );
    refuses(
        "StagedNetworkPolicy",
        &[
            ("{stagedAction: Remove}", "spec.stagedAction"),
            ("{stagedAction: ''}", "spec.stagedAction"),
            ("{stagedAction: Delete, selector: all()}", "spec.selector"),
            ("{stagedAction: Delete, ingress: [{action: Allow}]}", "spec.ingress"),
            ("{stagedAction: Delete, ingress: []}", "spec.ingress"),
            ("{stagedAction: Delete, types: [Ingress], tier: default}", "spec.types"),
            ("{stagedAction: Delete, order: 0}", "spec.order"),
            ("{stagedAction: Delete, performanceHints: [AssumeNeededOnEveryNode]}", "spec.performanceHints"),
            ("{ingress: [{action: Never}]}", "spec.ingress[0].action"),
        ],
    );
    refuses(
        "StagedGlobalNetworkPolicy",
        &[
            ("{stagedAction: Delete, order: 1}", "spec.order"),
            ("{stagedAction: Delete, namespaceSelector: all()}", "spec.namespaceSelector"),
        ],
    );
    refuses(
        "StagedKubernetesNetworkPolicy",
        &[
            ("{stagedAction: Delete, policyTypes: [Ingress]}", "spec.policyTypes"),
            ("{stagedAction: Delete, ingress: []}", "spec.ingress"),
            ("{stagedAction: Delete, podSelector: {matchLabels: {a: b}}}", "spec.podSelector"),
            ("{podSelector: {}, policyTypes: []}", "spec.policyTypes"),
            ("{podSelector: {}, policyTypes: [Egress, Egress]}", "spec.policyTypes[1]"),
            ("{podSelector: {}, ingress: [{ports: [{port: 0}]}]}", "spec.ingress[0].ports[0].port"),
        ],
    );
}
