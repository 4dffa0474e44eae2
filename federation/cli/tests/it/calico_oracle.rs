//! Calico's tiers, policies and network sets a second time: from the reference's text and code, sharing nothing with the
//! conversion and the evaluators, and compared at random with all that judges here: the reference evaluator, the prepared
//! form, compiled rule sets, and `hanse policy explain`.

mod reference;
mod world;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use hanse_api::assemble_cluster;
use hanse_api::manifest::{Manifests, read_bytes};
use hanse_compiler::{Input, compile};
use hanse_policy::evaluate::{End, Query, Verdict, View, evaluate};
use hanse_policy::inventory::{EndpointKind, Inventory};
use hanse_policy::model::{ClusterName, PolicySet};
use hanse_policy::prepared::Prepared;
use hanse_ruleset::{Hook, NodeConfig};
use serde_json::{Value, json};

use self::reference::{Decision, Misreading, Packet, Reference};
use self::world::{World, packet, world};
use crate::oracle::Random;

const ROUNDS: u64 = 600;
const QUERIES: usize = 100;
/// Rounds between two runs of the command, which take longer than all other checks.
const COMMAND: u64 = 10;

/// What of a run.
#[derive(Default)]
struct Tally {
    denied: usize,
    total: usize,
    /// What decided, and with which fields.
    occurred: BTreeMap<String, usize>,
    /// How many verdicts each misreading would change.
    told_apart: BTreeMap<Misreading, usize>,
}

impl Tally {
    fn decided(&mut self, decision: &Decision<'_>) {
        let mut occurs = |what: String| *self.occurred.entry(what).or_default() += 1;
        let rule = match decision {
            Decision::Rule(rule) => rule.as_object().expect("a rule"),
            Decision::EndOfTier(true) => return occurs("end of tier Deny".into()),
            Decision::EndOfTier(false) => return occurs("end of tier Pass".into()),
            Decision::Profile => return occurs("profile".into()),
        };
        for (field, value) in rule {
            match (field.as_str(), value) {
                ("action", action) => occurs(format!("action {}", action.as_str().expect("an action"))),
                ("source" | "destination", Value::Object(entity)) => {
                    entity.keys().for_each(|name| occurs(format!("{field}.{name}")));
                }
                _ => occurs(field.clone()),
            }
        }
    }
}

/// The same objects, read as the command reads them.
struct Read {
    policies: PolicySet,
    inventory: Inventory,
    cluster: ClusterName,
}

impl Read {
    fn new(objects: &Value) -> Self {
        let mut read = Manifests::default();
        read_bytes(&"all.json".into(), objects.to_string().as_bytes(), &mut read);
        assert_eq!(read.diagnostics, [], "{objects:#}");
        let cluster: ClusterName = "k".into();
        let state = assemble_cluster(&cluster, read.objects);
        let mut this = Self { policies: PolicySet::default(), inventory: Inventory::default(), cluster };
        this.policies.clusters.insert(this.cluster.clone(), state.layer);
        this.inventory.clusters.insert(this.cluster.clone(), state.cluster);
        this
    }

    fn end(&self, address: IpAddr) -> End {
        let mut endpoints = self.inventory.clusters[&self.cluster].endpoints.iter();
        let owner = endpoints.find(|(id, it)| id.kind == EndpointKind::Pod && it.addresses.contains(&address));
        End { address, pod: owner.map(|(id, _)| (self.cluster.clone(), id.clone())) }
    }

    fn query(&self, packet: &Packet) -> Query {
        Query {
            source: self.end(packet.addresses[0]),
            destination: self.end(packet.addresses[1]),
            protocol: packet.protocol,
            source_port: packet.ports[0],
            destination_port: packet.ports[1],
            icmp: matches!(packet.protocol, 1 | 58).then_some(packet.icmp),
        }
    }
}

