//! A member's rule sets say what `hanse policy explain` says offline of the same manifests, network sets included: random
//! federations, each cluster's world fed with what a hub sends of the others, against the reference over all directories.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use hanse_api::assemble::{Candidates, ClusterState, assemble_cluster, assemble_federation};
use hanse_api::clusters::{ClusterLabels, select_clusters};
use hanse_api::hanse::Member;
use hanse_api::manifest::{Manifest as Written, Manifests, read_bytes};
use hanse_api::object::Object;
use hanse_policy::evaluate::{End, Judgement, Query, Verdict, View, evaluate};
use hanse_policy::inventory::{EndpointKind, Inventory};
use hanse_policy::model::{ClusterName, PolicySet};
use hanse_policy::selector::Selector;
use hanse_ruleset::{Hook, Packet, UnknownPods};
use serde_json::{Value, json};

use super::World;
use crate::exchange::model::{Change, ClusterRecord, Lease, Manifest, ManifestKind, Position, Updates};
use crate::own_streams::Ends;
use crate::source::Changes;

const WORLDS: u64 = 150;
const PACKETS: usize = 60;
const CLUSTERS: [&str; 3] = ["east", "north", "west"];
/// Of no pod.
const OUTSIDE: [&str; 4] = ["192.0.2.1", "192.0.2.200", "198.51.100.7", "203.0.113.9"];
const NETS: [&str; 5] = ["192.0.2.0/25", "192.0.2.0/24", "198.51.100.0/24", "10.0.0.0/8", "10.1.0.0/30"];
const SELECTORS: [&str; 8] = [
    "k == 'v'",
    "k != 'v'",
    "has(k)",
    "!has(k)",
    "all()",
    "k == 'v' || app == 'a'",
    "pcns.team == 'red'",
    "app in {'a', 'b'}",
];

/// SplitMix64: its whole state is its seed.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % bound as u64) as usize
    }

    fn once_in(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }

    fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())].clone()
    }
}

fn labels(random: &mut Random) -> Value {
    let mut labels = serde_json::Map::new();
    for (key, values) in [("k", ["v", "w"]), ("app", ["a", "b"]), ("pcns.team", ["red", "blue"])] {
        if random.once_in(2) {
            labels.insert(key.to_owned(), json!(random.pick(&values)));
        }
    }
    Value::Object(labels)
}

/// The objects of a cluster.
fn cluster(random: &mut Random, at: usize) -> Vec<Value> {
    let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n"}, "spec": {"podCIDR": format!("10.{at}.0.0/24")}});
    let mut objects = vec![node];
    for (name, team) in [("web", "red"), ("jobs", "blue")] {
        let labels = json!({"team": team, "kubernetes.io/metadata.name": name});
        objects.push(json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}));
    }
    for pod in 1..4 {
        objects.push(json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": format!("p{pod}"), "namespace": random.pick(&["web", "jobs"]), "labels": labels(random)},
            "spec": {"nodeName": "n"},
            "status": {"phase": "Running", "podIP": format!("10.{at}.0.{pod}")},
        }));
    }
    for set in 0..random.below(3) {
        let (kind, namespace) = random.pick(&[("GlobalNetworkSet", None), ("NetworkSet", Some("web"))]);
        objects.push(json!({
            "apiVersion": "projectcalico.org/v3", "kind": kind,
            "metadata": {"name": format!("s{set}"), "namespace": namespace, "labels": labels(random)},
            "spec": {"nets": [random.pick(&NETS)]},
        }));
    }
    if random.once_in(2) {
        let slice = json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": "front-1", "namespace": "web", "labels": {"kubernetes.io/service-name": "front"}},
            "endpoints": [{"addresses": [format!("10.{at}.0.1")]}], "ports": [{"port": 80, "protocol": "TCP"}],
        });
        objects.push(slice);
    }
    for policy in 0..random.below(3) {
        let annotations = if random.once_in(2) { json!({"hanse.dev/peers": "ClusterSet"}) } else { json!({}) };
        objects.push(match random.once_in(3) {
            true => json!({
                "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
                "metadata": {"name": format!("k{policy}"), "namespace": "web", "annotations": annotations},
                "spec": {"podSelector": {}, "ingress": [{"from": [{
                    "namespaceSelector": {},
                    "podSelector": {"matchLabels": random.pick(&[json!({"pcns.team": "red"}), json!({"k": "v"}), json!({})])},
                }]}]},
            }),
            false => json!({
                "apiVersion": "projectcalico.org/v3", "kind": "GlobalNetworkPolicy",
                "metadata": {"name": format!("g{policy}"), "annotations": annotations},
                "spec": {"order": policy, "types": ["Ingress", "Egress"], "ingress": rules(random, "source", false), "egress": rules(random, "destination", false)},
            }),
        });
    }
    objects
}

