//! Reading files: places, errors, and what is left when something is broken.

use std::path::PathBuf;
use std::sync::Arc;

use hanse_api::{Manifests, assemble_cluster, assemble_federation, read_bytes, read_dir};
use hanse_policy::model::{ClusterScope, Phase};
use proptest::prelude::*;

fn read(text: &str) -> Manifests {
    let mut read = Manifests::default();
    read_bytes(&Arc::from("file.yaml"), text.as_bytes(), &mut read);
    read
}

fn complaints(read: &Manifests) -> Vec<String> {
    let line = |diagnostic: &hanse_api::Diagnostic| {
        format!(
            "{}:{} {}: {}",
            diagnostic.location.file, diagnostic.location.line, diagnostic.field, diagnostic.message
        )
    };
    read.diagnostics.iter().map(line).collect()
}

#[test]
fn one_bad_document_does_not_hide_the_others() {
    let read = read(
        "apiVersion: v1\nkind: Namespace\nmetadata: {name: a}\n---\nkind: [\n---\n\
         apiVersion: v1\nkind: Pod\nmetadata: {name: p, namespace: a}\nspec: {hostNetwork: sure}\n---\n\
         apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: d}\n---\n\
         apiVersion: v1\nkind: Namespace\nmetadata: {name: b}\n",
    );
    assert_eq!(read.objects.len(), 2);
    assert_eq!(read.workloads.len(), 1);
    let complaints = complaints(&read);
    assert_eq!(complaints.len(), 2, "{complaints:?}");
    assert!(complaints[0].starts_with("file.yaml:6 ") || complaints[0].starts_with("file.yaml:5 "), "{complaints:?}");
    assert!(complaints[1].starts_with("file.yaml:10 spec.hostNetwork: "), "{complaints:?}");
}

#[test]
fn lists_are_opened() {
    let read = read(
        "apiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: Namespace, metadata: {name: a}}\n---\n\
         apiVersion: v1\nkind: PodList\nitems:\n- metadata: {name: p, namespace: a}\n",
    );
    assert_eq!(complaints(&read), Vec::<String>::new());
    assert_eq!(read.objects.len(), 2);
}

#[test]
fn a_missing_directory_is_an_error_and_no_empty_one() {
    let directory = tempfile::tempdir().expect("a directory");
    assert!(read_dir(&directory.path().join("none")).is_err());
    assert!(read_dir(directory.path()).expect("readable").objects.is_empty());
    std::fs::write(directory.path().join("x.yaml"), "apiVersion: v1\nkind: Namespace\nmetadata: {name: a}\n")
        .expect("written");
    std::fs::write(directory.path().join("note.txt"), "hello").expect("written");
    assert_eq!(read_dir(directory.path()).expect("readable").objects.len(), 1);
}

#[test]
fn a_directory_is_listed_once_whatever_links_lead_to_it() {
    let directory = tempfile::tempdir().expect("a directory");
    let root = directory.path();
    let namespace = |name: &str| format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}}}\n");
    let below = root.join("a/b");
    std::fs::create_dir_all(&below).expect("made");
    std::fs::write(below.join("deep.yml"), namespace("deep")).expect("written");
    std::fs::write(root.join("UPPER.JSON"), r#"{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "j"}}"#)
        .expect("written");
    std::fs::write(root.join(".hidden.yaml"), namespace("hidden")).expect("written");
    let none = &root.join("none");
    for (to, link) in [(root, "one"), (root, "two"), (&below, "a/three"), (none, "dangling.yaml"), (none, "mount-1.0")]
    {
        std::os::unix::fs::symlink(to, root.join(link)).expect("linked");
    }
    // As a ConfigMap is mounted: files are links into a hidden folder.
    std::fs::create_dir(root.join("..data")).expect("made");
    std::fs::write(root.join("..data/m.yaml"), namespace("mounted")).expect("written");
    std::os::unix::fs::symlink("..data/m.yaml", root.join("m.yaml")).expect("linked");
    let read = read_dir(root).expect("readable");
    let mut names: Vec<&str> = read.objects.iter().map(|object| object.reference.name.as_str()).collect();
    names.sort_unstable();
    assert_eq!(names, ["deep", "j", "mounted"]);
    // What a link that leads to nothing stands for is unknown, which is not nothing.
    let unread: Vec<PathBuf> = read.diagnostics.iter().map(|it| (*it.location.file).into()).collect();
    assert_eq!(unread, [root.join("dangling.yaml"), root.join("mount-1.0")]);
    let mut deep = root.to_owned();
    for _ in 0..=hanse_api::files::MAX_DIRECTORY_DEPTH {
        deep.push("d");
    }
    std::fs::create_dir_all(&deep).expect("made");
    let told = read_dir(root).expect("readable").diagnostics;
    assert!(told.iter().any(|it| it.message.contains("directories below")), "not left out in silence: {told:?}");
}

#[test]
fn documents_are_cut_where_they_end() {
    let read = read(
        "\u{feff}# first\r\n---\r\napiVersion: v1\r\nkind: Namespace\r\nmetadata:\r\n  name: a\r\n---\r\n# only this\r\n---\r\n   \r\n\
         --- # b\napiVersion: v1\nkind: Namespace\nmetadata: {name: b}\n...\n---\n\
         --- {apiVersion: v1, kind: Namespace, metadata: {name: c}}\n---\t\n{\"apiVersion\": \"v1\",\"kind\": \"Namespace\", \"metadata\": {\"name\": \"d\"}}\n\
         ---\napiVersion: v1\nkind: ConfigMap\nmetadata: {name: text}\ndata:\n  a: |\n    ---\n    kind: Namespace\n---\n\
         apiVersion: v1\nkind: Namespace\nmetadata: {name: e}\n--- \n---",
    );
    assert_eq!(complaints(&read), Vec::<String>::new());
    let names: Vec<(&str, u32)> =
        read.objects.iter().map(|object| (object.reference.name.as_str(), object.location.line)).collect();
    assert_eq!(names, [("a", 3), ("b", 12), ("c", 17), ("d", 19), ("e", 29)]);
    assert_eq!(read.skipped.len(), 1);
}

