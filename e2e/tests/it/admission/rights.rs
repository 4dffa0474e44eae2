//! What is checked before an object is stored, and what the audit log says of it: with kubectl, and with Helm.

use std::fs;

use hanse_e2e::kubernetes::run;
use serde_json::json;

use super::{World, deny, policy, text, tier};

const POLICY_TEMPLATE: &str = "apiVersion: hanse.dev/v1alpha1
kind: FederatedNetworkPolicy
metadata: {name: '{{ .Release.Name }}'}
spec: {tier: '{{ .Values.tier }}', order: {{ .Values.order }}, selector: all(), types: [Ingress], ingress: []}
";

/// Users of Helm store their releases in a namespace.
const RELEASES: &str = "apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: releases, namespace: default}
rules: [{apiGroups: [''], resources: [secrets], verbs: ['*']}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: releases, namespace: default}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: releases}
subjects: [{kind: User, name: ada}, {kind: User, name: mallory}]
";

const FORBIDDEN: &str = "needs the verb \"use\" on tiers.hanse.dev/";

impl World {
    /// Helm as a user; the chart has one FederatedNetworkPolicy with the name of the release.
    fn helm(&self, user: &str, verb: &str, release: &str, values: &[&str]) -> (bool, String) {
        let chart = self.folder.path().join("policies");
        if !chart.exists() {
            fs::create_dir_all(chart.join("templates")).expect("a folder");
            fs::write(chart.join("Chart.yaml"), "apiVersion: v2\nname: policies\nversion: 0.1.0\n").expect("written");
            fs::write(chart.join("templates/policy.yaml"), POLICY_TEMPLATE).expect("written");
        }
        let mut command = self.server.helm().expect("Helm");
        command.env("KUBECONFIG", self.kubeconfig_of(user)).args([verb, release, "--namespace", "default"]);
        if verb != "uninstall" {
            command.arg(&chart);
        }
        values.iter().for_each(|value| _ = command.args(["--set", value]));
        text(&command.output().expect("it runs"))
    }

    fn helm_refused(&self, verb: &str, release: &str, values: &[&str]) {
        let (success, text) = self.helm("mallory", verb, release, values);
        assert!(!success && text.contains(&format!("{FORBIDDEN}platform")), "{verb} {release} {values:?}: {text}");
    }
}

/// A user without `use` on a tier cannot write into it with Helm either.
fn helm_is_refused_alike(world: &World) {
    world.apply("", RELEASES);
    let done = |user: &str, verb: &str, release: &str, values: &[&str]| {
        let (success, text) = world.helm(user, verb, release, values);
        assert!(success, "{user} {verb} {release}: {text}\n{}", world.hub_log());
    };
    world.helm_refused("install", "stolen", &["tier=platform", "order=1"]);
    assert!(!world.kubectl("", &["get", "fnp/stolen"]).0, "nothing is stored");
    done("ada", "install", "shop", &["tier=platform", "order=1"]);
    done("mallory", "install", "mine", &["tier=other", "order=1"]);
    // Neither into the tier, nor out of it, nor in it.
    world.helm_refused("upgrade", "mine", &["tier=platform", "order=1"]);
    world.helm_refused("upgrade", "shop", &["tier=other", "order=1"]);
    world.helm_refused("upgrade", "shop", &["tier=platform", "order=2"]);
    // Helm does not print why a deletion fails.
    assert!(!world.helm("mallory", "uninstall", "shop", &[]).0);
    let audit = world.server.audit().expect("the audit log");
    let is_refusal = |it: &&serde_json::Value| {
        let message = it["responseStatus"]["message"].as_str().unwrap_or_default();
        it["user"]["username"] == "mallory"
            && it["verb"] == "delete"
            && it["objectRef"]["name"] == "shop"
            && message.contains(&format!("{FORBIDDEN}platform"))
    };
    assert!(audit.iter().any(|it| is_refusal(&it)), "the webhook refuses the deletion");
    let tier = |name: &str| world.kubectl("", &["get", name, "-o", "jsonpath={.spec.tier} {.spec.order}"]).1;
    assert_eq!((tier("fnp/shop"), tier("fnp/mine")), ("platform 1".to_owned(), "other 1".to_owned()));
    done("mallory", "upgrade", "mine", &["tier=other", "order=2"]);
    assert_eq!(tier("fnp/mine"), "other 2");
}

