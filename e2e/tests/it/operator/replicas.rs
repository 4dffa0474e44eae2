//! Several hubs with one store: each shows the operator of all.

use std::process::Command;

use hanse_e2e::kubernetes::{programs, run};
use hanse_e2e::probe;
use hanse_e2e::process::Process;
use serde_json::{Value, json};

use super::{PATIENCE, TIER, World, free};

impl World {
    /// `hanse status` at a hub with this address.
    fn operator_at(&self, address: &str) -> Value {
        let text = std::fs::read(self.data().join("admin.context")).expect("the context");
        let mut context: Value = serde_json::from_slice(&text).expect("JSON");
        context["hubs"] = json!([address]);
        let path = self.data().join(format!("{}.context", address.replace(':', "-")));
        std::fs::write(&path, context.to_string()).expect("written");
        let mut command = Command::new(crate::system::programs().join("hanse"));
        let output = command.env("HANSE_CONTEXT", path).args(["status", "-o", "json"]).output().expect("it runs");
        serde_json::from_slice::<Value>(&output.stdout).map(|it| it["operator"].clone()).unwrap_or_default()
    }
}

#[test]
fn a_hub_that_does_not_lead_shows_the_problems_of_the_one_that_does() {
    run(async {
        let folder = tempfile::tempdir().expect("a folder");
        let [client, peer] = free().map(|it| format!("http://{it}"));
        let mut etcd = Command::new(programs::etcd().expect("etcd"));
        etcd.current_dir(folder.path()).args(["--name=test", "--data-dir=data", "--logger=zap"]);
        etcd.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
        etcd.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
        etcd.arg(format!("--initial-cluster=test={peer}"));
        let _etcd = Process::start_bound(etcd, &folder.path().join("etcd.log")).expect("it starts");
        let reached = client.trim_start_matches("http://").to_owned();
        let served = probe::until(PATIENCE, || std::net::TcpStream::connect(&reached).is_ok());
        assert!(served.is_some(), "etcd serves");
        let mut world = World::prepare_on(Some(format!("etcd://{reached}/hanse"))).await;
        world.start_hub();
        world.until_operated().await;
        let first = world.operator()["leader"].clone();

        // Another hub, which does not lead.
        let addresses: [String; 2] = free().map(|it| it.to_string());
        let mut command = Command::new(crate::system::programs().join("hanse-hub"));
        command.args(["run", "--listen", &addresses[0], "--join-listen", &addresses[1], "--data"]).arg(world.data());
        command.args(["--store", world.store.as_deref().expect("etcd"), "--operator", "--kubeconfig"]);
        let log = folder.path().join("other.log");
        let _other = Process::start_bound(
            {
                command.arg(&world.kubeconfig);
                command
            },
            &log,
        )
        .expect("it starts");
        let at_other = || world.operator_at(&addresses[0]);
        world.until("it names the leader", || at_other()["leadingMs"].is_u64()).await;
        let shown = at_other();
        assert_eq!((&shown["leader"], &shown["problemsTotal"]), (&first, &json!(0)), "{shown}");

        // What the leader cannot write is shown by both.
        let role = "clusterrole/hanse-hub";
        let rules = world.succeed(&["get", role, "-o", "jsonpath={.rules}"]);
        let mut fewer: Value = serde_json::from_str(&rules).expect("JSON");
        for rule in fewer.as_array_mut().expect("rules") {
            let resources = rule["resources"].as_array_mut().expect("resources");
            resources.retain(|it| it != "tiers/status");
        }
        fewer.as_array_mut().expect("rules").retain(|rule| rule["resources"] != json!([]));
        let patch = json!({"rules": fewer}).to_string();
        world.succeed(&["patch", role, "--type=merge", "-p", &patch]);
        world.apply(TIER);
        let named = |operator: &Value| {
            let problem = &operator["problems"][0];
            let message = problem["message"].as_str().unwrap_or_default();
            problem["hub"] == first && message.contains("tiers/status") && message.contains("cannot patch")
        };
        world.until("the leader names it", || named(&world.operator())).await;
        world.until("the other hub names it", || named(&at_other())).await;

        // Without the leader, the other one leads. What the former one could not do, this one cannot either.
        world.hub_is_killed();
        let leads = || {
            let shown = world.operator_at(&addresses[0]);
            shown["leadingMs"].is_u64() && shown["leader"] != first
        };
        assert!(probe::until(PATIENCE, leads).is_some(), "{}", world.operator_at(&addresses[0]));
    });
}
