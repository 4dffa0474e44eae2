//! Selectors of clusters, and the labels that they are evaluated on.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use hanse_policy::inventory::Labels;
use hanse_policy::model::ClusterName;
use hanse_policy::selector::Selector;
use hanse_policy::tri::Tri;

/// The label with which each cluster can be selected by name.
pub const CLUSTER_NAME_LABEL: &str = "hanse.dev/cluster";

/// The labels by which clusters are selected: those of their MemberCluster, and [`CLUSTER_NAME_LABEL`].
pub type ClusterLabels = BTreeMap<ClusterName, Labels>;

/// A selector of clusters, with its text in the manifest.
#[derive(Debug, Clone, PartialEq)]
pub struct ClusterSelector {
    pub text: Arc<str>,
    pub selector: Selector,
}

/// The clusters that a selector selects.
pub fn select_clusters(selector: &Selector, clusters: &ClusterLabels) -> BTreeSet<ClusterName> {
    let selects = |(name, labels): (&ClusterName, &Labels)| {
        let mut labels = labels.clone();
        labels.insert(CLUSTER_NAME_LABEL.into(), name.clone());
        (selector.expr.evaluate(&labels) == Tri::Yes).then(|| name.clone())
    };
    clusters.iter().filter_map(selects).collect()
}