#[test]
fn what_no_api_server_would_store_is_refused() {
    for (text, wanted) in [
        ("apiVersion: v1\nkind: Namespace\nmetadata: {name: UPPER}\n", "file.yaml:3 metadata.name"),
        ("apiVersion: v1\nkind: Namespace\nmetadata: {name: a.b}\n", "file.yaml:3 metadata.name"),
        ("apiVersion: v1\nkind: Namespace\nmetadata: {name: 123}\n", "file.yaml:3 metadata.name"),
        ("apiVersion: v1\nkind: Namespace\nmetadata: {name: a, labels: {a: 'b c'}}\n", "file.yaml:3 metadata.labels"),
        ("apiVersion: v1\nkind: Pod\nmetadata: {name: a, namespace: B}\n", "file.yaml:3 metadata.namespace"),
        ("apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nstatus: {podIP: ten}\n", "file.yaml:4 status.podIP"),
        (
            "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nstatus:\n  podIPs:\n  - ip: 10.0.0.1\n  - ip: 10.0.0.256\n",
            "file.yaml:7 status.podIPs[1].ip",
        ),
        ("apiVersion: v1\nkind: Node\nmetadata: {name: a b}\n", "file.yaml:3 metadata.name"),
        ("apiVersion: v1\nkind: Pod\nmetadata: {}\n", "file.yaml:3 metadata.name"),
        ("apiVersion: v1\nmetadata: {name: a}\n", "file.yaml:1 "),
        ("just a text\n", "file.yaml:1 "),
    ] {
        let complaints = complaints(&read(text));
        assert!(complaints.len() == 1 && complaints[0].starts_with(wanted), "{text}: {complaints:?}");
    }
}

/// To pass over what was meant to be a policy would take it out of force.
#[test]
fn what_looks_like_a_kind_that_is_read_is_not_passed_over() {
    for (api, kind, wanted) in [
        ("networking.k8s.io/v1", "NetworkPolcy", "kind: \"NetworkPolcy\" is not known; did you mean NetworkPolicy of"),
        ("networking.k8s.io/v1", "networkpolicies", "kind: "),
        ("networking.k8s.io/v1", "NetworkPolcyList", "kind: "),
        (
            "networking.k8s.io/v1beta1",
            "NetworkPolicy",
            "apiVersion: \"networking.k8s.io/v1beta1\" is not read: write the",
        ),
        ("netwroking.k8s.io/v1", "NetworkPolicy", "apiVersion: \"netwroking.k8s.io/v1\" is not known; did you mean"),
        ("discovery.k8s.io/v1beta1", "EndpointSlice", "apiVersion: "),
        ("v1", "Pods", "kind: "),
        ("v1beta1", "Namespace", "apiVersion: "),
        ("projectcalico.org/v3", "GlobalNetworkPolicies", "kind: "),
        ("projectcalico.org/v4", "GlobalNetworkSet", "apiVersion: "),
        ("crd.projectcalico.org/v1", "StagedNetworkPolicie", "kind: "),
        ("policy.networking.k8s.io/v1alpha2", "ClusterNetworkPolices", "kind: "),
        ("policy.networking.k8s.io/v1alpha1", "AdminNetworkPolicy", "kind: AdminNetworkPolicy of"),
        ("hanse.dev/v1alpha2", "Tier", "apiVersion: "),
        ("hanse.dev/v1alpha1", "Something", "kind: "),
    ] {
        let read = read(&format!("apiVersion: {api}\nkind: {kind}\nmetadata: {{name: a}}\n"));
        let complaints = complaints(&read);
        let line = if wanted.starts_with("kind") { 2 } else { 1 };
        let wanted = format!("file.yaml:{line} {wanted}");
        assert!(complaints.len() == 1 && complaints[0].starts_with(&wanted), "{api} {kind}: {complaints:?}");
    }
    for (api, kind) in [
        ("networking.k8s.io/v1", "Ingress"),
        ("networking.k8s.io/v1", "IngressClass"),
        ("networking.istio.io/v1", "Gateway"),
        ("v1", "Endpoints"),
        ("v1", "PodTemplate"),
        ("v1", "ConfigMap"),
        ("apps/v1", "ControllerRevision"),
        ("serving.knative.dev/v1", "Revision"),
        ("cilium.io/v2", "CiliumNetworkPolicy"),
        ("projectcalico.org/v3", "HostEndpoint"),
        ("projectcalico.org/v3", "IPPool"),
        ("crd.projectcalico.org/v1", "BlockAffinity"),
    ] {
        let read = read(&format!("apiVersion: {api}\nkind: {kind}\nmetadata: {{name: a}}\n"));
        assert_eq!((complaints(&read), read.skipped.len()), (Vec::new(), 1), "{api} {kind}");
    }
}

#[test]
fn a_list_of_what_is_read_is_a_list() {
    for items in ["items: {a: b}", "items: [a]", "items: a", "other: []"] {
        for kind in ["networking.k8s.io/v1\nkind: NetworkPolicyList", "v1\nkind: PodList"] {
            let complaints = complaints(&read(&format!("apiVersion: {kind}\n{items}\n")));
            assert!(complaints.len() == 1 && complaints[0].contains(" items: "), "{kind} {items}: {complaints:?}");
        }
    }
    let read = read(
        "apiVersion: v1\nkind: PodList\nitems: null\n---\napiVersion: example.org/v1\nkind: WaitingList\nitems: 3\n",
    );
    assert_eq!((complaints(&read), read.skipped.len()), (Vec::new(), 1));
}

