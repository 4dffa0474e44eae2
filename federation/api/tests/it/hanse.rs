//! The federation's own kinds: what their fields may say.

use crate::refusals;

/// `kind`, its name and its `spec` → the fields that are complained of.
fn check(kind: &str, name: &str, spec: &str) -> Vec<String> {
    refusals(&format!("apiVersion: hanse.dev/v1alpha1\nkind: {kind}\nmetadata: {{name: \"{name}\"}}\nspec: {spec}\n"))
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

/// The fields mean what they mean in Calico's GlobalNetworkPolicy, and are validated alike.
#[test]
fn policies() {
    accepts(
        "FederatedNetworkPolicy",
        &[
            "{tier: t}",
            "{tier: t, order: 1.5, clusterSelector: env == 'prod', types: [Egress]}",
            "{tier: t, ingress: [{action: Allow, source: {clusterSelector: all(), namespaceSelector: global()}}]}",
            "{tier: t, egress: [{action: Allow, destination: {services: {name: a, namespace: b}}}]}",
        ],
    );
    refuses(
        "FederatedNetworkPolicy",
        &[
            ("{}", "spec.tier"),
            ("{tier: a.b}", "spec.tier"),
            ("{tier: t, order: 1e999}", "spec.order"),
            ("{tier: t, types: []}", "spec.types"),
            ("{tier: t, types: [ingress]}", "spec.types[0]"),
            ("{tier: t, selector: global()}", "spec.selector"),
            ("{tier: t, namespaceSelector: global()}", "spec.namespaceSelector"),
            ("{tier: t, serviceAccountSelector: global()}", "spec.serviceAccountSelector"),
            ("{tier: t, clusterSelector: global()}", "spec.clusterSelector"),
            ("{tier: t, clusterSelector: a}", "spec.clusterSelector"),
            ("{tier: t, doNotTrack: true}", "spec.doNotTrack"),
            ("{tier: t, ingress: [{action: Permit}]}", "spec.ingress[0].action"),
            (
                "{tier: t, ingress: [{action: Allow, source: {clusterSelector: a}}]}",
                "spec.ingress[0].source.clusterSelector",
            ),
            (
                "{tier: t, egress: [{action: Allow, destination: {services: {name: a}}}]}",
                "spec.egress[0].destination.services.namespace",
            ),
            (
                "{tier: t, egress: [{action: Allow, destination: {services: {name: a, namespace: b}, clusterSelector: all()}}]}",
                "spec.egress[0].destination.services",
            ),
            (
                "{tier: t, ingress: [{action: Allow, source: {services: {name: a, namespace: b}, clusterSelector: ''}}]}",
                "spec.ingress[0].source.services",
            ),
        ],
    );
}

#[test]
fn tiers_and_sets() {
    accepts("Tier", &["{}", "{phase: Guard, order: -1, defaultAction: Pass}", "{phase: Baseline}"]);
    refuses(
        "Tier",
        &[
            ("{phase: Local}", "spec.phase"),
            ("{defaultAction: Allow}", "spec.defaultAction"),
            ("{order: 1e999}", "spec.order"),
            ("{weight: 1}", "spec.weight"),
        ],
    );
    accepts("FederatedNetworkSet", &["{}", "{nets: [10.0.0.1/8, 'fd00::1']}"]);
    refuses(
        "FederatedNetworkSet",
        &[("{nets: [ten]}", "spec.nets[0]"), ("{nets: [10.0.0.1, 10.0.0.1]}", "spec.nets[1]")],
    );
    for (kind, name, fields) in [
        ("Tier", "a.b", vec!["metadata.name"]),
        ("Tier", "A", vec!["metadata.name"]),
        ("FederatedNetworkSet", "a.b", vec![]),
        ("FederatedNetworkSet", "a_b", vec!["metadata.name"]),
        ("MemberCluster", "a.b", vec!["metadata.name"]),
        ("MemberCluster", &"a".repeat(64), vec!["metadata.name"]),
    ] {
        assert_eq!(check(kind, name, "{}"), fields, "{kind} {name}");
    }
}

#[test]
fn members() {
    accepts(
        "MemberCluster",
        &[
            "{labels: {env: prod, a.b/c: ''}, federatedAllow: Final}",
            "{grants: {namespaces: ['*'], cidrs: [10.0.0.0/8], labels: {app: ['*'], tier: [a, b]}, limits: {endpoints: 5}}}",
            "{grants: {visibleTo: {clusterSelector: ''}}}",
        ],
    );
    refuses(
        "MemberCluster",
        &[
            ("{labels: {env: 'a b'}}", "spec.labels"),
            ("{labels: {'a b': c}}", "spec.labels"),
            ("{federatedAllow: Always}", "spec.federatedAllow"),
            ("{labels: {hanse.dev/cluster: b}}", "spec.labels"),
            ("{grants: {cidrs: [ten]}}", "spec.grants.cidrs[0]"),
            ("{grants: {cidrs: [10.1.0.5/16]}}", "spec.grants.cidrs[0]"),
            ("{grants: {cidrs: [10.0.0.0/8, 10.1.0.0/16]}}", "spec.grants.cidrs[1]"),
            ("{grants: {labels: {hanse.dev/x: [a]}}}", "spec.grants.labels"),
            ("{grants: {visibleTo: {clusterSelector: a}}}", "spec.grants.visibleTo.clusterSelector"),
            ("{grants: {limits: {endpoints: -1}}}", "spec.grants.limits.endpoints"),
        ],
    );
}
