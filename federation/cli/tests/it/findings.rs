//! What `hanse policy lint` finds of DNS, Services, types and names of ports, and the presets that keep DNS open.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

fn hanse(arguments: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_hanse")).args(arguments).output().expect("hanse runs");
    assert!(output.status.code().is_some_and(|code| code < 2), "{arguments:?}: {output:?}");
    String::from_utf8(output.stdout).expect("text")
}

fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).expect("a line of JSON")).collect()
}

/// The findings of one kind in manifests: rule and message.
fn found(id: &str, manifests: &[&str]) -> Vec<(String, String)> {
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::write(folder.path().join("all.yaml"), manifests.join("---\n")).expect("manifests");
    let cluster = format!("c={}", folder.path().display());
    let findings = lines(&hanse(&["policy", "lint", "--cluster", &cluster, "-o", "json"]));
    let word = |line: &Value, field: &str| line[field].as_str().unwrap_or_default().to_owned();
    let of_id = findings.iter().filter(|line| line["id"] == id);
    of_id.map(|line| (word(line, "rule"), word(line, "message"))).collect()
}

fn messages(id: &str, manifests: &[&str]) -> Vec<String> {
    found(id, manifests).into_iter().map(|(_, message)| message).collect()
}

const WEB: &str = "\
apiVersion: v1
kind: Namespace
metadata: {name: app, labels: {kubernetes.io/metadata.name: app}}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: app, labels: {app: web}}
spec: {nodeName: node-1, containers: [{name: c, ports: [{name: http, containerPort: 8080}]}]}
status: {phase: Running, podIP: 10.128.0.5}
";

/// OpenShift's DNS, as its operator installs it.
const OPENSHIFT: &str = "\
apiVersion: v1
kind: Pod
metadata: {name: dns-default-x, namespace: openshift-dns, labels: {dns.operator.openshift.io/daemonset-dns: default}}
spec: {nodeName: node-1, containers: [{name: dns, ports: [{name: dns, containerPort: 5353, protocol: UDP}, {name: dns-tcp, containerPort: 5353}]}]}
status: {phase: Running, podIP: 10.128.0.6}
";
const OPENSHIFT_SERVICE: &str = "\
apiVersion: v1
kind: Service
metadata: {name: dns-default, namespace: openshift-dns}
spec:
  clusterIP: 172.30.0.10
  selector: {dns.operator.openshift.io/daemonset-dns: default}
  ports: [{name: dns, port: 53, protocol: UDP, targetPort: dns}, {name: dns-tcp, port: 53, targetPort: dns-tcp}]
";
const KUBE_DNS: &str = "\
apiVersion: v1
kind: Pod
metadata: {name: coredns, namespace: kube-system, labels: {k8s-app: kube-dns}}
spec: {nodeName: node-1, containers: [{name: dns, ports: [{name: dns, containerPort: 53, protocol: UDP}, {name: dns-tcp, containerPort: 53}]}]}
status: {phase: Running, podIP: 10.128.0.7}
";
const KUBE_DNS_SERVICE: &str = "\
apiVersion: v1
kind: Service
metadata: {name: kube-dns, namespace: kube-system}
spec:
  clusterIP: 10.96.0.10
  selector: {k8s-app: kube-dns}
  ports: [{name: dns, port: 53, protocol: UDP}, {name: dns-tcp, port: 53}]
";
const NODE_CACHE: &str = "\
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: node-local-dns, namespace: kube-system}
spec:
  selector: {matchLabels: {k8s-app: node-local-dns}}
  template:
    metadata: {labels: {k8s-app: node-local-dns}}
    spec: {hostNetwork: true, containers: [{name: node-cache, args: [-localip, '169.254.20.10,10.96.0.10']}]}
";

/// A NetworkPolicy of the namespace `app` with these egress rules only.
fn egress(rules: &str) -> String {
    format!(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: p, namespace: app}}\nspec:\n  \
         podSelector: {{}}\n  policyTypes: [Egress]\n  egress: {rules}\n"
    )
}

