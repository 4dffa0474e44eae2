//! The rights of the webhook: each is taken away, and what fails is named.

use std::collections::BTreeSet;

use hanse_e2e::kubernetes::run;
use serde_json::{Value, json};

use super::{HUB, PATIENCE, World, deny, policy, tier};
use crate::chart::installed::{Right, rights};

const ROLE: &str = "clusterrole/hanse-hub-webhook";

struct Role {
    all: BTreeSet<Right>,
    /// Rights whose absence was named.
    needed: BTreeSet<Right>,
}

impl Role {
    fn set(&self, world: &World, is_missing: impl Fn(&Right) -> bool) {
        let kept = self.all.iter().filter(|right| !is_missing(right));
        let rules: Vec<Value> = kept
            .map(|(group, resource, verb, name)| {
                json!({"apiGroups": [group], "resources": [resource], "verbs": [verb], "resourceNames": name.as_slice()})
            })
            .collect();
        let (success, text) =
            world.kubectl("", &["patch", ROLE, "--type=merge", "-p", &json!({"rules": rules}).to_string()]);
        assert!(success, "{text}");
    }

    /// Takes one right away, restarts the hub where it is used at its start, and waits until `hanse status` names it. `needs` makes the hub
    /// need it.
    async fn is_named(
        &mut self,
        world: &mut World,
        verb: &str,
        resource: &str,
        restarts: bool,
        needs: impl Fn(&World),
    ) {
        let is = |right: &Right| right.1 == resource && right.2 == verb;
        let missing: Vec<Right> = self.all.iter().filter(|right| is(right)).cloned().collect();
        assert!(!missing.is_empty(), "{verb} {resource}");
        self.set(world, is);
        let (Some(group), name) = (missing.first().map(|it| &it.0), missing.first().and_then(|it| it.3.as_deref()))
        else {
            return;
        };
        let object = name.map_or_else(|| format!("{resource}.{group}"), |name| format!("{resource}.{group}/{name}"));
        let can = ["auth", "can-i", verb, &object, "--as", HUB];
        world.until("the API server knows the role", || !world.kubectl("", &can).0).await;
        if restarts {
            world.hub.take().expect("it runs").stop(PATIENCE).expect("it stops");
            world.start_hub();
        }
        let named = format!("cannot {verb} resource \"{resource}\"");
        let is_named = || {
            needs(world);
            let problems = world.problems();
            let mut messages = problems.as_array().into_iter().flatten().filter_map(|it| it["message"].as_str());
            messages.any(|it| it.contains(&named))
        };
        world.until(&format!("status names: {named}"), is_named).await;
        self.needed.extend(missing);
    }
}

impl World {
    /// Those of the operator in `hanse status`.
    fn problems(&self) -> Value {
        let text = self.hanse(&["status", "-o", "json"]).1;
        serde_json::from_str::<Value>(&text).unwrap_or_default()["operator"]["problems"].clone()
    }
}

#[test]
fn each_right_of_the_webhook_is_needed_and_named_where_it_is_missing() {
    run(async {
        let mut world = World::start(86_400).await;
        let text = world.kubectl("", &["get", ROLE, "-o", "json"]).1;
        let all = rights(&serde_json::from_str(&text).expect("JSON"));
        let mut role = Role { all, needed: BTreeSet::new() };
        let strict = |more: &str| tier("strict", &format!("phase: Guard, order: 100, defaultAction: Deny{more}"));
        world.apply("", &strict(", requireApproval: true"));
        world.accepted("tiers.hanse.dev/strict").await;
        world.apply("ada", &policy("web", &deny("strict")));
        world.until_condition("fnp/web", "Approved", "False", "PendingApproval").await;
        world.apply("", &strict(""));
        world.until_condition("tiers.hanse.dev/strict", "Approved", "False", "PendingApproval").await;

        // The rights of users are not checked: their changes are refused.
        let dry = ["delete", "--dry-run=server", "fnp/web"];
        let deletes = |world: &World| assert!(!world.kubectl("ada", &dry).0, "without a check of rights");
        role.is_named(&mut world, "create", "subjectaccessreviews", false, deletes).await;
        // What is approved is not read: nothing is approved.
        for (resource, object) in [("federatednetworkpolicies", "fnp/web"), ("tiers", "tier/strict")] {
            let approves = |world: &World| assert!(!world.approve("bob", object).0, "without the version");
            role.is_named(&mut world, "get", resource, false, approves).await;
        }
        // The certificate of the webhook does not become known.
        let configurations = "validatingwebhookconfigurations";
        role.is_named(&mut world, "get", configurations, false, |_| {}).await;
        role.is_named(&mut world, "update", configurations, true, |_| {}).await;
        for verb in ["list", "watch"] {
            role.is_named(&mut world, verb, "policyapprovals", true, |_| {}).await;
        }
        // An approval that was used stays, until it can be deleted.
        let approves = |world: &World| _ = world.approve("bob", "fnp/web");
        role.is_named(&mut world, "delete", "policyapprovals", true, approves).await;
        assert!(world.in_force("fnp", "web").is_object(), "it has its effect");
        role.set(&world, |_| false);
        let approvals = || world.kubectl("", &["get", "pa", "-o", "name"]).1;
        world.until("it is deleted", || approvals().trim().is_empty()).await;
        world.until("status has no problem", || world.problems() == json!([])).await;
        assert_eq!(role.needed, role.all, "each right is needed");
    });
}
