//! `hanse policy approve` at a hub without an operator.

use std::path::PathBuf;

use crate::online::{Done, World, policy, run};

const STRICT: &str =
    "apiVersion: hanse.dev/v1alpha1\nkind: Tier\nmetadata: {name: platform}\nspec: {order: 1, requireApproval: true}\n";

impl World {
    /// The context of a new user.
    fn user(&self, name: &str, role: &str) -> PathBuf {
        let out = self.folder.path().join(name);
        let created = self.hanse(&["user", "create", name, "--role", role, "--out", out.to_str().expect("UTF-8")]);
        assert_eq!(created.code, Some(0), "{created:?}");
        out.join(format!("{name}.context"))
    }
}

#[test]
fn changes_wait_until_another_user_approves_them() {
    let world = World::new();
    let (ada, bob) = (world.user("ada", "author=platform"), world.user("bob", "approver=platform"));
    let listed = world.hanse(&["user", "list"]);
    assert!(listed.out.contains("approver=platform"), "{listed:?}");
    assert_eq!(world.apply(STRICT, &[]).code, Some(0));

    let applied = run(Some(&ada), &["apply", "-f", "-"], &policy("web", "platform", 1));
    assert!(applied.code == Some(0) && applied.out.contains("web pending"), "{applied:?}");
    let advice = "a user other than user/ada with the role approver in it runs `hanse policy approve";
    assert!(applied.err.contains(advice), "{applied:?}");
    assert_eq!(run(Some(&ada), &["get", "fnp", "web"], "").code, Some(1), "it is not in force");

    let approve =
        |who: &PathBuf, option: &str| -> Done { run(Some(who), &["policy", "approve", "fnp/web", option], "") };
    let shown = approve(&bob, "--show");
    let is_shown = |text: &str| shown.out.contains(text);
    assert!(shown.code == Some(0) && is_shown("sent by user/ada; tier platform requires an approval"), "{shown:?}");
    assert!(is_shown("+ kind: FederatedNetworkPolicy") && is_shown("sha256:"), "{shown:?}");
    let list = |who: &PathBuf, options: &[&str]| run(Some(who), &[&["policy", "pending"], options].concat(), "");
    let listed = list(&ada, &[]);
    let words = ["FederatedNetworkPolicy/web", "apply", "platform", "user/ada", "by another user"];
    assert!(words.iter().all(|it| listed.out.contains(it)), "{listed:?}");
    assert!(list(&ada, &["--approvable"]).out.contains("no change waits"));
    let listed = list(&bob, &["--approvable", "-o", "json"]).json();
    assert_eq!((&listed["kind"], &listed["items"][0]["canApprove"]), (&"PendingChangeList".into(), &true.into()));
    let dropped = run(Some(&ada), &["policy", "reject", "fnp/web"], "");
    assert!(dropped.code == Some(0) && dropped.out.contains("is dropped"), "{dropped:?}");
    assert!(list(&bob, &[]).out.contains("no change waits"));
    assert!(run(Some(&ada), &["apply", "-f", "-"], &policy("web", "platform", 1)).out.contains("web pending"));
    let denied = approve(&ada, "--yes");
    assert!(denied.code == Some(1) && denied.err.contains("needs the role approver=platform"), "{denied:?}");
    let unasked = run(Some(&bob), &["policy", "approve", "fnp/web"], "");
    assert!(unasked.code == Some(1) && unasked.err.contains("not a terminal"), "{unasked:?}");
    let approved = approve(&bob, "--yes");
    assert!(approved.code == Some(0) && approved.out.contains("FederatedNetworkPolicy/web approved"), "{approved:?}");
    assert_eq!(run(Some(&ada), &["get", "fnp", "web"], "").code, Some(0));
    let again = approve(&bob, "--yes");
    assert!(again.code == Some(1) && again.err.contains("no change of FederatedNetworkPolicy/web waits"), "{again:?}");

    let deleted = run(Some(&ada), &["delete", "fnp", "web"], "");
    assert!(deleted.code == Some(0) && deleted.out.contains("web pending"), "{deleted:?}");
    let shown = approve(&bob, "--show");
    assert!(shown.out.contains("- kind: FederatedNetworkPolicy"), "{shown:?}");
    assert_eq!(approve(&bob, "--yes").code, Some(0));
    assert_eq!(run(Some(&ada), &["get", "fnp", "web"], "").code, Some(1));
    let audit = world.hanse(&["audit", "-o", "json", "--object", "FederatedNetworkPolicy/web"]).json();
    let actions: Vec<String> = audit["items"]
        .as_array()
        .expect("a list")
        .iter()
        .rev()
        .map(|it| format!("{} {}", it["who"], it["action"]).replace('"', ""))
        .collect();
    let expected = [
        "user/ada propose",
        "user/ada reject",
        "user/ada propose",
        "user/ada approve",
        "user/bob approve",
        "user/ada propose",
        "user/bob approve",
    ];
    assert_eq!(actions, expected, "{audit:#}");
}
