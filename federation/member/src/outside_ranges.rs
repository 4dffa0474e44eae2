//! Pods whose addresses are not in the pod ranges of their nodes, because the network plugin allocates addresses itself. Such a pod is not
//! closed before its rules arrive.

use std::collections::BTreeMap;
use std::sync::Arc;

use hanse_api::assemble::{Changed, ClusterState};
use hanse_policy::inventory::{Endpoint, EndpointId};
use hanse_protocol::reason::Reason;

/// One such pod of each node.
#[derive(Debug, Default)]
pub struct OutsideRanges {
    examples: BTreeMap<Arc<str>, EndpointId>,
}

impl OutsideRanges {
    /// Looks at what has changed. Looks at all pods if a node, or the pod that is known of a node, has changed.
    pub fn update(&mut self, state: &ClusterState, changed: &Changed) {
        let is_outside = |id: &EndpointId, node: &Arc<str>| {
            let pod = state.cluster.endpoints.get(id).filter(|it| it.node.as_ref() == Some(node));
            pod.is_some_and(|pod| outside(state, pod).is_some())
        };
        let has_ended = self.examples.iter().any(|(node, id)| changed.endpoints.contains(id) && !is_outside(id, node));
        let all = has_ended || !changed.nodes.is_empty();
        if all {
            self.examples.clear();
        }
        let mut look_at = |(id, pod): (&EndpointId, &Endpoint)| {
            if let Some(node) = outside(state, pod).filter(|node| !self.examples.contains_key(*node)) {
                self.examples.insert(Arc::clone(node), id.clone());
            }
        };
        match all {
            true => state.cluster.endpoints.iter().for_each(&mut look_at),
            false => {
                let pods = changed.endpoints.iter().filter_map(|id| state.cluster.endpoints.get_key_value(id));
                pods.for_each(&mut look_at);
            }
        }
    }

    pub fn problem(&self) -> Option<Reason> {
        let (node, pod) = self.examples.first_key_value()?;
        let pod = format!("{}/{}", pod.namespace.as_deref().unwrap_or_default(), pod.name);
        let nodes = u64::try_from(self.examples.len()).unwrap_or(u64::MAX);
        Some(Reason::PodsOutsideRanges { nodes, node: node.to_string(), pod })
    }
}

/// The node of a pod with an address outside of the node's ranges.
fn outside<'a>(state: &ClusterState, pod: &'a Endpoint) -> Option<&'a Arc<str>> {
    let node = pod.node.as_ref()?;
    let ranges = &state.nodes.get(node)?.pod_ranges;
    let is_inside = |address| ranges.iter().any(|range| range.contains(address));
    (!pod.addresses.iter().all(is_inside)).then_some(node)
}

#[cfg(test)]
mod tests {
    use hanse_api::inventory::NodeInfo;
    use hanse_policy::inventory::EndpointKind;

    use super::*;

    #[test]
    fn pods_outside_of_the_ranges_of_their_node_are_reported() {
        let mut state = ClusterState::default();
        let mut found = OutsideRanges::default();
        let id = |name: &str| EndpointId { kind: EndpointKind::Pod, namespace: Some("a".into()), name: name.into() };
        let node = |ranges: &[&str]| NodeInfo {
            pod_ranges: ranges.iter().map(|it| it.parse().expect("a range")).collect(),
            ..NodeInfo::default()
        };
        let pod = |node: &str, addresses: &[&str]| Endpoint {
            node: Some(node.into()),
            addresses: addresses.iter().map(|it| it.parse().expect("an address")).collect(),
            ..Endpoint::default()
        };
        let of = |nodes: &[&str], pods: &[&str]| Changed {
            nodes: nodes.iter().map(|it| (*it).into()).collect(),
            endpoints: pods.iter().map(|it| id(it)).collect(),
            ..Changed::default()
        };
        let reported = |nodes, node: &str, pod: &str| {
            Some(Reason::PodsOutsideRanges { nodes, node: node.to_owned(), pod: pod.to_owned() })
        };
        state.nodes.insert("m".into(), node(&["10.0.0.0/24", "fd00::/64"]));
        state.nodes.insert("n".into(), node(&["10.0.1.0/24"]));
        state.cluster.endpoints.insert(id("inside"), pod("m", &["10.0.0.1", "fd00::1"]));
        state.cluster.endpoints.insert(id("starting"), pod("m", &[]));
        state.cluster.endpoints.insert(id("elsewhere"), pod("unknown", &["192.0.2.1"]));
        found.update(&state, &of(&["m", "n"], &["inside", "starting", "elsewhere"]));
        assert_eq!(found.problem(), None);

        state.cluster.endpoints.insert(id("one"), pod("m", &["10.0.0.2", "fd01::1"]));
        found.update(&state, &of(&[], &["one"]));
        assert_eq!(found.problem(), reported(1, "m", "a/one"));
        state.cluster.endpoints.insert(id("two"), pod("m", &["10.0.1.1"]));
        state.cluster.endpoints.insert(id("three"), pod("n", &["10.0.0.3"]));
        found.update(&state, &of(&[], &["two", "three"]));
        assert_eq!(found.problem(), reported(2, "m", "a/one"));
        state.cluster.endpoints.remove(&id("one"));
        found.update(&state, &of(&[], &["one"]));
        assert_eq!(found.problem(), reported(2, "m", "a/two"), "others are looked for");

        state.nodes.insert("m".into(), node(&["10.0.0.0/23"]));
        state.cluster.endpoints.remove(&id("inside"));
        found.update(&state, &of(&["m"], &["inside"]));
        assert_eq!(found.problem(), reported(1, "n", "a/three"));
        state.cluster.endpoints.insert(id("three"), pod("m", &["10.0.0.3"]));
        found.update(&state, &of(&[], &["three"]));
        assert_eq!(found.problem(), None);
        state.nodes.insert("m".into(), node(&[]));
        found.update(&state, &of(&["m"], &[]));
        assert_eq!(found.problem(), reported(1, "m", "a/three"), "a node without ranges");
    }
}