fn round(seed: u64, tally: &mut Tally) {
    let mut random = Random(seed);
    let World { state, objects } = world(&mut random);
    let all = json!({"apiVersion": "v1", "kind": "List", "items": objects});
    let read = Read::new(&all);
    let prepared = Prepared::new(&read.policies, &read.inventory, View::Enforced);
    let nodes: BTreeMap<Arc<str>, NodeConfig> = ["n0", "n1"].map(|name| (name.into(), NodeConfig::default())).into();
    let input = Input { cluster: &read.cluster, policies: &read.policies, inventory: &read.inventory, nodes: &nodes };
    let rule_sets = compile(input).nodes;
    let reference = Reference::new(&state, None);
    let misread = Misreading::ALL.map(|misreading| (misreading, Reference::new(&state, Some(misreading))));
    let (mut lines, mut expected) = (Vec::new(), Vec::new());
    for _ in 0..QUERIES {
        let (packet, line) = packet(&mut random, &state);
        let allowed = reference.verdict(&packet, &mut |decision| tally.decided(&decision));
        for (misreading, reference) in &misread {
            let differs = reference.verdict(&packet, &mut |_| {}) != allowed;
            *tally.told_apart.entry(*misreading).or_default() += usize::from(differs);
        }
        let query = read.query(&packet);
        let answer = evaluate(&read.policies, &read.inventory, &query, View::Enforced);
        assert_eq!(answer.verdict == Verdict::Allow, allowed, "seed {seed}\n{line}\n{answer:#?}\n{all:#}");
        assert_eq!(prepared.evaluate(&query), answer, "seed {seed}, prepared\n{line}\n{all:#}");
        let seen = hanse_ruleset::Packet {
            source: packet.addresses[0],
            destination: packet.addresses[1],
            protocol: packet.protocol,
            source_port: packet.ports[0],
            destination_port: packet.ports[1],
            icmp: query.icmp,
        };
        let outcomes: Vec<_> = rule_sets.values().map(|it| hanse_ruleset::evaluate(it, &seen, Hook::Forward)).collect();
        let enforced = outcomes.iter().all(|outcome| outcome.verdict == hanse_ruleset::Verdict::Allow);
        assert_eq!(enforced, allowed, "seed {seed}, rule sets\n{line}\n{outcomes:#?}\n{answer:#?}\n{all:#}");
        expected.push(allowed);
        lines.push(line.to_string());
    }
    tally.total += expected.len();
    tally.denied += expected.iter().filter(|allowed| !**allowed).count();
    if seed.is_multiple_of(COMMAND) {
        let root = tempfile::tempdir().expect("temporary directory");
        std::fs::write(root.path().join("all.json"), all.to_string()).expect("manifests");
        let answers = explain(root.path(), &lines.join("\n"));
        assert_eq!(answers.len(), expected.len(), "seed {seed}");
        for ((line, expected), answer) in lines.iter().zip(expected).zip(answers) {
            let verdict = if expected { "allow" } else { "deny" };
            assert_eq!(answer["verdict"], verdict, "seed {seed}\n{line}\n{answer}\n{all:#}");
        }
    }
}

fn explain(root: &Path, lines: &str) -> Vec<Value> {
    let queries = root.join("queries.jsonl");
    std::fs::write(&queries, lines).expect("queries");
    let output = Command::new(env!("CARGO_BIN_EXE_hanse"))
        .args(["policy", "explain", "-o", "json", "--cluster", &format!("k={}", root.display()), "--queries"])
        .arg(&queries)
        .output()
        .expect("hanse runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

/// What a run is not worth much without.
const CLAUSES: [&str; 27] = [
    "action Allow",
    "action Deny",
    "action Pass",
    "action Log",
    "end of tier Deny",
    "end of tier Pass",
    "profile",
    "protocol",
    "notProtocol",
    "icmp",
    "notICMP",
    "ipVersion",
    "source.selector",
    "source.notSelector",
    "source.namespaceSelector",
    "source.serviceAccounts",
    "source.services",
    "source.nets",
    "source.notNets",
    "source.ports",
    "source.notPorts",
    "destination.selector",
    "destination.notSelector",
    "destination.serviceAccounts",
    "destination.services",
    "destination.ports",
    "destination.notPorts",
];

#[test]
fn calicos_policies_mean_what_the_reference_says() {
    let first = std::env::var("HANSE_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or_else(|| std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), 0_u8) >> 16);
    println!("HANSE_SEED={first}");
    let mut tally = Tally::default();
    for seed in first..first + ROUNDS {
        round(seed, &mut tally);
    }
    let Tally { denied, total, occurred, told_apart } = tally;
    println!("{total} packets, {denied} denied; {occurred:#?}\nchanged by misreadings: {told_apart:#?}");
    assert!(denied * 10 >= total * 3 && denied * 10 <= total * 7, "{denied} of {total} are denied");
    let missing: Vec<&str> = CLAUSES.into_iter().filter(|clause| !occurred.contains_key(*clause)).collect();
    assert!(missing.is_empty(), "{missing:?} never decided");
    // Else the run could not have shown it.
    let unseen: Vec<_> = told_apart.iter().filter(|(_, count)| **count == 0).collect();
    assert!(unseen.is_empty(), "{unseen:?} would change no verdict");
}
