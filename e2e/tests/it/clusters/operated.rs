//! Policies that are applied to the management API server become verdicts on packets in a cluster.

use std::path::Path;
use std::time::Instant;

use hanse_e2e::deployment::Deployment;
use hanse_e2e::fabric::Fabric;
use hanse_e2e::kubernetes::{manifests, run, until};
use hanse_e2e::probe::Observed;
use hanse_e2e::sandbox;
use hanse_hub::custom_resources;
use k8s_openapi::api::apps::v1;
use kube::Api;
use kube::api::Patch;
use serde_json::{Value, json};

use super::east::{East, world};
use super::nodes::PATIENCE;

const POLICIES: &str = "apiVersion: hanse.dev/v1alpha1
kind: Tier
metadata: {name: platform}
spec: {phase: Guard, order: 100, defaultAction: Pass}
---
apiVersion: hanse.dev/v1alpha1
kind: FederatedNetworkPolicy
metadata: {name: web}
spec: {tier: platform, selector: \"app == 'web'\", types: [Ingress], ingress: [{action: Deny}]}
";

/// kubectl, with the administrator of the cluster, which is its own management cluster here.
fn kubectl(east: &East, arguments: &[&str]) -> (bool, String) {
    let output = east.server.kubectl().expect("kubectl").args(arguments).output().expect("it runs");
    (output.status.success(), String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
}

fn succeeds(east: &East, system: &Deployment<'_>, arguments: &[&str]) {
    let (success, text) = kubectl(east, arguments);
    let status = system.hanse(&["status"]).unwrap_or_default();
    let policy = kubectl(east, &["get", "fnp", "-o", "yaml"]).1;
    assert!(success, "{arguments:?}: {text}\n{status}\n{policy}");
}

fn status(east: &East) -> Value {
    serde_json::from_str::<Value>(&kubectl(east, &["get", "fnp", "web", "-o", "json"]).1).expect("JSON")["status"]
        .clone()
}

async fn patch<K>(east: &East, name: &str, patch: Value)
where
    K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope>
        + Clone
        + std::fmt::Debug
        + serde::de::DeserializeOwned,
    K::DynamicType: Default,
{
    let api: Api<K> = Api::namespaced(east.client.clone(), "hanse");
    api.patch(name, &Default::default(), &Patch::Merge(patch)).await.expect("patched");
}

#[test]
fn policies_of_the_management_cluster_become_verdicts() {
    sandbox::test("clusters::operated::policies_of_the_management_cluster_become_verdicts", || {
        let world = world();
        let fabric = Fabric::build(std::slice::from_ref(&world)).expect("the network");
        let scratch = tempfile::tempdir_in("/run").expect("a folder");
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(scratch.path(), open).expect("set");
        let mut system = Deployment::start(&fabric, &crate::system::programs(), scratch.path()).expect("a hub");
        fabric.router().enter(|| {
            run(async {
                let east = East::start(&world, &fabric, scratch.path()).await;
                let crds = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/crds");
                let crds = crds.to_str().expect("UTF-8");
                succeeds(&east, &system, &["apply", "--server-side", "-f", crds]);
                for definition in custom_resources::definitions() {
                    manifests::established(&east.client, &definition.name).await.expect("it is established");
                }
                system.operate(&east.server.kubeconfig()).expect("the hub serves again");
                let (web, clients) = east.deploy(&system).await;
                let client = &clients[0];
                east.until_observed(client, &web, Observed::Open).await;

                let start = Instant::now();
                east.apply(POLICIES).await;
                east.until_observed(client, &web, Observed::Closed).await;
                println!("closed after {:?}", start.elapsed());
                let wait = |condition| ["wait", condition, "--timeout=90s", "fnp/web"];
                succeeds(&east, &system, &wait("--for=condition=Enforced"));
                println!("Enforced after {:?}", start.elapsed());
                // Counts are not older than the condition.
                let now = status(&east);
                assert_eq!((&now["clustersEnforced"], &now["nodesEnforced"]), (&json!("1/1"), &json!("2/2")), "{now}");
                succeeds(&east, &system, &wait("--for=condition=Distributed"));

                // Without agents, the cluster lags; with them, it enforces again.
                let start = Instant::now();
                let on_nodes =
                    |label: Value| json!({"spec": {"template": {"spec": {"nodeSelector": {"none": label}}}}});
                patch::<v1::DaemonSet>(&east, "hanse-agent", on_nodes(json!("none"))).await;
                succeeds(&east, &system, &wait("--for=condition=Enforced=false"));
                println!("not Enforced after {:?} without agents", start.elapsed());
                patch::<v1::DaemonSet>(&east, "hanse-agent", on_nodes(Value::Null)).await;
                succeeds(&east, &system, &wait("--for=condition=Enforced"));

                // Deletion reverses it.
                let start = Instant::now();
                succeeds(&east, &system, &["delete", "--timeout=60s", "fnp/web", "tiers.hanse.dev/platform"]);
                east.until_observed(client, &web, Observed::Open).await;
                println!("open after {:?}", start.elapsed());
                let is_gone = |stored: String| !stored.contains("web") && !stored.contains("platform");
                let gone = until(PATIENCE, async || system.hanse(&["get", "-o", "name"]).is_ok_and(is_gone));
                assert!(gone.await.is_some(), "{}", system.hanse(&["get"]).unwrap_or_default());

                // Without its member, the cluster is silent; packets stay closed.
                east.apply(POLICIES).await;
                succeeds(&east, &system, &wait("--for=condition=Enforced"));
                let start = Instant::now();
                patch::<v1::Deployment>(&east, "hanse-member", json!({"spec": {"replicas": 0}})).await;
                succeeds(&east, &system, &wait("--for=condition=Enforced=false"));
                println!("not Enforced after {:?} without member", start.elapsed());
                let now = status(&east);
                assert_eq!(now["clusters"][0]["state"], "Lagging", "{now}");
                assert!(now["clusters"][0]["reason"].is_string(), "{now}");
                east.until_observed(client, &web, Observed::Closed).await;
            });
        });
    });
}
