//! Roles, objects, grants and the audit, through the API.

use hanse_hub::registry::Lease;
use hanse_proto::federation::v1 as wire;
use tonic::Code;

use crate::support::{Admin, TestHub, apply, eventually, member_cluster, policy};

fn code<T>(answer: Result<T, tonic::Status>) -> Option<Code> {
    answer.err().map(|status| status.code())
}

async fn delete(admin: &mut Admin, kind: wire::ObjectKind, name: &str) -> Option<Code> {
    code(admin.delete(wire::DeleteRequest { kind: kind.into(), name: name.to_owned() }).await)
}

#[tokio::test]
async fn each_role_does_its_own_and_nothing_else() {
    use wire::role::Role;
    let test = TestHub::start().await;
    let mut admin = test.admin().await;
    let mut viewer = test.user("viewer", Role::Viewer(wire::Viewer {})).await;
    let mut author = test.user("author", Role::Author(wire::Author { tiers: vec!["platform".into()] })).await;
    let mut operator = test.user("operator", Role::Operator(wire::Operator { clusters: vec!["train".into()] })).await;
    let denied = Some(Code::PermissionDenied);
    let token =
        |cluster: &str| wire::CreateTokenRequest { cluster: cluster.into(), lifetime_seconds: 60, accept: true };

    for user in [&mut viewer, &mut author, &mut operator] {
        assert_eq!(code(user.status(wire::StatusRequest {}).await), None);
        assert_eq!(code(user.get(wire::GetRequest::default()).await), None);
        assert_eq!(code(user.list_users(wire::ListUsersRequest {}).await), denied);
        assert_eq!(code(user.list_audit(wire::ListAuditRequest { limit: 1, object: String::new() }).await), denied);
        assert_eq!(code(user.apply(apply(member_cluster("train", &[]))).await), denied);
        assert_eq!(code(user.create_token(token("serve")).await), denied);
        assert_eq!(code(user.revoke_user(wire::RevokeUserRequest { name: "admin".into() }).await), denied);
    }
    assert_eq!(code(viewer.apply(apply(policy("p", "platform"))).await), denied);
    assert_eq!(code(operator.apply(apply(policy("p", "platform"))).await), denied);
    assert_eq!(code(author.apply(apply(policy("p", "security"))).await), denied);
    assert_eq!(code(author.apply(apply(policy("p", "platform"))).await), None);
    assert_eq!(code(admin.apply(apply(policy("s", "security"))).await), None);
    assert_eq!(code(author.apply(apply(policy("s", "platform"))).await), denied, "taking over another tier's policy");
    let kind = wire::ObjectKind::FederatedNetworkPolicy;
    assert_eq!(delete(&mut author, kind, "s").await, denied);
    assert_eq!(delete(&mut viewer, kind, "p").await, denied);
    assert_eq!(delete(&mut author, kind, "p").await, None);
    assert_eq!(code(operator.create_token(token("train")).await), None);
    assert_eq!(code(author.create_token(token("train")).await), denied);
    let revoke = wire::RevokeUserRequest { name: "author".into() };
    assert_eq!(admin.revoke_user(revoke).await.unwrap().into_inner().closed, 1);
    assert!(author.status(wire::StatusRequest {}).await.is_err(), "a revoked user's connection is closed");
    let last = wire::RevokeUserRequest { name: "admin".into() };
    assert_eq!(code(admin.revoke_user(last).await), Some(Code::FailedPrecondition), "the last administrator");

    let audit = admin
        .list_audit(wire::ListAuditRequest { limit: 1000, object: String::new() })
        .await
        .unwrap()
        .into_inner()
        .records;
    let has = |who: &str, action: &str, object: &str, done: bool| {
        audit.iter().any(|r| r.who == who && r.action == action && r.object == object && (r.outcome == "done") == done)
    };
    assert!(has("user/author", "apply", "FederatedNetworkPolicy/p", true));
    assert!(has("user/author", "delete", "FederatedNetworkPolicy/s", false), "denials are on record");
    assert!(audit.iter().any(|r| r.who == "hub" && r.action == "user.create"), "the first administrator too");
    assert!(audit.is_sorted_by(|a, b| a.number > b.number));

    // A token is on record by its id, and for its cluster.
    let created = operator.create_token(token("train")).await.unwrap().into_inner();
    for (object, expected) in [(format!("token/{}", created.id), 1), ("cluster/train".to_owned(), 2)] {
        let request = wire::ListAuditRequest { limit: 1000, object: object.clone() };
        let records = admin.list_audit(request).await.unwrap().into_inner().records;
        assert_eq!(records.iter().filter(|it| it.action == "token.create").count(), expected, "{object}: {records:?}");
    }
}

