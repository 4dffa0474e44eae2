//! The webhook of the hub as a pod of the chart, called by a real API server: without one of its rights, what fails is named.

use std::collections::BTreeSet;

use hanse_e2e::kubernetes::until;
use serde_json::{Value, json};

use super::Installer;
use crate::chart::installed::{Right, rights};
use crate::chart::{self, NAMESPACE, list, rendered};
use crate::clusters::east::East;
use crate::clusters::nodes::PATIENCE;

/// API servers are at the router. The certificate is renewed during the test.
pub const VALUES: [&str; 3] = [
    "--set=hub.webhook.enabled=true",
    "--set=hub.webhook.from[0].ipBlock.cidr=169.254.2.1/32",
    "--set=hub.webhook.certificateSeconds=60",
];
/// What the roles of the webhook permit, and what installs its configuration.
pub const RESOURCES: [&str; 5] =
    ["validatingwebhookconfigurations", "subjectaccessreviews", "federatednetworkpolicies", "tiers", "policyapprovals"];
const CONFIGURATION: &str = "validatingwebhookconfiguration/hanse-hub";
const TIER: &str = "apiVersion: hanse.dev/v1alpha1
kind: Tier
metadata: {name: platform}
spec: {phase: Guard, order: 100}
";

fn policy(name: &str, selector: &str) -> String {
    format!(
        "apiVersion: hanse.dev/v1alpha1\nkind: FederatedNetworkPolicy\nmetadata: {{name: {name}}}\nspec: {{tier: platform, selector: \
         \"{selector}\", types: [Ingress], ingress: [{{action: Allow}}]}}\n"
    )
}

/// Of an object that does not exist.
fn approval(kind: &str) -> String {
    let spec = json!({
        "action": "Apply", "kind": kind, "name": "none", "uid": "0", "generation": 1,
        "digest": format!("sha256:{}", "0".repeat(64)),
    });
    json!({"apiVersion": "hanse.dev/v1alpha1", "kind": "PolicyApproval", "metadata": {"name": "unseen"}, "spec": spec})
        .to_string()
}

struct Webhook<'a> {
    east: &'a East,
    /// Its ClusterRole, as the chart renders it.
    role: Value,
    /// Rights whose absence was named.
    needed: BTreeSet<Right>,
}

impl Webhook<'_> {
    fn log(&self) -> String {
        self.east.programs.log(NAMESPACE, "hanse-hub-0", "hub").replace('\\', "")
    }

    /// Whether the API server stores an object, and its answer.
    fn create(&self, text: &str) -> (bool, String) {
        let mut kubectl = self.east.server.kubectl().expect("kubectl");
        let created = chart::output(kubectl.args(["create", "-f", "-"]), text);
        (created.status.success(), String::from_utf8_lossy(&[created.stdout, created.stderr].concat()).into_owned())
    }

    /// The right to do this with a resource.
    fn right(&self, resource: &str, verb: &str) -> Right {
        rights(&self.role).into_iter().find(|right| right.1 == resource && right.2 == verb).expect("a right")
    }

    fn take_away(&self, missing: &[&Right]) {
        let all = rights(&self.role);
        let rules = all.iter().filter(|it| !missing.contains(it)).map(|(group, resource, verb, name)| {
            json!({"apiGroups": [group], "resources": [resource], "verbs": [verb], "resourceNames": name.as_slice()})
        });
        let mut less = self.role.clone();
        less["rules"] = rules.collect();
        self.replace(&less);
    }

    fn replace(&self, role: &Value) {
        self.east.kubectl(&["replace", "-f", "-"], &role.to_string());
    }

    /// Without a right, `text` reports it.
    async fn is_named(&mut self, resource: &str, verb: &str, mut text: impl FnMut(&Self) -> String) {
        let missing = self.right(resource, verb);
        self.take_away(&[&missing]);
        let named = format!("cannot {verb} resource \"{resource}\" in API group \"{}\"", missing.0);
        // The client library does not always pass on why a watch is refused.
        let watch = "PolicyApprovals cannot be watched";
        let mut last = String::new();
        let found = until(PATIENCE, async || {
            last = text(self);
            last.contains(&named) || (verb == "watch" && last.contains(watch))
        });
        assert!(found.await.is_some(), "without it, nothing says: {named}\n{last}\n{}", self.log());
        self.needed.insert(missing);
        self.replace(&self.role);
    }

    /// Starts the hub again. Returns what the log contained before.
    async fn restart(&self) -> String {
        let before = self.log();
        self.east.kubectl(&["--namespace", NAMESPACE, "delete", "pod", "hanse-hub-0"], "");
        self.east.ready_component("hub", 1).await;
        before
    }
}

