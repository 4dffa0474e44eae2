//! A policy that is applied at a management cluster becomes verdicts on packets in two other clusters, all of them with real API
//! servers; its deletion reverses them.

use std::time::Duration;

use hanse_e2e::fabric::Fabric;
use hanse_e2e::federation::delays::{self, POLICY, TIER};
use hanse_e2e::federation::{self, Federation};
use hanse_e2e::kubernetes::run;
use hanse_e2e::probe::Observed;
use hanse_e2e::sandbox;
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(60);
/// Changes that are timed, an even number: the last one closes. `cargo xtask bench federation` times 100.
const CHANGES: usize = 4;

#[test]
fn one_policy_changes_packets_in_two_clusters_until_it_is_deleted() {
    sandbox::test("federation::one_policy_changes_packets_in_two_clusters_until_it_is_deleted", || {
        let worlds = delays::worlds();
        let fabric = Fabric::build(&worlds).expect("the network");
        let scratch = tempfile::tempdir_in("/run").expect("a folder");
        fabric.router().enter(|| {
            run(async {
                let programs = crate::system::programs();
                let federation = Federation::start(&fabric, &worlds, delays::REGISTRATIONS, &programs, scratch.path());
                let federation = federation.await.expect("it starts");
                federation.join().await.expect("it is installed");
                let pods = delays::Pods::start(&federation).await.expect("they run");
                let become_so = |wanted: Observed| {
                    let took = federation::becomes(&pods.pairs(), &wanted, PATIENCE);
                    took.unwrap_or_else(|| panic!("packets are not {wanted:?}: {}", federation.logs()))
                };
                let kubectl = |arguments: &[&str]| federation.kubectl(arguments).expect("it succeeds");
                become_so(Observed::Open);

                // One policy, two clusters.
                federation.apply(&format!("{TIER}---\n{POLICY}")).expect("it is applied");
                println!("closed in both clusters after {:?}", become_so(Observed::Closed));
                let waited = federation.kubectl(&["wait", "--for=condition=Enforced", "--timeout=60s", "fnp/web"]);
                waited.unwrap_or_else(|error| panic!("{error:#}\n{}", federation.logs()));
                let table = kubectl(&["get", "fnp"]);
                let row: Vec<&str> = table.lines().nth(1).expect("a row").split_whitespace().collect();
                // The policy has no order: name, tier, accepted, distributed, enforced, clusters, nodes.
                assert_eq!(row[2..7], ["True", "True", "True", "2/2", "4/4"], "{table}");
                let status: Value = serde_json::from_str(&kubectl(&["get", "fnp", "web", "-o", "json"])).expect("JSON");
                let clusters = status["status"]["clusters"].as_array().cloned().unwrap_or_default();
                let names: Vec<&Value> = clusters.iter().map(|it| &it["name"]).collect();
                assert_eq!(names, [&json!("east"), &json!("west")], "{status}");
                // Nothing that the policy does not select is closed.
                for (client, _) in pods.pairs() {
                    assert!(pods.clients().all(|it| client.observe(it) == Observed::Open), "clients reach each other");
                }

                let delays = delays::measure(&federation, &pods, CHANGES).await.expect("they are measured");
                println!("from the answer of the API server to packets in both clusters: {delays:?}");
                assert_eq!(delays.len(), CHANGES);

                // The last change closed the servers. Deletion reverses it.
                kubectl(&["delete", "--wait=false", "fnp/web"]);
                println!("open in both clusters after {:?}", become_so(Observed::Open));
                kubectl(&["wait", "--for=delete", "--timeout=60s", "fnp/web"]);
            });
        });
    });
}
