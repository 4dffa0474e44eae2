//! Workloads: groups of endpoints that policies treat alike. The verdict for one endpoint is the verdict for all.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::inventory::{Cluster, Endpoint, EndpointId, EndpointKind, Inventory};
use crate::model::{ClusterName, PolicySet};
use crate::selector::build;

/// The keys of own labels that occur in the selectors of these policies.
pub fn relevant_keys<'a>(policies: impl IntoIterator<Item = &'a PolicySet>) -> BTreeSet<&'a str> {
    let mut keys = BTreeSet::new();
    let layers = policies.into_iter().flat_map(|set| [&set.federation].into_iter().chain(set.clusters.values()));
    for policy in layers.flat_map(|layer| layer.policies.values()) {
        let rules = [&policy.ingress, &policy.egress].into_iter().flatten().flatten();
        let entities = rules.flat_map(|rule| [&rule.source, &rule.destination]);
        let selections = entities.flat_map(|entity| [&entity.selection, &entity.not_selection]).flatten();
        let selectors = [&policy.selector].into_iter().chain(selections.map(|selection| &selection.selector));
        selectors.for_each(|selector| {
            selector.expr.for_each_key(&mut |key| keys.extend(build::own_label(key)));
        });
    }
    keys
}

/// Endpoints of one cluster and namespace with the same relevant labels. Never empty.
#[derive(Debug, Clone)]
pub struct Workload<'a> {
    pub cluster: &'a ClusterName,
    pub owner: &'a Cluster,
    pub members: Vec<(&'a EndpointId, &'a Endpoint)>,
}

/// An invalid label value, which represents an unknown value.
pub(crate) const SOME_VALUE: &str = "*";

/// The labels of an endpoint with one of `keys`. The value is [`SOME_VALUE`] if only the value is unknown, and `None` if it is unknown
/// whether the label exists.
pub(crate) fn seen<'a>(endpoint: &'a Endpoint, keys: &BTreeSet<&str>) -> Vec<(&'a str, Option<&'a str>)> {
    let labels = endpoint.labels.iter().map(|(key, value)| (&**key, Some(&**value)));
    let unknown = endpoint.run_time_labels().map(|(key, certain)| (&**key, certain.then_some(SOME_VALUE)));
    labels.chain(unknown).filter(|(key, _)| keys.contains(key)).collect()
}

/// The workloads of each cluster, in the order of their first members. Host-network pods are omitted: no policy selects them.
pub fn workloads<'a>(inventory: &'a Inventory, keys: &BTreeSet<&str>) -> BTreeMap<&'a ClusterName, Vec<Workload<'a>>> {
    let mut all = BTreeMap::new();
    for (cluster, owner) in &inventory.clusters {
        let mut found: Vec<Workload<'a>> = Vec::new();
        let mut known: HashMap<_, usize> = HashMap::new();
        for (id, endpoint) in owner.endpoints.iter().filter(|(_, endpoint)| !endpoint.host_network) {
            let account = endpoint.service_account.as_deref().filter(|_| id.kind == EndpointKind::Pod);
            let key = (id.kind, id.namespace.as_deref(), account, seen(endpoint, keys));
            let at = *known.entry(key).or_insert(found.len());
            match found.get_mut(at) {
                Some(workload) => workload.members.push((id, endpoint)),
                None => found.push(Workload { cluster, owner, members: vec![(id, endpoint)] }),
            }
        }
        all.insert(cluster, found);
    }
    all
}

/// A name for a group: the common prefix up to a `-`, followed by `*`.
pub fn common_name<'n>(names: impl IntoIterator<Item = &'n str>) -> String {
    let mut names = names.into_iter();
    let Some(first) = names.next() else { return "*".to_owned() };
    let (mut common, mut several) = (first.len(), false);
    for name in names {
        several = true;
        common = first.bytes().zip(name.bytes()).take(common).take_while(|(a, b)| a == b).count();
    }
    if !several {
        return first.to_owned();
    }
    // Names are ASCII; in others, the part before the last `-` is still valid.
    let stem = first.get(..common).and_then(|stem| stem.rfind('-').map(|at| &stem[..=at]));
    format!("{}*", stem.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::common_name;

    #[test]
    fn common_name_ends_at_a_dash() {
        for (names, name) in [
            (&["web-0"][..], "web-0"),
            (&["web-0", "web-1"], "web-*"),
            (&["web-a-1x", "web-a-2y"], "web-a-*"),
            (&["web-10", "web-11"], "web-*"),
            (&["a", "b"], "*"),
        ] {
            assert_eq!(common_name(names.iter().copied()), name);
        }
    }
}
