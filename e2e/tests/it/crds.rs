//! The custom resource definitions of `hanse.dev` on a real API server.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use hanse_api::federated::FederatedObject;
use hanse_e2e::kubernetes::{ApiServer, Etcd, Options, manifests, run, until};
use hanse_hub::custom_resources::{
    self, ClusterEnforcement, Condition, FederatedNetworkPolicy, PendingChange, PolicyStatus,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::Api;
use kube::api::{DynamicObject, ListParams, Patch, PatchParams};
use serde_json::{Value, json};

use crate::corpus::Corpus;

const GROUP: &str = "hanse.dev/v1alpha1";
const PATIENCE: Duration = Duration::from_secs(60);

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace's root").to_owned()
}

/// An API server with the definitions, installed as the guide says.
async fn server() -> ApiServer {
    let etcd = Etcd::start().expect("etcd starts");
    let server = ApiServer::start(&etcd, Options::new("management")).await.expect("it is ready");
    let crds = root().join("deploy/crds");
    succeeds(server.kubectl().expect("kubectl").args(["apply", "--server-side", "-f"]).arg(crds));
    let client = server.client().await.expect("a client");
    for definition in custom_resources::definitions() {
        manifests::established(&client, &definition.name).await.expect("it is established");
    }
    server
}

fn output(command: &mut Command) -> (bool, String) {
    let Output { status, stdout, stderr } = command.output().expect("kubectl runs");
    (status.success(), String::from_utf8_lossy(&[stdout, stderr].concat()).into_owned())
}

fn succeeds(command: &mut Command) -> String {
    let (success, text) = output(command);
    assert!(success, "{command:?}: {text}");
    text
}

/// The objects of the federation in a text, as their author wrote them.
fn written(text: &str) -> Vec<DynamicObject> {
    let objects = manifests::read(text).expect("objects").into_iter();
    objects.filter(|it| it.types.as_ref().is_some_and(|types| types.api_version == GROUP)).collect()
}

fn json_of(object: &DynamicObject) -> Vec<u8> {
    serde_json::to_vec(object).expect("JSON")
}

/// Every valid manifest of the demo, of the corpus, and of the kinds that neither has.
fn valid() -> Vec<DynamicObject> {
    let mut all = Vec::new();
    for file in ["clusters.yaml", "policies.yaml"] {
        let path = root().join("e2e/demo/federation").join(file);
        all.extend(written(&std::fs::read_to_string(path).expect("the demo")));
    }
    let corpus = Corpus::read(&root().join("federation/cli/tests/it/corpus"), "federated");
    let of_cases = corpus.cases.iter().flat_map(|case| &case.federated);
    let of_corpus = corpus.federation.iter().chain(of_cases).cloned();
    all.extend(of_corpus.map(|object| serde_json::from_value::<DynamicObject>(object).expect("an object")));
    all.extend(written(OTHERS));
    all
}

const OTHERS: &str = r#"
apiVersion: hanse.dev/v1alpha1
kind: ClusterSet
metadata: {name: default}
spec: {trustDomain: hanse.example, leaseSeconds: 60, defaults: {limits: {endpoints: 1000}, joinTokenSeconds: 600}}
---
apiVersion: hanse.dev/v1alpha1
kind: ClusterJoinToken
metadata: {name: train-1}
spec: {cluster: train, secretName: train-token, lifetimeSeconds: 600, accept: true}
---
apiVersion: hanse.dev/v1alpha1
kind: MemberCluster
metadata: {name: full}
spec:
  labels: {env: prod, "example.com/tier": "1"}
  grants:
    namespaces: ["*"]
    cidrs: [10.40.0.0/16, "2001:db8:40::/48"]
    labels: {app: ["*"], stage: [train, serve]}
    visibleTo: {clusterSelector: "env == 'prod'"}
    limits: {endpoints: 100, labelSets: 10, updatesPerSecond: 5}
  federatedAllow: Final
  acceptance: Accepted