fn rules(random: &mut Random, peer: &str, federated: bool) -> Value {
    let rule = |random: &mut Random| {
        let mut end = json!({});
        match random.below(8) {
            0 if federated => end["services"] = json!({"name": "front", "namespace": "web"}),
            0 => {}
            1 => end["nets"] = json!([random.pick(&NETS)]),
            2 => end["notSelector"] = json!(random.pick(&SELECTORS)),
            3 => {
                end["selector"] = json!(random.pick(&SELECTORS));
                end["notSelector"] = json!(random.pick(&SELECTORS));
            }
            4 => end["namespaceSelector"] = json!(random.pick(&["all()", "global()", "team == 'red'"])),
            _ => end["selector"] = json!(random.pick(&SELECTORS)),
        }
        if federated && end.get("services").is_none() && random.once_in(3) {
            end["clusterSelector"] = json!(random.pick(&["all()", "region == 'eu'", "hanse.dev/cluster == 'west'"]));
        }
        json!({"action": random.pick(&["Allow", "Allow", "Deny", "Pass"]), peer: end})
    };
    (0..1 + random.below(3)).map(|_| rule(random)).collect()
}

fn federation(random: &mut Random) -> Vec<Value> {
    let object = |kind: &str, name: &str, labels: Value, spec: Value| {
        let metadata = json!({"name": name, "labels": labels});
        json!({"apiVersion": "hanse.dev/v1alpha1", "kind": kind, "metadata": metadata, "spec": spec})
    };
    let mut objects = Vec::new();
    for name in CLUSTERS {
        let spec = json!({"labels": {"region": random.pick(&["eu", "us"])}});
        objects.push(object("MemberCluster", name, json!({}), spec));
    }
    for (name, phase) in [("guard", "Guard"), ("base", "Baseline")] {
        let default = random.pick(&["Deny", "Pass"]);
        objects.push(object("Tier", name, json!({}), json!({"phase": phase, "order": 1, "defaultAction": default})));
    }
    for set in 0..random.below(3) {
        objects.push(object(
            "FederatedNetworkSet",
            &format!("f{set}"),
            labels(random),
            json!({"nets": [random.pick(&NETS)]}),
        ));
    }
    for policy in 0..1 + random.below(4) {
        let spec = json!({
            "tier": random.pick(&["guard", "base", "base", "ghost"]),
            "order": policy,
            "clusterSelector": random.pick(&["", "all()", "region == 'eu'"]),
            "selector": random.pick(&["", "app == 'a'", "!has(app)"]),
            "types": ["Ingress", "Egress"],
            "ingress": rules(random, "source", true),
            "egress": rules(random, "destination", true),
        });
        objects.push(object("FederatedNetworkPolicy", &format!("p{policy}"), json!({}), spec.clone()));
        if random.below(2) == 0 {
            let mut staged = spec;
            staged["clusterSelector"] = json!(random.pick(&["", "region == 'eu'", "!has(region)"]));
            staged["ingress"] = rules(random, "source", true);
            staged["stagedAction"] = json!(random.pick(&["Set", "Set", "Delete", "Learn"]));
            // Also of policies that do not exist.
            let name = format!("p{}", if random.once_in(4) { policy + 10 } else { policy });
            objects.push(object("StagedFederatedNetworkPolicy", &name, json!({}), staged));
        }
    }
    objects
}

fn read(objects: &[Value]) -> Vec<Written> {
    let mut read = Manifests::default();
    for object in objects {
        read_bytes(&"manifests".into(), object.to_string().as_bytes(), &mut read);
    }
    assert!(read.diagnostics.is_empty(), "{:?}", read.diagnostics);
    read.objects
}