#[test]
fn dns_that_the_folder_knows_is_what_pods_must_reach() {
    let anywhere = egress("[{ports: [{protocol: UDP, port: 53}, {protocol: TCP, port: 53}]}]");
    let openshift = egress("[{ports: [{protocol: UDP, port: 53}, {protocol: UDP, port: 5353}]}]");
    let pods_of_kube_dns = egress(
        "[{to: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: kube-system}}, podSelector: {matchLabels: \
         {k8s-app: kube-dns}}}], ports: [{protocol: UDP, port: 53}]}]",
    );
    let cache = egress("[{to: [{ipBlock: {cidr: 169.254.20.10/32}}], ports: [{protocol: UDP, port: 53}]}]");
    let link_local = egress("[{to: [{ipBlock: {cidr: 169.0.0.0/8}}], ports: [{protocol: UDP, port: 53}]}]");
    let address = egress("[{to: [{ipBlock: {cidr: 10.96.0.10/32}}], ports: [{protocol: UDP, port: 53}]}]");
    let nothing = egress("[]");
    // The DNS that is known, a policy, and which servers the finding names.
    let cases: &[(&str, &[&str], &str, Option<&str>)] = &[
        ("a pod of OpenShift's DNS answers on 5353", &[OPENSHIFT], &anywhere, Some("OpenShift DNS")),
        ("so it does behind its Service", &[OPENSHIFT, OPENSHIFT_SERVICE], &anywhere, Some("OpenShift DNS")),
        ("the Service alone says which DNS there is", &[OPENSHIFT_SERVICE], &anywhere, Some("OpenShift DNS")),
        ("5353 is open", &[OPENSHIFT, OPENSHIFT_SERVICE], &openshift, None),
        ("5353 is open, of the Service alone", &[OPENSHIFT_SERVICE], &openshift, None),
        ("kube-dns is another one", &[OPENSHIFT], &pods_of_kube_dns, Some("OpenShift DNS")),
        ("kube-dns is open", &[KUBE_DNS, KUBE_DNS_SERVICE], &pods_of_kube_dns, None),
        ("kube-dns is open, of its Service alone", &[KUBE_DNS_SERVICE], &pods_of_kube_dns, None),
        ("a policy that names the cache says that there is one", &[KUBE_DNS], &cache, None),
        ("a cache that nothing speaks of does not count", &[KUBE_DNS], &link_local, Some("kube-dns")),
        (
            "pods use the cache of their node",
            &[KUBE_DNS, KUBE_DNS_SERVICE, NODE_CACHE],
            &pods_of_kube_dns,
            Some("NodeLocal DNSCache"),
        ),
        ("the cache is open", &[KUBE_DNS, KUBE_DNS_SERVICE, NODE_CACHE], &cache, None),
        ("the cache at the Service's address is open", &[KUBE_DNS, KUBE_DNS_SERVICE, NODE_CACHE], &address, None),
        ("of an unknown DNS any may be meant", &[], &pods_of_kube_dns, None),
        ("or the cache", &[], &cache, None),
        ("but none is reached", &[], &nothing, Some("kube-dns, OpenShift DNS, NodeLocal DNSCache")),
    ];
    for (title, dns, policy, expected) in cases {
        let manifests: Vec<&str> = [WEB].into_iter().chain(dns.iter().copied()).chain([*policy]).collect();
        let messages = messages("HN017", &manifests);
        let expected: Vec<String> = expected
            .iter()
            .map(|servers| format!("namespace app: 1 pod cannot resolve names: UDP to {servers} is denied"))
            .collect();
        assert_eq!(messages, expected, "{title}");
    }
}

/// Whether another port than the usual one is what the Service says.
#[test]
fn dns_answers_on_the_target_port_of_its_service() {
    let moved = KUBE_DNS_SERVICE.replace("port: 53, protocol: UDP", "port: 53, protocol: UDP, targetPort: 1053");
    let policy = egress("[{ports: [{protocol: UDP, port: 53}]}]");
    assert_eq!(messages("HN017", &[WEB, KUBE_DNS, &moved, &policy]).len(), 1);
    let policy = egress("[{ports: [{protocol: UDP, port: 1053}]}]");
    assert_eq!(messages("HN017", &[WEB, KUBE_DNS, &moved, &policy]), Vec::<String>::new());
    // A workload that does not run is a server as well.
    let planned = "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: coredns, namespace: kube-system}\nspec:\n  selector: \
                   {matchLabels: {k8s-app: kube-dns}}\n  template: {metadata: {labels: {k8s-app: kube-dns}}, spec: {containers: \
                   [{name: c}]}}\n";
    let policy = egress("[{ports: [{protocol: UDP, port: 53}]}]");
    assert_eq!(messages("HN017", &[WEB, planned, &policy]), Vec::<String>::new());
}

