//! `hanse apply`, `get` and `delete` with the management API server, as a user of its kubeconfig.

use std::fs;

use hanse_e2e::kubernetes::run;
use serde_json::Value;

use super::{DENY, TIER, World, policy};

impl World {
    fn write(&self, name: &str, text: &str) -> String {
        let path = self.folder.path().join(name);
        fs::write(&path, text).expect("written");
        path.to_str().expect("UTF-8").to_owned()
    }
}

#[test]
fn commands_use_the_management_api_server_with_the_rights_of_the_caller() {
    run(async {
        let world = World::start().await;
        let admin = world.server.kubeconfig();
        let admin = admin.to_str().expect("UTF-8");
        let with = |verb: &[&str], kubeconfig: &str| world.hanse(&[verb, &["--kubeconfig", kubeconfig]].concat());
        let policies = world.write("policies.yaml", &format!("{TIER}---\n{}", policy("deny", DENY)));
        let apply = ["apply", "-f", &policies];

        let stranger = world.server.user("stranger", &[]).expect("a kubeconfig");
        let stranger = world.server.write_kubeconfig("stranger", &stranger).expect("written");
        let (applied, text) = with(&apply, stranger.to_str().expect("UTF-8"));
        assert!(!applied && text.contains("stranger") && text.contains("forbidden"), "{text}");
        let (applied, text) = with(&[&apply[..], &["--dry-run"]].concat(), admin);
        assert!(applied && text.contains("FederatedNetworkPolicy/deny created (dry run)"), "{text}");
        assert!(!world.kubectl(&["get", "fnp/deny"]).0);

        for result in ["created", "unchanged"] {
            let (applied, text) = with(&apply, admin);
            assert!(applied && text.contains(&format!("FederatedNetworkPolicy/deny {result}")), "{text}");
        }
        world.until("accepted", || world.condition("fnp/deny", "Accepted")[0] == "True").await;
        // Status and counts are not part of what is read, edited and applied.
        let (read, text) = with(&["get", "fnp", "deny", "-o", "json"], admin);
        let object: Value = serde_json::from_str(&text).expect("JSON");
        assert!(read && object["status"].is_null() && object["spec"]["tier"] == "platform", "{text}");
        let edited = world.write("edited.json", &text.replace("all()", "app == 'web'"));
        let (applied, text) = with(&["apply", "-f", &edited], admin);
        assert!(applied && text.contains("configured"), "{text}");
        let (applied, text) = with(&["apply", "-f", &edited], admin);
        assert!(!applied && text.contains("modified"), "the object has changed since: {text}");
        world.until("stored", || world.hanse(&["get", "fnp", "deny", "-o", "json"]).1.contains("web")).await;

        let (listed, text) = with(&["get", "-o", "name"], admin);
        assert!(
            listed && text.lines().collect::<Vec<_>>() == ["Tier/platform", "FederatedNetworkPolicy/deny"],
            "{text}"
        );
        let (deleted, text) = with(&["delete", "-f", &policies], admin);
        assert!(deleted && text.contains("2 deleted"), "{text}");
        assert!(world.stored().trim().is_empty(), "the hub has deleted them: {}", world.stored());
        let (deleted, text) = with(&["delete", "fnp", "deny"], admin);
        assert!(!deleted && text.contains("not found"), "{text}");
        assert!(with(&["delete", "fnp", "deny", "--ignore-not-found"], admin).0);
    });
}