---
apiVersion: hanse.dev/v1alpha1
kind: FederatedNetworkPolicy
metadata: {name: full}
spec:
  tier: platform
  order: 1.5
  clusterSelector: env == 'prod'
  namespaceSelector: stage == 'serve'
  selector: app == 'web'
  serviceAccountSelector: role == 'server'
  types: [Ingress, Egress]
  ingress:
  - {action: Log}
  - action: Allow
    ipVersion: 4
    protocol: 6
    notProtocol: UDP
    metadata: {annotations: {owner: a}}
    source: {nets: [10.0.0.0/8], notNets: [10.1.0.0/16], selector: has(app), notSelector: app == 'x', serviceAccounts: {names: [a, b], selector: has(x)}}
    destination: {ports: [80, "81", "8000:8080", http], notPorts: [82]}
    http: {methods: [GET], paths: [{exact: /a}, {prefix: /b}]}
  - {action: Deny, protocol: ICMP, icmp: {type: 8, code: 0}, notICMP: {type: 0}}
  - {action: Allow, destination: {ports: [http]}}
  egress:
  - {action: Allow, protocol: TCP, destination: {services: {name: front, namespace: web}}}
  - {action: Pass, protocol: "47", destination: {namespaceSelector: global()}}
  - {action: Deny, protocol: UDPLite, source: {clusterSelector: hanse.dev/cluster == 'a'}}
---
apiVersion: hanse.dev/v1alpha1
kind: StagedFederatedNetworkPolicy
metadata: {name: full}
spec: {tier: platform, stagedAction: Delete}
---
apiVersion: hanse.dev/v1alpha1
kind: FederatedNetworkSet
metadata: {name: full, labels: {kind: registry}}
spec: {nets: [192.0.2.1, 198.51.100.0/24, "2001:db8::1"]}
"#;

#[test]
fn valid_objects_are_stored_and_read_back_as_they_were_written() {
    run(async {
        let server = server().await;
        let client = server.client().await.expect("a client");
        let objects = valid();
        assert!(objects.len() > 60, "{} objects", objects.len());
        for object in objects {
            let before = json_of(&object);
            let (name, kind) = (object.metadata.name.clone(), object.types.clone().expect("a kind").kind);
            let stored = manifests::apply_object(&client, "test", object).await;
            let stored = stored.unwrap_or_else(|error| panic!("{error:#}: {}", String::from_utf8_lossy(&before)));
            assert!(stored.metadata.managed_fields.is_some() && stored.metadata.uid.is_some());
            let (before, after) = (FederatedObject::read(&before), FederatedObject::read(&json_of(&stored)));
            assert_eq!(after.object(), before.object(), "{kind} {name:?}");
            assert!(before.object().is_ok(), "{kind} {name:?}: {:?}", before.object());
        }
        // kubectl names them as people do.
        for (arguments, expected) in [
            (&["get", "fnp,sfnp,fns,mc,cjt,cset", "-o", "name"][..], "memberclusters.hanse.dev/full"),
            (&["get", "hanse"], "clusterset.hanse.dev/default"),
            (
                &["get", "fnp", "full"],
                "NAME   TIER       ORDER   ACCEPTED   DISTRIBUTED   ENFORCED   CLUSTERS   NODES   AGE",
            ),
            (&["get", "tiers.hanse.dev", "strict"], "Guard"),
        ] {
            let shown = succeeds(server.kubectl().expect("kubectl").args(arguments));
            assert!(shown.replace("membercluster.", "memberclusters.").contains(expected), "{arguments:?}: {shown}");
        }
    });
}