fn scaffold(federation: &Path, preset: &str, parameters: &[&str]) {
    let mut arguments = vec!["policy", "scaffold", preset];
    arguments.extend(parameters.iter().flat_map(|parameter| ["--set", *parameter]));
    let manifests = hanse(&arguments);
    assert!(manifests.contains("kind: "), "{preset}: {manifests}");
    std::fs::write(federation.join(format!("{preset}.yaml")), manifests).expect("manifests");
}

/// In a ClusterSet whose clusters are not alike, under each preset that closes egress.
#[test]
fn presets_keep_dns_open_in_unlike_clusters() {
    let root = tempfile::tempdir().expect("a folder");
    let worlds = [
        ("kube", vec![WEB, KUBE_DNS, KUBE_DNS_SERVICE]),
        ("openshift", vec![WEB, OPENSHIFT, OPENSHIFT_SERVICE]),
        ("cached", vec![WEB, KUBE_DNS, KUBE_DNS_SERVICE, NODE_CACHE]),
    ];
    let mut clusters = Vec::new();
    for (at, (name, manifests)) in worlds.iter().enumerate() {
        let folder = root.path().join(name);
        std::fs::create_dir(&folder).expect("a folder");
        let text = manifests.join("---\n").replace("10.128.", &format!("10.{}.", 128 + at));
        let text = text.replace("name: app, labels: {", "name: app, labels: {stage: train, ");
        let text = text.replace("{app: web}", "{app: web, models: read, batch.kubernetes.io/job-name: llama}");
        std::fs::write(folder.join("all.yaml"), text).expect("manifests");
        clusters.extend(["--cluster".to_owned(), format!("{name}={}", folder.display())]);
    }
    let to_pod = |namespace: &str, pod: &str| serde_json::json!({"namespace": namespace, "pod": pod});
    let to_ip = |address: &str| serde_json::json!({"ip": address});
    let cases = [
        ("kube", to_pod("kube-system", "coredns"), 53, true),
        ("kube", to_pod("kube-system", "coredns"), 54, false),
        ("kube", to_ip("10.128.0.5"), 53, true),
        ("openshift", to_pod("openshift-dns", "dns-default-x"), 5353, true),
        ("openshift", to_pod("openshift-dns", "dns-default-x"), 5354, false),
        ("openshift", serde_json::json!({"service": "openshift-dns/dns-default"}), 53, true),
        ("cached", to_ip("169.254.20.10"), 53, true),
        ("cached", to_ip("169.254.25.10"), 53, true),
        ("cached", to_ip("169.254.20.10"), 54, false),
        ("cached", to_ip("169.254.20.11"), 53, false),
    ];
    let queries = root.path().join("queries.jsonl");
    let mut asked = Vec::new();
    for (cluster, to, port, allowed) in &cases {
        for protocol in ["UDP", "TCP"] {
            let from = serde_json::json!({"cluster": cluster, "namespace": "app", "pod": "web"});
            let mut to = to.clone();
            if to.get("ip").is_none() {
                to["cluster"] = (*cluster).into();
            }
            asked.push((serde_json::json!({"from": from, "to": to, "port": port, "protocol": protocol}), *allowed));
        }
    }
    let text: Vec<String> = asked.iter().map(|(query, _)| query.to_string()).collect();
    std::fs::write(&queries, text.join("\n")).expect("queries");
    let presets: [(&str, &[&str]); 5] = [
        ("default-deny", &[]),
        ("stages", &[]),
        ("model-registry", &[]),
        ("gpu-collective", &["namespace=app", "job=llama"]),
        ("egress-registries", &["nets=203.0.113.0/28"]),
    ];
    for (preset, parameters) in presets {
        let federation = root.path().join(preset);
        std::fs::create_dir(&federation).expect("a folder");
        scaffold(&federation, "tiers", &[]);
        scaffold(&federation, preset, parameters);
        let federation = federation.display().to_string();
        let run = |arguments: &[&str]| {
            let clusters = clusters.iter().map(String::as_str);
            let arguments: Vec<&str> =
                ["policy"].into_iter().chain(arguments.iter().copied()).chain(clusters).collect();
            lines(&hanse(&[&arguments, &["--federation", &federation, "-o", "json"][..]].concat()))
        };
        let answers = run(&["explain", "--queries", &queries.display().to_string()]);
        assert_eq!(answers.len(), asked.len());
        for (answer, (query, allowed)) in answers.iter().zip(&asked) {
            // Of the packets to pods, this one leaves and enters; the preset for registries closes what is outside only.
            let is_pod = query["to"].get("ip").is_none() || query["to"]["ip"] == "10.128.0.5";
            if preset == "egress-registries" && is_pod || *allowed {
                assert_eq!(answer["verdict"], "allow", "{preset}: {query}");
            } else {
                assert_eq!(answer["verdict"], "deny", "{preset}: {query}");
            }
        }
        let findings = run(&["lint"]);
        for id in ["HN017", "HN020"] {
            assert!(findings.iter().all(|finding| finding["id"] != id), "{preset}: {findings:#?}");
        }
        // Each cluster lacks some of the servers that the policies name.
        let of_dns = |finding: &&Value| {
            let message = finding["message"].as_str().unwrap_or_default();
            (finding["id"] == "HN001" || finding["id"] == "HN002") && message.contains("dns")
        };
        let of_dns: Vec<&Value> = findings.iter().filter(of_dns).collect();
        assert!(of_dns.is_empty(), "{preset}: {of_dns:#?}");
    }
}

