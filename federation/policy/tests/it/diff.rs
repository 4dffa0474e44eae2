//! A diff contains exactly the packets whose verdict changes, compared with the reference evaluator over all pairs.

use std::convert::Infallible;
use std::net::IpAddr;

use hanse_policy::diff::{Change, Diff, Party, State};
use hanse_policy::evaluate::{End, Query, View, evaluate};
use hanse_policy::inventory::{Endpoint, EndpointId, EndpointKind, Inventory};

use crate::worlds::{Random, world};

const OUTSIDE: [&str; 2] = ["10.0.0.200", "2001:db8::1"];

/// Beside each pod another of the same labels, with addresses of its own.
fn add_twins(inventory: &mut Inventory) {
    for cluster in inventory.clusters.values_mut() {
        let twin = |(id, endpoint): (&EndpointId, &Endpoint)| {
            let mut endpoint = endpoint.clone();
            for address in &mut endpoint.addresses {
                match address {
                    IpAddr::V4(v4) => *v4 = (u32::from(*v4) + 100).into(),
                    IpAddr::V6(v6) => *v6 = (u128::from(*v6) + 100).into(),
                }
            }
            (EndpointId { name: format!("{}-twin", id.name).into(), ..id.clone() }, endpoint)
        };
        let pods = cluster.endpoints.iter().filter(|(id, _)| id.kind == EndpointKind::Pod);
        let twins: Vec<_> = pods.map(twin).collect();
        cluster.endpoints.extend(twins);
    }
}

/// The members of a party as ends of packets of an IP version.
fn ends(party: &Party<'_>, inventory: &Inventory, version: u8) -> Vec<End> {
    let of_version = |address: &&IpAddr| address.is_ipv4() == (version == 4);
    match party {
        Party::Address(address) => {
            [*address].iter().filter(of_version).map(|it| End { address: *it, pod: None }).collect()
        }
        Party::Pods { cluster, members } => {
            let endpoints = &inventory.clusters[*cluster].endpoints;
            let end = |id: &&EndpointId| {
                let address = *endpoints[*id].addresses.iter().find(of_version)?;
                Some(End { address, pod: Some(((*cluster).clone(), (*id).clone())) })
            };
            members.iter().filter_map(end).collect()
        }
    }
}

fn names(changes: &[Change], from: usize, to: usize, version: u8, query: &Query) -> bool {
    let own = changes.iter().filter(|it| (it.from, it.to, it.ip_version) == (from, to, version));
    own.flat_map(|change| &change.packets).any(|it| {
        let port = it.ports.is_none_or(|(low, high)| (low..=high).contains(&query.destination_port));
        it.protocol == Some(query.protocol) && port
    })
}

#[test]
fn diff_contains_exactly_the_changed_verdicts() {
    let (mut changed, mut same, mut grouped) = (0, 0, 0);
    for seed in 0..24 {
        let mut random = Random(seed);
        let before = world(&mut random);
        let mut after = world(&mut random);
        // Half of the time what is there stays, and only policies change; else a few of either.
        if seed % 2 == 0 {
            after.inventory = before.inventory.clone();
        }
        if seed % 4 == 0 {
            let own = before.policies.clusters.clone();
            after.policies.clusters = own;
        }
        let mut before = before;
        for inventory in [&mut before.inventory, &mut after.inventory] {
            add_twins(inventory);
        }
        let view = if seed % 3 == 0 { View::Pending } else { View::Enforced };
        let first = State { policies: &before.policies, inventory: &before.inventory, view: View::Enforced };
        let second = State { policies: &after.policies, inventory: &after.inventory, view };
        let outside = OUTSIDE.map(|it| it.parse().expect("an address"));
        let diff = Diff::new(first, second, &outside, Vec::new());
        let mut changes = Vec::new();
        let Ok(()) = diff.compare(|change| -> Result<(), Infallible> {
            changes.push(change);
            Ok(())
        });
        grouped += diff.parties.iter().filter(|party| party.count() > 1).count();
        for (from, source) in diff.parties.iter().enumerate() {
            for (to, destination) in diff.parties.iter().enumerate() {
                for version in [4, 6] {
                    let sides = [&before.inventory, &after.inventory]
                        .map(|inventory| (ends(source, inventory, version), ends(destination, inventory, version)));
                    // The same members in both, unless an address is in one only: then there is no packet to compare.
                    if sides[0].0.len() != sides[1].0.len() || sides[0].1.len() != sides[1].1.len() {
                        continue;
                    }
                    for at in 0..sides[0].0.len() {
                        for other in 0..sides[0].1.len() {
                            let pair = sides.each_ref().map(|(from, to)| (from[at].clone(), to[other].clone()));
                            let itself = pair[0].0.pod.is_some() && pair[0].0.pod == pair[0].1.pod;
                            if itself || pair[0].0.pod.is_none() && pair[0].1.pod.is_none() {
                                continue;
                            }
                            for (protocol, port) in [6, 17, 132]
                                .into_iter()
                                .flat_map(|it| [0, 53, 79, 80, 81, 8080, 40_000].map(|p| (it, p)))
                            {
                                let query = |(source, destination): &(End, End)| Query {
                                    source: source.clone(),
                                    destination: destination.clone(),
                                    protocol,
                                    source_port: 40_000,
                                    destination_port: port,
                                    icmp: None,
                                };
                                let was = evaluate(first.policies, first.inventory, &query(&pair[0]), first.view);
                                let is = evaluate(second.policies, second.inventory, &query(&pair[1]), second.view);
                                let differs = was.verdict != is.verdict;
                                let named = names(&changes, from, to, version, &query(&pair[0]));
                                assert_eq!(named, differs, "seed {seed}: {:?}\n{was:?}\n{is:?}", query(&pair[0]));
                                *(if differs { &mut changed } else { &mut same }) += 1;
                            }
                        }
                    }
                }
            }
        }
    }
    println!("{changed} packets change verdict, {same} do not; {grouped} groups of several pods");
    assert!(changed > 1_000 && same > 1_000 && grouped > 10, "hardly tried: {changed} {same} {grouped}");
}
