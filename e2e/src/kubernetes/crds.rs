//! CustomResourceDefinitions of others, for tests of their policies.

use std::path::Path;

use anyhow::Context as _;
use serde_json::{Value, json};

use crate::go;

/// The API with the kind ClusterNetworkPolicy, and what its release contains of it.
pub const NETWORK_POLICY_API: go::Module = go::Module {
    path: "sigs.k8s.io/network-policy-api",
    version: "v0.3.0",
    sum: "h1:RL6fVXiix9IW1pj0ImkW645m+EWmb3dBGCiW19bg5+k=",
};

/// How a cluster has Calico's objects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Calico {
    /// As its users write them: `projectcalico.org/v3`.
    V3,
    /// As it stores them where it has an API server of its own: `crd.projectcalico.org/v1`.
    Stored,
}

/// Kind, plural, and whether it has a namespace.
const CALICO: [(&str, &str, bool); 8] = [
    ("Tier", "tiers", false),
    ("NetworkPolicy", "networkpolicies", true),
    ("GlobalNetworkPolicy", "globalnetworkpolicies", false),
    ("StagedNetworkPolicy", "stagednetworkpolicies", true),
    ("StagedGlobalNetworkPolicy", "stagedglobalnetworkpolicies", false),
    ("StagedKubernetesNetworkPolicy", "stagedkubernetesnetworkpolicies", true),
    ("NetworkSet", "networksets", true),
    ("GlobalNetworkSet", "globalnetworksets", false),
];

impl Calico {
    pub fn group(self) -> &'static str {
        match self {
            Self::V3 => "projectcalico.org",
            Self::Stored => "crd.projectcalico.org",
        }
    }

    fn version(self) -> &'static str {
        match self {
            Self::V3 => "v3",
            Self::Stored => "v1",
        }
    }

    /// The definitions of the kinds that are policy, as documents for [`apply`](super::manifests::apply). Their specs are not
    /// validated: any object that Calico could store can be stored.
    pub fn definitions(self) -> String {
        let all = CALICO.map(|(kind, plural, namespaced)| self.definition(kind, plural, namespaced).to_string());
        all.join("\n---\n")
    }

    fn definition(self, kind: &str, plural: &str, namespaced: bool) -> Value {
        let any = json!({ "type": "object", "x-kubernetes-preserve-unknown-fields": true });
        json!({
            "apiVersion": "apiextensions.k8s.io/v1",
            "kind": "CustomResourceDefinition",
            "metadata": { "name": format!("{plural}.{}", self.group()) },
            "spec": {
                "group": self.group(),
                "names": { "kind": kind, "plural": plural, "singular": kind.to_lowercase(), "listKind": format!("{kind}List") },
                "scope": if namespaced { "Namespaced" } else { "Cluster" },
                "versions": [{
                    "name": self.version(),
                    "served": true,
                    "storage": true,
                    "schema": { "openAPIV3Schema": {
                        "type": "object",
                        "properties": { "spec": any, "status": any },
                    } },
                }],
            },
        })
    }
}

/// The definition of ClusterNetworkPolicy `v1alpha2`, as its project publishes it: with its validation.
///
/// # Errors
/// When Go is missing, or the module cannot be downloaded.
pub fn cluster_network_policies() -> anyhow::Result<String> {
    let file = Path::new("config/crd/standard/policy.networking.k8s.io_clusternetworkpolicies.yaml");
    let path = NETWORK_POLICY_API.download()?.join(file);
    std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
}