#[test]
fn dns_addresses_of_presets_are_a_parameter() {
    let rendered = hanse(&["policy", "scaffold", "default-deny", "--set", "dnsNets=169.254.20.10/32,10.96.0.10/32"]);
    assert!(rendered.contains("nets: [169.254.20.10/32,10.96.0.10/32]"), "{rendered}");
    let help = hanse(&["policy", "scaffold", "--help"]);
    assert!(help.contains("dnsNets") && help.contains("OpenShift"), "{help}");
    let list = hanse(&["policy", "scaffold"]);
    assert_eq!(list.matches("dnsNets=169.254.20.10/32, 169.254.25.10/32").count(), 5, "{list}");
}

#[test]
fn service_whose_backends_are_not_pods_is_opened_by_their_addresses() {
    let service = "apiVersion: v1\nkind: Service\nmetadata: {name: kubernetes, namespace: default}\nspec: {clusterIP: 10.96.0.1, \
                   ports: [{name: https, port: 443, targetPort: 6443}]}\n";
    let slice = |addresses: &str| {
        format!(
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: s, namespace: default, labels: \
             {{kubernetes.io/service-name: kubernetes}}}}\naddressType: IPv4\nendpoints: [{{addresses: [{addresses}]}}]\nports: \
             [{{name: https, port: 6443, protocol: TCP}}]\n"
        )
    };
    let policy = egress("[{to: [{ipBlock: {cidr: 10.96.0.1/32}}], ports: [{port: 443}]}]");
    let instead = |manifests: &[&str]| {
        let messages = messages("HN018", manifests);
        assert_eq!(messages.len(), 1, "{messages:?}");
        messages[0].rsplit_once("; write ").map(|(_, instead)| instead.to_owned()).expect("an advice")
    };
    // A Service without a selector, and without endpoints that are known.
    let advice = instead(&[WEB, service, &policy]);
    assert_eq!(
        advice,
        "an ipBlock with the addresses and ports of its EndpointSlices, since its backends are not pods"
    );
    let advice = instead(&[WEB, service, &slice("192.168.0.1"), &policy]);
    assert_eq!(advice, "an ipBlock with 192.168.0.1/32 and port 6443, since its backends are not pods");
    // The advice opens the way.
    let followed = egress("[{to: [{ipBlock: {cidr: 192.168.0.1/32}}], ports: [{port: 6443}]}]");
    let folder = tempfile::tempdir().expect("a folder");
    let manifests = [WEB, service, &slice("192.168.0.1"), &followed].join("---\n");
    std::fs::write(folder.path().join("all.yaml"), manifests).expect("manifests");
    let queries = folder.path().join("queries.jsonl");
    let query = r#"{"from": {"namespace": "app", "pod": "web"}, "to": {"service": "default/kubernetes"}, "port": 443}"#;
    std::fs::write(&queries, query).expect("a query");
    let cluster = format!("c={}", folder.path().display());
    let queries = queries.display().to_string();
    let answer = lines(&hanse(&["policy", "explain", "--cluster", &cluster, "--queries", &queries, "-o", "json"]));
    assert_eq!(answer[0]["verdict"], "allow", "{answer:#?}");

    let many = slice("192.168.0.1, 192.168.0.2, 192.168.0.3, 192.168.0.4");
    let advice = instead(&[WEB, service, &many, &policy]);
    assert!(advice.contains("192.168.0.3/32 and port 6443; and 1 more"), "{advice}");
    // A pod behind a Service without a selector can be selected.
    let advice = instead(&[WEB, service, &slice("10.128.0.5"), &policy]);
    assert!(advice.contains("podSelector of its pods"), "{advice}");
    // Pods on the host's network cannot, though the selector is theirs.
    let selecting = service.replace("ports:", "selector: {app: api}, ports:");
    let advice = instead(&[WEB, &selecting, &slice("192.168.0.1"), &policy]);
    assert!(advice.starts_with("an ipBlock with 192.168.0.1/32"), "{advice}");
    assert!(instead(&[WEB, &selecting, &policy]).contains("podSelector of its pods"));

    let cluster = "apiVersion: policy.networking.k8s.io/v1alpha2\nkind: ClusterNetworkPolicy\nmetadata: {name: p}\nspec:\n  tier: \
                   Admin\n  priority: 1\n  subject: {namespaces: {}}\n  egress: [{action: Accept, to: [{networks: \
                   [10.96.0.1/32]}]}]\n";
    let advice = instead(&[WEB, service, &slice("192.168.0.1"), cluster]);
    assert_eq!(advice, "networks with 192.168.0.1/32 and port 6443, since its backends are not pods");
    // Calico's rules name the Service itself, whatever its backends are.
    let calico = "apiVersion: projectcalico.org/v3\nkind: NetworkPolicy\nmetadata: {name: p, namespace: app}\nspec: {types: \
                  [Egress], egress: [{action: Allow, destination: {nets: [10.96.0.1/32]}}]}\n";
    let advice = instead(&[WEB, service, &slice("192.168.0.1"), calico]);
    assert_eq!(advice, "services: {name: kubernetes, namespace: default}");
}