/// What a hub sends to `enforcer` of these objects, as the receiver hands it on: no policy without a tier is among it.
fn sent(
    enforcer: &str,
    objects: &[(Value, Written)],
    members: &BTreeMap<ClusterName, Member>,
    clusters: &BTreeMap<ClusterName, ClusterState>,
) -> Vec<Change> {
    let labels: ClusterLabels = members.iter().map(|(name, member)| (name.clone(), member.labels.clone())).collect();
    let is_tier = |name: &str| {
        objects.iter().any(|(_, it)| matches!(&it.object, Object::FederatedTier(_)) && it.reference.name == name)
    };
    let mut changes = Vec::new();
    for (json, written) in objects {
        let (kind, selectors, own) = match &written.object {
            Object::FederatedPolicy(policy) if is_tier(policy.tier()) => {
                let selectors: Vec<String> = policy.cluster_selectors().map(|it| it.text.to_string()).collect();
                let own = json["spec"]["clusterSelector"].as_str().unwrap_or_default().to_owned();
                (if policy.is_staged() { ManifestKind::StagedPolicy } else { ManifestKind::Policy }, selectors, own)
            }
            Object::FederatedTier(_) => (ManifestKind::Tier, Vec::new(), String::new()),
            Object::FederatedNetworkSet(..) => (ManifestKind::NetworkSet, Vec::new(), String::new()),
            _ => continue,
        };
        let select = |text: &str| select_clusters(&Selector::parse(text).expect("a selector"), &labels);
        let manifest = Manifest {
            json: json.to_string().into(),
            enforcers: select(&own),
            resolved: selectors.iter().map(|text| (Arc::from(text.as_str()), select(text))).collect(),
            features: Vec::new(),
        };
        // A staged policy is also sent to the clusters that enforce the policy which it would replace.
        let replaces = objects.iter().any(|(_, other)| match &other.object {
            Object::FederatedPolicy(policy) => {
                kind == ManifestKind::StagedPolicy
                    && !policy.is_staged()
                    && other.reference.name == written.reference.name
                    && is_tier(policy.tier())
                    && policy.enforcers(&labels).contains(enforcer)
            }
            _ => false,
        });
        if !kind.is_policy() || replaces || manifest.enforcers.contains(enforcer) {
            let name = written.reference.name.as_str().into();
            changes.push(Change::Manifest { kind, name, manifest: Some(manifest) });
        }
    }
    for (name, state) in clusters.iter().filter(|(name, _)| &***name != enforcer) {
        let cluster = name.clone();
        let record = ClusterRecord {
            labels: members[name].labels.clone(),
            label_grant: members[name].grants.label_grant(),
            cidrs: Vec::new(),
            lease: Lease::Live,
            federated_allow_final: false,
        };
        changes.push(Change::Cluster { name: cluster.clone(), record: Some(record) });
        for (name, namespace) in &state.cluster.namespaces {
            let labels = Some(namespace.labels.clone());
            changes.push(Change::Namespace { cluster: cluster.clone(), name: name.clone(), labels });
        }
        // Members publish pods.
        for (id, endpoint) in state.cluster.endpoints.iter().filter(|(id, _)| id.kind == EndpointKind::Pod) {
            changes.push(Change::Endpoint {
                cluster: cluster.clone(),
                id: id.clone(),
                endpoint: Some(endpoint.clone()),
            });
        }
    }
    changes
}

fn owner(inventory: &Inventory, address: IpAddr) -> End {
    let all = inventory.clusters.iter().flat_map(|(name, it)| it.endpoints.iter().map(move |(id, it)| (name, id, it)));
    let mut owners = all.filter(|(.., it)| it.addresses.contains(&address));
    End { address, pod: owners.next().map(|(name, id, _)| (name.clone(), id.clone())) }
}