#[test]
fn only_users_of_a_tier_write_its_policies() {
    run(async {
        let world = World::start(86_400).await;
        // Tiers are a matter of RBAC on the kind.
        for name in ["platform", "other"] {
            world.apply("", &tier(name, "phase: Guard, order: 100, defaultAction: Deny"));
        }
        // What would not compile is refused, with the words of `hanse policy check`; other kinds are not concerned.
        let (_, text) = world.try_apply("ada", &policy("wrong", "tier: platform, selector: \"app ==\""));
        assert!(text.contains("denied the request: spec.selector:"), "{text}");

        world.apply("ada", &policy("web", &deny("platform")));
        world.accepted("fnp/web").await;
        let records = world.audit("FederatedNetworkPolicy/web");
        assert_eq!(records.len(), 1, "{records:?}");
        assert_eq!(
            (&records[0]["who"], &records[0]["action"], &records[0]["outcome"]),
            (&json!("kubernetes/ada"), &json!("apply"), &json!("done"))
        );
        assert_eq!(records[0]["after"]["spec"]["tier"], "platform");
        assert!(records[0]["before"].is_null());

        // Without the right: not into a tier, not out of one, and neither change nor deletion.
        let before = world.in_force("fnp", "web");
        world.apply_refused("mallory", &policy("new", &deny("platform")), &format!("{FORBIDDEN}platform"));
        world.apply_refused("mallory", &policy("web", &deny("other")), &format!("{FORBIDDEN}platform"));
        world.apply("mallory", &policy("own", &deny("other")));
        world.apply_refused("mallory", &policy("own", &deny("platform")), &format!("{FORBIDDEN}platform"));
        let staged = policy("web", &deny("platform")).replace("kind: Fed", "kind: StagedFed");
        world.apply_refused("mallory", &staged, &format!("{FORBIDDEN}platform"));
        // Nor out of one that only the stored version is in: the tier does not exist, so nothing of the policy is in force.
        world.apply("", &policy("early", &deny("absent")));
        world.apply_refused("mallory", &policy("early", &deny("other")), &format!("{FORBIDDEN}absent"));
        assert!(world.kubectl("", &["delete", "--timeout=60s", "fnp/early"]).0, "{}", world.hub_log());
        world.refused("mallory", &["delete", "fnp/web"], &format!("{FORBIDDEN}platform"));
        world.refused("mallory", &["delete", "fnp", "--all"], &format!("{FORBIDDEN}platform"));
        let collection = "/apis/hanse.dev/v1alpha1/federatednetworkpolicies";
        world.refused("mallory", &["delete", "--raw", collection], &format!("{FORBIDDEN}platform"));
        world.refused("mallory", &["label", "fnp/web", "a=b"], &format!("{FORBIDDEN}platform"));
        let set = "apiVersion: hanse.dev/v1alpha1\nkind: FederatedNetworkSet\nmetadata: {name: nets}\nspec: {nets: [10.0.0.0/8]}\n";
        world.apply_refused("mallory", set, "on all tiers.hanse.dev");
        world.apply_refused("ada", set, "on all tiers.hanse.dev");
        world.apply("", set);
        // With one of two tiers, the user cannot move a policy between them.
        world.apply_refused("ada", &policy("web", &deny("other")), &format!("{FORBIDDEN}other"));
        assert_eq!(world.in_force("fnp", "web"), before);
        let denials = world.audit("FederatedNetworkPolicy/new");
        assert_eq!(denials[0]["who"], "kubernetes/mallory");
        assert!(denials[0]["outcome"].as_str().is_some_and(|it| it.contains(FORBIDDEN)), "{denials:?}");

        // What another plugin refuses later, and what is not done, is not part of the log as done.
        let refused = policy("web", &format!("{}, order: 7", deny("platform")));
        let path = world.folder.path().join("dry.yaml");
        std::fs::write(&path, &refused).expect("written");
        let dry = ["apply", "--dry-run=server", "-f", path.to_str().expect("UTF-8")];
        assert!(world.kubectl("ada", &dry).0);
        let policies = "apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingWebhookConfiguration
metadata: {name: zz-later}
webhooks:
- name: later.example.com
  admissionReviewVersions: [v1]
  sideEffects: None
  failurePolicy: Fail
  timeoutSeconds: 1
  clientConfig: {url: 'https://127.0.0.1:1/'}
  rules: [{apiGroups: [hanse.dev], apiVersions: ['*'], resources: [federatednetworkpolicies], operations: [UPDATE]}]
";
        world.apply("", policies);
        world
            .until("the other webhook refuses", || world.try_apply("ada", &refused).1.contains("later.example.com"))
            .await;
        assert!(world.kubectl("", &["delete", "validatingwebhookconfiguration", "zz-later"]).0);
        world.until("it is gone", || world.kubectl("bob", &["annotate", "--overwrite", "fnp/web", "x=y"]).0).await;

        // The author of a change is who sent it, whatever others sent before.
        let changed = policy("web", &format!("{}, order: 5", deny("platform")));
        world.until("changed", || world.try_apply("bob", &changed).0).await;
        world.until("changed", || world.in_force("fnp", "web")["spec"]["order"] == 5).await;
        assert!(world.kubectl("ada", &["delete", "--timeout=60s", "fnp/web"]).0, "{}", world.hub_log());
        let records = world.audit("FederatedNetworkPolicy/web");
        let all: Vec<String> = records
            .iter()
            .map(|it| {
                let order = |version: &str| it[version]["spec"]["order"].to_string();
                let who = it["who"].as_str().unwrap_or_default();
                format!("{who} {} {} {}", it["action"], order("before"), order("after"))
            })
            .filter(|it| !it.contains("mallory"))
            .collect();
        let expected = [
            "kubernetes/ada \"delete\" 5 null",
            "kubernetes/bob \"apply\" null 5",
            "kubernetes/ada \"apply\" null null",
        ];
        // A denial of ada, for the move.
        let all: Vec<&str> = all.iter().map(String::as_str).filter(|it| !it.is_empty()).collect();
        let done: Vec<&&str> = all.iter().filter(|it| expected.contains(it)).collect();
        assert_eq!(done, expected.iter().collect::<Vec<_>>(), "{records:#?}");
        helm_is_refused_alike(&world);
        assert_eq!(world.forbidden(), Vec::<String>::new());
    });
}
