//! Edits of a cluster's parts have the same result as a start from them, and are reported without a gap or a surplus.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::path::Path;
use std::sync::Arc;

use hanse_api::assemble::{Assembly, Candidates, Changed, ClusterState, ObjectKey, Position};
use hanse_api::{Diagnostic, Manifest, Manifests, read_bytes};
use proptest::prelude::*;

/// Few names, nodes and addresses, so that objects meet: under one key, at one address, on one node.
fn object() -> impl Strategy<Value = String> {
    let name = prop::sample::select(vec!["a", "b", "c"]);
    let place = (name.clone(), prop::sample::select(vec!["x", "z"]));
    let meta = |(name, namespace): &(&str, &str)| format!("metadata: {{name: {name}, namespace: {namespace}");
    let pod = (
        place.clone(),
        prop::sample::select(vec!["n1", "n2"]),
        0..4_u8,
        prop::sample::select(vec!["", ", creationTimestamp: '2026-01-01T00:00:00Z'", ", creationTimestamp: '2026-02-02T00:00:00Z'"]),
        prop::sample::select(vec!["Running", "Running", "Running", "Failed"]),
        prop::sample::select(vec!["", "", ", hostNetwork: true"]),
    )
        .prop_map(move |(place, node, address, created, phase, host)| {
            let reported = if address == 0 { String::new() } else { format!(", podIPs: [{{ip: 10.0.0.{address}}}, {{ip: 10.0.1.1}}]") };
            format!(
                "apiVersion: v1\nkind: Pod\n{}{created}, labels: {{app: a{address}}}}}\nspec: {{nodeName: {node}{host}}}\nstatus: {{phase: {phase}{reported}}}\n",
                meta(&place)
            )
        });
    let node = (prop::sample::select(vec!["n1", "n2"]), 1..3_u8, any::<bool>()).prop_map(|(name, address, gpu)| {
        format!("apiVersion: v1\nkind: Node\nmetadata: {{name: {name}, labels: {{gpu: '{gpu}'}}}}\nstatus: {{addresses: [{{type: InternalIP, address: 192.0.2.{address}}}]}}\n")
    });
    let namespace = (prop::sample::select(vec!["x", "z"]), 0..2_u8).prop_map(|(name, team)| {
        format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}, labels: {{team: t{team}}}}}\n")
    });
    let account = (place.clone(), 0..2_u8).prop_map(move |(place, team)| {
        format!("apiVersion: v1\nkind: ServiceAccount\n{}, labels: {{team: t{team}}}}}\n", meta(&place))
    });
    let service = (place.clone(), 1..3_u8).prop_map(move |(place, address)| {
        format!("apiVersion: v1\nkind: Service\n{}}}\nspec: {{clusterIP: 10.96.0.{address}}}\n", meta(&place))
    });
    let slice = (place.clone(), name.clone(), 1..4_u8).prop_map(move |(place, of, address)| {
        format!(
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n{}, labels: {{kubernetes.io/service-name: {of}}}}}\naddressType: IPv4\nendpoints: [{{addresses: [10.0.0.{address}]}}]\nports: [{{port: 80}}]\n",
            meta(&place)
        )
    });
    let policy = (place.clone(), 1..3_u8).prop_map(move |(place, app)| {
        format!("apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\n{}}}\nspec: {{podSelector: {{matchLabels: {{app: a{app}}}}}}}\n", meta(&place))
    });
    let cluster_policy = (name.clone(), 1..3_u8).prop_map(|(name, priority)| {
        format!(
            "apiVersion: policy.networking.k8s.io/v1alpha2\nkind: ClusterNetworkPolicy\nmetadata: {{name: {name}}}\nspec: {{tier: Admin, priority: {priority}, subject: {{namespaces: {{}}}}, egress: [{{action: Deny, to: [{{nodes: {{matchLabels: {{gpu: 'true'}}}}}}]}}]}}\n"
        )
    });
    let calico = (place, 1..3_u8, 0..4_u8, prop::sample::select(vec!["projectcalico.org/v3", "crd.projectcalico.org/v1"])).prop_map(
        move |((name, namespace), number, kind, version)| {
            // One that does not belong there does not make it another object.
            let global = if number == 1 { format!(", namespace: {namespace}") } else { String::new() };
            match kind {
            0 => format!("apiVersion: {version}\nkind: Tier\nmetadata: {{name: {name}{global}}}\nspec: {{order: {number}}}\n"),
            1 => format!("apiVersion: {version}\nkind: GlobalNetworkSet\nmetadata: {{name: {name}{global}}}\nspec: {{nets: [10.{number}.0.0/16]}}\n"),
            2 => format!("apiVersion: {version}\nkind: NetworkSet\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec: {{nets: [10.{number}.0.0/16]}}\n"),
            _ => format!("apiVersion: {version}\nkind: GlobalNetworkPolicy\nmetadata: {{name: {name}{global}}}\nspec: {{order: {number}, selector: all()}}\n"),
            }
        },
    );
    let federated = name.prop_map(|name| {
        format!("apiVersion: hanse.dev/v1alpha1\nkind: Tier\nmetadata: {{name: {name}}}\nspec: {{order: 1}}\n")
    });
    prop_oneof![
        8 => pod, 2 => node, 2 => namespace, 1 => account, 2 => service, 2 => slice, 2 => policy, 1 => cluster_policy,
        2 => calico, 1 => federated,
    ]
}

