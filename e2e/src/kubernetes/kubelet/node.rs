//! The Node object of a simulated node, and its lease.

use std::time::Duration;

use anyhow::Context as _;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, Patch, PatchParams, PostParams};
use serde_json::{Value, json};

use super::NodeOptions;

/// As the kubelet does: a quarter of the lease's duration.
pub const HEARTBEAT: Duration = Duration::from_secs(10);
const LEASE_SECONDS: u64 = 40;
const LEASES: &str = "kube-node-lease";

/// Registers the node, or adopts the one that exists, and reports that it is ready. Returns its UID.
pub async fn register(client: &kube::Client, options: &NodeOptions) -> anyhow::Result<String> {
    let nodes: Api<Node> = Api::all(client.clone());
    let node: Node = serde_json::from_value(object(options)).context("make the Node")?;
    let node = match nodes.create(&PostParams::default(), &node).await {
        Err(kube::Error::Api(status)) if status.code == 409 => nodes.get(&options.name).await,
        other => other,
    };
    let node = node.with_context(|| format!("register node {}", options.name))?;
    let mut status = status(options);
    // The type is the key by which addresses are merged, and two families have the same one.
    if let Some(addresses) = status["addresses"].as_array_mut() {
        addresses.insert(0, json!({ "$patch": "replace" }));
    }
    let patch = Patch::Strategic(json!({ "status": status }));
    let patched = nodes.patch_status(&options.name, &PatchParams::default(), &patch).await;
    patched.with_context(|| format!("report that node {} is ready", options.name))?;
    node.metadata.uid.context("a node has a UID")
}

fn object(options: &NodeOptions) -> Value {
    let mut labels = json!({
        "kubernetes.io/hostname": options.name,
        "kubernetes.io/os": "linux",
        "kubernetes.io/arch": "amd64",
    });
    for (key, value) in &options.labels {
        labels[key] = json!(value);
    }
    let taints: Vec<Value> =
        options.taints.iter().map(|(key, effect)| json!({ "key": key, "effect": effect })).collect();
    json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": { "name": options.name, "labels": labels },
        "spec": { "podCIDR": options.pod_ranges.first(), "podCIDRs": options.pod_ranges, "taints": taints },
        "status": status(options),
    })
}

fn status(options: &NodeOptions) -> Value {
    let now = Timestamp::now().to_string();
    let condition = |kind: &str, status: &str, reason: &str| {
        json!({
            "type": kind, "status": status, "reason": reason, "message": "simulated",
            "lastHeartbeatTime": now, "lastTransitionTime": now,
        })
    };
    let mut addresses: Vec<Value> =
        options.addresses.iter().map(|address| json!({ "type": "InternalIP", "address": address })).collect();
    addresses.push(json!({ "type": "Hostname", "address": options.name }));
    let resources = json!({ "cpu": "64", "memory": "256Gi", "ephemeral-storage": "1Ti", "pods": "500" });
    json!({
        "addresses": addresses,
        "capacity": resources,
        "allocatable": resources,
        "conditions": [
            condition("MemoryPressure", "False", "KubeletHasSufficientMemory"),
            condition("DiskPressure", "False", "KubeletHasNoDiskPressure"),
            condition("PIDPressure", "False", "KubeletHasSufficientPID"),
            condition("Ready", "True", "KubeletReady"),
        ],
        "nodeInfo": {
            "architecture": "amd64", "operatingSystem": "linux", "kubeletVersion": "v1.36.0", "kubeProxyVersion": "",
            "containerRuntimeVersion": "simulated://1", "kernelVersion": "6", "osImage": "simulated",
            "machineID": "", "systemUUID": "", "bootID": "",
        },
    })
}

/// Renews the node's lease, by which the node controller sees that the node lives.
pub async fn heartbeat(client: &kube::Client, node: &str, uid: &str) -> Result<(), kube::Error> {
    let leases: Api<Lease> = Api::namespaced(client.clone(), LEASES);
    // To the microsecond, as the type of the field is.
    let now = format!("{:.6}", Timestamp::now());
    let lease = json!({
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": {
            "name": node,
            "namespace": LEASES,
            "ownerReferences": [{ "apiVersion": "v1", "kind": "Node", "name": node, "uid": uid }],
        },
        "spec": { "holderIdentity": node, "leaseDurationSeconds": LEASE_SECONDS, "renewTime": now },
    });
    // By a merge, since the rights of a node have no server-side apply that creates.
    match leases.patch(node, &PatchParams::default(), &Patch::Merge(&lease)).await {
        Err(kube::Error::Api(status)) if status.code == 404 => {
            let lease = serde_json::from_value(lease).map_err(kube::Error::SerdeError)?;
            leases.create(&PostParams::default(), &lease).await.map(drop)
        }
        other => other.map(drop),
    }
}