/// What an API server would not store, and would be left out of what policy goes by.
#[test]
fn addresses_and_ports_are_such() {
    for (text, wanted) in [
        ("v1\nkind: Node\nmetadata: {name: 'n'}\nspec: {podCIDR: 10.0.0/24}", "4 spec.podCIDR"),
        ("v1\nkind: Node\nmetadata: {name: 'n'}\nspec: {podCIDRs: [10.0.0.0/24, junk]}", "4 spec.podCIDRs[1]"),
        (
            "v1\nkind: Node\nmetadata: {name: 'n'}\nstatus: {addresses: [{type: Hostname, address: 'n'}, {type: InternalIP, address: 10.0.0.300}]}",
            "4 status.addresses[1].address",
        ),
        ("v1\nkind: Service\nmetadata: {name: s}\nspec: {clusterIP: 10.9.0.999}", "4 spec.clusterIP"),
        (
            "discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: s}\naddressType: IPv4\nendpoints: [{addresses: [10.0.0.999]}]",
            "5 endpoints[0].addresses[0]",
        ),
        (
            "discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: s}\naddressType: IPv4\nports: [{protocol: GRE, port: 1}]",
            "5 ports[0].protocol",
        ),
    ] {
        let complaints = complaints(&read(&format!("apiVersion: {text}\n")));
        let wanted = format!("file.yaml:{wanted}: ");
        assert!(complaints.len() == 1 && complaints[0].starts_with(&wanted), "{text}: {complaints:?}");
    }
    // A pod stays part of its cluster whatever its ports are, and so does a Service.
    for (text, wanted) in [
        (
            "v1\nkind: Pod\nmetadata: {name: p}\nspec: {containers: [{ports: [{containerPort: 80}, {containerPort: 0}]}]}",
            "4 spec.containers[0].ports[1].containerPort",
        ),
        (
            "v1\nkind: Pod\nmetadata: {name: p}\nspec: {initContainers: [{ports: [{containerPort: 80, protocol: tcp}]}]}",
            "4 spec.initContainers[0].ports[0].protocol",
        ),
        ("v1\nkind: Service\nmetadata: {name: s}\nspec: {ports: [{port: 0}]}", "4 spec.ports[0].port"),
    ] {
        let read = read(&format!("apiVersion: {text}\n"));
        assert_eq!((complaints(&read), read.objects.len()), (Vec::new(), 1), "{text}");
        let found: Vec<String> =
            read.not_storable.iter().map(|it| format!("{} {}", it.location.line, it.field)).collect();
        assert_eq!(found, [wanted], "{text}");
        let cluster = assemble_cluster(&"c".into(), read.objects).cluster;
        assert_eq!(cluster.endpoints.len(), usize::from(text.contains("Pod")), "{text}");
    }
    let good = read(
        "apiVersion: v1\nkind: Node\nmetadata: {name: 'n'}\nspec: {podCIDR: 010.9.0.0/24, podCIDRs: [010.9.0.0/24, 'fd00::/64']}\n\
         status: {addresses: [{type: Hostname, address: 'n'}, {type: InternalIP, address: 10.0.0.3}]}\n---\n\
         apiVersion: v1\nkind: Service\nmetadata: {name: s}\nspec: {clusterIP: None}\n---\n\
         apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: s}\naddressType: FQDN\nendpoints: [{addresses: [example.org]}]\n",
    );
    assert_eq!(complaints(&good), Vec::<String>::new());
    let state = assemble_cluster(&"c".into(), good.objects);
    let ranges: Vec<String> = state.nodes["n"].pod_ranges.iter().map(ToString::to_string).collect();
    assert_eq!(ranges, ["10.9.0.0/24", "fd00::/64"]);
}

/// Where nothing earlier is in force, a policy closes what it may close: a rule in which a field is not known is unknown,
/// and so is every rule where it is elsewhere.
#[test]
fn policy_with_unknown_parts_is_partial() {
    let network = "networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: p, namespace: a}";
    let calico = "projectcalico.org/v3\nkind: GlobalNetworkPolicy\nmetadata: {name: p}";
    let cluster = "policy.networking.k8s.io/v1alpha2\nkind: ClusterNetworkPolicy\nmetadata: {name: p}";
    for (text, unknown) in [
        (
            format!("{network}\nspec: {{podSelector: {{}}, ingress: [{{}}, {{more: 1}}], egress: [{{}}]}}"),
            [false, true, false],
        ),
        (format!("{network}\nspec: {{podSelector: {{more: 1}}, ingress: [{{}}, {{}}], egress: [{{}}]}}"), [true; 3]),
        (
            format!(
                "{network}\nspec: {{ingress: [{{from: [{{podSelector: {{more: 1, other: 2}}}}]}}, {{}}], egress: [{{to: [], x: 1}}]}}"
            ),
            [true, false, true],
        ),
        (
            format!(
                "{calico}\nspec: {{ingress: [{{action: Allow}}, {{action: Deny}}], egress: [{{action: Allow, destination: {{domains: [a.b]}}}}]}}"
            ),
            [false, false, true],
        ),
        (
            format!(
                "{calico}\nspec: {{more: 1, ingress: [{{action: Allow}}, {{action: Deny}}], egress: [{{action: Allow}}]}}"
            ),
            [true; 3],
        ),
        (
            format!(
                "{cluster}\nspec: {{more: 1, tier: Admin, priority: 1, subject: {{namespaces: {{}}}}, ingress: [{{action: Deny, from: [{{namespaces: {{}}}}]}}, {{action: Deny, from: [{{namespaces: {{}}}}]}}], egress: [{{action: Deny, to: [{{namespaces: {{}}}}]}}]}}"
            ),
            [true; 3],
        ),
    ] {
        let read = read(&format!("apiVersion: {text}\n"));
        assert!(read.objects.is_empty() && !read.diagnostics.is_empty(), "{text}");
        assert_eq!(read.partial.len(), 1, "{text}: {:?}", read.diagnostics);
        let state = assemble_cluster(&"c".into(), read.partial);
        let policy = state.layer.policies.into_values().next().expect("a policy");
        let rules = policy.ingress.into_iter().chain(policy.egress).flatten();
        let found: Vec<bool> = rules.map(|rule| rule.not_understood.is_some()).collect();
        assert_eq!(found, unknown, "{text}");
    }
    // Only policies have a reading that is safe.
    let set =
        "apiVersion: hanse.dev/v1alpha1\nkind: FederatedNetworkSet\nmetadata: {name: s}\nspec: {nets: [], more: 1}\n";
    let set = read(set);
    assert!(set.partial.is_empty() && set.diagnostics.len() == 1, "{:?}", set.diagnostics);
}