pub async fn needs_its_rights(east: &East) {
    let mut values = chart::complete();
    for (path, value) in [
        ("hub.operator", json!({"enabled": true})),
        ("hub.webhook", json!({"enabled": true, "from": [{"ipBlock": {"cidr": "169.254.2.1/32"}}]})),
    ] {
        values = chart::set(values, path, value);
    }
    let role = rendered(&values).into_iter();
    let mut role = role.filter(|it| it["kind"] == "ClusterRole" && it["metadata"]["name"] == "hanse-hub-webhook");
    let role = role.next().expect("the role of the webhook");
    assert!(list(&role, "rules").count() > 0);
    let mut webhook = Webhook { east, role, needed: BTreeSet::new() };

    // It refuses what would not compile, through the NetworkPolicy of the chart, which agents enforce.
    east.kubectl(&["apply", "-f", "-"], TIER);
    let (stored, text) = webhook.create(&policy("wrong", "app =="));
    assert!(!stored && text.contains("denied the request"), "{text}");

    let log = |webhook: &Webhook<'_>| webhook.log();
    webhook.is_named("validatingwebhookconfigurations", "get", log).await;
    east.kubectl(&["wait", "--for=create", CONFIGURATION], "");
    // Nor can it write the configuration, while another user removes the webhooks from it.
    webhook
        .is_named("validatingwebhookconfigurations", "update", |webhook| {
            webhook.east.kubectl(&["patch", CONFIGURATION, "--type=merge", "-p", r#"{"webhooks":[]}"#], "");
            webhook.log()
        })
        .await;
    // It must neither see the approval nor delete it at once.
    let update = webhook.right("validatingwebhookconfigurations", "update");
    webhook.take_away(&[&update, &webhook.right("policyapprovals", "delete")]);
    let unseen = until(PATIENCE, async || {
        east.kubectl(&["patch", CONFIGURATION, "--type=merge", "-p", r#"{"webhooks":[]}"#], "");
        webhook.create(&approval("Tier")).0
    });
    assert!(unseen.await.is_some(), "no webhook sees it");
    webhook.is_named("policyapprovals", "delete", log).await;
    let is_deleted = until(PATIENCE, async || east.kubectl(&["get", "policyapprovals", "-o", "name"], "").is_empty());
    assert!(is_deleted.await.is_some(), "{}", webhook.log());

    // What fails for a user is in the answer.
    webhook.is_named("subjectaccessreviews", "create", |it| it.create(&policy("web", "app == 'web'")).1).await;
    for (kind, resource) in [("FederatedNetworkPolicy", "federatednetworkpolicies"), ("Tier", "tiers")] {
        webhook.is_named(resource, "get", |it| it.create(&approval(kind)).1).await;
    }
    for verb in ["list", "watch"] {
        webhook.take_away(&[&webhook.right("policyapprovals", verb)]);
        let before = webhook.restart().await;
        webhook.is_named("policyapprovals", verb, |it| it.log().replacen(&before, "", 1)).await;
    }
    assert_eq!(webhook.needed, rights(&webhook.role), "each right is needed");
    let stored = until(PATIENCE, async || webhook.create(&policy("later", "app == 'web'")).0);
    assert!(stored.await.is_some(), "with all rights, it is stored: {}", webhook.log());
    assert_eq!(Installer::new(east).install(&[]).0, Some(0));
}
