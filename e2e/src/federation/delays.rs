//! How long a change of a policy at the management cluster takes to become verdicts on packets in two clusters.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use kube::api::{Api, DynamicObject, Patch, PatchParams};
use kube::core::{ApiResource, GroupVersionKind};
use serde_json::{Value, json};

use super::{Federation, becomes};
use crate::kubernetes::cluster::Endpoint;
use crate::probe::Observed;
use crate::world::{Cluster, Node};

/// How long packets may take to change.
const PATIENCE: Duration = Duration::from_secs(60);
/// Changes begin at different times of a second, so that none of the periods of hub, member and agent favours them.
const SPREAD_MS: u64 = 1_000;

/// The two clusters, and the tokens with which they join.
pub const REGISTRATIONS: &str = "apiVersion: hanse.dev/v1alpha1
kind: MemberCluster
metadata: {name: east}
spec: {grants: {namespaces: ['*'], cidrs: [10.20.0.0/16]}}
---
apiVersion: hanse.dev/v1alpha1
kind: MemberCluster
metadata: {name: west}
spec: {grants: {namespaces: ['*'], cidrs: [10.30.0.0/16]}}
---
apiVersion: hanse.dev/v1alpha1
kind: ClusterJoinToken
metadata: {name: east}
spec: {cluster: east, secretName: east-join, accept: true}
---
apiVersion: hanse.dev/v1alpha1
kind: ClusterJoinToken
metadata: {name: west}
spec: {cluster: west, secretName: west-join, accept: true}
";

pub const TIER: &str = "apiVersion: hanse.dev/v1alpha1
kind: Tier
metadata: {name: platform}
spec: {phase: Guard, order: 100, defaultAction: Pass}
";

/// Closes web in every cluster.
pub const POLICY: &str = "apiVersion: hanse.dev/v1alpha1
kind: FederatedNetworkPolicy
metadata: {name: web}
spec: {tier: platform, selector: \"app == 'web'\", types: [Ingress], ingress: [{action: Deny}]}
";

/// A server and a client on different nodes.
const WORKLOADS: &str = "apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: default}
spec:
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      nodeSelector: {kubernetes.io/hostname: a}
      containers: [{name: web, image: web, ports: [{containerPort: 8080}]}]
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: client, namespace: default}
spec:
  selector: {matchLabels: {app: client}}
  template:
    metadata: {labels: {app: client}}
    spec:
      nodeSelector: {kubernetes.io/hostname: b}
      containers: [{name: client, image: client, ports: [{containerPort: 8080}]}]
";

/// East and west, with two nodes each.
pub fn worlds() -> Vec<Cluster> {
    let cluster = |(name, number): (&str, u8)| {
        let node = |(name, of_node): (&str, u8)| Node {
            name: name.to_owned(),
            addresses: vec![[172, number, 0, of_node].into()],
            pod_ranges: vec![ipnet::Ipv4Net::new_assert([10, number, of_node, 0].into(), 24).into()],
        };
        let nodes = [("a", 1), ("b", 2)].map(node).into();
        Cluster { name: name.to_owned(), directory: PathBuf::new(), nodes, pods: Vec::new() }
    };
    [("east", 20), ("west", 30)].map(cluster).into()
}

/// A server and a client in each cluster.
#[derive(Debug)]
pub struct Pods(Vec<(Endpoint, Endpoint)>);

impl Pods {
    /// # Errors
    /// When they are not ready in time.
    pub async fn start(federation: &Federation<'_>) -> anyhow::Result<Self> {
        for cluster in &federation.clusters {
            cluster.apply(WORKLOADS).await?;
        }
        let mut pods = Vec::new();
        for cluster in &federation.clusters {
            let one = async |label: &str| cluster.ready("default", label, 1).await.map(|mut it| it.remove(0));
            pods.push((one("app=client").await?, one("app=web").await?));
        }
        Ok(Self(pods))
    }

    /// The client and the server of each cluster.
    pub fn pairs(&self) -> Vec<(&Endpoint, &Endpoint)> {
        self.0.iter().map(|(client, web)| (client, web)).collect()
    }

    pub fn clients(&self) -> impl Iterator<Item = &Endpoint> {
        self.0.iter().map(|(client, _)| client)
    }
}

/// A change of the policy: what packets became, and after which time since the answer of the API server in all clusters.
#[derive(Debug, Clone)]
pub struct Delay {
    pub became: Observed,
    pub took: Duration,
}

/// Changes [`POLICY`], which is applied and in force: opens the servers, closes them, and so on.
///
/// # Errors
/// When the API server refuses a change, or packets do not change in time.
pub async fn measure(federation: &Federation<'_>, pods: &Pods, changes: usize) -> anyhow::Result<Vec<Delay>> {
    let kind = ApiResource::from_gvk_with_plural(
        &GroupVersionKind::gvk("hanse.dev", "v1alpha1", "FederatedNetworkPolicy"),
        "federatednetworkpolicies",
    );
    let policies: Api<DynamicObject> = Api::all_with(federation.client.clone(), &kind);
    let (pairs, mut delays, mut random) = (pods.pairs(), Vec::new(), 1_u64);
    for number in 0..changes {
        let (action, became) = [("Allow", Observed::Open), ("Deny", Observed::Closed)][number % 2].clone();
        // A linear congruential generator (Knuth, MMIX): the same times in every run.
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        tokio::time::sleep(Duration::from_millis((random >> 33) % SPREAD_MS)).await;
        let change: Value = json!({ "spec": { "ingress": [{ "action": action }] } });
        policies.patch("web", &PatchParams::default(), &Patch::Merge(&change)).await.context("change the policy")?;
        let took = becomes(&pairs, &became, PATIENCE);
        let took = took.with_context(|| format!("packets are not {became:?}\n{}", federation.logs()))?;
        delays.push(Delay { became, took });
    }
    Ok(delays)
}
