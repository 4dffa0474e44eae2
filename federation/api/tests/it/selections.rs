//! What the selectors of a rule's end become: one selection of which one object must meet all parts, in every kind that has
//! Calico's rules, at both ends and in both directions.

use hanse_api::{Manifests, assemble_cluster, assemble_federation, read_bytes};
use hanse_policy::model::{EntityMatch, Policy, Selection};

const KINDS: [(&str, &str); 6] = [
    ("projectcalico.org/v3", "NetworkPolicy"),
    ("projectcalico.org/v3", "GlobalNetworkPolicy"),
    ("projectcalico.org/v3", "StagedNetworkPolicy"),
    ("projectcalico.org/v3", "StagedGlobalNetworkPolicy"),
    ("hanse.dev/v1alpha1", "FederatedNetworkPolicy"),
    ("hanse.dev/v1alpha1", "StagedFederatedNetworkPolicy"),
];

fn policy(api_version: &str, kind: &str, spec: &str) -> Policy {
    let metadata = match kind {
        "NetworkPolicy" | "StagedNetworkPolicy" => "{name: p, namespace: web}",
        _ => "{name: p}",
    };
    let mut text = format!("apiVersion: {api_version}\nkind: {kind}\nmetadata: {metadata}\nspec: {spec}\n");
    if kind.contains("Federated") {
        // Without its tier it is not in force.
        text += "---\napiVersion: hanse.dev/v1alpha1\nkind: Tier\nmetadata: {name: t}\nspec: {order: 1}\n";
    }
    let mut read = Manifests::default();
    read_bytes(&"file.yaml".into(), text.as_bytes(), &mut read);
    assert_eq!(read.diagnostics, [], "{text}");
    let layer = match kind {
        _ if kind.contains("Federated") => assemble_federation(&read.objects, ["c".into()]).layer,
        _ => assemble_cluster(&"c".into(), read.objects).layer,
    };
    layer.policies.into_values().next().expect("the policy")
}

/// The selectors, in their canonical form, that one object must meet, and that no object may meet.
fn selectors(entity: &EntityMatch) -> (Option<String>, Option<String>) {
    let text = |selection: &Option<Selection>| selection.as_ref().map(|it| it.selector.canonical.to_string());
    (text(&entity.selection), text(&entity.not_selection))
}

/// Every end of every rule that says `end`, by kind.
fn ends(end: &str) -> Vec<(&'static str, EntityMatch)> {
    let rules = format!("[{{action: Deny, source: {end}}}, {{action: Deny, destination: {end}}}]");
    let mut all = Vec::new();
    for (api_version, kind) in KINDS {
        let tier = if kind.contains("Federated") { "tier: t, " } else { "" };
        let policy = policy(api_version, kind, &format!("{{{tier}ingress: {rules}, egress: {rules}}}"));
        for rules in [policy.ingress, policy.egress] {
            let rules = rules.expect("both directions");
            assert_eq!(rules.len(), 2);
            all.extend([(kind, rules[0].source.clone()), (kind, rules[1].destination.clone())]);
        }
    }
    all
}

#[test]
fn a_negated_selector_beside_a_positive_part_is_part_of_it() {
    let web = "projectcalico.org/namespace == \"web\"";
    for (positive, global, namespaced) in [
        ("selector: has(a)", "has(a)".to_owned(), format!("({web} && has(a)")),
        ("namespaceSelector: has(a)", "has(pcns.a)".into(), "(has(pcns.a)".into()),
        (
            "namespaceSelector: global()",
            "!has(projectcalico.org/namespace)".into(),
            "(!has(projectcalico.org/namespace)".into(),
        ),
        (
            "serviceAccounts: {names: [s]}",
            "projectcalico.org/serviceaccount in {\"s\"}".into(),
            format!("({web} && projectcalico.org/serviceaccount in {{\"s\"}}"),
        ),
    ] {
        for (kind, end) in ends(&format!("{{{positive}, notSelector: has(b)}}")) {
            let expected = match kind {
                "NetworkPolicy" | "StagedNetworkPolicy" => format!("{namespaced} && !has(b))"),
                _ => format!("({global} && !has(b))"),
            };
            assert_eq!(selectors(&end), (Some(expected), None), "{kind} {positive}");
        }
    }
}

#[test]
fn a_lone_negated_selector_is_beside_the_namespace_of_a_namespaced_policy_only() {
    for (kind, end) in ends("{notSelector: has(b), nets: [10.0.0.0/8]}") {
        let expected = match kind {
            "NetworkPolicy" | "StagedNetworkPolicy" => {
                (Some("(projectcalico.org/namespace == \"web\" && !has(b))".into()), None)
            }
            _ => (None, Some("has(b)".into())),
        };
        assert_eq!(selectors(&end), expected, "{kind}");
    }
    let spec = "{tier: t, ingress: [{action: Deny, source: {clusterSelector: all(), notSelector: has(b)}}]}";
    let policy = policy("hanse.dev/v1alpha1", "FederatedNetworkPolicy", spec);
    assert_eq!(selectors(&policy.ingress.expect("rules")[0].source), (Some("!has(b)".into()), None));
}

#[test]
fn a_rule_stays_one_rule_whatever_its_ports_are_called() {
    for ports in ["ports: [dns]", "notPorts: [dns]", "ports: [dns], notPorts: [http]"] {
        for protocol in ["", "notProtocol: TCP, ", "notProtocol: ICMP, "] {
            for (api_version, kind) in KINDS {
                let tier = if kind.contains("Federated") { "tier: t, " } else { "" };
                let rule = format!("{{action: Allow, {protocol}source: {{{ports}}}, destination: {{{ports}}}}}");
                let policy = policy(api_version, kind, &format!("{{{tier}ingress: [{rule}]}}"));
                let rules = policy.ingress.expect("rules");
                assert_eq!(rules.iter().map(|rule| rule.protocol).collect::<Vec<_>>(), [None], "{kind} {rule}");
            }
        }
    }
}
