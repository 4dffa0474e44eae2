//! Changes in a tier that requires approvals.

use hanse_e2e::kubernetes::run;
use serde_json::{Value, json};

use super::{World, deny, policy, tier};

const STRICT: &str = "phase: Guard, order: 100, defaultAction: Deny, requireApproval: true";

fn with_order(order: u32) -> String {
    policy("web", &format!("{}, order: {order}", deny("strict")))
}

impl World {
    /// `hanse policy approve`, with the rights of a user.
    pub(super) fn approve(&self, user: &str, object: &str) -> (bool, String) {
        let mut command = std::process::Command::new(crate::system::programs().join("hanse"));
        command.args(["policy", "approve", object, "--yes", "--kubeconfig"]).arg(self.kubeconfig_of(user));
        let output = command.output().expect("it runs");
        (output.status.success(), String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
    }

    /// `hanse policy reject`, with the rights of a user.
    fn reject(&self, user: &str, object: &str) -> (bool, String) {
        let mut command = std::process::Command::new(crate::system::programs().join("hanse"));
        command.args(["policy", "reject", object, "--kubeconfig"]).arg(self.kubeconfig_of(user));
        let output = command.output().expect("it runs");
        (output.status.success(), String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
    }

    fn uid(&self, object: &str) -> String {
        self.kubectl("", &["get", object, "-o", "jsonpath={.metadata.uid}"]).1
    }

    fn order(&self) -> Value {
        self.in_force("fnp", "web")["spec"]["order"].clone()
    }
}

#[test]
fn changes_wait_for_another_user() {
    run(async {
        let world = World::start(86_400).await;
        // A policy that is older than its tier does not come into force with it.
        world.apply("ada", &policy("early", &deny("strict")));
        world.until_condition("fnp/early", "Accepted", "False", "TierNotFound").await;
        for (name, spec) in [("strict", STRICT), ("other", "phase: Guard, order: 200, defaultAction: Deny")] {
            world.apply("", &tier(name, spec));
            world.accepted(&format!("tiers.hanse.dev/{name}")).await;
        }
        let waits = async |object: &str| {
            let is = || {
                let (success, text) = world.kubectl("", &["get", object, "-o", "json"]);
                let is_read = success && {
                    let object: Value = serde_json::from_str(&text).expect("JSON");
                    object["status"]["observedGeneration"] == object["metadata"]["generation"]
                };
                is_read && world.condition(object, "Approved")[..2] == ["False", "PendingApproval"]
            };
            world.until(&format!("{object} waits for an approval"), is).await;
        };

        waits("fnp/early").await;
        assert!(world.in_force("fnp", "early").is_null());

        // A new policy is not in force, but evaluated as a staged one.
        world.apply("ada", &with_order(1));
        waits("fnp/web").await;
        assert!(world.in_force("fnp", "web").is_null());
        world.until("staged", || world.in_force("sfnp", "web")["spec"]["stagedAction"] == "Set").await;
        // Not by its author, who lacks the verb, and not by a user without it.
        let (success, text) = world.approve("ada", "FederatedNetworkPolicy/web");
        assert!(!success && text.contains("needs the verb \"approve\" on tiers.hanse.dev/strict"), "{text}");
        let (success, text) = world.approve("mallory", "FederatedNetworkPolicy/web");
        assert!(!success && text.contains("needs the verb \"approve\""), "{text}");
        let (success, text) = world.approve("bob", "fnp/web");
        assert!(success && text.contains("+"), "{text}\n{}", world.hub_log());
        world.until("in force", || world.order() == 1).await;
        world.until_condition("fnp/web", "Approved", "True", "Approved").await;
        world.until("not staged", || world.in_force("sfnp", "web").is_null()).await;
        world
            .until("the approval is used", || world.kubectl("", &["get", "pa", "-o", "name"]).1.trim().is_empty())
            .await;

        // The last approved version stays enforced; the author is not an approver, also with the verb.
        world.apply("bob", &with_order(2));
        waits("fnp/web").await;
        assert_eq!(world.order(), 1);
        let (success, text) = world.approve("bob", "fnp/web");
        assert!(!success && text.contains("is an author of the change"), "{text}");
        // An approval of an older version has no effect: it is refused, and one that exists already is not used.
        let old = world.kubectl("", &["get", "fnp/web", "-o", "json"]).1;
        let old: Value = serde_json::from_str(&old).expect("JSON");
        let lease = |holder: &str| {
            let patch = json!({"spec": {"holderIdentity": holder, "leaseDurationSeconds": 3}}).to_string();
            world.kubectl("", &["-n", "hanse", "patch", "lease", "hanse-hub-operator", "--type=merge", "-p", &patch])
        };
        assert!(lease("another-hub").0);
        world.until("the operator stops", || world.hub_log().contains("another process has taken the Lease")).await;
        let (success, text) = world.approve("eve", "fnp/web");
        assert!(success, "{text}");
        world.apply("bob", &with_order(3));
        world
            .until("the operator decides", || {
                world.condition("fnp/web", "Approved")[1] == "PendingApproval"
                    && serde_json::from_str::<Value>(&world.kubectl("", &["get", "fnp/web", "-o", "json"]).1)
                        .is_ok_and(|it| it["status"]["observedGeneration"] == it["metadata"]["generation"])
            })
            .await;
        assert_eq!(world.order(), 1);
        let digest = hanse_kubernetes::change::digest(
            hanse_kubernetes::change::manifest(
                "FederatedNetworkPolicy",
                &serde_json::from_value(old.clone()).expect("an object"),
            )
            .as_bytes(),
        );
        let stale = json!({
            "apiVersion": "hanse.dev/v1alpha1", "kind": "PolicyApproval", "metadata": {"name": "stale"},
            "spec": {
                "action": "Apply", "kind": "FederatedNetworkPolicy", "name": "web", "uid": old["metadata"]["uid"],
                "generation": old["metadata"]["generation"], "digest": digest,
            },
        });
        world.apply_refused("eve", &stale.to_string(), "has changed since");
        // Names become paths of requests of the hub.
        for name in ["?watch=1", "web/status", ".."] {
            let mut odd = stale.clone();
            odd["spec"]["name"] = json!(name);
            world.apply_refused("eve", &odd.to_string(), "spec.name");
        }

        // A move out of the tier waits as well, and a deletion does.
        let moved = policy("web", &deny("other"));
        world.apply("", &moved);
        waits("fnp/web").await;
        assert_eq!(world.in_force("fnp", "web")["spec"]["tier"], "strict");
        // The tier of the version in force counts as well.
        world.refused("mallory", &["delete", "fnp/web"], "on tiers.hanse.dev/strict");
        world.apply("", &with_order(4));
        waits("fnp/web").await;
        let (success, text) = world.approve("eve", "fnp/web");
        assert!(success && text.contains("order"), "{text}");
        world.until("in force", || world.order() == 4).await;
        // A change is rejected by a user who could make it, and not by one who may only approve.
        world.apply("ada", &with_order(7));
        waits("fnp/web").await;
        let (success, text) = world.reject("eve", "fnp/web");
        assert!(!success && text.contains("needs the verb \"use\""), "{text}");
        let (success, text) = world.reject("bob", "fnp/web");
        assert!(success && text.contains("the version in force again"), "{text}");
        world.until_condition("fnp/web", "Approved", "True", "Approved").await;
        world.until("not staged", || world.in_force("sfnp", "web").is_null()).await;
        assert_eq!(world.order(), 4);

        // A deletion cannot be revoked, and is rejected all the same: the object is another one, and the hub's stays as it is.
        let revision = || world.in_force("fnp", "web")["metadata"]["resourceVersion"].clone();
        let (before, uid) = (revision(), world.uid("fnp/web"));
        assert!(world.kubectl("bob", &["delete", "--wait=false", "fnp/web"]).0);
        world.until_condition("fnp/web", "Terminating", "True", "PendingApproval").await;
        let message = world.condition("fnp/web", "Terminating")[2].clone();
        assert!(message.contains("`hanse policy reject FederatedNetworkPolicy/web`"), "{message}");
        let (success, text) = world.try_apply("bob", &with_order(4));
        let is_leaving = |world: &World| {
            let path = "jsonpath={.metadata.deletionTimestamp}";
            !world.kubectl("", &["get", "fnp/web", "-o", path]).1.is_empty()
        };
        assert!(is_leaving(&world), "{success} {text}");
        for user in ["eve", "mallory"] {
            let (success, text) = world.reject(user, "fnp/web");
            assert!(!success && text.contains("needs the verb \"use\""), "{user}: {text}");
            assert!(is_leaving(&world) && world.uid("fnp/web") == uid, "nothing is changed");
        }
        let (success, text) = world.reject("ada", "fnp/web");
        assert!(success && text.contains("as a new object"), "{text}");
        assert!(!is_leaving(&world) && world.uid("fnp/web") != uid);
        world.until_condition("fnp/web", "Approved", "True", "Approved").await;
        world.accepted("fnp/web").await;
        world.until("not staged", || world.in_force("sfnp", "web").is_null()).await;
        assert_eq!((world.order(), revision()), (json!(4), before), "it was in force all the time");
        let (success, text) = world.reject("ada", "fnp/web");
        assert!(!success && text.contains("no change of FederatedNetworkPolicy/web waits"), "{text}");

        assert!(world.kubectl("bob", &["delete", "--wait=false", "fnp/web"]).0);
        world.until_condition("fnp/web", "Terminating", "True", "PendingApproval").await;
        assert_eq!(world.order(), 4);
        world.until("staged", || world.in_force("sfnp", "web")["spec"]["stagedAction"] == "Delete").await;
        let (success, text) = world.approve("bob", "fnp/web");
        assert!(!success && text.contains("is an author of the change"), "{text}");
        let (success, text) = world.approve("eve", "fnp/web");
        assert!(success, "{text}");
        world.until("deleted", || world.in_force("fnp", "web").is_null()).await;
        world.until("deleted", || !world.kubectl("", &["get", "fnp/web"]).0).await;
        world.until("not staged", || world.in_force("sfnp", "web").is_null()).await;

        // What was never in force is deleted without an approval, and its staged policy with it.
        assert!(world.kubectl("ada", &["delete", "--timeout=60s", "fnp/early"]).0, "{}", world.hub_log());
        world.until("not staged", || world.in_force("sfnp", "early").is_null()).await;

        // It reserves no name: a user who may not write into the tier, but approve in it, deletes it as well.
        world.apply("ada", &policy("reserved", &deny("strict")));
        waits("fnp/reserved").await;
        let kubeconfig = world.kubeconfig_of("bob");
        let list = ["policy", "pending", "--kubeconfig", kubeconfig.to_str().expect("UTF-8"), "-o", "json"];
        let (success, text) = world.hanse(&list);
        let listed: Value = serde_json::from_str(&text).expect("JSON");
        let items = listed["items"].as_array().into_iter().flatten();
        let objects: Vec<&Value> = items.map(|it| &it["object"]).collect();
        assert!(success && objects == ["FederatedNetworkPolicy/reserved"], "{text}");
        world.refused("mallory", &["delete", "fnp/reserved"], "on tiers.hanse.dev/strict");
        let (success, text) = world.reject("eve", "fnp/reserved");
        assert!(success && text.contains("never in force"), "{text}");
        world.until("deleted", || !world.kubectl("", &["get", "fnp/reserved"]).0).await;

        // The tier does not become lenient by one user alone.
        world.apply("", &tier("strict", "phase: Guard, order: 100, defaultAction: Deny"));
        waits("tiers.hanse.dev/strict").await;
        world.apply("ada", &with_order(5));
        waits("fnp/web").await;
        assert_eq!(world.in_force("tier", "strict")["spec"]["requireApproval"], true);
        let (success, text) = world.approve("bob", "tier/strict");
        assert!(success && text.contains("requireApproval"), "{text}");
        world.until("in force", || world.order() == 5).await;

        let records = world.audit("FederatedNetworkPolicy/web");
        let all: Vec<String> = records
            .iter()
            .rev()
            .filter(|it| it["outcome"] == "done" || it["action"] == "propose")
            .map(|it| {
                format!("{} {}", it["who"].as_str().unwrap_or_default(), it["action"].as_str().unwrap_or_default())
            })
            .collect();
        let starts =
            ["kubernetes/ada propose", "kubernetes/bob approve", "kubernetes/ada apply", "kubernetes/bob propose"];
        assert_eq!(all[..4], starts, "{records:#?}");
        assert!(all.contains(&"kubernetes/bob delete".to_owned()), "{all:?}");
        assert_eq!(world.forbidden(), Vec::<String>::new());
    });
}

/// A tier that is being deleted is created again. What the user may not create is not released.
#[test]
fn deletion_of_a_tier_is_rejected_by_users_who_may_create_it() {
    run(async {
        let world = World::start(86_400).await;
        let object = "tiers.hanse.dev/strict";
        world.apply("", &tier("strict", STRICT));
        world.accepted(object).await;
        let uid = world.uid(object);
        assert!(world.kubectl("bob", &["delete", "--wait=false", object]).0);
        world.until_condition(object, "Terminating", "True", "PendingApproval").await;
        let (success, text) = world.reject("carol", "tier/strict");
        assert!(!success && text.contains("needs the verb \"create\" on tiers.hanse.dev"), "{text}");
        let finalizers = world.kubectl("", &["get", object, "-o", "jsonpath={.metadata.finalizers}"]).1;
        assert!(world.uid(object) == uid && finalizers.contains("hanse.dev/operator"), "{finalizers}");
        let (success, text) = world.reject("ada", "tier/strict");
        assert!(success && text.contains("as a new object"), "{text}");
        assert_ne!(world.uid(object), uid);
        world.until_condition(object, "Approved", "True", "Approved").await;
        assert_eq!(world.in_force("tier", "strict")["spec"]["requireApproval"], true);
    });
}
