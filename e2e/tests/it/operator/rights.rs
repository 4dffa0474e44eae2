//! The operator's rights: each is taken away, and what fails is named.

use std::collections::BTreeSet;

use hanse_e2e::kubernetes::{manifests, run};
use hanse_hub::operator::LEASE;
use serde_json::{Value, json};

use super::{PATIENCE, World, of_chart, policy};
use crate::chart::NAMESPACE;
use crate::chart::installed::{Right, rights};

const PLURALS: [&str; 7] = [
    "clusterjointokens",
    "clustersets",
    "federatednetworkpolicies",
    "federatednetworksets",
    "memberclusters",
    "stagedfederatednetworkpolicies",
    "tiers",
];

/// One object of each kind, with the name `default`.
fn objects() -> String {
    let object = |kind: &str, spec: &str| {
        format!("apiVersion: hanse.dev/v1alpha1\nkind: {kind}\nmetadata: {{name: default}}\nspec: {{{spec}}}\n")
    };
    let policy = "tier: default, selector: all(), types: [Ingress], ingress: []";
    [
        object("ClusterSet", "trustDomain: hanse.local"),
        object("MemberCluster", ""),
        object("Tier", "phase: Guard, order: 1"),
        object("FederatedNetworkSet", "nets: [10.0.0.0/8]"),
        object("FederatedNetworkPolicy", policy),
        object("StagedFederatedNetworkPolicy", policy),
        object("ClusterJoinToken", "cluster: a, secretName: default"),
    ]
    .join("---\n")
}

struct Roles {
    all: Vec<Value>,
    /// Rights whose absence was named.
    needed: BTreeSet<Right>,
}

impl Roles {
    /// Every right of every role.
    fn rights(&self) -> BTreeSet<Right> {
        self.all.iter().flat_map(rights).collect()
    }

    /// Takes rights away, and starts the hub without them.
    async fn start_without(&self, world: &mut World, is_missing: impl Fn(&Right) -> bool) {
        if let Some(hub) = world.hub.take() {
            hub.stop(PATIENCE).expect("it stops");
        }
        self.take_away(world, is_missing).await;
        world.start_hub();
    }

    async fn take_away(&self, world: &World, is_missing: impl Fn(&Right) -> bool) {
        let client = world.server.client().await.expect("a client");
        for role in &self.all {
            let rules: Vec<Value> = rights(role)
                .into_iter()
                .filter(|right| !is_missing(right))
                .map(|(group, resource, verb, name)| {
                    json!({"apiGroups": [group], "resources": [resource], "verbs": [verb], "resourceNames": name.as_slice()})
                })
                .collect();
            let mut role = role.clone();
            role["rules"] = json!(rules);
            manifests::apply(&client, "test", &role.to_string()).await.expect("it is applied");
        }
    }

    /// Waits until `hanse status` names that each of these rights is missing.
    async fn are_named(&mut self, world: &World, is_missing: impl Fn(&Right) -> bool) {
        let missing: Vec<Right> = self.rights().into_iter().filter(|right| is_missing(right)).collect();
        assert!(!missing.is_empty());
        for right in missing {
            let (group, resource, verb, _) = &right;
            let named = format!("cannot {verb} resource \"{resource}\" in API group \"{group}\"");
            let is_named = || {
                let operator = world.operator();
                let problems = operator["problems"].as_array().into_iter().flatten();
                problems.filter_map(|it| it["message"].as_str()).any(|it| it.contains(&named))
            };
            world.until(&format!("{named}: {}", world.operator()), is_named).await;
            self.needed.insert(right);
        }
    }
}

fn is(right: &Right, resources: &[&str], verb: &str) -> bool {
    resources.contains(&right.1.as_str()) && right.2 == verb
}