/// A policy that is refused for any other reason closes too: an error in a rule makes that rule unknown; one elsewhere makes all rules
/// unknown, and the selected endpoints all that its kind can select.
#[test]
fn refused_policy_closes_what_it_may_close() {
    let network = "networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: p, namespace: a}\nspec: ";
    let calico = "projectcalico.org/v3\nkind: NetworkPolicy\nmetadata: {name: p, namespace: a}\nspec: ";
    let global = "projectcalico.org/v3\nkind: GlobalNetworkPolicy\nmetadata: {name: p}\nspec: ";
    let cluster = "policy.networking.k8s.io/v1alpha2\nkind: ClusterNetworkPolicy\nmetadata: {name: p}\nspec: ";
    let subject = "tier: Admin, priority: 7, subject: {pods: {podSelector: {matchLabels: {app: web}}}}";
    let web = |namespace: &str| format!("projectcalico.org/namespace == \"{namespace}\" && app == \"web\"");
    // Each with: what it selects, its order, and of ingress and egress the rules: the first letter of the action, ? if unknown.
    let in_a = "(projectcalico.org/orchestrator == \"k8s\" && projectcalico.org/namespace == \"a\")";
    let any = "projectcalico.org/orchestrator == \"k8s\"";
    let first = Some(f64::MIN);
    let web_in_a = in_a.replace(')', " && app == \"web\")");
    for (text, selects, order, ingress, egress) in [
        // Errors in rules.
        (
            format!(
                "{network}{{podSelector: {{matchLabels: {{app: web}}}}, ingress: [{{}}, {{ports: [{{port: 0}}]}}]}}"
            ),
            &*web_in_a,
            Some(1000.0),
            Some("A A?"),
            None,
        ),
        (
            format!("{network}{{podSelector: {{matchLabels: {{app: web}}}}, ingress: [{{from: 7}}]}}"),
            &web_in_a,
            Some(1000.0),
            Some("A?"),
            None,
        ),
        (
            format!(
                "{calico}{{selector: app == 'web', order: 3, ingress: [{{action: Deny, source: {{nets: [x, 10.0.0.0/8]}}}}, {{action: Allow}}, {{action: Audit}}]}}"
            ),
            &format!("({})", web("a")),
            Some(3.0),
            Some("D? A D?"),
            None,
        ),
        (
            format!(
                "{global}{{selector: app == 'web', order: 3, egress: [{{action: Pass, protocol: [TCP]}}, {{action: Allow}}]}}"
            ),
            "app == \"web\"",
            Some(3.0),
            None,
            Some("P? A"),
        ),
        (
            format!(
                "{cluster}{{{subject}, ingress: [{{action: Accept, from: [{{namespaces: {{}}}}]}}, {{action: Reject, from: [{{namespaces: {{}}}}]}}]}}"
            ),
            &format!("({any} && has(projectcalico.org/namespace) && app == \"web\")"),
            Some(7.0),
            Some("A D?"),
            None,
        ),
        // Elsewhere.
        (
            format!("{network}{{podSelector: {{matchLabels: {{app: '-'}}}}, ingress: [{{}}]}}"),
            in_a,
            Some(1000.0),
            Some("A?"),
            None,
        ),
        (format!("{network}{{podSelector: {{more: 1}}, ingress: [{{}}]}}"), in_a, Some(1000.0), Some("A?"), None),
        (format!("{network}{{podSelector: 7, ingress: [{{}}]}}"), in_a, Some(1000.0), Some("A?"), None),
        (
            format!(
                "{network}{{podSelector: {{matchLabels: {{app: web}}}}, ingress: [{{}}], egress: [{{}}], policyTypes: [None]}}"
            ),
            &web_in_a,
            Some(1000.0),
            Some(""),
            Some(""),
        ),
        (format!("{network}7"), in_a, Some(1000.0), Some(""), Some("")),
        (
            format!("{calico}{{selector: app ==, order: 3, ingress: [{{action: Allow}}]}}"),
            "projectcalico.org/namespace == \"a\"",
            Some(3.0),
            Some("D?"),
            None,
        ),
        (
            format!("{global}{{selector: app == 'web', order: [], ingress: [{{action: Allow}}]}}"),
            "app == \"web\"",
            first,
            Some("D?"),
            None,
        ),
        (
            format!("{global}{{selector: app == 'web', order: 3, ingress: 7}}"),
            "app == \"web\"",
            Some(3.0),
            Some("D?"),
            None,
        ),
        (
            format!("{global}{{selector: app == 'web', order: 3, types: [Both], ingress: [{{action: Allow}}]}}"),
            "app == \"web\"",
            Some(3.0),
            Some("D?"),
            Some("D?"),
        ),
        (format!("{global}x"), "all()", first, Some("D?"), Some("D?")),
        (
            format!(
                "{cluster}{{{}, ingress: [{{action: Accept, from: [{{namespaces: {{}}}}]}}]}}",
                subject.replace("podSelector", "podsSelector")
            ),
            any,
            Some(7.0),
            Some("D?"),
            None,
        ),
        (
            format!(
                "{cluster}{{{}, ingress: [{{action: Accept, from: [{{namespaces: {{}}}}]}}]}}",
                subject.replace("Admin", "Other")
            ),
            &format!("({any} && has(projectcalico.org/namespace) && app == \"web\")"),
            first,
            Some("D?"),
            None,
        ),
        (
            format!("{cluster}{{priority: 1, egress: [{{action: Accept, to: [{{nodes: {{}}}}]}}]}}"),
            any,
            first,
            Some("D?"),
            Some("D?"),
        ),
    ] {
        let read = read(&format!("apiVersion: {text}\n"));
        assert!(read.objects.is_empty() && !read.diagnostics.is_empty(), "{text}");
        assert_eq!(read.partial.len(), 1, "{text}: {:?}", read.diagnostics);
        let state = assemble_cluster(&"c".into(), read.partial);
        let policy = state.layer.policies.into_values().next().expect("a policy");
        let letter = |rule: hanse_policy::model::Rule| {
            let unknown = if rule.not_understood.is_some() { "?" } else { "" };
            format!("{}{unknown}", &format!("{:?}", rule.action)[..1])
        };
        let rules =
            |rules: Option<Vec<_>>| rules.map(|rules| rules.into_iter().map(letter).collect::<Vec<_>>().join(" "));
        let found = (policy.selector.expr.to_string(), policy.order.0, rules(policy.ingress), rules(policy.egress));
        assert_eq!(
            found,
            (selects.to_owned(), order, ingress.map(str::to_owned), egress.map(str::to_owned)),
            "{text}: {:?}",
            read.diagnostics
        );
    }
}