#[test]
fn rules_that_types_leave_out_are_found() {
    let kubernetes = |spec: &str| {
        format!(
            "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: p, namespace: app}}\nspec:\n  podSelector: \
             {{}}\n{spec}"
        )
    };
    let calico = |kind: &str, metadata: &str, spec: &str| {
        format!("apiVersion: projectcalico.org/v3\nkind: {kind}\nmetadata: {{{metadata}}}\nspec:\n{spec}")
    };
    let stored = |spec: &str| {
        format!(
            "apiVersion: crd.projectcalico.org/v1\nkind: GlobalNetworkPolicy\nmetadata: {{name: default.g}}\nspec:\n{spec}"
        )
    };
    const EGRESS: &str = "  egress: [{action: Allow}, {action: Deny}]\n";
    const INGRESS: &str = "  ingress: [{action: Allow}]\n";
    let cases: Vec<(String, &[(&str, &str)])> = vec![
        (kubernetes("  policyTypes: [Ingress]\n  egress: [{}]\n"), &[("egress[0]", "policyTypes omits Egress")]),
        (kubernetes("  policyTypes: [Egress]\n  ingress: [{}]\n"), &[("ingress[0]", "policyTypes omits Ingress")]),
        (kubernetes("  policyTypes: [Ingress, Egress]\n  egress: [{}]\n"), &[]),
        (kubernetes("  policyTypes: [Ingress]\n  egress: []\n"), &[]),
        (kubernetes("  egress: [{}]\n"), &[]),
        (
            calico("NetworkPolicy", "name: p, namespace: app", &format!("  types: [Ingress]\n{EGRESS}")),
            &[("egress[0]", "types omits Egress")],
        ),
        (
            calico("GlobalNetworkPolicy", "name: p", &format!("  types: [Egress]\n{INGRESS}")),
            &[("ingress[0]", "types omits Ingress")],
        ),
        (
            calico("StagedNetworkPolicy", "name: p, namespace: app", &format!("  types: [Ingress]\n{EGRESS}")),
            &[("egress[0]", "types omits Egress")],
        ),
        (
            calico(
                "StagedKubernetesNetworkPolicy",
                "name: p, namespace: app",
                "  podSelector: {}\n  policyTypes: [Ingress]\n  egress: [{}]\n",
            ),
            &[("egress[0]", "policyTypes omits Egress")],
        ),
        (calico("GlobalNetworkPolicy", "name: p", EGRESS), &[]),
        (stored(&format!("  types: [ingress]\n{EGRESS}")), &[("egress[0]", "types omits Egress")]),
        // Without types a stored policy is of both directions.
        (stored(EGRESS), &[]),
    ];
    for (policy, expected) in cases {
        let found = found("HN019", &[WEB, &policy]);
        assert_eq!(found.len(), expected.len(), "{policy}\n{found:?}");
        for ((rule, message), (wanted, part)) in found.iter().zip(expected) {
            assert!(rule == wanted && message.starts_with(part), "{policy}\n{rule}: {message}");
        }
    }
    // A federated one, at its line.
    let root = tempfile::tempdir().expect("a folder");
    let (own, federation) = (root.path().join("own"), root.path().join("federation"));
    for folder in [&own, &federation] {
        std::fs::create_dir(folder).expect("a folder");
    }
    std::fs::write(own.join("all.yaml"), WEB).expect("manifests");
    let federated = "apiVersion: hanse.dev/v1alpha1\nkind: Tier\nmetadata: {name: t}\nspec: {phase: Guard, order: 1}\n---\n\
                     apiVersion: hanse.dev/v1alpha1\nkind: FederatedNetworkPolicy\nmetadata: {name: f}\nspec:\n  tier: t\n  types: \
                     [Egress]\n  ingress:\n  - {action: Deny}\n";
    std::fs::write(federation.join("all.yaml"), federated).expect("manifests");
    let (cluster, federation) = (format!("c={}", own.display()), federation.display().to_string());
    let arguments = ["policy", "lint", "--cluster", &cluster, "--federation", &federation, "-o", "json"];
    let findings = lines(&hanse(&arguments));
    let left_out: Vec<&Value> = findings.iter().filter(|finding| finding["id"] == "HN019").collect();
    assert_eq!(left_out.len(), 1, "{left_out:#?}");
    assert_eq!((&left_out[0]["line"], &left_out[0]["severity"]), (&13.into(), &"error".into()), "{left_out:#?}");
}