#[tokio::test]
async fn the_authors_bytes_are_kept_and_preconditions_hold() {
    let test = TestHub::start().await;
    let mut admin = test.admin().await;
    let manifest = policy("p", "platform");
    let first = admin.apply(apply(manifest.clone())).await.unwrap().into_inner();
    assert_eq!(first.applied(), wire::Applied::Created);
    let same = admin.apply(apply(manifest.clone())).await.unwrap().into_inner();
    assert_eq!((same.applied(), same.revision), (wire::Applied::Unchanged, first.revision));
    let object = admin.get(wire::GetRequest::default()).await.unwrap().into_inner().objects.remove(0);
    assert_eq!((object.manifest.as_ref(), object.revision), (manifest.as_slice(), first.revision));

    use wire::apply_request::Precondition;
    let mut changed = manifest.clone();
    changed.push(b' ');
    let with = |precondition| wire::ApplyRequest { precondition: Some(precondition), ..apply(changed.clone()) };
    let failed = Some(Code::FailedPrecondition);
    assert_eq!(code(admin.apply(with(Precondition::Absent(wire::Absent {}))).await), failed);
    assert_eq!(code(admin.apply(with(Precondition::Revision(first.revision + 1))).await), failed);
    let second = admin.apply(with(Precondition::Revision(first.revision))).await.unwrap().into_inner();
    assert_eq!(second.applied(), wire::Applied::Configured);
    assert!(second.revision > first.revision);

    for wrong in [&b"{"[..], b"{}", br#"{"apiVersion":"v1","kind":"Pod","metadata":{"name":"a"}}"#] {
        assert_eq!(code(admin.apply(apply(wrong.to_vec())).await), Some(Code::InvalidArgument));
    }
    let large = vec![b' '; 300 << 10];
    assert_eq!(code(admin.apply(apply(large)).await), Some(Code::InvalidArgument));
}

#[tokio::test]
async fn what_no_member_could_read_is_refused_with_its_field() {
    let test = TestHub::start().await;
    let mut admin = test.admin().await;
    let good = String::from_utf8(policy("p", "platform")).unwrap();
    for (wrong, field) in [
        (good.replace("app == 'a'", "app = 'a'"), "spec.selector"),
        (good.replace("\"order\"", "\"odrer\""), "odrer"),
        (good.replace("Deny", "Refuse"), "spec.ingress[0].action"),
        (good.replace("\"tier\":\"platform\",", ""), "spec.tier"),
        (good.replace("all()", "env in"), "spec.clusterSelector"),
        (String::from_utf8(member_cluster("a", &["10.0.0.0/33"])).unwrap(), "spec.grants.cidrs[0]"),
    ] {
        assert_ne!(wrong, good, "{field}");
        let refused = admin.apply(apply(wrong.into_bytes())).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{field}");
        assert!(refused.message().contains(field), "{}", refused.message());
    }
    let applied = admin.apply(apply(good.into_bytes())).await.unwrap().into_inner();
    assert!(applied.warnings[0].contains("Tier platform does not exist"), "{:?}", applied.warnings);
    let name = "x".repeat(100_000);
    let kind = wire::ObjectKind::FederatedNetworkPolicy;
    assert_eq!(delete(&mut admin, kind, &name).await, Some(Code::InvalidArgument), "and not kept in the audit");
}