#[test]
fn status_is_written_apart_and_does_not_disturb_reading() {
    run(async {
        let server = server().await;
        let client = server.client().await.expect("a client");
        let policy = written(OTHERS)
            .into_iter()
            .find(|it| it.types.as_ref().is_some_and(|it| it.kind == "FederatedNetworkPolicy"));
        let policy = policy.expect("one of these");
        let before = FederatedObject::read(&json_of(&policy));
        manifests::apply_object(&client, "test", policy).await.expect("stored");
        let api: Api<FederatedNetworkPolicy> = Api::all(client);
        let generation = api.get("full").await.expect("read").metadata.generation;
        let condition = |status: &str, reason: &str| Condition {
            kind: "Enforced".to_owned(),
            status: status.to_owned(),
            observed_generation: generation,
            last_transition_time: Time("2026-01-02T03:04:05Z".parse().expect("a time")),
            reason: reason.to_owned(),
            message: "node n1: at revision 5".to_owned(),
        };
        let cluster = ClusterEnforcement {
            name: "train".to_owned(),
            state: "Lagging".to_owned(),
            nodes_enforced: 1,
            nodes_total: 2,
            reason: Some("Lag".to_owned()),
            message: None,
        };
        let status = PolicyStatus {
            observed_generation: generation.expect("a generation"),
            conditions: vec![condition("False", "ClusterLags")],
            clusters_enforced: "0/1".to_owned(),
            nodes_enforced: "1/2".to_owned(),
            clusters: vec![cluster],
            pending_change: Some(PendingChange { in_force: "{}".to_owned() }),
        };
        let patch =
            |status: &PolicyStatus| json!({"apiVersion": GROUP, "kind": "FederatedNetworkPolicy", "status": status});
        let write = async |status: &PolicyStatus| {
            api.patch_status("full", &PatchParams::apply("hanse-hub").force(), &Patch::Apply(patch(status))).await
        };
        let stored = write(&status).await.expect("written");
        assert_eq!(stored.status.as_ref(), Some(&status), "nothing of it is pruned");
        assert_eq!(stored.metadata.generation, generation, "the spec is as it was");
        let bytes = serde_json::to_vec(&stored).expect("JSON");
        assert_eq!(FederatedObject::read(&bytes).object(), before.object());
        let shown = succeeds(server.kubectl().expect("kubectl").args(["get", "fnp", "full"]));
        assert!(shown.contains("0/1") && shown.contains("1/2") && shown.contains("False"), "{shown}");
        let waits = |timeout: &str| {
            let mut kubectl = server.kubectl().expect("kubectl");
            output(kubectl.args(["wait", "--for=condition=Enforced", "fnp/full", &format!("--timeout={timeout}")]))
        };
        assert!(!waits("1s").0);
        let enforced = PolicyStatus { conditions: vec![condition("True", "Enforced")], ..status.clone() };
        write(&enforced).await.expect("written");
        assert!(waits("30s").0);
        // Wrong statuses are refused, too.
        let wrong = PolicyStatus { conditions: vec![condition("Yes", "Enforced")], ..status };
        let error = write(&wrong).await.expect_err("refused").to_string();
        assert!(error.contains("status.conditions[0].status"), "{error}");
    });
}