#[test]
fn objects_of_an_api_server_are_not_refused_for_the_syntax_of_their_metadata() {
    // As API servers accept it: they convert keys to lower case as Go does, character by character.
    let text = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: p, annotations: {İstanbul.example/K: x}}\n";
    assert_eq!(complaints(&read(text)), Vec::<String>::new());
    // What this version would refuse.
    let long = "a".repeat(300);
    let text = format!(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: '{long}', annotations: {{'ü ü': x}}, labels: {{'ü': 'ü'}}}}\n---\n\
         apiVersion: crd.projectcalico.org/v1\nkind: NetworkPolicy\nmetadata: {{name: default.p, annotations: {{projectcalico.org/metadata: '['}}}}\nspec: {{}}\n---\n\
         apiVersion: projectcalico.org/v3\nkind: NetworkSet\nmetadata: {{name: a.b.c, labels: {{projectcalico.org/namespace: x}}}}\nspec: {{}}\n"
    );
    assert_eq!(read(&text).objects.len(), 0);
    let mut read = Manifests::of_api_server();
    read_bytes(&Arc::from("file.yaml"), text.as_bytes(), &mut read);
    assert_eq!((complaints(&read), read.objects.len()), (Vec::new(), 3));
}

#[test]
fn errors_of_one_object_are_limited() {
    let ports = "{port: 0}, ".repeat(1_000);
    let text = format!(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: p}}\nspec: {{ingress: [{{ports: [{ports}]}}]}}\n"
    );
    let complaints = complaints(&read(&text));
    assert_eq!(complaints.len(), 21);
    assert!(complaints[20].ends_with("and 980 more errors"), "{complaints:?}");
    let policy = format!(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: p}}\nspec: {{policyTypes: [{}]}}\n",
        "ä".repeat(100_000)
    );
    let complaints = self::complaints(&read(&policy));
    assert!(complaints.len() == 1 && complaints[0].len() < 600, "{complaints:?}");
}

#[test]
fn pods_become_endpoints() {
    let read = read(
        "apiVersion: v1\nkind: Pod\nmetadata: {name: web, namespace: shop, labels: {app: web}}\n\
         spec:\n  nodeName: n1\n  containers:\n  - ports: [{name: http, containerPort: 80}]\n\
         \x20 - ports: [{name: dns, containerPort: 53, protocol: UDP}]\n\
         status: {phase: Running, podIP: 10.0.0.1, podIPs: [{ip: 10.0.0.1}, {ip: 'fd00::1'}]}\n---\n\
         apiVersion: v1\nkind: Pod\nmetadata: {name: done, namespace: shop}\n\
         status: {phase: Succeeded, podIP: 10.0.0.2}\n---\n\
         apiVersion: v1\nkind: Pod\nmetadata: {name: host, namespace: shop}\nspec: {hostNetwork: true, nodeName: n1}\n\
         status: {phase: Running, podIP: 192.168.0.1}\n",
    );
    assert_eq!(complaints(&read), Vec::<String>::new());
    let state = assemble_cluster(&"c".into(), read.objects);
    let endpoint = |name: &str| {
        let found = state.cluster.endpoints.iter().find(|(id, _)| &*id.name == name);
        found.map(|(_, endpoint)| endpoint.clone()).expect("the pod")
    };
    let web = endpoint("web");
    assert_eq!(web.addresses, ["10.0.0.1".parse::<std::net::IpAddr>().expect("v4"), "fd00::1".parse().expect("v6")]);
    assert_eq!(
        web.ports.iter().map(|port| (&*port.name, port.protocol, port.port)).collect::<Vec<_>>(),
        [("http", 6, 80), ("dns", 17, 53)]
    );
    assert_eq!(web.service_account.as_deref(), Some("default"));
    assert!(endpoint("done").addresses.is_empty());
    let host = endpoint("host");
    assert!(host.host_network && host.addresses.is_empty() && host.host_addresses.len() == 1);
    let labels = &state.cluster.namespaces["shop"].labels;
    assert_eq!(labels.get("kubernetes.io/metadata.name").map(|value| &**value), Some("shop"));
}

#[test]
fn an_address_belongs_to_one_live_pod() {
    let pod = |name: &str, created: &str, phase: &str, more: &str| {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop{created}}}\nspec: {{nodeName: n1{more}}}\n\
             status: {{phase: {phase}, podIP: 10.0.0.1, hostIP: 192.168.0.1}}\n---\n"
        )
    };
    let old = ", creationTimestamp: '2026-01-01T00:00:00Z'";
    let new = ", creationTimestamp: '2026-02-01T00:00:00Z'";
    for (pods, owner) in [
        ([pod("a", old, "Running", ""), pod("b", new, "Running", "")], Some("b")),
        ([pod("a", new, "Running", ""), pod("b", old, "Running", "")], Some("a")),
        ([pod("b", old, "Running", ""), pod("a", old, "Running", "")], Some("a")),
        ([pod("b", "", "Running", ""), pod("a", "", "Running", "")], Some("a")),
        ([pod("a", old, "Running", ""), pod("b", "", "Running", "")], Some("a")),
        ([pod("a", old, "Running", ""), pod("b", new, "Failed", "")], Some("a")),
        ([pod("a", old, "Failed", ""), pod("b", new, "Succeeded", "")], None),
        ([pod("a", old, "Running", ""), pod("b", new, "Running", ", hostNetwork: true")], Some("a")),
    ] {
        let read = read(&pods.concat());
        assert_eq!(complaints(&read), Vec::<String>::new());
        let state = assemble_cluster(&"c".into(), read.objects);
        let owners = state.cluster.endpoints.iter().filter(|(_, endpoint)| !endpoint.addresses.is_empty());
        assert_eq!(owners.map(|(id, _)| &*id.name).collect::<Vec<_>>(), Vec::from_iter(owner), "{pods:?}");
    }
    // One on the host's network has none of its own; when it has ended, not the host's either.
    for (phase, expected) in [("Running", 1), ("Succeeded", 0), ("Failed", 0)] {
        let read = read(&pod("h", "", phase, ", hostNetwork: true"));
        let state = assemble_cluster(&"c".into(), read.objects);
        let endpoint = state.cluster.endpoints.values().next().expect("the pod");
        assert_eq!((endpoint.addresses.len(), endpoint.host_addresses.len()), (0, expected), "{phase}");
    }
}