#[test]
fn port_names_that_match_no_pod_are_found() {
    const TWO: &str = "\
apiVersion: v1
kind: Pod
metadata: {name: other, namespace: app, labels: {app: other}}
spec: {nodeName: node-1, containers: [{name: c, ports: [{name: metrics, containerPort: 9090}, {name: dns, containerPort: 53, protocol: UDP}]}]}
status: {phase: Running, podIP: 10.128.0.8}
";
    let ingress = |subject: &str, rules: &str| {
        format!(
            "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: p, namespace: app}}\nspec:\n  podSelector: \
             {subject}\n  policyTypes: [Ingress]\n  ingress: {rules}\n"
        )
    };
    let web = "{matchLabels: {app: web}}";
    let calico = |rule: &str| {
        format!(
            "apiVersion: projectcalico.org/v3\nkind: GlobalNetworkPolicy\nmetadata: {{name: g}}\nspec:\n  selector: app == \
             'web'\n  types: [Ingress, Egress]\n  {rule}\n"
        )
    };
    let planned = |api: &str, kind: &str, spec: &str| {
        format!("apiVersion: {api}\nkind: {kind}\nmetadata: {{name: w, namespace: app}}\nspec: {spec}\n")
    };
    let deployment = planned(
        "apps/v1",
        "Deployment",
        "{selector: {matchLabels: {app: w}}, template: {metadata: {labels: {app: w}}, spec: {containers: [{name: c}]}}}",
    );
    let knative = planned(
        "serving.knative.dev/v1",
        "Service",
        "{template: {metadata: {labels: {kind: w}}, spec: {containers: [{name: c}]}}}",
    );
    let none = "port \"metrics\": no container of the policy's own pods has a port of this name (they have http)";
    let cases: Vec<(&str, Vec<String>, Option<String>)> = vec![
        ("the name of another pod's port", vec![ingress(web, "[{ports: [{port: metrics}]}]")], Some(format!("destination {none}"))),
        ("a name that they have", vec![ingress(web, "[{ports: [{port: http}]}]")], None),
        ("a name that one of them has", vec![ingress("{}", "[{ports: [{port: metrics}]}]")], None),
        (
            "with another protocol",
            vec![ingress(web, "[{ports: [{port: http, protocol: UDP}]}]")],
            Some("destination port \"http\": the policy's own pods have it for TCP only, which the rule does not match".to_owned()),
        ),
        ("a number", vec![ingress(web, "[{ports: [{port: 9090}]}]")], None),
        ("no pods at all", vec![ingress("{matchLabels: {app: gone}}", "[{ports: [{port: metrics}]}]")], None),
        (
            "a peer's port",
            vec![egress(&format!("[{{to: [{{podSelector: {web}}}], ports: [{{port: metrics}}]}}]"))],
            Some(
                "destination port \"metrics\": no container of the pods that it can match has a port of this name (they have http)"
                    .to_owned(),
            ),
        ),
        ("a peer that has it", vec![egress("[{to: [{podSelector: {}}], ports: [{port: metrics}]}]")], None),
        // The cluster's DNS is not among these pods.
        ("a port of DNS", vec![egress("[{ports: [{port: dns-tcp}]}]")], None),
        ("a port of DNS, elsewhere", vec![egress("[{to: [{podSelector: {}}], ports: [{port: dns-tcp}]}]")], Some(
            "destination port \"dns-tcp\": no container of the pods that it can match has a port of this name (they have dns, http, metrics)".to_owned(),
        )),
        ("a name without a protocol", vec![calico("ingress: [{action: Allow, destination: {ports: [http]}}]")], None),
        (
            "a name of no one",
            vec![calico("ingress: [{action: Allow, protocol: TCP, destination: {ports: [metrics, 80]}}]")],
            Some(format!("destination {none}")),
        ),
        (
            "a name that is excluded",
            vec![calico("ingress: [{action: Deny, protocol: TCP, destination: {notPorts: [htpp]}}]")],
            Some("destination notPorts \"htpp\": no container of the policy's own pods has a port of this name (they have http)".to_owned()),
        ),
        (
            "a name beside notProtocol",
            vec![calico("ingress: [{action: Allow, notProtocol: TCP, destination: {ports: [http]}}]")],
            Some("destination port \"http\": the policy's own pods have it for TCP only, which the rule does not match".to_owned()),
        ),
        (
            "the port of a source",
            vec![calico("egress: [{action: Allow, source: {ports: [metrics]}}]")],
            Some(format!("source {none}")),
        ),
        (
            "of a workload that does not run",
            vec![deployment, ingress("{matchLabels: {app: w}}", "[{ports: [{port: http}]}]")],
            Some("destination port \"http\": no container of the policy's own pods has a port of this name (they have none)".to_owned()),
        ),
        (
            "of a workload whose controller adds containers",
            vec![knative, ingress("{matchLabels: {kind: w}}", "[{ports: [{port: http-queueadm}]}]")],
            None,
        ),
    ];
    for (title, manifests, expected) in cases {
        let manifests: Vec<&str> = [WEB, TWO].into_iter().chain(manifests.iter().map(String::as_str)).collect();
        assert_eq!(messages("HN020", &manifests), expected.into_iter().collect::<Vec<_>>(), "{title}");
    }
}