/// Of a kind, with this spec in place of the valid one, and what the refusal names.
const WRONG: &[(&str, &str, &[&str])] = &[
    ("FederatedNetworkPolicy", "{order: 1}", &["spec.tier: Required"]),
    ("FederatedNetworkPolicy", "{tier: Platform}", &["spec.tier", "Platform"]),
    ("FederatedNetworkPolicy", "{tier: a.b}", &["spec.tier"]),
    ("FederatedNetworkPolicy", "{tier: t, order: first}", &["spec.order"]),
    ("FederatedNetworkPolicy", "{tier: t, selector: \"a == 'b' || global()\"}", &["spec.selector", "global()"]),
    ("FederatedNetworkPolicy", "{tier: t, types: []}", &["spec.types"]),
    ("FederatedNetworkPolicy", "{tier: t, types: [Ingress, Ingress]}", &["spec.types", "has duplicates"]),
    (
        "FederatedNetworkPolicy",
        "{tier: t, ingress: [{action: Allow, http: {methods: [GET, GET]}}]}",
        &["spec.ingress[0].http.methods", "has duplicates"],
    ),
    ("FederatedNetworkPolicy", "{tier: t, types: [Both]}", &["spec.types[0]"]),
    ("FederatedNetworkPolicy", "{tier: t, ingress: [{}]}", &["spec.ingress[0].action: Required"]),
    ("FederatedNetworkPolicy", "{tier: t, ingress: [{action: Permit}]}", &["spec.ingress[0].action", "Permit"]),
    ("FederatedNetworkPolicy", "{tier: t, ingress: [{action: Deny, ipVersion: 5}]}", &["spec.ingress[0].ipVersion"]),
    ("FederatedNetworkPolicy", "{tier: t, ingress: [{action: Deny, protocol: tcp}]}", &["spec.ingress[0].protocol"]),
    ("FederatedNetworkPolicy", "{tier: t, ingress: [{action: Deny, protocol: 256}]}", &["spec.ingress[0].protocol"]),
    (
        "FederatedNetworkPolicy",
        "{tier: t, ingress: [{action: Deny, protocol: TCP, icmp: {type: 8}}]}",
        &["spec.ingress[0].icmp", "ICMPv6"],
    ),
    (
        "FederatedNetworkPolicy",
        "{tier: t, ingress: [{action: Deny, protocol: ICMP, icmp: {code: 8}}]}",
        &["spec.ingress[0].icmp.code", "needs type"],
    ),
    (
        "FederatedNetworkPolicy",
        "{tier: t, ingress: [{action: Deny, protocol: ICMP, icmp: {type: 255}}]}",
        &["spec.ingress[0].icmp.type"],
    ),
    (
        "FederatedNetworkPolicy",
        "{tier: t, ingress: [{action: Deny, protocol: ICMPv6, ipVersion: 4}]}",
        &["spec.ingress[0].ipVersion", "contradicts"],
    ),
    (
        "FederatedNetworkPolicy",
        "{tier: t, ingress: [{action: Deny, destination: {ports: [80]}}]}",
        &["spec.ingress[0].destination.ports", "needs the protocol"],
    ),
    (
        "FederatedNetworkPolicy",
        "{tier: t, ingress: [{action: Deny, protocol: ICMP, destination: {ports: [http]}}]}",
        &["spec.ingress[0].destination.ports", "needs the protocol"],
    ),
    (
        "FederatedNetworkPolicy",
        "{tier: t, egress: [{action: Deny, source: {notPorts: ['1:2']}}]}",
        &["spec.egress[0].source.notPorts", "needs the protocol"],
    ),
    (
        "FederatedNetworkPolicy",
        "{tier: t, ingress: [{action: Deny, protocol: TCP, destination: {ports: [0]}}]}",
        &["spec.ingress[0].destination.ports[0]"],
    ),
    (
        "FederatedNetworkPolicy",
        "{tier: t, ingress: [{action: Deny, protocol: TCP, destination: {ports: [70000]}}]}",
        &["spec.ingress[0].destination.ports[0]"],
    ),
    (
        "FederatedNetworkPolicy",
        "{tier: t, ingress: [{action: Deny, protocol: TCP, destination: {ports: [Http]}}]}",
        &["spec.ingress[0].destination.ports[0]"],
    ),
    (
        "FederatedNetworkPolicy",
        "{tier: t, ingress: [{action: Deny, source: {nets: [10.0.0.1]}}]}",
        &["spec.ingress[0].source.nets[0]"],
    ),
    (
        "FederatedNetworkPolicy",
        "{tier: t, ingress: [{action: Deny, source: {selector: global()}}]}",
        &["spec.ingress[0].source.selector", "global()"],
    ),
    (
        "FederatedNetworkPolicy",
        "{tier: t, ingress: [{action: Deny, source: {services: {name: a}}}]}",
        &["spec.ingress[0].source.services.namespace: Required"],
    ),
    (
        "FederatedNetworkPolicy",
        "{tier: t, ingress: [{action: Deny, source: {services: {name: a, namespace: b}, selector: has(a)}}]}",
        &["spec.ingress[0].source.services", "not allowed beside"],
    ),
    (
        "FederatedNetworkPolicy",
        "{tier: t, ingress: [{action: Deny, source: {services: {name: a, namespace: b}, clusterSelector: has(a)}}]}",
        &["spec.ingress[0].source.services", "not allowed beside"],
    ),
    (
        "FederatedNetworkPolicy",
        "{tier: t, ingress: [{action: Deny, destination: {services: {name: a, namespace: b}}}]}",
        &["spec.ingress", "services selects the peer"],
    ),
    (
        "FederatedNetworkPolicy",
        "{tier: t, egress: [{action: Deny, source: {services: {name: a, namespace: b}}}]}",
        &["spec.egress", "services selects the peer"],
    ),
    (
        "FederatedNetworkPolicy",
        "{tier: t, egress: [{action: Deny, protocol: TCP, destination: {services: {name: a, namespace: b}, ports: [80]}}]}",
        &["spec.egress[0].destination.services", "beside ports"],
    ),
    (
        "FederatedNetworkPolicy",
        "{tier: t, egress: [{action: Allow, http: {methods: [GET]}}]}",
        &["spec.egress", "ingress rules only"],
    ),
    (
        "FederatedNetworkPolicy",
        "{tier: t, ingress: [{action: Deny, http: {methods: [GET]}}]}",
        &["spec.ingress[0].http", "requires the action Allow"],
    ),
    (
        "FederatedNetworkPolicy",
        "{tier: t, ingress: [{action: Allow, protocol: UDP, http: {methods: [GET]}}]}",
        &["spec.ingress[0].http", "requires the protocol TCP"],
    ),
    (
        "FederatedNetworkPolicy",
        "{tier: t, ingress: [{action: Allow, http: {paths: [{exact: /a, prefix: /b}]}}]}",
        &["spec.ingress[0].http.paths[0]", "one of exact and prefix"],
    ),
    (
        "FederatedNetworkPolicy",
        "{tier: t, ingress: [{action: Allow, http: {paths: [{exact: a}]}}]}",
        &["spec.ingress[0].http.paths[0].exact"],
    ),
    ("StagedFederatedNetworkPolicy", "{tier: t, stagedAction: Add}", &["spec.stagedAction", "Add"]),
    ("Tier", "{phase: Middle}", &["spec.phase", "Middle"]),
    ("Tier", "{defaultAction: Allow}", &["spec.defaultAction"]),
    ("FederatedNetworkSet", "{nets: [web]}", &["spec.nets[0]"]),
    ("MemberCluster", "{labels: {hanse.dev/cluster: a}}", &["spec.labels", "reserved"]),
    ("MemberCluster", "{labels: {a: 'b c'}}", &["spec.labels.a"]),
    ("MemberCluster", "{grants: {cidrs: [10.0.0.1/8]}}", &["spec.grants.cidrs[0]", "bits beyond its prefix"]),
    ("MemberCluster", "{grants: {cidrs: [web]}}", &["spec.grants.cidrs[0]"]),
    ("MemberCluster", "{grants: {labels: {hanse.dev/x: ['*']}}}", &["spec.grants.labels", "reserved"]),
    ("MemberCluster", "{grants: {limits: {endpoints: -1}}}", &["spec.grants.limits.endpoints"]),
    ("MemberCluster", "{federatedAllow: Always}", &["spec.federatedAllow"]),
    ("MemberCluster", "{acceptance: Yes}", &["spec.acceptance"]),
    ("ClusterSet", "{leaseSeconds: 30}", &["spec.trustDomain: Required"]),
    ("ClusterSet", "{trustDomain: A}", &["spec.trustDomain"]),
    ("ClusterSet", "{trustDomain: a, leaseSeconds: 1}", &["spec.leaseSeconds"]),
    ("ClusterJoinToken", "{cluster: train}", &["spec.secretName: Required"]),
    ("ClusterJoinToken", "{cluster: Train, secretName: a}", &["spec.cluster"]),
    ("ClusterJoinToken", "{cluster: train, secretName: a, lifetimeSeconds: 604801}", &["spec.lifetimeSeconds"]),
];