#[test]
fn a_member_enforces_what_offline_explain_says() {
    let mut seen: BTreeMap<&str, usize> = BTreeMap::new();
    for seed in 0..WORLDS {
        let mut random = Random(seed);
        let written: BTreeMap<ClusterName, Vec<Value>> =
            CLUSTERS.iter().enumerate().map(|(at, name)| ((*name).into(), cluster(&mut random, at))).collect();
        let federated = federation(&mut random);
        let clusters: BTreeMap<ClusterName, ClusterState> =
            written.iter().map(|(name, objects)| (name.clone(), assemble_cluster(name, read(objects)))).collect();
        let objects: Vec<(Value, Written)> = federated.iter().cloned().zip(read(&federated)).collect();
        let offline = assemble_federation(objects.iter().map(|(_, it)| it), clusters.keys().cloned());
        let (mut inventory, mut policies) = (Inventory::default(), PolicySet::default());
        for (name, state) in &clusters {
            let mut cluster = state.cluster.clone();
            cluster.labels = offline.members[name].labels.clone();
            inventory.clusters.insert(name.clone(), cluster);
            policies.clusters.insert(name.clone(), state.layer.clone());
        }
        inventory.federated_sets = offline.sets.clone();
        policies.federation = offline.layer.clone();
        let mut worlds: BTreeMap<&ClusterName, World> = BTreeMap::new();
        for (name, local) in &written {
            let mut world = World::new(name.clone(), UnknownPods::default(), Ends::default());
            let mut candidates = Candidates::default();
            candidates.replace_all(read(local));
            world.take_local(Changes { objects: candidates.take_changes(), problems: Vec::new(), revision: 1 });
            let changes = sent(name, &objects, &offline.members, &clusters);
            world.receive(Updates { changes, in_force: Position { epoch: 1, revision: 1 } });
            world.compile().expect("the state of the hub was received");
            worlds.insert(name, world);
        }
        let pods = (0..CLUSTERS.len()).flat_map(|at| (1..4).map(move |pod| format!("10.{at}.0.{pod}")));
        let addresses: Vec<String> = pods.chain(OUTSIDE.map(str::to_owned)).collect();
        for _ in 0..PACKETS {
            let mut end = || owner(&inventory, random.pick(&addresses).parse().expect("an address"));
            let (source, destination) = (end(), end());
            if source == destination {
                continue;
            }
            let query =
                Query { source, destination, protocol: 6, source_port: 40_000, destination_port: 80, icmp: None };
            let packet = Packet {
                source: query.source.address,
                destination: query.destination.address,
                protocol: 6,
                source_port: 40_000,
                destination_port: 80,
                icmp: None,
            };
            let wanted = evaluate(&policies, &inventory, &query, View::Enforced);
            let pending = evaluate(&policies, &inventory, &query, View::Pending);
            for (name, world) in &worlds {
                let is_here = |end: &End| end.pod.as_ref().is_some_and(|(owner, _)| owner == *name);
                let judged = [(&query.source, &wanted.egress), (&query.destination, &wanted.ingress)];
                let judged: Vec<_> =
                    judged.into_iter().filter(|(end, _)| is_here(end)).filter_map(|(_, it)| it.as_ref()).collect();
                if judged.is_empty() {
                    continue;
                }
                let live = world.live().read();
                let judge = live.judge();
                let ends = (judge.end(query.source.address), judge.end(query.destination.address));
                let found =
                    judge.evaluate(&Query { source: ends.0, destination: ends.1, ..query.clone() }, View::Pending);
                for (end, expected, found, now) in [
                    (&query.source, &pending.egress, &found.egress, &wanted.egress),
                    (&query.destination, &pending.ingress, &found.ingress, &wanted.ingress),
                ] {
                    if is_here(end) {
                        let verdict = |of: &Option<Judgement>| of.as_ref().map(|it| it.verdict);
                        assert_eq!(
                            verdict(found),
                            verdict(expected),
                            "seed {seed}, cluster {name}, staged: {query:?}\noffline {expected:#?}\nlive {found:#?}\n{}",
                            serde_json::to_string_pretty(&federated).expect("JSON"),
                        );
                        *seen.entry("staged verdict differs").or_default() +=
                            usize::from(verdict(found) != verdict(now));
                    }
                }
                let denied = judged.iter().any(|it| it.verdict == Verdict::Deny);
                let rules = &world.nodes()["n"].rules;
                let found = hanse_ruleset::evaluate(rules, &packet, Hook::Forward);
                assert_eq!(
                    found.verdict == hanse_ruleset::Verdict::Deny,
                    denied,
                    "seed {seed}, cluster {name}: {query:?}\noffline {judged:#?}\nlive {:#?}\n{}\n{}",
                    found.trace,
                    serde_json::to_string_pretty(&written).expect("JSON"),
                    serde_json::to_string_pretty(&federated).expect("JSON"),
                );
                *seen.entry(if denied { "denied" } else { "allowed" }).or_default() += 1;
            }
        }
        let sets: BTreeSet<bool> = inventory
            .clusters
            .values()
            .map(|it| it.endpoints.keys().any(|id| id.kind == EndpointKind::NetworkSet))
            .collect();
        *seen.entry("worlds with sets in some clusters only").or_default() += usize::from(sets.len() == 2);
        *seen.entry("worlds with a policy without a tier").or_default() += usize::from(!offline.diagnostics.is_empty());
    }
    assert!(seen["denied"] > 1_000 && seen["allowed"] > 1_000 && seen.len() == 5, "{seen:?}");
    assert!(seen["staged verdict differs"] > 200, "{seen:?}");
}