#[test]
fn cluster_policies_of_equal_priority_that_contradict_each_other_are_found() {
    let policy = |name: &str, priority: u32, rest: &str| {
        format!(
            "apiVersion: policy.networking.k8s.io/v1alpha2\nkind: ClusterNetworkPolicy\nmetadata: {{name: {name}}}\nspec:\n  tier: \
             Baseline\n  priority: {priority}\n{rest}\n"
        )
    };
    let all = |rules: &str| format!("  subject: {{namespaces: {{}}}}\n  {rules}");
    const DENY: &str = "ingress: [{action: Deny, from: [{namespaces: {}}]}]";
    const ACCEPT: &str = "ingress: [{action: Accept, from: [{namespaces: {}}]}]";
    let tcp = |action: &str, port: u16| {
        format!(
            "ingress: [{{action: {action}, from: [{{namespaces: {{}}}}], protocols: [{{tcp: {{destinationPort: {{number: \
             {port}}}}}}}]}}]"
        )
    };
    let networks = |action: &str, net: &str| format!("egress: [{{action: {action}, to: [{{networks: [{net}]}}]}}]");
    let pods =
        "egress: [{action: Deny, to: [{pods: {namespaceSelector: {}, podSelector: {matchLabels: {app: web}}}}]}]";
    let gone =
        "  subject: {pods: {namespaceSelector: {}, podSelector: {matchLabels: {app: gone}}}}\n  ".to_owned() + ACCEPT;
    let cases: Vec<(&str, [String; 2], bool)> = vec![
        ("they contradict each other", [policy("a", 7, &all(DENY)), policy("b", 7, &all(ACCEPT))], true),
        ("one comes first", [policy("a", 7, &all(DENY)), policy("b", 8, &all(ACCEPT))], false),
        ("they say the same", [policy("a", 7, &all(DENY)), policy("b", 7, &all(DENY))], false),
        ("they select other pods", [policy("a", 7, &all(DENY)), policy("b", 7, &gone)], false),
        ("on one port", [policy("a", 7, &all(&tcp("Deny", 80))), policy("b", 7, &all(&tcp("Accept", 80)))], true),
        ("on other ports", [policy("a", 7, &all(&tcp("Deny", 80))), policy("b", 7, &all(&tcp("Accept", 81)))], false),
        (
            "in one direction each",
            [policy("a", 7, &all(DENY)), policy("b", 7, &all(&networks("Accept", "10.0.0.0/8")))],
            false,
        ),
        (
            "nets that overlap",
            [
                policy("a", 7, &all(&networks("Deny", "10.0.0.0/8"))),
                policy("b", 7, &all(&networks("Accept", "10.1.0.0/16"))),
            ],
            true,
        ),
        (
            "nets that do not",
            [
                policy("a", 7, &all(&networks("Deny", "10.0.0.0/16"))),
                policy("b", 7, &all(&networks("Accept", "10.1.0.0/16"))),
            ],
            false,
        ),
        (
            "a net with a pod",
            [policy("a", 7, &all(pods)), policy("b", 7, &all(&networks("Accept", "10.128.0.0/16")))],
            true,
        ),
        (
            "a net without",
            [policy("a", 7, &all(pods)), policy("b", 7, &all(&networks("Accept", "10.0.0.0/16")))],
            false,
        ),
    ];
    for (title, [first, second], expected) in cases {
        let manifests = [WEB, &first, &second];
        let found = found("HN021", &manifests);
        assert_eq!(found.len(), usize::from(expected), "{title}: {found:?}");
        for (rule, message) in &found {
            let parts = ["gress[0] of ClusterNetworkPolicy a, which has the same priority 7", "to the implementation"];
            assert!(
                rule.ends_with("gress[0]") && parts.iter().all(|part| message.contains(part)),
                "{title}: {message}"
            );
        }
        // To delete what may come first elsewhere is not an advice.
        assert!(!expected || messages("HN004", &manifests).is_empty(), "{title}");
    }
    let tiers = [policy("a", 7, &all(DENY)), policy("b", 7, &all(ACCEPT)).replace("tier: Baseline", "tier: Admin")];
    assert_eq!(found("HN021", &[WEB, &tiers[0], &tiers[1]]), Vec::new(), "tiers come one after the other");
}