#[test]
fn the_federation_is_resolved_to_names() {
    let read = read(
        "apiVersion: hanse.dev/v1alpha1\nkind: Tier\nmetadata: {name: platform}\nspec: {phase: Baseline, order: 1}\n---\n\
         apiVersion: hanse.dev/v1alpha1\nkind: MemberCluster\nmetadata: {name: prod}\n\
         spec: {labels: {env: prod}, grants: {cidrs: [10.1.0.0/16]}}\n---\n\
         apiVersion: hanse.dev/v1alpha1\nkind: FederatedNetworkPolicy\nmetadata: {name: p}\n\
         spec:\n  tier: platform\n  clusterSelector: env == 'prod'\n  selector: app == 'vllm'\n  types: [Ingress]\n\
         \x20 ingress:\n  - action: Allow\n    protocol: TCP\n\
         \x20   source: {clusterSelector: \"hanse.dev/cluster == 'train'\", selector: role == 'gateway'}\n\
         \x20   destination: {ports: [8000, '9000:9010', http]}\n",
    );
    assert_eq!(complaints(&read), Vec::<String>::new());
    let federation = assemble_federation(&read.objects, ["prod".into(), "train".into()]);
    assert!(federation.diagnostics.is_empty(), "{:?}", federation.diagnostics);
    let policy = federation.layer.policies.values().next().expect("the policy");
    assert_eq!(policy.tier.phase, Phase::Baseline);
    assert_eq!(policy.enforcers, ClusterScope::Named(["prod".into()].into()));
    let rule = &policy.ingress.as_deref().expect("of ingress")[0];
    let selection = rule.source.selection.as_ref().expect("a selection");
    assert_eq!(selection.clusters, ClusterScope::Named(["train".into()].into()));
    assert_eq!(rule.destination.ports.len(), 3);
    assert!(policy.egress.is_none());
}

#[test]
fn fields_nobody_knows_are_named() {
    for (text, wanted) in [
        (
            "apiVersion: hanse.dev/v1alpha1\nkind: FederatedNetworkPolicy\nmetadata: {name: p}\nspec:\n  tier: t\n  selecter: a == 'b'\n",
            "file.yaml:6 spec.selecter",
        ),
        (
            "apiVersion: projectcalico.org/v3\nkind: GlobalNetworkPolicy\nmetadata: {name: p}\nspec:\n  ingress:\n  - action: Allow\n    source: {clusterSelector: a == 'b'}\n",
            "file.yaml:7 spec.ingress[0].source.clusterSelector",
        ),
        (
            "apiVersion: hanse.dev/v1alpha1\nkind: FederatedNetworkPolicy\nmetadata: {name: p}\nspec:\n  tier: t\n  ingress:\n  - action: Permit\n",
            "file.yaml:7 spec.ingress[0].action",
        ),
        (
            "apiVersion: hanse.dev/v1alpha1\nkind: FederatedNetworkPolicy\nmetadata: {name: p}\nspec:\n  tier: t\n  selector: a = 'b'\n",
            "file.yaml:6 spec.selector",
        ),
    ] {
        let complaints = complaints(&read(text));
        assert!(complaints.len() == 1 && complaints[0].starts_with(wanted), "{complaints:?}");
    }
}

#[test]
fn what_is_not_known_hides_nothing_else() {
    let read = read(
        "apiVersion: projectcalico.org/v3\nkind: GlobalNetworkPolicy\nmetadata: {name: p}\nspec:\n  selecter: all()\n  types: [Both]\n  ingress:\n  - action: Permit\n    dscp: 4\n",
    );
    let told = complaints(&read);
    let wanted = ["5 spec.selecter", "9 spec.ingress[0].dscp", "6 spec.types[0]", "8 spec.ingress[0].action"];
    assert_eq!(told.len(), wanted.len(), "{told:?}");
    for (told, wanted) in told.iter().zip(wanted) {
        assert!(told.starts_with(&format!("file.yaml:{wanted}: ")), "{told}");
    }
}

/// Its document is not read, and the object is named.
#[test]
fn a_key_that_stands_twice_refuses_its_object() {
    let namespace =
        |name: &str, more: &str| format!("- apiVersion: v1\n  kind: Namespace\n  metadata:\n    name: {name}\n{more}");
    let twice = namespace("b", "    labels: {a: b}\n    labels: {c: d}\n");
    let list = format!("apiVersion: v1\nkind: List\nitems:\n{}{twice}{}", namespace("a", ""), namespace("c", ""));
    let alone = "apiVersion: v1\nkind: Namespace\nmetadata: {name: d, name: e}\n";
    let json = r#"{"apiVersion": "v1", "kind": "Namespace", "kind": "Node", "metadata": {"name": "f"}}"#;
    let read = read(&format!("{list}---\n{alone}---\n{json}\n"));
    assert!(read.objects.is_empty());
    let told: Vec<(u32, u32, String, String)> = read
        .diagnostics
        .iter()
        .map(|it| {
            let object = it.object.clone().expect("it is known");
            assert!(it.message.contains("duplicate key"), "{it:?}");
            (it.start, it.location.line, object.kind.to_string(), object.name.to_string())
        })
        .collect();
    let of = |start, line, name: &str| (start, line, "Namespace".to_owned(), name.to_owned());
    assert_eq!(told, [of(8, 13, "b"), of(19, 21, "d"), of(23, 23, "f")]);
}

