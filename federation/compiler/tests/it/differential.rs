//! Rule sets say what the reference evaluator says.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use hanse_policy::evaluate::{End, Query, Step, Verdict, View, evaluate};
use hanse_policy::inventory::{EndpointKind, Inventory, LabelGrant};
use hanse_policy::model::{Action, ClusterName, EntityMatch, PolicyKind, PolicySet, Port};
use hanse_ruleset::{Hook, Packet, RuleSet};

use crate::shared::{NODE_ADDRESS, compile, place_pods, rule_sets};
use crate::worlds::{Random, World, query, world};

const WORLDS: u64 = 400;
const QUERIES: usize = 60;

type Counts = BTreeMap<String, usize>;

fn seed() -> u64 {
    std::env::var("HANSE_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(20_261_124)
}

/// The seeds of worlds are the run's seed and what follows it.
#[test]
fn rule_sets_agree_with_the_reference() {
    let seed = seed();
    println!("seed {seed} (HANSE_SEED sets another)");
    let (mut verdicts, mut steps, mut clauses, mut ends) =
        (Counts::new(), Counts::new(), CLAUSES.map(|name| (name.to_owned(), 0)).into(), Counts::new());
    for seed in seed..seed + WORLDS {
        let mut random = Random(seed);
        let mut world = world(&mut random);
        place_pods(&mut world);
        contest(&mut random, &mut world);
        count_clauses(&world, &mut clauses);
        let compiled: Vec<(ClusterName, Arc<str>, RuleSet)> = world
            .inventory
            .clusters
            .keys()
            .flat_map(|name| {
                rule_sets(&mut compile(&world, name)).into_iter().map(|(node, it)| (name.clone(), node, it))
            })
            .collect();
        for _ in 0..QUERIES {
            let query = query(&mut random, &world.inventory);
            count_ends(&world.inventory, &query, &mut ends);
            let mut verdict = Verdict::Allow;
            for (cluster, node, rules) in &compiled {
                // Each cluster by what it takes the ends for.
                let seen = Query {
                    source: seen(&world.inventory, cluster, query.source.address),
                    destination: seen(&world.inventory, cluster, query.destination.address),
                    ..query.clone()
                };
                let reference = evaluate(&world.policies, &world.inventory, &seen, View::Enforced);
                let judged = [(&seen.source, &reference.egress), (&seen.destination, &reference.ingress)];
                let mut wanted = Verdict::Allow;
                for (end, judgement) in judged {
                    let here = is_at(&world.inventory, end, cluster, node);
                    for judgement in judgement.iter().filter(|_| here) {
                        judgement.trace.iter().for_each(|step| *steps.entry(name_of(step)).or_default() += 1);
                        if judgement.verdict == Verdict::Deny {
                            (wanted, verdict) = (Verdict::Deny, Verdict::Deny);
                        }
                    }
                }
                let found = hanse_ruleset::evaluate(rules, &packet(&seen), Hook::Forward);
                let same = (found.verdict == hanse_ruleset::Verdict::Deny) == (wanted == Verdict::Deny);
                let found = found.trace;
                assert!(same, "seed {seed}, {cluster}/{node}: {seen:?}\nreference {reference:#?}\nrules {found:#?}");
            }
            *verdicts.entry(format!("{verdict:?}")).or_default() += 1;
        }
    }
    println!("verdicts {verdicts:?}\nends {ends:#?}\nsteps {steps:#?}\nclauses {clauses:#?}");
    let all: usize = verdicts.values().sum();
    assert!(all >= 10_000);
    assert!(verdicts.len() == 2 && verdicts.values().all(|count| count * 10 >= all * 3), "unbalanced: {verdicts:?}");
    let never: Vec<&str> = clauses.iter().filter(|(_, count)| **count == 0).map(|(name, _)| name.as_str()).collect();
    assert!(never.is_empty(), "never occurred: {never:?}");
    assert_eq!(ends.len(), ENDS, "{ends:?}");
}

/// A pod's egress to its own node is judged without Kubernetes' NetworkPolicy, which never denies it.
#[test]
fn egress_to_the_own_node_is_not_for_network_policy() {
    let seed = seed();
    let mut told_apart = 0;
    let mut verdicts = Counts::new();
    for seed in seed..seed + WORLDS / 4 {
        let mut random = Random(seed);
        let mut world = world(&mut random);
        place_pods(&mut world);
        let mut without = world.policies.clone();
        for layer in without.clusters.values_mut() {
            layer.policies.retain(|id, _| id.kind != PolicyKind::KubernetesNetworkPolicy);
        }
        for cluster in world.inventory.clusters.keys() {
            for (_, rules) in rule_sets(&mut compile(&world, cluster)) {
                for _ in 0..QUERIES / 6 {
                    let mut query = query(&mut random, &world.inventory);
                    query.destination = End { address: NODE_ADDRESS.parse().unwrap(), pod: None };
                    query.source = seen(&world.inventory, cluster, query.source.address);
                    let ours = rules.endpoints.values().any(|it| it.addresses.contains(&query.source.address));
                    if !ours || query.source.address.is_ipv6() {
                        continue;
                    }
                    let wanted = evaluate(&without, &world.inventory, &query, View::Enforced);
                    let with = evaluate(&world.policies, &world.inventory, &query, View::Enforced);
                    told_apart += usize::from(wanted.verdict != with.verdict);
                    let found = hanse_ruleset::evaluate(&rules, &packet(&query), Hook::Input);
                    let (want, have) = (format!("{:?}", wanted.verdict), format!("{:?}", found.verdict));
                    assert_eq!(have, want, "seed {seed}, {cluster}: {query:?}\n{wanted:#?}\n{:#?}", found.trace);
                    *verdicts.entry(want).or_default() += 1;
                }
            }
        }
    }
    println!("verdicts {verdicts:?}, NetworkPolicy alone would deny {told_apart}");
    assert!(verdicts.len() == 2 && told_apart > 0);
}

fn packet(query: &Query) -> Packet {
    Packet {
        source: query.source.address,
        destination: query.destination.address,
        protocol: query.protocol,
        source_port: query.source_port,
        destination_port: query.destination_port,
        icmp: query.icmp,
    }
}

/// Two pods of different clusters claim one address, now and then; and a pod on the host's network may claim its node's,
/// in vain.
fn contest(random: &mut Random, world: &mut World) {
    for endpoint in world.inventory.clusters.values_mut().flat_map(|it| it.endpoints.values_mut()) {
        if endpoint.host_network && random.once_in(2) {
            endpoint.addresses = endpoint.host_addresses.clone();
        }
    }
    for (from, to) in [("prod", "serve"), ("train", "serve"), ("train", "prod")] {
        let first = |cluster: &str| {
            let pods = world.inventory.clusters[cluster].endpoints.iter();
            pods.filter(|(_, it)| !it.addresses.is_empty() && !it.host_network)
                .map(|(id, it)| (id.clone(), it.addresses.clone()))
                .next()
        };
        if random.once_in(5)
            && let (Some((_, claimed)), Some((id, _))) = (first(from), first(to))
            && let Some(claimant) = world.inventory.clusters.get_mut(to).and_then(|it| it.endpoints.get_mut(&id))
        {
            claimant.addresses.extend(claimed);
            claimant.addresses.sort();
            claimant.addresses.dedup();
        }
    }
}

/// Whom `cluster` takes for the holder of an address: its own pod, else the first by cluster and name.
fn seen(inventory: &Inventory, cluster: &ClusterName, address: IpAddr) -> End {
    let mut clusters: Vec<_> = inventory.clusters.iter().collect();
    clusters.sort_by_key(|(name, _)| *name != cluster);
    let all = clusters.into_iter().flat_map(|(name, it)| it.endpoints.iter().map(move |(id, it)| (name, id, it)));
    let mut holders = all.filter(|(.., it)| !it.host_network && it.addresses.contains(&address));
    End { address, pod: holders.next().map(|(name, id, _)| (name.clone(), id.clone())) }
}

fn is_at(inventory: &Inventory, end: &End, cluster: &ClusterName, node: &Arc<str>) -> bool {
    end.pod.as_ref().is_some_and(|(owner, id)| {
        owner == cluster && inventory.clusters[cluster].endpoints[id].node.as_ref() == Some(node)
    })
}

fn name_of(step: &Step) -> String {
    match step {
        Step::Rule { action, effect, .. } => format!("{action:?} {effect:?}"),
        Step::EndOfTier { action, .. } => format!("end of tier {action:?}"),
        Step::Profile => "profile".into(),
        Step::Itself => "itself".into(),
    }
}

/// How many kinds [`count_ends`] knows.
const ENDS: usize = 12;

fn count_ends(inventory: &Inventory, query: &Query, ends: &mut Counts) {
    let mut count = |name: &str| *ends.entry(name.to_owned()).or_default() += 1;
    count(if query.source.address.is_ipv4() { "IPv4" } else { "IPv6" });
    count(match query.protocol {
        6 => "TCP",
        17 => "UDP",
        132 => "SCTP",
        _ => "ICMP",
    });
    for end in [&query.source, &query.destination] {
        let claims = inventory.clusters.values().flat_map(|it| it.endpoints.values());
        let claims = claims.filter(|it| !it.host_network && it.addresses.contains(&end.address)).count();
        let on_host = inventory.clusters.values().flat_map(|it| it.endpoints.values());
        let on_host = on_host.filter(|it| it.host_addresses.contains(&end.address)).count() > 0;
        count(match (&end.pod, claims) {
            (_, 2..) => "contested",
            _ if on_host => "node",
            (Some((cluster, _)), _) if inventory.clusters[cluster].stale => "pod of a stale cluster",
            (Some((cluster, _)), _) if inventory.clusters[cluster].label_grant != LabelGrant::All => {
                "pod of a cluster with a label grant"
            }
            (Some(_), _) => "pod",
            (None, _) => "nobody",
        });
    }
}

const CLAUSES: [&str; 32] = [
    "Allow",
    "Deny",
    "Pass",
    "Log",
    "federated",
    "federatedAllow: Final",
    "Kubernetes",
    "staged",
    "staged federated",
    "host only",
    "enforced elsewhere",
    "missing tier",
    "network set",
    "federated network set",
    "host network",
    "ipVersion",
    "protocol",
    "notProtocol",
    "icmp",
    "notICMP",
    "http",
    "not understood",
    "nets",
    "notNets",
    "selector",
    "notSelector",
    "ports",
    "notPorts",
    "named port",
    "named port beside a selector",
    "named port without a protocol",
    "service",
];

fn count_clauses(world: &World, clauses: &mut Counts) {
    let mut count = |name: &str, has: bool| {
        *clauses.get_mut(name).unwrap_or_else(|| panic!("{name} is in the list")) += usize::from(has);
    };
    for cluster in world.inventory.clusters.values() {
        count("federatedAllow: Final", cluster.federated_allow_final);
        cluster.endpoints.iter().for_each(|(id, it)| {
            count("host network", it.host_network);
            count("network set", id.kind == EndpointKind::NetworkSet);
        });
    }
    count("federated network set", !world.inventory.federated_sets.is_empty());
    let PolicySet { federation, clusters } = &world.policies;
    for (owner, layer) in [(None, federation)].into_iter().chain(clusters.iter().map(|(name, it)| (Some(name), it))) {
        for policy in layer.policies.values() {
            count("staged", policy.staged.is_some());
            count("staged federated", policy.id.kind == PolicyKind::StagedFederatedNetworkPolicy);
            count("host only", policy.host_only);
            if !policy.acts() {
                continue;
            }
            count("federated", owner.is_none());
            count("Kubernetes", policy.id.kind == PolicyKind::KubernetesNetworkPolicy);
            let absent = world.inventory.clusters.keys().any(|cluster| !policy.enforcers.contains(cluster, cluster));
            count("enforced elsewhere", absent);
            count("missing tier", layer.tier(&policy.tier).0.missing);
            for rule in [&policy.ingress, &policy.egress].into_iter().flatten().flatten() {
                count(
                    match rule.action {
                        Action::Allow => "Allow",
                        Action::Deny => "Deny",
                        Action::Pass => "Pass",
                        Action::Log => "Log",
                    },
                    true,
                );
                count("ipVersion", rule.ip_version.is_some());
                count("protocol", rule.protocol.is_some());
                count("notProtocol", rule.not_protocol.is_some());
                count("icmp", rule.icmp.is_some());
                count("notICMP", rule.not_icmp.is_some());
                count("http", rule.http.is_some());
                count("not understood", rule.not_understood.is_some());
                let mut either = |name, has: &dyn Fn(&EntityMatch) -> bool| {
                    count(name, [&rule.source, &rule.destination].into_iter().any(has));
                };
                either("nets", &|it| !it.nets.is_empty());
                either("notNets", &|it| !it.not_nets.is_empty());
                either("selector", &|it| it.selection.is_some());
                either("notSelector", &|it| it.not_selection.is_some());
                either("ports", &|it| !it.ports.is_empty());
                either("notPorts", &|it| !it.not_ports.is_empty());
                let is_named = |port: &Port| matches!(port, Port::Named(_));
                let names = |it: &EntityMatch| it.ports.iter().chain(&it.not_ports).any(is_named);
                either("named port", &names);
                either("named port beside a selector", &|it| names(it) && it.selection.is_some());
                either("named port without a protocol", &|it| names(it) && rule.protocol.is_none());
                either("service", &|it| it.service.is_some());
            }
        }
    }
}