#[test]
fn wrong_objects_are_refused_with_the_field() {
    run(async {
        let server = server().await;
        let client = server.client().await.expect("a client");
        let object = |kind: &str, name: &str, spec: &str| {
            let text = format!("apiVersion: {GROUP}\nkind: {kind}\nmetadata: {{name: {name}}}\nspec: {spec}\n");
            (written(&text).remove(0), text)
        };
        for (kind, spec, named) in WRONG {
            let name = if *kind == "ClusterSet" { "default" } else { "x" };
            let (wrong, text) = object(kind, name, spec);
            let reader = FederatedObject::read(&json_of(&wrong));
            assert!(reader.object().is_err(), "hanse policy check accepts {text}");
            let error = match manifests::apply_object(&client, "test", wrong).await {
                Ok(stored) => panic!("accepted: {text}{stored:?}"),
                Err(error) => format!("{error:#}"),
            };
            assert!(named.iter().all(|part| error.contains(part)), "{text}{error}");
        }
        for (kind, name) in [("Tier", "a.b"), ("MemberCluster", "a.b"), ("ClusterSet", "second")] {
            let spec = if kind == "ClusterSet" { "{trustDomain: a}" } else { "{}" };
            let error =
                manifests::apply_object(&client, "test", object(kind, name, spec).0).await.expect_err("refused");
            assert!(format!("{error:#}").contains("metadata.name: "), "{kind}: {error:#}");
        }
        // What cannot be changed.
        for (kind, name, before, after, field) in [
            ("ClusterSet", "default", "{trustDomain: a}", "{trustDomain: b}", "spec.trustDomain"),
            ("ClusterJoinToken", "t", "{cluster: a, secretName: s}", "{cluster: b, secretName: s}", "spec"),
            (
                "ClusterJoinToken",
                "t",
                "{cluster: a, secretName: s}",
                "{cluster: a, secretName: s, accept: true}",
                "spec",
            ),
        ] {
            manifests::apply_object(&client, "test", object(kind, name, before).0).await.expect("stored");
            let error =
                manifests::apply_object(&client, "test", object(kind, name, after).0).await.expect_err("refused");
            let error = format!("{error:#}");
            assert!(
                error.contains(&format!("{field}: Invalid value")) && error.contains("cannot be changed"),
                "{error}"
            );
        }
        // A field that is not known, at any depth. This is the default of kubectl.
        for (spec, field) in [
            ("{tier: t, dscp: 1}", "spec.dscp"),
            ("{tier: t, stagedAction: Set}", "spec.stagedAction"),
            ("{tier: t, ingress: [{action: Deny, source: {domains: [a]}}]}", "spec.ingress[0].source.domains"),
        ] {
            let path = server.path("unknown.yaml");
            std::fs::write(&path, object("FederatedNetworkPolicy", "x", spec).1).expect("written");
            let mut kubectl = server.kubectl().expect("kubectl");
            let (success, error) = output(kubectl.args(["apply", "--validate=strict", "-f"]).arg(&path));
            assert!(!success && error.contains(&format!("unknown field \"{field}\"")), "{error}");
        }
        let policies: Api<FederatedNetworkPolicy> = Api::all(client);
        let stored = policies.list(&ListParams::default()).await.expect("a list");
        assert!(stored.items.is_empty(), "nothing of it was stored");
    });
}

