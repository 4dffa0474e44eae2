//! Approvals at a hub without an operator: by the roles of its users, over real TLS.

use hanse_proto::federation::v1 as wire;
use tonic::Code;
use wire::role::Role;

use crate::support::{Admin, TestHub, apply, policy, tier};

const POLICY: wire::ObjectKind = wire::ObjectKind::FederatedNetworkPolicy;
const TIER: wire::ObjectKind = wire::ObjectKind::Tier;

fn strict(require: bool) -> Vec<u8> {
    let text = String::from_utf8(tier("strict")).unwrap();
    text.replace("\"order\":1", &format!("\"order\":1,\"requireApproval\":{require}")).into_bytes()
}

/// A policy with another order.
fn ordered(tier: &str, order: u32) -> Vec<u8> {
    let text = String::from_utf8(policy("web", tier)).unwrap();
    assert!(text.contains("\"order\":10"), "{text}");
    text.replace("\"order\":10", &format!("\"order\":{order}")).into_bytes()
}

fn tiers(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

/// Applies a manifest; returns whether it waits.
async fn waits(user: &mut Admin, manifest: Vec<u8>) -> bool {
    let applied = user.apply(apply(manifest)).await.unwrap().into_inner();
    let is_pending = applied.applied() == wire::Applied::Pending;
    assert_eq!(is_pending, applied.warnings.iter().any(|it| it.contains("hanse policy approve")), "{applied:?}");
    is_pending
}

async fn manifest(user: &mut Admin, kind: wire::ObjectKind, name: &str) -> Option<serde_json::Value> {
    let request = wire::GetRequest { kind: kind.into(), name: name.to_owned() };
    let objects = user.get(request).await.unwrap().into_inner().objects;
    objects.first().map(|object| serde_json::from_slice(&object.manifest).unwrap())
}

/// The order of the policy in force.
async fn in_force(user: &mut Admin) -> Option<u64> {
    manifest(user, POLICY, "web").await.map(|it| it["spec"]["order"].as_u64().unwrap())
}

/// The order of the staged policy, and its action.
async fn stage(user: &mut Admin) -> Option<(u64, String)> {
    let staged = manifest(user, wire::ObjectKind::StagedFederatedNetworkPolicy, "web").await?;
    Some((
        staged["spec"]["order"].as_u64().unwrap(),
        staged["spec"]["stagedAction"].as_str().unwrap_or_default().to_owned(),
    ))
}

async fn pending(user: &mut Admin, kind: wire::ObjectKind, name: &str) -> Result<wire::PendingChange, Code> {
    let request = wire::GetPendingRequest { kind: kind.into(), name: name.to_owned() };
    user.get_pending(request).await.map(tonic::Response::into_inner).map_err(|status| status.code())
}

async fn approve(user: &mut Admin, kind: wire::ObjectKind, name: &str, digest: &str) -> Result<u64, (Code, String)> {
    let request = wire::ApproveRequest { kind: kind.into(), name: name.to_owned(), digest: digest.to_owned() };
    let approved = user.approve(request).await.map_err(|status| (status.code(), status.message().to_owned()))?;
    Ok(approved.into_inner().revision)
}

fn denied(result: Result<u64, (Code, String)>, words: &str) {
    let (code, message) = result.unwrap_err();
    assert!(code == Code::PermissionDenied && message.contains(words), "{code:?}: {message}");
}

#[tokio::test]
async fn another_user_with_the_role_approves_a_change() {
    let test = TestHub::start().await;
    let mut admin = test.admin().await;
    let mut ada = test.user("ada", Role::Author(wire::Author { tiers: tiers(&["strict", "open"]) })).await;
    let mut bob = test.user("bob", Role::Approver(wire::Approver { tiers: tiers(&["strict"]) })).await;
    let mut eve = test.user("eve", Role::Approver(wire::Approver { tiers: tiers(&["open"]) })).await;
    for tier in [tier("open"), strict(true)] {
        assert!(!waits(&mut admin, tier).await, "to require approvals needs none");
    }

    // Creation: a staged policy, and nothing in force.
    assert!(waits(&mut ada, ordered("strict", 1)).await);
    assert_eq!((in_force(&mut ada).await, stage(&mut ada).await), (None, Some((1, "Set".to_owned()))));
    let waiting = pending(&mut bob, POLICY, "web").await.unwrap();
    assert_eq!((&waiting.authors[..], &waiting.tiers[..]), (&["user/ada".to_owned()][..], &["strict".to_owned()][..]));
    assert!(!waiting.deletion && waiting.before.is_empty() && waiting.after == ordered("strict", 1));
    denied(approve(&mut ada, POLICY, "web", &waiting.digest).await, "needs the role approver=strict");
    denied(approve(&mut eve, POLICY, "web", &waiting.digest).await, "needs the role approver=strict");
    let (code, _) = approve(&mut bob, POLICY, "web", "sha256:0").await.unwrap_err();
    assert_eq!(code, Code::FailedPrecondition, "of another change");
    // Who sends the same change is an author as well, also an administrator.
    assert!(waits(&mut admin, ordered("strict", 1)).await);
    denied(approve(&mut admin, POLICY, "web", &waiting.digest).await, "user/admin is an author of the change");
    let test = test.restart().await;
    let (mut admin, mut bob) = (test.admin().await, bob_again(&test).await);
    let mut ada = test.user("ada", Role::Author(wire::Author { tiers: tiers(&["strict", "open"]) })).await;
    assert_eq!(pending(&mut bob, POLICY, "web").await.unwrap().authors, ["user/ada", "user/admin"]);
    approve(&mut bob, POLICY, "web", &waiting.digest).await.unwrap();
    assert_eq!((in_force(&mut ada).await, stage(&mut ada).await), (Some(1), None));
    assert_eq!(pending(&mut bob, POLICY, "web").await, Err(Code::NotFound));

    // A change: the version in force stays; another change replaces it, and the version in force withdraws it.
    assert!(waits(&mut ada, ordered("strict", 2)).await);
    let second = pending(&mut bob, POLICY, "web").await.unwrap();
    assert_eq!(second.before, ordered("strict", 1));
    assert!(waits(&mut ada, ordered("strict", 3)).await);
    assert_eq!((in_force(&mut ada).await, stage(&mut ada).await), (Some(1), Some((3, "Set".to_owned()))));
    let (code, _) = approve(&mut bob, POLICY, "web", &second.digest).await.unwrap_err();
    assert_eq!(code, Code::FailedPrecondition, "it was replaced");
    assert!(!waits(&mut ada, ordered("strict", 1)).await);
    assert_eq!((pending(&mut bob, POLICY, "web").await, stage(&mut ada).await), (Err(Code::NotFound), None));

    // A move out of the tier, and a dry run of one.
    let dry = ada.dry_run(apply(ordered("open", 4))).await.unwrap().into_inner();
    assert_eq!(dry.applied(), wire::Applied::Pending, "{dry:?}");
    assert_eq!(pending(&mut bob, POLICY, "web").await, Err(Code::NotFound));
    assert!(waits(&mut ada, ordered("open", 4)).await);
    let moved = pending(&mut bob, POLICY, "web").await.unwrap();
    approve(&mut bob, POLICY, "web", &moved.digest).await.unwrap();
    assert_eq!(in_force(&mut ada).await, Some(4));
    assert!(!waits(&mut ada, ordered("open", 5)).await, "this tier requires no approvals");
    assert!(waits(&mut ada, ordered("strict", 6)).await, "and a move into the other does");
    let moved = pending(&mut bob, POLICY, "web").await.unwrap();
    approve(&mut bob, POLICY, "web", &moved.digest).await.unwrap();

    // A deletion.
    let request = wire::DeleteRequest { kind: POLICY.into(), name: "web".to_owned() };
    let deleted = ada.delete(request.clone()).await.unwrap().into_inner();
    assert!(deleted.pending && deleted.warnings.iter().any(|it| it.contains("hanse policy approve")), "{deleted:?}");
    assert_eq!((in_force(&mut ada).await, stage(&mut ada).await), (Some(6), Some((6, "Delete".to_owned()))));
    let deletion = pending(&mut bob, POLICY, "web").await.unwrap();
    let (code, _) = approve(&mut bob, POLICY, "web", &moved.digest).await.unwrap_err();
    assert_eq!(code, Code::FailedPrecondition, "an approval of this version is none of its deletion");
    assert!(deletion.deletion && deletion.after.is_empty() && deletion.before == ordered("strict", 6));
    approve(&mut bob, POLICY, "web", &deletion.digest).await.unwrap();
    assert_eq!((in_force(&mut ada).await, stage(&mut ada).await), (None, None));

    // The tier itself: to require no approvals needs one.
    assert!(waits(&mut admin, strict(false)).await);
    let change = pending(&mut bob, TIER, "strict").await.unwrap();
    denied(approve(&mut admin, TIER, "strict", &change.digest).await, "user/admin is an author");
    assert!(waits(&mut ada, ordered("strict", 7)).await);
    approve(&mut bob, TIER, "strict", &change.digest).await.unwrap();
    let still = pending(&mut bob, POLICY, "web").await.unwrap();
    assert!(still.tiers.is_empty());
    let (code, _) = approve(&mut admin, POLICY, "web", &still.digest).await.unwrap_err();
    assert_eq!(code, Code::FailedPrecondition, "no approval is needed any more");
    assert!(!waits(&mut ada, ordered("strict", 7)).await);
    assert_eq!((in_force(&mut ada).await, stage(&mut ada).await), (Some(7), None));
    assert_eq!(pending(&mut bob, POLICY, "web").await, Err(Code::NotFound));

    // Who proposed and who approved, with both versions.
    let request = wire::ListAuditRequest { limit: 100, object: "FederatedNetworkPolicy/web".to_owned() };
    let records = admin.list_audit(request).await.unwrap().into_inner().records;
    let of = |who: &str, action: &str, outcome: &str, before: &str, after: &str| {
        let has = |text: &str, order: &str| match order {
            "" => text.is_empty(),
            order => text.contains(&format!("\"order\":{order},")),
        };
        let found = records.iter().filter(|it| it.who == who && it.action == action && it.outcome == outcome);
        assert!(
            found.clone().any(|it| has(&it.before, before) && has(&it.after, after)),
            "{who} {action}: {records:#?}"
        );
    };
    of("user/ada", "propose", "waits for an approval", "", "1");
    of("user/bob", "approve", "done", "", "1");
    of("user/ada", "propose", "waits for an approval", "1", "3");
    of("user/ada", "propose", "waits for an approval", "6", "");
    of("user/bob", "approve", "done", "6", "");
    let is_denial = |it: &&wire::AuditRecord| it.who == "user/eve" && it.action == "approve";
    assert!(records.iter().find(is_denial).is_some_and(|it| it.outcome.contains("approver=strict")), "{records:#?}");
}

#[tokio::test]
async fn an_approval_is_for_one_change_of_one_version() {
    let test = TestHub::start().await;
    let mut admin = test.admin().await;
    let mut bob = bob_again(&test).await;
    assert!(!waits(&mut admin, strict(true)).await);
    let outdated = async |bob: &mut Admin, digest: &str, why: &str| {
        let (code, _) = approve(bob, POLICY, "web", digest).await.unwrap_err();
        assert_eq!(code, Code::FailedPrecondition, "{why}");
    };

    assert!(waits(&mut admin, ordered("strict", 1)).await);
    let created = pending(&mut bob, POLICY, "web").await.unwrap().digest;
    approve(&mut bob, POLICY, "web", &created).await.unwrap();
    let request = wire::DeleteRequest { kind: POLICY.into(), name: "web".to_owned() };
    assert!(admin.delete(request).await.unwrap().into_inner().pending);
    outdated(&mut bob, &created, "the deletion of what was created").await;
    let deleted = pending(&mut bob, POLICY, "web").await.unwrap().digest;

    assert!(waits(&mut admin, ordered("strict", 2)).await);
    outdated(&mut bob, &deleted, "a change instead of the deletion").await;
    let second = pending(&mut bob, POLICY, "web").await.unwrap().digest;
    approve(&mut bob, POLICY, "web", &second).await.unwrap();
    assert!(waits(&mut admin, ordered("strict", 1)).await);
    outdated(&mut bob, &created, "the way back to the first version").await;
    outdated(&mut bob, &second, "another version").await;
    assert_eq!(in_force(&mut bob).await, Some(2));
    // Withdrawn, and sent again: the same manifests, and another change.
    let withdrawn = pending(&mut bob, POLICY, "web").await.unwrap().digest;
    assert!(!waits(&mut admin, ordered("strict", 2)).await);
    assert!(waits(&mut admin, ordered("strict", 1)).await);
    outdated(&mut bob, &withdrawn, "of the earlier proposal of the same change").await;
    let back = pending(&mut bob, POLICY, "web").await.unwrap().digest;
    approve(&mut bob, POLICY, "web", &back).await.unwrap();
    assert_eq!(in_force(&mut bob).await, Some(1));
}

#[tokio::test]
async fn authors_withdraw_and_leave_room_for_others() {
    let test = TestHub::start().await;
    let mut admin = test.admin().await;
    let author = |tier: &str| Role::Author(wire::Author { tiers: tiers(&[tier]) });
    let mut ada = test.user("ada", author("strict")).await;
    let mut eve = test.user("eve", author("strict")).await;
    assert!(!waits(&mut admin, strict(true)).await);

    // The creation of an object that does not exist yet.
    let request = wire::DeleteRequest { kind: POLICY.into(), name: "web".to_owned() };
    for withdraws in [&mut ada, &mut admin] {
        assert!(waits(withdraws, ordered("strict", 1)).await);
        let refused = eve.delete(request.clone()).await.unwrap_err();
        assert_eq!(refused.code(), Code::PermissionDenied, "as without a proposal: {refused}");
        assert_eq!(pending(&mut eve, POLICY, "web").await.unwrap().authors.len(), 1);
        let withdrawn = withdraws.delete(request.clone()).await.unwrap().into_inner();
        assert!(!withdrawn.pending && withdrawn.warnings[0].contains("is withdrawn"), "{withdrawn:?}");
        assert_eq!((pending(&mut eve, POLICY, "web").await, stage(&mut eve).await), (Err(Code::NotFound), None));
    }
    assert_eq!(ada.delete(request.clone()).await.unwrap_err().code(), Code::PermissionDenied);
    assert_eq!(admin.delete(request).await.unwrap_err().code(), Code::NotFound);

    // A quarter of all changes that may wait.
    let named = |number: usize| apply(policy(&format!("web-{number}"), "strict"));
    for number in 0..250 {
        assert_eq!(ada.apply(named(number)).await.unwrap().into_inner().applied(), wire::Applied::Pending);
    }
    let refused = ada.apply(named(250)).await.unwrap_err();
    let is_limit = refused.code() == Code::ResourceExhausted && refused.message().contains("250 changes that wait");
    assert!(is_limit && refused.message().contains("of user/ada"), "{refused}");
    assert_eq!(eve.apply(named(250)).await.unwrap().into_inner().applied(), wire::Applied::Pending);
    let request = wire::DeleteRequest { kind: POLICY.into(), name: "web-0".to_owned() };
    ada.delete(request).await.unwrap();
    assert_eq!(ada.apply(named(251)).await.unwrap().into_inner().applied(), wire::Applied::Pending);
}

async fn list(user: &mut Admin) -> Vec<wire::PendingSummary> {
    user.list_pending(wire::ListPendingRequest {}).await.unwrap().into_inner().changes
}

async fn reject(user: &mut Admin, digest: &str) -> Result<(), Code> {
    let request = wire::RejectRequest { kind: POLICY.into(), name: "web".to_owned(), digest: digest.to_owned() };
    user.reject(request).await.map(drop).map_err(|status| status.code())
}

#[tokio::test]
async fn changes_that_wait_are_listed_and_dropped_by_role() {
    let test = TestHub::start().await;
    let mut admin = test.admin().await;
    let author = |tier: &str| Role::Author(wire::Author { tiers: tiers(&[tier]) });
    let mut ada = test.user("ada", author("strict")).await;
    let mut eve = test.user("eve", author("open")).await;
    let mut bob = bob_again(&test).await;
    let mut viewer = test.user("vic", Role::Viewer(wire::Viewer {})).await;
    for tier in [tier("open"), strict(true)] {
        assert!(!waits(&mut admin, tier).await);
    }
    assert_eq!(list(&mut viewer).await, []);
    assert!(waits(&mut ada, ordered("strict", 1)).await);
    assert!(waits(&mut admin, strict(false)).await);
    for (user, of_policy, of_tier) in [
        (&mut viewer, false, false),
        (&mut ada, false, false),
        (&mut bob, true, true),
        // An author of the second.
        (&mut admin, true, false),
    ] {
        let listed = list(user).await;
        let names: Vec<(&str, &[String], bool)> =
            listed.iter().map(|it| (&*it.name, &it.authors[..], it.can_approve)).collect();
        let (ada, admin) = (["user/ada".to_owned()], ["user/admin".to_owned()]);
        assert_eq!(names, [("web", &ada[..], of_policy), ("strict", &admin[..], of_tier)], "{listed:#?}");
        assert!(listed.iter().all(|it| it.tiers == ["strict"] && it.since > 1_700_000_000 && it.is_authorized));
    }

    // Who may approve a change may drop it, and so may its authors; others may not.
    let digest = list(&mut bob).await[0].digest.clone();
    assert_eq!(reject(&mut eve, &digest).await, Err(Code::PermissionDenied));
    assert_eq!(reject(&mut bob, "sha256:0").await, Err(Code::FailedPrecondition));
    assert_eq!(reject(&mut bob, &digest).await, Ok(()));
    assert_eq!((list(&mut bob).await.len(), stage(&mut ada).await), (1, None));
    assert!(waits(&mut ada, ordered("strict", 1)).await);
    let again = list(&mut ada).await[0].digest.clone();
    assert_ne!(again, digest, "the same change is another one when it is proposed again");
    let (code, _) = approve(&mut bob, POLICY, "web", &digest).await.unwrap_err();
    assert_eq!(code, Code::FailedPrecondition, "an approval of the change that was dropped");
    assert_eq!(reject(&mut ada, &again).await, Ok(()));

    // A change that waits reserves no name: a user who may not write into its tier creates the policy in another one.
    assert!(waits(&mut ada, ordered("strict", 1)).await);
    assert!(!waits(&mut eve, ordered("open", 2)).await);
    assert_eq!((list(&mut bob).await.len(), in_force(&mut eve).await), (1, Some(2)));
}

#[tokio::test]
async fn proposal_of_an_author_without_rights_cannot_take_effect() {
    let test = TestHub::start().await;
    let mut admin = test.admin().await;
    let author = |tier: &str| Role::Author(wire::Author { tiers: tiers(&[tier]) });
    let (mut ada, mut bob) = (test.user("ada", author("strict")).await, bob_again(&test).await);
    assert!(!waits(&mut admin, strict(true)).await);
    assert!(waits(&mut ada, ordered("strict", 1)).await);
    let digest = list(&mut bob).await[0].digest.clone();
    // Other roles, and then none at all.
    let _ = test.user("ada", author("open")).await;
    for revoked in [false, true] {
        if revoked {
            admin.revoke_user(wire::RevokeUserRequest { name: "ada".to_owned() }).await.unwrap();
        }
        assert!(!list(&mut bob).await[0].is_authorized);
        let (code, message) = approve(&mut bob, POLICY, "web", &digest).await.unwrap_err();
        assert!(code == Code::FailedPrecondition && message.contains("user/ada"), "{code:?}: {message}");
        assert_eq!(in_force(&mut bob).await, None);
    }
    // It is also the change of another author, who may make it.
    assert!(waits(&mut admin, ordered("strict", 1)).await);
    assert!(list(&mut bob).await[0].is_authorized);
    approve(&mut bob, POLICY, "web", &digest).await.unwrap();
    assert_eq!(in_force(&mut bob).await, Some(1));
}

/// `bob`, whose connection ended with the hub.
async fn bob_again(test: &TestHub) -> Admin {
    test.user("bob", Role::Approver(wire::Approver { tiers: tiers(&["strict"]) })).await
}

#[tokio::test]
async fn staged_policy_of_a_user_and_tiers_with_policies_stay() {
    let test = TestHub::start().await;
    let mut admin = test.admin().await;
    // A policy that was stored before its tier would be in force without an approval.
    assert!(!waits(&mut admin, ordered("strict", 1)).await);
    let refused = admin.apply(apply(strict(true))).await.unwrap_err();
    assert!(refused.code() == Code::FailedPrecondition && refused.message().contains("web"), "{refused}");
    let request = wire::DeleteRequest { kind: POLICY.into(), name: "web".to_owned() };
    admin.delete(request).await.unwrap();
    assert!(!waits(&mut admin, strict(true)).await);

    let staged = String::from_utf8(ordered("strict", 9)).unwrap();
    let staged = staged.replace("\"FederatedNetworkPolicy\"", "\"StagedFederatedNetworkPolicy\"");
    assert!(!waits(&mut admin, staged.into_bytes()).await, "staged policies are not enforced");
    assert!(waits(&mut admin, ordered("strict", 1)).await);
    assert_eq!(stage(&mut admin).await.map(|it| it.0), Some(9));
    let mut bob = bob_again(&test).await;
    let waiting = pending(&mut bob, POLICY, "web").await.unwrap();
    approve(&mut bob, POLICY, "web", &waiting.digest).await.unwrap();
    assert_eq!((in_force(&mut admin).await, stage(&mut admin).await.map(|it| it.0)), (Some(1), Some(9)));
    for kind in [wire::ObjectKind::MemberCluster, wire::ObjectKind::Unspecified] {
        assert_eq!(pending(&mut bob, kind, "web").await, Err(Code::InvalidArgument));
    }
}
