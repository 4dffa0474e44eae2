//! MemberCluster: the labels of a cluster, and what it may export.
//!
//! ```yaml
//! apiVersion: hanse.dev/v1alpha1
//! kind: MemberCluster
//! metadata: {name: train}
//! spec:
//!   labels: {env: prod, region: eu}
//!   grants:
//!     namespaces: ["*"]                # or names; none by default
//!     cidrs: [10.1.0.0/16]             # of its endpoints; never overlap with another cluster's
//!     labels: {app: ["*"], stage: [inference, training]}   # keys with permitted values; absent: all keys
//!     visibleTo: {clusterSelector: "env == 'prod'"}        # absent: all clusters
//!     limits: {endpoints: 100000, labelSets: 20000, updatesPerSecond: 2000}
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use hanse_api::Object;
use hanse_api::federated::FederatedObject;
use hanse_api::hanse::{self, Member, RESERVED_PREFIX, overlap};
use hanse_policy::inventory::{LabelGrant, Labels};
use hanse_policy::selector::Selector;
use hanse_policy::tri::Tri;
use ipnet::IpNet;

/// Labels and grants of a cluster. The default has no grants.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct MemberCluster {
    pub labels: Labels,
    pub namespaces: Namespaces,
    /// The nets that its endpoints' addresses come from.
    pub cidrs: Vec<IpNet>,
    /// The label keys that it may set, with the values permitted; none is every key and value.
    pub label_values: Option<BTreeMap<Arc<str>, Values>>,
    /// Which clusters may see what it exports; none is all.
    pub visible_to: Option<Selector>,
    pub limits: Limits,
}

/// The namespaces that a cluster may export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Namespaces {
    All,
    Named(BTreeSet<Arc<str>>),
}

impl Default for Namespaces {
    fn default() -> Self {
        Self::Named(BTreeSet::new())
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Values {
    Any,
    Named(BTreeSet<Arc<str>>),
}

/// How much a cluster may publish.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    pub endpoints: u64,
    pub label_sets: u64,
    /// Average over a minute. Updates above the limit are delayed, not dropped.
    pub updates_per_second: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            endpoints: hanse::DEFAULT_MAX_ENDPOINTS,
            label_sets: hanse::DEFAULT_MAX_LABEL_SETS,
            updates_per_second: hanse::DEFAULT_MAX_UPDATES_PER_SECOND,
        }
    }
}

impl MemberCluster {
    /// The grants of a MemberCluster; `None` for another object.
    pub fn of(object: &Object) -> Option<Self> {
        let Object::Member(member) = object else { return None };
        let values = |values: Option<BTreeSet<Arc<str>>>| values.map_or(Values::Any, Values::Named);
        let Member { labels, grants, .. } = Member::clone(member);
        Some(Self {
            labels,
            namespaces: grants.namespaces.map_or(Namespaces::All, Namespaces::Named),
            cidrs: grants.cidrs,
            label_values: grants.labels.map(|keys| keys.into_iter().map(|(key, v)| (key, values(v))).collect()),
            visible_to: grants.visible_to,
            limits: Limits {
                endpoints: grants.max_endpoints,
                label_sets: grants.max_label_sets,
                updates_per_second: grants.max_updates_per_second,
            },
        })
    }

    /// Reads the JSON of a MemberCluster.
    ///
    /// # Errors
    /// What is wrong, naming the field.
    pub fn from_manifest(manifest: &[u8]) -> Result<Self, String> {
        let read = FederatedObject::read(manifest);
        Self::of(read.object()?).ok_or_else(|| "kind: is not MemberCluster".to_owned())
    }

    /// Whether endpoints of this namespace may be exported.
    pub fn permits_namespace(&self, name: &str) -> bool {
        match &self.namespaces {
            Namespaces::All => true,
            Namespaces::Named(names) => names.contains(name),
        }
    }

    /// Whether an endpoint may have this address.
    pub fn permits_address(&self, address: IpAddr) -> bool {
        self.cidrs.iter().any(|net| net.contains(&address))
    }