#[test]
fn explain_documents_every_field() {
    run(async {
        let server = server().await;
        // What `kubectl explain` prints. The server publishes it some time after it serves the kinds.
        let names: Vec<String> = custom_resources::definitions()
            .iter()
            .map(|it| format!("dev.hanse.v1alpha1.{}", it.object["spec"]["names"]["kind"].as_str().expect("a kind")))
            .collect();
        let mut document = Value::Null;
        let published = until(PATIENCE, async || {
            let mut kubectl = server.kubectl().expect("kubectl");
            let (_, text) = output(kubectl.args(["get", "--raw", "/openapi/v3/apis/hanse.dev/v1alpha1"]));
            document = serde_json::from_str(&text).unwrap_or_default();
            names.iter().all(|name| document["components"]["schemas"][name].is_object())
        });
        assert!(published.await.is_some(), "{document}");
        let mut documented = 0;
        for name in &names {
            documented += count_documented(name, &document["components"]["schemas"][name]);
        }
        assert!(documented > 250, "{documented} fields");
        for (path, expected) in [
            ("fnp.spec.ingress.source.serviceAccounts.names", "The names of the service accounts"),
            ("sfnp.spec.stagedAction", "replaces the FederatedNetworkPolicy"),
            ("tiers.hanse.dev.spec.phase", "ENUM: Guard Baseline"),
            ("mc.status.conditions", "Connected"),
            ("cjt.spec.secretName", "under the key `token`"),
        ] {
            // Its cache is of the time before the definitions.
            let mut kubectl = server.kubectl().expect("kubectl");
            let explained = succeeds(kubectl.args(["explain", path]).env("KUBECACHEDIR", server.path("explain-cache")));
            assert!(
                explained.split_whitespace().collect::<Vec<_>>().join(" ").contains(expected),
                "{path}: {explained}"
            );
        }
    });
}