/// Objects for some of three parts; what is under each number goes together.
fn edits() -> impl Strategy<Value = Vec<Vec<(u8, Vec<String>)>>> {
    let part = (0..3_u8, prop::collection::vec(object(), 0..6));
    prop::collection::vec(prop::collection::vec(part, 1..3), 1..10)
}

static NOTHING: Vec<String> = Vec::new();

fn part(number: u8) -> Arc<Path> {
    Path::new(&format!("{number}.yaml")).into()
}

fn objects(part: &Path, texts: &[String]) -> Vec<Manifest> {
    let mut read = Manifests::default();
    read_bytes(&part.to_string_lossy().into(), texts.join("---\n").as_bytes(), &mut read);
    assert_eq!(read.diagnostics, [], "{texts:?}");
    read.objects
}

/// The keys under which two maps differ.
fn differing<K: Ord + Clone, V: PartialEq>(before: &BTreeMap<K, V>, now: &BTreeMap<K, V>) -> BTreeSet<K> {
    before.keys().chain(now.keys()).filter(|key| before.get(key) != now.get(key)).cloned().collect()
}

fn difference(before: &ClusterState, now: &ClusterState) -> Changed {
    Changed {
        namespaces: differing(&before.cluster.namespaces, &now.cluster.namespaces),
        service_accounts: differing(&before.cluster.service_accounts, &now.cluster.service_accounts),
        endpoints: differing(&before.cluster.endpoints, &now.cluster.endpoints),
        services: differing(&before.cluster.services, &now.cluster.services),
        nodes: differing(&before.nodes, &now.nodes),
        tiers: differing(&before.layer.tiers, &now.layer.tiers),
        policies: differing(&before.layer.policies, &now.layer.policies),
        service_addresses: before.service_addresses != now.service_addresses,
    }
}

/// Parts, such as files, that are replaced as a whole.
#[derive(Default)]
struct Parts {
    candidates: Candidates,
    assembly: Option<Assembly>,
    keys: BTreeMap<u8, Vec<Arc<ObjectKey>>>,
}

impl Parts {
    fn assembly(&mut self) -> &mut Assembly {
        self.assembly.get_or_insert_with(|| Assembly::new("c".into()))
    }

    fn state(&mut self) -> Arc<ClusterState> {
        Arc::clone(self.assembly().state())
    }

    fn update<'t>(&mut self, parts: impl IntoIterator<Item = (&'t u8, &'t Vec<String>)>) -> Changed {
        for (number, texts) in parts {
            let position = |index| Position { origin: part(*number), index };
            for (index, key) in (0..).zip(self.keys.remove(number).unwrap_or_default()) {
                self.candidates.remove(&position(index), &key);
            }
            let objects = (0..).zip(objects(&part(*number), texts));
            let keys = objects.map(|(index, object)| self.candidates.put(position(index), object)).collect();
            self.keys.insert(*number, keys);
        }
        let changes = self.candidates.take_changes();
        self.assembly().update(changes)
    }

    fn diagnostics(&self) -> Vec<Diagnostic> {
        self.candidates.diagnostics().cloned().collect()
    }
}

fn check(edits: &[Vec<(u8, Vec<String>)>]) -> Result<(), TestCaseError> {
    fn same<T: PartialEq + Debug>(found: &T, wanted: &T) -> Result<(), TestCaseError> {
        prop_assert_eq!(found, wanted);
        Ok(())
    }
    let mut edited = Parts::default();
    let mut parts: BTreeMap<u8, Vec<String>> = BTreeMap::new();
    for edit in edits {
        let before = edited.state();
        let changed = edited.update(edit.iter().map(|(number, texts)| (number, texts)));
        parts.extend(edit.iter().cloned());
        let mut fresh = Parts::default();
        // In another order than that of their names.
        fresh.update(parts.iter().rev());
        let state = edited.state();
        same(&state, &fresh.state())?;
        same(&edited.diagnostics(), &fresh.diagnostics())?;
        same(&changed, &difference(&before, &state))?;
        for (id, endpoint) in &state.cluster.endpoints {
            for address in &endpoint.addresses {
                same(&edited.assembly().owner(*address), &Some(id))?;
            }
        }
    }
    edited.update(parts.keys().map(|number| (number, &NOTHING)));
    same(&edited.diagnostics(), &Vec::new())?;
    same(&*edited.state(), &ClusterState::default())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]
    #[test]
    fn an_edit_comes_to_the_same_as_a_start_from_it(edits in edits()) {
        check(&edits)?;
    }
}
