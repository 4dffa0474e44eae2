//! Objects that the API server, another manager or the hub's store makes difficult.

use hanse_e2e::kubernetes::run;

use super::{DENY, TIER, World, policy};

/// A webhook of which no server exists: the API server answers 500 to each change of an object with the label.
const BROKEN: &str = "apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingWebhookConfiguration
metadata: {name: broken}
webhooks:
- name: broken.test.example
  failurePolicy: Fail
  sideEffects: None
  timeoutSeconds: 1
  admissionReviewVersions: [v1]
  objectSelector: {matchLabels: {broken: 'true'}}
  clientConfig: {url: 'https://127.0.0.1:1/'}
  rules:
  - {apiGroups: [hanse.dev], apiVersions: ['*'], operations: [UPDATE], resources: ['*/*'], scope: '*'}
";

#[test]
fn object_that_another_manager_applied_with_the_finalizer_is_released() {
    run(async {
        let world = World::start().await;
        let restored =
            TIER.replace("metadata: {name: platform}", "metadata: {name: platform, finalizers: [hanse.dev/operator]}");
        let path = world.folder.path().join("restored.yaml");
        std::fs::write(&path, restored).expect("written");
        let file = path.to_str().expect("UTF-8");
        world.succeed(&["apply", "--server-side", "--field-manager=backup", "-f", file]);
        world.until("accepted", || world.condition("tiers.hanse.dev/platform", "Accepted")[0] == "True").await;
        world.succeed(&["delete", "--timeout=60s", "tiers.hanse.dev/platform"]);
        assert!(world.stored().trim().is_empty(), "{}", world.stored());
    });
}

#[test]
fn object_that_the_api_server_does_not_let_change_delays_no_other() {
    run(async {
        let world = World::start().await;
        let names: Vec<String> = (0..4).map(|index| format!("p{index}")).collect();
        let policies: Vec<String> = names.iter().map(|name| policy(name, DENY)).collect();
        world.apply(&format!("{TIER}---\n{}", policies.join("---\n")));
        for name in &names {
            world.until("accepted", || world.condition(&format!("fnp/{name}"), "Accepted")[0] == "True").await;
        }
        // The first one in the order of names.
        world.succeed(&["label", "fnp/p0", "broken=true"]);
        world.until("it is stored", || world.hanse(&["get", "fnp", "p0", "-o", "json"]).1.contains("broken")).await;
        world.apply(BROKEN);
        let (mut delete, others) = (vec!["delete", "--wait=false", "fnp"], ["p1", "p2", "p3"]);
        delete.push("p0");
        delete.extend(others);
        let is_refused = || !world.kubectl(&["label", "fnp/p0", "--overwrite", "broken=true", "more=true"]).0;
        world.until("the webhook is in effect", is_refused).await;
        world.succeed(&delete);
        for name in others {
            world.until("it is gone", || !world.kubectl(&["get", &format!("fnp/{name}")]).0).await;
        }
        world
            .until("it is named", || {
                world
                    .hub_log()
                    .lines()
                    .any(|line| line.contains("refuses a write") && line.contains("FederatedNetworkPolicy/p0"))
            })
            .await;
        // New objects are reconciled meanwhile, and the last one is released when the API server permits it.
        world.apply(&policy("new", DENY));
        world.until("accepted", || world.condition("fnp/new", "Accepted")[0] == "True").await;
        assert!(world.kubectl(&["get", "fnp/p0"]).0, "it waits");
        assert!(!world.stored().contains("p0"), "the hub has deleted it");
        world.succeed(&["delete", "validatingwebhookconfiguration", "broken"]);
        world.until("it is released", || !world.kubectl(&["get", "fnp/p0"]).0).await;
    });
}

/// A webhook whose server accepts connections and answers nothing: a status of an object with the label is not written for long.
const SILENT: &str = "apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingWebhookConfiguration
metadata: {name: silent}
webhooks:
- name: silent.test.example
  failurePolicy: Fail
  sideEffects: None
  timeoutSeconds: 30
  admissionReviewVersions: [v1]
  objectSelector: {matchLabels: {silent: 'true'}}
  clientConfig: {url: 'https://ADDRESS/'}
  rules:
  - {apiGroups: [hanse.dev], apiVersions: ['*'], operations: [UPDATE], resources: ['*/status'], scope: '*'}
";

#[test]
fn status_that_is_not_answered_delays_no_change() {
    run(async {
        let world = World::start().await;
        world.apply(&format!("{TIER}---\n{}---\n{}", policy("slow", DENY), policy("other", DENY)));
        for name in ["fnp/slow", "fnp/other"] {
            world.until("accepted", || world.condition(name, "Accepted")[0] == "True").await;
        }
        let server = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        server.set_nonblocking(true).expect("changed");
        world.succeed(&["label", "fnp/slow", "silent=true"]);
        world.apply(&SILENT.replace("ADDRESS", &server.local_addr().expect("an address").to_string()));
        // The change of the label has no other effect. Each change of the spec makes a new status, which is not answered.
        let change = |name: &str, number: usize| {
            let patch = format!(r#"{{"spec":{{"order":{number}}}}}"#);
            world.succeed(&["patch", "fnp", name, "--type=merge", "-p", &patch]);
        };
        let is_stored = |name: &str, number: usize| {
            world.hanse(&["get", "fnp", name, "-o", "yaml"]).1.contains(&format!("order: {number}"))
        };
        let is_written = || {
            let object = world.succeed(&["get", "fnp", "slow", "-o", "json"]);
            let object: serde_json::Value = serde_json::from_str(&object).expect("JSON");
            object["status"]["observedGeneration"] == object["metadata"]["generation"]
        };
        let connections = std::cell::RefCell::new(Vec::new());
        for number in 1.. {
            change("slow", number);
            let called = || {
                let accepted = server.accept().map(|(connection, _)| connections.borrow_mut().push(connection));
                accepted.is_ok()
            };
            world.until("the API server asks", called).await;
            let failures =
                || world.hub_log().matches("not written").count() + world.hub_log().matches("not reconciled").count();
            let before = failures();
            change("other", number);
            world.until("stored", || is_stored("other", number)).await;
            // No request has ended meanwhile, unless the machine is very slow.
            if failures() == before && !is_written() {
                break;
            }
            assert!(number < 5, "each change waited for a status: {}", world.hub_log());
        }
        world.succeed(&["delete", "validatingwebhookconfiguration", "silent"]);
        world.until("it is written when the API server can", is_written).await;
    });
}
