//! What the chart adds for OpenShift: constraints and roles, which no test cluster enforces, fit the pods that it renders.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::installed::rights;
use super::{list, pods, rendered, set, value_sets};

/// On OpenShift, each pod has constraints of its own, which allow what it requests and no other privilege.
#[test]
fn openshift_allows_what_pods_request_and_no_more() {
    for (name, values) in value_sets() {
        let objects = rendered(&values);
        let of = |kind: &str, name: &str| {
            objects.iter().find(|it| it["kind"] == kind && it["metadata"]["name"] == json!(name))
        };
        let is_openshift = values["openshift"]["enabled"] == json!(true);
        for (component, pod) in pods(&objects) {
            let (at, account) = (format!("{name}: {component}"), format!("hanse-{component}"));
            let Some(constraints) = of("SecurityContextConstraints", &account) else {
                assert!(!is_openshift, "{at} has no constraints");
                continue;
            };
            assert!(is_openshift, "{at}");
            let is_on_host = pod["hostNetwork"] == json!(true);
            for key in ["allowHostNetwork", "allowHostPorts"] {
                assert_eq!(constraints[key], json!(is_on_host), "{at}: {key}");
            }
            for key in ["allowHostIPC", "allowHostPID", "allowPrivilegeEscalation", "allowPrivilegedContainer"] {
                assert_eq!(constraints[key], json!(false), "{at}: {key}");
            }
            let containers = || list(pod, "initContainers").chain(list(pod, "containers"));
            let added: BTreeSet<&str> = containers()
                .flat_map(|it| list(&it["securityContext"]["capabilities"], "add").filter_map(Value::as_str))
                .collect();
            let allowed: BTreeSet<&str> = list(constraints, "allowedCapabilities").filter_map(Value::as_str).collect();
            assert_eq!(added, allowed, "{at}");
            assert_eq!(constraints["requiredDropCapabilities"], json!(["ALL"]), "{at}");
            assert_eq!(constraints["readOnlyRootFilesystem"], json!(true), "{at}");
            let user = json!({"type": "MustRunAs", "uid": pod["securityContext"]["runAsUser"]});
            assert_eq!(constraints["runAsUser"], user, "{at}");
            if let Some(group) = pod["securityContext"]["fsGroup"].as_u64() {
                let expected = json!({"type": "MustRunAs", "ranges": [{"min": group, "max": group}]});
                assert_eq!(constraints["fsGroup"], expected, "{at}");
            }
            let volumes: BTreeSet<&str> = list(constraints, "volumes").filter_map(Value::as_str).collect();
            for volume in list(pod, "volumes").flat_map(|it| it.as_object().into_iter().flat_map(|it| it.keys())) {
                assert!(volume == "name" || volumes.contains(&**volume), "{at}: {volume}");
            }
            let has_host_path = list(pod, "volumes").any(|it| it["hostPath"].is_object());
            assert_eq!(volumes.contains("hostPath"), has_host_path, "{at}");
            assert_eq!(constraints["allowHostDirVolumePlugin"], json!(has_host_path), "{at}");

            let role = format!("{account}-openshift");
            let found = rights(of("Role", &role).expect("a role"));
            let right = |group: &str, resource: &str, verb: &str, name: Option<&str>| {
                (group.to_owned(), resource.to_owned(), verb.to_owned(), name.map(str::to_owned))
            };
            let mut expected =
                BTreeSet::from([right("security.openshift.io", "securitycontextconstraints", "use", Some(&account))]);
            if component == "member" {
                expected.insert(right("discovery.k8s.io", "endpointslices/restricted", "create", None));
            }
            assert_eq!(found, expected, "{at}");
            let binding = of("RoleBinding", &role).expect("a binding");
            assert_eq!(binding["roleRef"]["name"], json!(role), "{at}");
            assert_eq!(binding["subjects"][0]["name"], json!(account), "{at}");
        }
    }
}

/// DNS pods of OpenShift listen on 5353, and egress is evaluated after the address of their Service was translated.
#[test]
fn dns_is_permitted_where_pods_of_openshift_listen() {
    let mut rules = [0, 0];
    for (name, values) in value_sets() {
        for is_openshift in [false, true] {
            for policy in rendered(&set(values.clone(), "openshift", json!({"enabled": is_openshift}))) {
                if policy["kind"] != "NetworkPolicy" {
                    continue;
                }
                for rule in list(&policy["spec"], "egress") {
                    let permits = |port: u16| {
                        ["UDP", "TCP"]
                            .map(|it| list(rule, "ports").any(|at| *at == json!({"port": port, "protocol": it})))
                    };
                    let dns = permits(53);
                    let expected = if is_openshift { dns } else { [false; 2] };
                    assert_eq!(permits(5353), expected, "{name}: {}: {is_openshift}", policy["metadata"]["name"]);
                    rules[usize::from(is_openshift)] += usize::from(dns == [true; 2]);
                }
            }
        }
    }
    // Of the member in the network of pods, and of the hub with its store on etcd.
    assert!(rules[0] >= 2 && rules[0] == rules[1], "{rules:?}");
}