    /// Whether an endpoint may have this label. A key outside the grant is not refused, but unknown (see [`Self::label_grant`]).
    pub fn permits_label(&self, key: &str, value: &str) -> bool {
        if key.starts_with(RESERVED_PREFIX) {
            return false;
        }
        match self.label_values.as_ref().and_then(|keys| keys.get(key)) {
            Some(Values::Named(values)) => values.contains(value),
            Some(Values::Any) | None => true,
        }
    }

    /// The keys that are known on this cluster's endpoints.
    pub fn label_grant(&self) -> LabelGrant {
        match &self.label_values {
            None => LabelGrant::All,
            Some(keys) => LabelGrant::Keys(keys.keys().cloned().collect()),
        }
    }

    /// Warnings about these grants, with the fields.
    pub fn warnings(&self) -> Vec<String> {
        let any = "spec.grants.labels is absent (labels: any): endpoints of the cluster may have any label, including labels \
                   that policies of other clusters trust; list the permitted keys and values";
        self.label_values.is_none().then(|| any.to_owned()).into_iter().collect()
    }

    /// Whether a cluster with these labels may see what this one exports.
    pub fn visible_to(&self, labels: &Labels) -> bool {
        self.visible_to.as_ref().is_none_or(|selector| selector.evaluate(labels) == Tri::Yes)
    }

    /// The first of its nets that overlaps with one of `other`, with that one.
    pub fn overlap(&self, other: &Self) -> Option<(IpNet, IpNet)> {
        let pairs = self.cidrs.iter().flat_map(|a| other.cidrs.iter().map(move |b| (*a, *b)));
        pairs.into_iter().find(|(a, b)| overlap(a, b))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(spec: serde_json::Value) -> Result<MemberCluster, String> {
        let (api, kind) = ("hanse.dev/v1alpha1", "MemberCluster");
        let manifest = serde_json::json!({"apiVersion": api, "kind": kind, "metadata": {"name": "a"}, "spec": spec});
        MemberCluster::from_manifest(manifest.to_string().as_bytes())
    }

    #[test]
    fn without_a_grant_nothing_is_granted() {
        let none = MemberCluster::default();
        assert!(!none.permits_namespace("a") && !none.permits_address([10, 0, 0, 1].into()));
        assert_eq!(read(serde_json::json!({})).unwrap(), none);
    }

    #[test]
    fn reads_every_field_and_names_what_is_wrong() {
        let grant = read(serde_json::json!({
            "labels": {"env": "prod"},
            "grants": {
                "namespaces": ["a"], "cidrs": ["10.1.0.0/16", "fd00::/64"],
                "labels": {"app": ["*"], "stage": ["x"]},
                "visibleTo": {"clusterSelector": "env == 'prod'"},
                "limits": {"endpoints": 5}
            }
        }))
        .unwrap();
        assert!(grant.permits_namespace("a") && !grant.permits_namespace("b"));
        assert!(grant.permits_address([10, 1, 2, 3].into()) && !grant.permits_address([10, 2, 0, 0].into()));
        assert!(
            grant.permits_label("app", "q") && grant.permits_label("stage", "x") && !grant.permits_label("stage", "y")
        );
        assert!(!grant.permits_label("hanse.dev/x", "y"));
        assert!(grant.visible_to(&grant.labels) && !grant.visible_to(&Labels::new()));
        for (spec, field) in [
            (serde_json::json!({"grants": {"cidrs": ["10.1.0.1/16"]}}), "spec.grants.cidrs[0]"),
            (serde_json::json!({"grants": {"cidrs": ["10.0.0.0/8", "10.1.0.0/16"]}}), "spec.grants.cidrs[1]"),
            (serde_json::json!({"grants": {"labels": {"hanse.dev/a": []}}}), "spec.grants.labels"),
            (serde_json::json!({"labels": {"hanse.dev/cluster": "b"}}), "spec.labels"),
            (serde_json::json!({"grants": {"visibleTo": {"clusterSelector": "=="}}}), "visibleTo"),
            (serde_json::json!({"typo": 1}), "typo"),
        ] {
            let error = read(spec).unwrap_err();
            assert!(error.contains(field), "{error}");
        }
    }
}