/// `kubectl`'s words for a boolean are booleans wherever they are without quotes.
#[test]
fn booleans_may_be_words() {
    let policy = |spec: &str| {
        let head = "apiVersion: projectcalico.org/v3\nkind: GlobalNetworkPolicy\nmetadata: {name: p}\n";
        complaints(&read(&format!("{head}spec: {spec}\n")))
    };
    assert_eq!(policy("{applyOnForward: yes, doNotTrack: on, selector: on == 'yes'}"), Vec::<String>::new());
    assert_eq!(policy("{applyOnForward: off, doNotTrack: n}"), Vec::<String>::new());
    for wrong in ["yEs", "1", "''", "'yes'", "\"on\""] {
        assert_eq!(policy(&format!("{{applyOnForward: {wrong}}}")).len(), 1, "{wrong}");
    }
    let pod = |label: &str| {
        let read = read(&format!(
            "apiVersion: v1\nkind: Pod\nmetadata:\n  name: p\n  labels: {{gpu: {label}}}\nspec: {{hostNetwork: yes}}\n"
        ));
        complaints(&read)
    };
    assert_eq!(pod("'yes'"), Vec::<String>::new());
    // An API server refuses it too.
    for (label, wanted) in [("yes", "true"), ("no", "false"), ("1_0", "10")] {
        let complaints = pod(label);
        let wanted = format!("file.yaml:5 metadata.labels.gpu: {wanted}, where text is expected; text needs quotes");
        assert!(complaints.len() == 1 && complaints[0].starts_with(&wanted), "{complaints:?}");
    }
}

/// What a policy comes to mean.
fn policy(spec: &str) -> hanse_policy::model::Policy {
    let text = format!(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: p, namespace: a}}\nspec:\n{spec}"
    );
    let read = read(&text);
    assert_eq!(complaints(&read), Vec::<String>::new(), "{text}");
    let state = assemble_cluster(&"c".into(), read.objects);
    state.layer.policies.into_values().next().expect("a policy")
}

#[test]
fn numbers_are_those_of_kubernetes() {
    let port = |port: &str| policy(&format!("  ingress:\n  - ports: [{{port: {port}}}]\n"));
    for spelled in ["1_000", "0b1111101000", "0x3e8", "01750", "1000.0", "1e3", "+1000", "1_0_0_0.0"] {
        assert_eq!(port(spelled), port("1000"), "{spelled}");
    }
}

/// Null in lists and mappings is the zero value of what is wanted.
#[test]
fn null_is_the_zero_value() {
    for (written, meant) in [
        ("  podSelector: {matchLabels: {a: }}\n", "  podSelector: {matchLabels: {a: ''}}\n"),
        ("  podSelector: ~\n", "  podSelector: {}\n"),
        ("  ingress:\n  -\n", "  ingress:\n  - {}\n"),
        ("  ingress:\n  - ports: [~]\n", "  ingress:\n  - ports: [{}]\n"),
        ("  ingress:\n  - from:\n", "  ingress:\n  - {}\n"),
        ("  ingress:\n  - ports: [{port: ~, protocol: }]\n", "  ingress:\n  - ports: [{}]\n"),
        (
            "  podSelector: {matchExpressions: [{key: a, operator: In, values: [~, b]}]}\n",
            "  podSelector: {matchExpressions: [{key: a, operator: In, values: ['', b]}]}\n",
        ),
    ] {
        assert_eq!(policy(written), policy(meant), "{written}");
    }
    let read = read(
        "apiVersion: v1\nkind: Pod\nmetadata: {name: p, labels: {app: }, annotations: {a: ~}}\nspec: {hostNetwork: , containers: [~]}\n---\n\
         apiVersion: projectcalico.org/v3\nkind: StagedKubernetesNetworkPolicy\nmetadata: {name: p, namespace: a}\n\
         spec:\n  podSelector: {matchLabels: {a: }}\n  ingress:\n  -\n",
    );
    assert_eq!((complaints(&read), read.objects.len()), (Vec::new(), 2));
}

