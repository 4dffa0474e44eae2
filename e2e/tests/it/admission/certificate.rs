//! The webhook's certificate, and API servers without a webhook.

use hanse_e2e::kubernetes::certificates::Authority;
use hanse_e2e::kubernetes::run;
use serde_json::{Value, json};

use super::{World, deny, policy, tier};

const TIER: &str = "tiers.hanse.dev/platform";

#[test]
fn nothing_opens_without_a_webhook() {
    run(async {
        // The certificate ends after 6 s, and is replaced after 4 s.
        let mut world = World::start(6).await;
        world.apply("", &tier("platform", "phase: Guard, order: 100, defaultAction: Deny"));
        world.apply("ada", &policy("web", &deny("platform")));
        world.accepted("fnp/web").await;
        world.until_condition(TIER, "Admission", "True", "Ready").await;
        let in_force = world.in_force("fnp", "web");
        assert!(in_force.is_object());

        // It rotates by itself, and no write is refused meanwhile.
        let renewed = || world.hub_log().matches("certificate of the webhook renewed").count();
        let before = renewed();
        let (mut writes, mut last) = (0, 0);
        while renewed() < before + 3 {
            writes += 1;
            let changed = policy("other", &format!("{}, order: {writes}", deny("platform")));
            world.apply("ada", &changed);
            last = writes;
        }
        world.until("the last write is in force", || world.in_force("fnp", "other")["spec"]["order"] == last).await;
        println!("{writes} writes while the certificate was renewed three times");

        // Without the right to make a new certificate known, the old one expires.
        let role = "clusterrole/hanse-hub-webhook";
        let rules = world.kubectl("", &["get", role, "-o", "jsonpath={.rules}"]).1;
        let rules: Value = serde_json::from_str(&rules).expect("JSON");
        let mut fewer = rules.clone();
        let all = fewer.as_array_mut().expect("rules");
        all.retain(|rule| rule["resources"] != json!(["validatingwebhookconfigurations"]));
        assert_eq!(all.len(), rules.as_array().map_or(0, Vec::len) - 1);
        let set = |rules: &Value| {
            let patch = json!({"rules": rules}).to_string();
            assert!(world.kubectl("", &["patch", role, "--type=merge", "-p", &patch]).0);
        };
        set(&fewer);
        let changed = policy("web", &format!("{}, order: 9", deny("platform")));
        let dry = ["delete", "--dry-run=server", "fnp/web"];
        world.until("it has expired", || world.kubectl("ada", &dry).1.contains("certificate has expired")).await;
        world.apply_refused("ada", &changed, "certificate has expired");
        world.refused("ada", &["delete", "fnp/web"], "certificate has expired");
        // Status says so, and the rest goes on: what is in force stays, other kinds are written, and the operator writes its own.
        world.until_condition(TIER, "Admission", "False", "CertificateExpired").await;
        let message = world.condition(TIER, "Admission")[2].clone();
        assert!(message.contains("validatingwebhookconfigurations") && message.contains("forbidden"), "{message}");
        let status = || world.hanse(&["status", "-o", "json"]).1;
        let problem = |text: &str| -> Value {
            let status: Value = serde_json::from_str(text).unwrap_or_default();
            status["operator"]["problems"].as_array().and_then(|it| it.first()).cloned().unwrap_or_default()
        };
        let shown = problem(&status());
        assert_eq!((&shown["reason"], &shown["message"]), (&json!("CertificateExpired"), &json!(message)), "{shown}");
        assert!(world.kubectl("ada", &["create", "configmap", "other-kinds"]).0);
        assert_eq!(world.in_force("fnp", "web"), in_force);
        // With the right, everything converges.
        set(&rules);
        world.until("it is accepted again", || world.try_apply("ada", &changed).0).await;
        world.until("it is in force", || world.in_force("fnp", "web")["spec"]["order"] == 9).await;
        world.until_condition(TIER, "Admission", "True", "Ready").await;
        world.until("status has no problem", || problem(&status()).is_null()).await;

        // Another program that removes the certificate again and again is named.
        let clear = r#"[{"op": "remove", "path": "/webhooks/0/clientConfig/caBundle"}]"#;
        let patch = ["patch", "validatingwebhookconfiguration", "hanse-hub", "--type=json", "-p", clear];
        let is_named = || {
            world.kubectl("", &patch);
            problem(&status())["reason"] == "ConfigurationOverwritten"
        };
        world.until("status names the removal of the certificate", is_named).await;
        world.until("it is repaired", || world.try_apply("ada", &changed).0).await;
        // One that removes everything, and claims a later revision, leaves nothing that is checked.
        let configuration = ["patch", "validatingwebhookconfiguration", "hanse-hub", "--type=merge", "-p"];
        let revision = |value: &str| json!({"metadata": {"annotations": {"hanse.dev/webhooks-revision": value}}});
        let mut emptied = revision("4000000000");
        emptied["webhooks"] = json!([]);
        assert!(world.kubectl("", &[&configuration[..], &[&emptied.to_string()]].concat()).0);
        let is_named = || problem(&status())["message"].to_string().contains("contains no webhook");
        world.until("status says that nothing is checked", is_named).await;
        assert!(world.kubectl("", &[&configuration[..], &[&revision("0").to_string()]].concat()).0);
        world
            .until("it is repaired", || {
                world
                    .kubectl("", &["get", "validatingwebhookconfiguration", "hanse-hub", "-o", "yaml"])
                    .1
                    .contains("caBundle")
            })
            .await;
        world.until("it is accepted again", || world.try_apply("ada", &changed).0).await;

        // An API server without a certificate of the authority is refused: it cannot send a review, and nothing is written.
        let clients = world.folder.path().join("clients.pem");
        let authority = std::fs::read_to_string(&clients).expect("the authority");
        let other = Authority::create("other").expect("an authority");
        world.hub.take().expect("it runs").kill().expect("killed");
        std::fs::write(&clients, other.pem()).expect("written");
        world.start_hub();
        let refused = || world.try_apply("ada", &policy("web", &deny("platform"))).1.contains("remote error: tls");
        world.until("the API server is refused", refused).await;
        // The authority is read again when the file changes.
        std::fs::write(&clients, authority).expect("written");
        let again = policy("web", &format!("{}, order: 10", deny("platform")));
        world.until("it is accepted again", || world.try_apply("ada", &again).0).await;

        // Without a hub, no policy is written; other kinds are.
        world.hub.take().expect("it runs").kill().expect("killed");
        let (success, text) = world.try_apply("ada", &policy("web", &deny("platform")));
        assert!(!success && text.contains("failed calling webhook"), "{text}");
        world.refused("ada", &["delete", "fnp/web"], "failed calling webhook");
        world.refused("", &["delete", "fnp", "--all"], "failed calling webhook");
        assert!(world.kubectl("ada", &["create", "configmap", "other-kinds-too"]).0);
        // What changes no spec is not delayed.
        assert!(world.kubectl("ada", &["annotate", "fnp/web", "x=y"]).0);
        world.start_hub();
        world.until("it is accepted again", || world.try_apply("ada", &policy("web", &deny("platform"))).0).await;
        world.until("it is in force", || world.in_force("fnp", "web")["spec"] == in_force["spec"]).await;
    });
}
