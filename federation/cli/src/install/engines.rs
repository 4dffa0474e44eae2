//! Which other programs of a cluster enforce network policy.

use anyhow::Context as _;
use hanse_kubernetes::answered;
use k8s_openapi::api::apps::v1::DaemonSet;
use kube::api::ListParams;
use kube::{Api, Client, ResourceExt as _};

/// Objects in a page of a list.
const PAGE: u32 = 500;

/// The names of images, without their path, and the engines. Images say more than the names of objects, which distributions change.
const ENGINES: [(&str, &str); 9] = [
    ("calico-node", "Calico"),
    ("cilium", "Cilium"),
    ("antrea-agent-ubuntu", "Antrea"),
    ("antrea-ubuntu", "Antrea"),
    ("kube-router", "kube-router"),
    ("weave-npc", "Weave Net"),
    ("azure-npm", "Azure Network Policy Manager"),
    ("aws-network-policy-agent", "the Amazon VPC CNI"),
    ("kube-network-policies", "kube-network-policies"),
];

/// The engines that run, with their DaemonSets: `Calico (calico-system/calico-node)`.
pub async fn found(client: &Client) -> anyhow::Result<Vec<String>> {
    let api: Api<DaemonSet> = Api::all(client.clone());
    let mut parameters = ListParams::default().limit(PAGE);
    let mut found = Vec::new();
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

fn engine(set: &DaemonSet) -> Option<&'static str> {
    let pod = set.spec.as_ref()?.template.spec.as_ref()?;
    let containers = pod.containers.iter().flat_map(|it| it.image.as_deref().map(|image| (image, it.name.as_str())));
    containers.into_iter().find_map(|(image, container)| {
        let name = image.split('@').next().unwrap_or_default();
        // A port of the registry is not a tag.
        let (path, last) = name.rsplit_once('/').unwrap_or(("", name));
        let last = last.split(':').next().unwrap_or_default();
        match last {
            // Many images have this name.
            "node" => (path.ends_with("/calico") || container == "calico-node").then_some("Calico"),
            // Of OVN-Kubernetes, the image is that of a distribution.
            _ if container.starts_with("ovnkube-") => Some("OVN-Kubernetes"),
            // Of GKE, the image has another name.
            _ if container == "cilium-agent" => Some("Cilium"),
            _ => ENGINES.iter().find(|(image, _)| *image == last).map(|(_, engine)| *engine),
        }
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn with(image: &str, container: &str) -> Option<&'static str> {
        let set = json!({"spec": {"selector": {}, "template": {"spec": {"containers": [
            {"name": "first", "image": "registry.example/other:1"}, {"name": container, "image": image},
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
            ("1.dkr.ecr.example/amazon/aws-network-policy-agent:v1", "aws-eks-nodeagent", Some("the Amazon VPC CNI")),
            // They enforce no policy.
            ("ghcr.io/flannel-io/flannel:v1", "kube-flannel", None),
            ("registry.example/prometheus/node:1", "exporter", None),
            ("registry.k8s.io/kube-proxy:v1.36.0", "kube-proxy", None),
            ("registry.example/hanse/hanse-agent@sha256:01", "agent", None),
        ] {
            assert_eq!(with(image, container), expected, "{image}");
        }
    }
}
