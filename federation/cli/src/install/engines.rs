//! Which other programs of a cluster enforce network policy.

use anyhow::Context as _;
use hanse_kubernetes::answered;
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::Node;
use kube::api::ListParams;
use kube::{Api, Client, ResourceExt as _};

/// Objects in a page of a list.
const PAGE: u32 = 500;

/// The names of images, without their path, and the engines. Images say more than the names of objects, which distributions change.
const ENGINES: [(&str, &str); 8] = [
    ("calico-node", "Calico"),
    ("cilium", "Cilium"),
    ("antrea-agent-ubuntu", "Antrea"),
    ("antrea-ubuntu", "Antrea"),
    ("kube-router", "kube-router"),
    ("weave-npc", "Weave Net"),
    ("azure-npm", "Azure Network Policy Manager"),
    ("kube-network-policies", "kube-network-policies"),
];

/// The engines that run, with their DaemonSets: `Calico (calico-system/calico-node)`.
pub async fn found(client: &Client) -> anyhow::Result<Vec<String>> {
    let api: Api<DaemonSet> = Api::all(client.clone());
    let mut parameters = ListParams::default().limit(PAGE);
    let mut found = k3s(client).await?;
    loop {
        let page = answered(api.list(&parameters)).await.context("look for other policy engines")?;
        for set in &page.items {
            if let Some(engine) = engine(set) {
                found.push(format!("{engine} ({}/{})", set.namespace().unwrap_or_default(), set.name_any()));
            }
        }
        parameters.continue_token = page.metadata.continue_.filter(|it| !it.is_empty());
        if parameters.continue_token.is_none() {
            return Ok(found);
        }
    }
}

/// k3s enforces policy in its own process.
async fn k3s(client: &Client) -> anyhow::Result<Vec<String>> {
    let api: Api<Node> = Api::all(client.clone());
    let nodes =
        answered(api.list(&ListParams::default().limit(PAGE))).await.context("look for other policy engines")?;
    let is_k3s = |node: &Node| {
        let version = node.status.as_ref().and_then(|it| it.node_info.as_ref()).map(|it| it.kubelet_version.as_str());
        version.is_some_and(|it| it.contains("+k3s"))
    };
    Ok(nodes
        .items
        .iter()
        .any(is_k3s)
        .then(|| "k3s (unless it runs with --disable-network-policy)".to_owned())
        .into_iter()
        .collect())
}

fn engine(set: &DaemonSet) -> Option<&'static str> {
    let pod = set.spec.as_ref()?.template.spec.as_ref()?;
    pod.containers.iter().find_map(|container| {
        let image = container.image.as_deref().unwrap_or_default();
        let name = image.split('@').next().unwrap_or_default();
        // A port of the registry is not a tag.
        let (path, last) = name.rsplit_once('/').unwrap_or(("", name));
        let last = last.split(':').next().unwrap_or_default();
        let has = |argument: &str| container.args.iter().chain(&container.command).flatten().any(|it| it == argument);
        match (last, &*container.name) {
            // The images of Calico Enterprise and of distributions have other names.
            (_, "calico-node") => Some("Calico"),
            // Many images have this name.
            ("node", _) => path.ends_with("/calico").then_some("Calico"),
            (_, "cilium-agent") => Some("Cilium"),
            // Of OVN-Kubernetes, the image is that of a distribution.
            (_, container) if container.starts_with("ovnkube-") => Some("OVN-Kubernetes"),
            // Amazon runs it everywhere, and it enforces where an add-on setting says so.
            ("aws-network-policy-agent", _) => has("--enable-network-policy=true").then_some("the Amazon VPC CNI"),
            _ => ENGINES.iter().find(|(image, _)| *image == last).map(|(_, engine)| *engine),
        }
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn with(image: &str, container: &str) -> Option<&'static str> {
        with_arguments(image, container, &[])
    }

    fn with_arguments(image: &str, container: &str, arguments: &[&str]) -> Option<&'static str> {
        let set = json!({"spec": {"selector": {}, "template": {"spec": {"containers": [
            {"name": "first", "image": "registry.example/other:1"}, {"name": container, "image": image, "args": arguments},
        ]}}}});
        engine(&serde_json::from_value(set).expect("a DaemonSet"))
    }

    #[test]
    fn engine_is_known_by_its_images() {
        for (image, container, expected) in [
            ("docker.io/calico/node:v3.30.0", "calico-node", Some("Calico")),
            ("registry.example:5000/mirror/node@sha256:01", "calico-node", Some("Calico")),
            ("quay.io/cilium/cilium:v1.18.0@sha256:01", "cilium-agent", Some("Cilium")),
            ("gke.gcr.io/other:1", "cilium-agent", Some("Cilium")),
            ("antrea/antrea-agent-ubuntu:v2", "antrea-agent", Some("Antrea")),
            ("cloudnativelabs/kube-router", "kube-router", Some("kube-router")),
            ("ghcr.io/ovn-kubernetes/ovn-kube-ubuntu:1", "ovnkube-controller", Some("OVN-Kubernetes")),
            ("quay.io/tigera/cnx-node:v3.19.4", "calico-node", Some("Calico")),
            // They enforce no policy.
            ("ghcr.io/flannel-io/flannel:v1", "kube-flannel", None),
            ("registry.example/prometheus/node:1", "exporter", None),
            ("registry.k8s.io/kube-proxy:v1.36.0", "kube-proxy", None),
            ("registry.example/hanse/hanse-agent@sha256:01", "agent", None),
        ] {
            assert_eq!(with(image, container), expected, "{image}");
        }
    }

    #[test]
    fn agent_of_amazon_counts_where_it_enforces() {
        let with = |argument| {
            with_arguments("1.dkr.ecr.example/amazon/aws-network-policy-agent:v1", "aws-eks-nodeagent", &[argument])
        };
        assert_eq!(with("--enable-network-policy=true"), Some("the Amazon VPC CNI"));
        assert_eq!(with("--enable-network-policy=false"), None);
    }
}