/// Blocks are alternatives: one rule of each family, so that a policy of very many is small.
#[test]
fn blocks_without_exceptions_are_one_rule() {
    let peers = "{ipBlock: {cidr: 10.0.0.0/8}}, {ipBlock: {cidr: 'fd00::/8'}}, {ipBlock: {cidr: 11.0.0.0/8}}, {podSelector: {}}, {ipBlock: {cidr: 12.0.0.0/8, except: [12.1.0.0/16]}}";
    let policy = policy(&format!("  ingress:\n  - from: [{peers}]\n"));
    let rules = policy.ingress.expect("of ingress");
    let nets: Vec<String> = rules
        .iter()
        .map(|rule| rule.source.nets.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "))
        .collect();
    assert_eq!(nets, ["10.0.0.0/8 11.0.0.0/8", "fd00::/8", "", "12.0.0.0/8"]);
}

#[test]
fn a_generated_name_is_one_of_its_own() {
    let pod = "apiVersion: v1\nkind: Pod\nmetadata: {generateName: job-, namespace: a}\n";
    let text = format!(
        "{pod}---\n{pod}---\napiVersion: v1\nkind: Pod\nmetadata: {{generateName: job-, name: job-x, namespace: a}}\n"
    );
    let names =
        |read: Manifests| -> Vec<String> { read.objects.into_iter().map(|it| it.reference.name.to_string()).collect() };
    let first = read(&text);
    assert_eq!(complaints(&first), Vec::<String>::new());
    let first = names(first);
    assert_eq!(first, names(read(&text)), "the same at each reading");
    assert!(first[0] != first[1] && first[..2].iter().all(|it| it.len() == 9 && it.starts_with("job-")), "{first:?}");
    assert_eq!(first[2], "job-x");
    let endpoints = assemble_cluster(&"c".into(), read(&text).objects).cluster.endpoints;
    assert_eq!(endpoints.len(), 3);
    // What is applied is found again by its name.
    let tier = read("apiVersion: hanse.dev/v1alpha1\nkind: Tier\nmetadata: {generateName: a-}\n");
    assert!(complaints(&tier)[0].starts_with("file.yaml:3 metadata.generateName: "), "{:?}", complaints(&tier));
}

/// Of other kinds nothing is checked that the reader does not stumble over.
#[test]
fn what_is_wrong_with_other_kinds_is_none_of_our_business() {
    let deep = format!("{}1{}", "[".repeat(100), "]".repeat(100));
    let other =
        |name: &str, more: &str| format!("apiVersion: example.org/v1\nkind: Tree\nmetadata: {{name: {name}}}\n{more}");
    let read_both = |text: &str| {
        let read = read(text);
        (complaints(&read), read.skipped.len(), read.objects.len())
    };
    for fault in [format!("spec: {deep}\n"), "a: 1\na: 2\n".to_owned()] {
        assert_eq!(read_both(&other("a", &fault)), (Vec::new(), 1, 0), "{fault}");
        let item = other("a", &fault).replace('\n', "\n  ");
        let list = format!(
            "apiVersion: v1\nkind: List\nitems:\n- {}\n- {{apiVersion: v1, kind: Namespace, metadata: {{name: a}}}}\n",
            item.trim_end()
        );
        assert_eq!(read_both(&list), (Vec::new(), 1, 1), "{list}");
        let ours = fault.replace("a: 1", "metadata: {name: b}").replace("a: 2", "metadata: {name: c}");
        let (complaints, ..) = read_both(&format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: a}}\n{ours}"));
        assert_eq!(complaints.len(), 1, "{complaints:?}");
    }
}

/// Nor do they cost another reading each.
#[test]
fn many_unknown_fields_are_found_in_one_reading() {
    let rules: String = (0..40_000).map(|at| format!("  - {{action: Allow, dscp{at}: 4}}\n")).collect();
    let text = format!(
        "apiVersion: projectcalico.org/v3\nkind: GlobalNetworkPolicy\nmetadata: {{name: p}}\nspec:\n  ingress:\n{rules}"
    );
    let start = std::time::Instant::now();
    let read = read(&text);
    let complaints = complaints(&read);
    assert_eq!(complaints.len(), 22, "20 of them, that there are too many rules, and how many more");
    assert!(complaints[19].starts_with("file.yaml:25 spec.ingress[19].dscp19: unknown field"), "{complaints:?}");
    let selector: String = (0..40_000).map(|at| format!("      k{at}: 1\n")).collect();
    let text = format!(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: p}}\nspec:\n  ingress: [{{}}]\n  podSelector:\n{selector}"
    );
    let many = self::read(&text);
    assert_eq!((many.diagnostics.len(), many.partial.len()), (21, 1), "{:?}", many.diagnostics.first());
    assert!(start.elapsed() < std::time::Duration::from_secs(20), "{:?}", start.elapsed());
    let state = assemble_cluster(&"c".into(), many.partial);
    let policy = state.layer.policies.into_values().next().expect("a policy");
    assert!(policy.ingress.into_iter().flatten().all(|rule| rule.not_understood.is_some()));
}

/// Nor is a list taken for an object whose fields it might give in their order.
#[test]
fn a_list_is_no_object() {
    for spec in ["{ingress: [[]]}", "{podSelector: []}", "{ingress: [{from: [[]]}]}", "[]"] {
        let text =
            format!("apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: p}}\nspec: {spec}\n");
        let complaints = complaints(&read(&text));
        assert!(
            complaints.len() == 1 && complaints[0].contains("a list, where a mapping is expected"),
            "{spec}: {complaints:?}"
        );
    }
}

#[test]
fn an_unknown_field_names_what_was_meant() {
    for (field, wanted) in [
        ("Ingress: []", "unknown field `Ingress`; did you mean `ingress`?"),
        ("selecter: all()", "did you mean `selector`?"),
        ("dscp: 1", "unknown field `dscp`, expected one of `tier`, `order`"),
    ] {
        let text = format!(
            "apiVersion: projectcalico.org/v3\nkind: GlobalNetworkPolicy\nmetadata: {{name: p}}\nspec:\n  {field}\n"
        );
        let complaints = complaints(&read(&text));
        assert!(complaints.len() == 1 && complaints[0].contains(wanted), "{complaints:?}");
    }
}

#[test]
fn what_is_no_directory_is_read_as_a_file() {
    assert!(read_dir(std::path::Path::new("/dev/null")).expect("readable").objects.is_empty());
    let directory = tempfile::tempdir().expect("a directory");
    let pipe = directory.path().join("pipe");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().expect("mkfifo runs").success());
    let writer = std::thread::spawn({
        let pipe = pipe.clone();
        move || std::fs::write(pipe, "apiVersion: v1\nkind: Namespace\nmetadata: {name: piped}\n")
    });
    let read = read_dir(&pipe).expect("readable");
    writer.join().expect("no panic").expect("written");
    assert_eq!(read.objects.len(), 1);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn no_bytes_make_the_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let mut read = Manifests::default();
        read_bytes(&Arc::from("f"), &bytes, &mut read);
    }

    #[test]
    fn no_shape_makes_the_reader_panic(
        kind in prop::sample::select(vec!["NetworkPolicy", "Pod", "Node", "EndpointSlice"]),
        spec in "[\\[\\]{}:, \\-a-z0-9'\"\n]{0,120}",
    ) {
        let group = match kind { "NetworkPolicy" => "networking.k8s.io/v1", "EndpointSlice" => "discovery.k8s.io/v1", _ => "v1" };
        let text = format!("apiVersion: {group}\nkind: {kind}\nmetadata: {{name: x}}\nspec: {spec}\n");
        drop(read(&text));
    }
}