#[tokio::test]
async fn an_administrator_is_always_left_and_denials_do_not_fill_the_audit() {
    use wire::role::Role;
    let test = TestHub::start().await;
    let mut admin = test.admin().await;
    let request = |roles| wire::CreateUserRequest {
        name: "admin".to_owned(),
        roles: vec![wire::Role { role: Some(roles) }],
        request: hanse_identity::keys::Key::generate().unwrap().request().unwrap().into(),
    };
    let refused = admin.create_user(request(Role::Viewer(wire::Viewer {}))).await;
    assert_eq!(code(refused), Some(Code::FailedPrecondition), "the last administrator becomes a viewer");

    let mut viewer = test.user("viewer", Role::Viewer(wire::Viewer {})).await;
    for at in 0..20 {
        let refused = viewer.apply(apply(policy(&format!("p-{at}"), "platform"))).await;
        assert_eq!(code(refused), Some(Code::PermissionDenied));
    }
    let audit = admin
        .list_audit(wire::ListAuditRequest { limit: 1000, object: String::new() })
        .await
        .unwrap()
        .into_inner()
        .records;
    assert_eq!(audit.iter().filter(|record| record.who == "user/viewer").count(), 1);
}

#[tokio::test]
async fn a_revocation_ends_every_token_of_its_cluster() {
    let test = TestHub::start().await;
    let mut admin = test.admin().await;
    test.member("train").await;
    let token = |accept| wire::CreateTokenRequest { cluster: "train".into(), lifetime_seconds: 600, accept };
    let mut last = String::new();
    for _ in 0..63 {
        last = admin.create_token(token(true)).await.unwrap().into_inner().token;
    }
    assert_eq!(code(admin.create_token(token(true)).await), Some(Code::ResourceExhausted));
    let revoke = wire::RevokeClusterRequest { name: "train".to_owned(), reason: String::new() };
    admin.revoke_cluster(revoke).await.unwrap();
    assert_eq!(admin.list_tokens(wire::ListTokensRequest {}).await.unwrap().into_inner().tokens, []);
    assert!(test.join("again", "train", &last).await.is_err());
}

#[tokio::test]
async fn nets_of_clusters_never_overlap() {
    let test = TestHub::start().await;
    let mut admin = test.admin().await;
    assert_eq!(code(admin.apply(apply(member_cluster("train", &["10.1.0.0/16", "fd01::/64"]))).await), None);
    for nets in [&["10.0.0.0/8"][..], &["10.1.2.0/24"], &["10.2.0.0/16", "fd01::/96"]] {
        let refused = admin.apply(apply(member_cluster("serve", nets))).await.unwrap_err();
        assert_eq!(refused.code(), Code::FailedPrecondition, "{nets:?}");
        assert!(refused.message().contains("train"), "{}", refused.message());
    }
    assert_eq!(code(admin.apply(apply(member_cluster("serve", &["10.2.0.0/16"]))).await), None);
    assert_eq!(code(admin.apply(apply(member_cluster("train", &["10.1.0.0/16"]))).await), None, "its own do not count");
    assert_eq!(code(admin.apply(apply(member_cluster("serve", &["10.2.0.0/16", "fd01::/64"]))).await), None);
}

#[tokio::test]
async fn a_silent_clusters_lease_ends_and_begins_again() {
    let test = TestHub::start().await;
    test.member("train").await;
    let registry = &test.hub.registry;
    let lease = || registry.snapshot().clusters["train"].lease;
    assert_eq!(lease(), Lease::NeverConnected);
    assert!(registry.renew_lease("unknown").await.is_err());
    registry.renew_lease("train").await.unwrap();
    assert_eq!(lease(), Lease::Live);
    let revision = registry.snapshot().clusters["train"].revision;
    registry.renew_lease("train").await.unwrap();
    assert_eq!(registry.snapshot().clusters["train"].revision, revision, "a renewal writes nothing");
    let status = test.admin().await.status(wire::StatusRequest {}).await.unwrap().into_inner();
    assert_eq!((status.clusters[0].lease.as_str(), status.clusters[0].age_ms.is_some()), ("live", true));
}

#[tokio::test]
async fn a_view_follows_the_store() {
    let test = TestHub::start().await;
    let mut view = test.hub.registry.subscribe();
    let before = view.borrow_and_update().revision;
    test.admin().await.apply(apply(policy("p", "platform"))).await.unwrap();
    eventually("the view shows the policy", || async { view.borrow().objects.len() == 1 }).await;
    assert!(view.borrow().revision > before);
}