#[test]
fn each_right_is_needed_and_named_where_it_is_missing() {
    run(async {
        let mut world = World::prepare().await;
        let all: Vec<Value> = of_chart().into_iter().filter(|it| it["rules"].is_array()).collect();
        let mut roles = Roles { all, needed: BTreeSet::new() };

        // The Lease: nothing is reconciled.
        for verb in ["get", "create", "update"] {
            let lacks = move |right: &Right| is(right, &["leases"], verb);
            if verb == "create" {
                world.kubectl(&["delete", "lease", LEASE, "-n", NAMESPACE]);
            }
            roles.start_without(&mut world, lacks).await;
            roles.are_named(&world, lacks).await;
            if verb != "create" {
                continue;
            }
            // It exists for the next one.
            roles.take_away(&world, |_| false).await;
            world.until("elected", || world.kubectl(&["get", "lease", LEASE, "-n", NAMESPACE]).0).await;
        }
        for verb in ["list", "watch"] {
            let lacks = move |right: &Right| is(right, &PLURALS, verb);
            roles.start_without(&mut world, lacks).await;
            roles.are_named(&world, lacks).await;
        }

        // The finalizer, and then the status.
        let patch = |right: &Right| is(right, &PLURALS, "patch");
        roles.start_without(&mut world, patch).await;
        world.apply(&objects());
        roles.are_named(&world, patch).await;
        let status = |right: &Right| right.1.ends_with("/status");
        roles.start_without(&mut world, status).await;
        roles.are_named(&world, status).await;

        // Secrets: the status names it, and the token is issued when the right is there.
        let secrets = |right: &Right| is(right, &["secrets"], "create");
        let token = "apiVersion: hanse.dev/v1alpha1\nkind: ClusterJoinToken\nmetadata: {name: late}\nspec: {cluster: a, secretName: late}\n";
        roles.start_without(&mut world, secrets).await;
        world.apply(token);
        let expected = ["False", "SecretNotWritten"].map(str::to_owned);
        world.until("not written", || world.condition("cjt/late", "Issued") == expected).await;
        let named = world.status("cjt/late").to_string();
        assert!(named.contains("cannot create resource") && named.contains("secrets"), "{named}");
        roles.are_named(&world, secrets).await;
        roles.take_away(&world, |_| false).await;
        world.until("issued", || world.condition("cjt/late", "Issued")[0] == "True").await;

        // Events of refusals: the condition is there in any case.
        let events = |right: &Right| is(right, &["events"], "create");
        roles.start_without(&mut world, events).await;
        world.apply(&policy("refused", "tier: none, selector: all(), types: [Ingress], ingress: []"));
        world.until("refused", || world.condition("fnp/refused", "Accepted")[1] == "TierNotFound").await;
        roles.are_named(&world, events).await;

        // A cluster that has no MemberCluster.
        let create = |right: &Right| is(right, &["memberclusters"], "create");
        roles.start_without(&mut world, create).await;
        world.hub.take().expect("it runs").stop(PATIENCE).expect("it stops");
        world.succeed(&["patch", "mc/default", "--type=merge", "-p", r#"{"metadata":{"finalizers":[]}}"#]);
        world.succeed(&["delete", "--timeout=60s", "mc/default"]);
        world.start_hub();
        roles.are_named(&world, create).await;

        // Deletions wait, since the operator cannot know what they mean.
        let definitions = |right: &Right| is(right, &["customresourcedefinitions"], "get");
        roles.start_without(&mut world, definitions).await;
        world.until("adopted", || world.kubectl(&["get", "mc/default"]).0).await;
        for plural in PLURALS {
            world.succeed(&["delete", "--wait=false", &format!("{plural}.hanse.dev"), "--all"]);
        }
        for right in roles.rights().into_iter().filter(|right| definitions(right)) {
            let name = right.3.clone().expect("the definition");
            let named = format!("read the CustomResourceDefinition {name}: ");
            world.until(&named, || world.operator().to_string().contains(&named)).await;
            roles.needed.insert(right);
        }
        assert!(world.stored().contains("default"), "{}", world.stored());
        roles.take_away(&world, |_| false).await;
        world.until("deleted", || world.stored().trim().is_empty()).await;
        world.until_operated().await;
        world.until("released", || world.succeed(&["get", "hanse", "-o", "name"]).is_empty()).await;
        assert_eq!(roles.needed, roles.rights(), "each right is needed");
    });
}