/// The number of fields, which all have a description.
fn count_documented(path: &str, schema: &Value) -> usize {
    let nested = schema["properties"].as_object().into_iter().flatten();
    let fields = nested.filter(|(name, _)| !path.ends_with(".metadata") && name.as_str() != "metadata");
    let of_fields = fields.map(|(name, field)| {
        let path = format!("{path}.{name}");
        assert!(field["description"].as_str().is_some_and(|text| text.len() > 8), "{path}: {field}");
        1 + count_documented(&path, field)
    });
    let of_items = ["items", "additionalProperties"].into_iter().filter_map(|nested| schema.get(nested));
    of_fields.sum::<usize>() + of_items.map(|items| count_documented(path, items)).sum::<usize>()
}

/// A version of the definitions that has a field more: what is stored with it reaches the reader, which closes what it concerns.
#[test]
fn field_of_a_newer_version_reaches_the_reader() {
    run(async {
        let server = server().await;
        let client = server.client().await.expect("a client");
        let path = root().join("deploy/crds/federatednetworkpolicies.hanse.dev.yaml");
        let text = std::fs::read_to_string(path).expect("the definition");
        let mut definition = manifests::read(&text).expect("an object").remove(0);
        let rule = "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties/ingress/items/properties";
        let fields = definition.data.pointer_mut(rule).and_then(Value::as_object_mut).expect("the fields of a rule");
        fields.insert("dscp".to_owned(), json!({"type": "integer", "description": "New."}));
        manifests::apply_object(&client, "test", definition).await.expect("applied");
        let policy = format!(
            "apiVersion: {GROUP}\nkind: FederatedNetworkPolicy\nmetadata: {{name: p}}\n\
             spec: {{tier: t, ingress: [{{action: Allow, dscp: 46}}, {{action: Deny}}]}}\n"
        );
        let api: Api<FederatedNetworkPolicy> = Api::all(client.clone());
        // The server uses the new schema some time after it has it.
        let stored = until(PATIENCE, async || {
            // Until then it refuses the field, or prunes it.
            manifests::apply(&client, "test", &policy).await.is_ok()
                && api.get("p").await.is_ok_and(|it| it.spec.0["ingress"][0].get("dscp").is_some())
        });
        assert!(stored.await.is_some(), "the new field is stored");
        let bytes = serde_json::to_vec(&api.get("p").await.expect("read")).expect("JSON");
        let read = FederatedObject::read(&bytes);
        assert!(read.object().is_err_and(|why| why.contains("spec.ingress[0].dscp")), "{:?}", read.object());
        let Some(hanse_api::Object::FederatedPolicy(policy)) = read.possible() else { panic!("{read:?}") };
        let policy = policy.among(&Default::default(), &Default::default());
        let unknown: Vec<bool> = policy.ingress.iter().flatten().map(|rule| rule.not_understood.is_some()).collect();
        assert_eq!(unknown, [true, false]);
    });
}
