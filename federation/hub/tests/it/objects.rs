//! Federated objects, one and many: what is refused, in what order things happen, and what they leave on record.

use hanse_hub::registry::{AuditAction, ChangeError, Clock, MAX_AUDIT_RECORDS, Registry};
use hanse_proto::federation::v1 as wire;
use hanse_store::{Key, Transaction};
use tonic::Code;
use wire::apply_result::Result as Applied;
use wire::delete_result::Result as Deleted;

use crate::support::{Admin, SOON, TestHub, member_cluster, policy, tier};

/// As a user does who does not allow a tier to be missing.
fn apply(manifest: Vec<u8>) -> wire::ApplyRequest {
    wire::ApplyRequest { allow_missing_tier: false, ..crate::support::apply(manifest) }
}

fn batch(manifests: impl IntoIterator<Item = Vec<u8>>) -> wire::ApplyManyRequest {
    wire::ApplyManyRequest { objects: manifests.into_iter().map(apply).collect(), dry_run: false }
}

async fn apply_many(
    admin: &mut Admin,
    requests: Vec<wire::ApplyManyRequest>,
) -> Result<Vec<Result<wire::ApplyResponse, wire::ObjectRefusal>>, tonic::Status> {
    let mut answers = admin.apply_many(futures::stream::iter(requests)).await?.into_inner();
    let mut results = Vec::new();
    while let Some(answer) = tokio::time::timeout(SOON, answers.message()).await.expect("in time")? {
        results.extend(answer.results.into_iter().map(|result| match result.result.expect("a result") {
            Applied::Applied(applied) => Ok(applied),
            Applied::Refused(refused) => Err(refused),
        }));
    }
    Ok(results)
}

async fn delete_many(
    admin: &mut Admin,
    objects: &[(wire::ObjectKind, &str)],
) -> Vec<Result<wire::DeleteResponse, wire::ObjectRefusal>> {
    let request = |(kind, name): &(wire::ObjectKind, &str)| wire::DeleteRequest {
        kind: (*kind).into(),
        name: (*name).to_owned(),
    };
    let request = wire::DeleteManyRequest { objects: objects.iter().map(request).collect() };
    let mut answers = admin.delete_many(futures::stream::iter([request])).await.unwrap().into_inner();
    let mut results = Vec::new();
    while let Some(answer) = tokio::time::timeout(SOON, answers.message()).await.expect("in time").unwrap() {
        results.extend(answer.results.into_iter().map(|result| match result.result.expect("a result") {
            Deleted::Deleted(deleted) => Ok(deleted),
            Deleted::Refused(refused) => Err(refused),
        }));
    }
    results
}

async fn stored(admin: &mut Admin) -> Vec<String> {
    let objects = admin.get(wire::GetRequest::default()).await.unwrap().into_inner().objects;
    objects.into_iter().map(|object| object.name).collect()
}

#[tokio::test]
async fn policy_of_a_missing_tier_is_refused_unless_that_is_allowed() {
    let test = TestHub::start().await;
    let mut admin = test.admin().await;
    let none = admin.apply(apply(policy("p", "platfrom"))).await.unwrap_err();
    assert_eq!(none.code(), Code::InvalidArgument);
    assert!(none.message().contains("Tier platfrom does not exist (no tiers exist)"), "{}", none.message());
    admin.apply(apply(tier("platform"))).await.unwrap();
    for call in ["apply", "dry run"] {
        let refused = match call {
            "apply" => admin.apply(apply(policy("p", "platfrom"))).await,
            _ => admin.dry_run(apply(policy("p", "platfrom"))).await,
        };
        let refused = refused.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{call}");
        assert!(refused.message().contains("existing tiers: platform"), "{call}: {}", refused.message());
    }
    assert_eq!(stored(&mut admin).await, ["platform"]);
    let first = admin.apply(apply(policy("p", "platform"))).await.unwrap().into_inner();
    assert_eq!(first.warnings, Vec::<String>::new());
    assert!(admin.apply(apply(policy("p", "platfrom"))).await.is_err(), "a move into a missing tier");
    let allowed = wire::ApplyRequest { allow_missing_tier: true, ..apply(policy("q", "platfrom")) };
    let allowed = admin.apply(allowed).await.unwrap().into_inner();
    assert!(
        allowed.warnings[0].contains("Tier platfrom does not exist") && allowed.warnings[0].contains("not in force")
    );
    let same = admin.apply(apply(policy("q", "platfrom"))).await.unwrap().into_inner();
    assert_eq!(same.applied(), wire::Applied::Unchanged, "what is stored is not refused when it is applied again");
}

#[tokio::test]
async fn tier_of_the_same_batch_counts_from_its_place_on() {
    let test = TestHub::start().await;
    let mut admin = test.admin().await;
    let both = vec![batch([tier("a"), policy("p", "a")])];
    let dry = both.iter().cloned().map(|batch| wire::ApplyManyRequest { dry_run: true, ..batch }).collect();
    assert!(apply_many(&mut admin, dry).await.unwrap().iter().all(Result::is_ok), "a dry run sees what it would write");
    assert_eq!(stored(&mut admin).await, [""; 0], "and writes nothing");
    assert!(apply_many(&mut admin, both).await.unwrap().iter().all(Result::is_ok));
    let late = apply_many(&mut admin, vec![batch([policy("q", "b"), tier("b"), policy("r", "b")])]).await.unwrap();
    assert!(late[0].is_err() && late[1].is_ok() && late[2].is_ok(), "{late:?}");

    use wire::ObjectKind::{FederatedNetworkPolicy, Tier};
    let used = delete_many(&mut admin, &[(Tier, "a")]).await;
    assert!(used[0].as_ref().is_err_and(|it| it.message.contains("is used by p")), "{used:?}");
    let both = [(FederatedNetworkPolicy, "p"), (Tier, "a"), (FederatedNetworkPolicy, "gone")];
    let deleted = delete_many(&mut admin, &both).await;
    assert!(deleted[0].is_ok() && deleted[1].is_ok(), "{deleted:?}");
    assert_eq!(deleted[2].as_ref().unwrap_err().code, Code::NotFound as u32);
}

#[tokio::test]
async fn batch_applies_the_good_names_the_bad_and_records_each_in_few_transactions() {
    const GOOD: usize = 400;
    let test = TestHub::start().await;
    let mut admin = test.admin().await;
    let mut manifests = vec![tier("platform")];
    for number in 0..GOOD {
        manifests.push(policy(&format!("p-{number}"), "platform"));
        if number % 100 == 50 {
            manifests.push(policy("typo", "platfrom"));
            manifests.push(b"{".to_vec());
        }
    }
    let sent: Vec<bool> = manifests.iter().map(|it| it.len() > 2 && !it.windows(8).any(|w| w == b"platfrom")).collect();
    let before = test.hub.registry.snapshot().revision;
    let batches = manifests.chunks(150).map(|chunk| batch(chunk.to_vec())).collect();
    let results = apply_many(&mut admin, batches).await.unwrap();
    assert_eq!(results.iter().map(Result::is_ok).collect::<Vec<_>>(), sent, "in their order");
    for (result, name) in results.iter().flatten().zip(["platform", "p-0", "p-1"]) {
        assert_eq!((result.name.as_str(), result.applied()), (name, wire::Applied::Created));
    }
    // 128 changes in a transaction: an object, its audit record, and room for the one that this replaces.
    let transactions = test.hub.registry.snapshot().revision - before;
    assert!((7..=20).contains(&transactions), "{transactions}");
    let audit = admin
        .list_audit(wire::ListAuditRequest { limit: 1_000, ..Default::default() })
        .await
        .unwrap()
        .into_inner()
        .records;
    let of_policies: Vec<&str> =
        audit.iter().rev().map(|it| it.object.as_str()).filter(|it| it.contains("/p-")).collect();
    let expected: Vec<String> = (0..GOOD).map(|number| format!("FederatedNetworkPolicy/p-{number}")).collect();
    assert_eq!(of_policies, expected, "one record for each, in order");
    assert!(audit.is_sorted_by(|a, b| a.number == b.number + 1));
}

#[tokio::test]
async fn objects_of_a_batch_are_judged_after_those_before_them() {
    let test = TestHub::start().await;
    let mut admin = test.admin().await;
    let nets = |name: &str, net: &str| member_cluster(name, &[net]);
    let overlap =
        [nets("a", "10.1.0.0/16"), nets("b", "10.1.2.0/24"), nets("a", "10.2.0.0/16"), nets("b", "10.1.2.0/24")];
    for dry_run in [true, false] {
        let request = wire::ApplyManyRequest { dry_run, ..batch(overlap.clone()) };
        let results = apply_many(&mut admin, vec![request]).await.unwrap();
        let applied: Vec<_> = results.iter().map(|it| it.as_ref().ok().map(|it| it.applied())).collect();
        use wire::Applied::{Configured, Created};
        assert_eq!(applied, [Some(Created), None, Some(Configured), Some(Created)], "dry run: {dry_run}");
    }
    let stored = admin.get(wire::GetRequest { name: "a".into(), ..Default::default() }).await.unwrap().into_inner();
    assert_eq!(stored.objects[0].manifest, nets("a", "10.2.0.0/16"), "the last of one key");
}

#[tokio::test]
async fn each_object_of_a_batch_needs_its_role_and_a_denial_names_it() {
    use wire::role::Role;
    let test = TestHub::start().await;
    let mut admin = test.admin().await;
    let tiers = vec![batch([tier("platform"), tier("security")])];
    assert!(apply_many(&mut admin, tiers).await.unwrap().iter().all(Result::is_ok));
    let mut author = test.user("author", Role::Author(wire::Author { tiers: vec!["platform".into()] })).await;
    let mixed = [policy("p", "platform"), policy("s", "security"), policy("t", "security"), policy("q", "platform")];
    for dry_run in [true, false] {
        let request = wire::ApplyManyRequest { dry_run, ..batch(mixed.clone()) };
        let results = apply_many(&mut author, vec![request]).await.unwrap();
        assert_eq!(results.iter().map(Result::is_ok).collect::<Vec<_>>(), [true, false, false, true]);
        let denied = results[1].as_ref().unwrap_err();
        assert_eq!(denied.code, Code::PermissionDenied as u32);
        let expected = "this needs the role author=security or administrator; user/author has author=platform";
        assert_eq!(denied.message, expected);
    }
    let audit = admin
        .list_audit(wire::ListAuditRequest { limit: 1_000, ..Default::default() })
        .await
        .unwrap()
        .into_inner()
        .records;
    let of_author: Vec<_> = audit.iter().filter(|it| it.who == "user/author").map(|it| it.outcome == "done").collect();
    assert_eq!(of_author.iter().filter(|done| **done).count(), 2, "{audit:?}");
    assert_eq!(of_author.iter().filter(|done| !**done).count(), 1, "denials do not fill the audit: {audit:?}");
}

#[tokio::test]
async fn batches_and_dry_runs_are_bounded() {
    let test = TestHub::start().await;
    let mut admin = test.admin().await;
    let large = batch((0..1_001).map(|_| b"{".to_vec()));
    assert_eq!(apply_many(&mut admin, vec![large]).await.unwrap_err().code(), Code::InvalidArgument);
    // Dry runs that go on keep what they would write.
    let mut open = Vec::new();
    let mut last = None;
    for _ in 0..5 {
        let (send, requests) = tokio::sync::mpsc::channel(1);
        let first = wire::ApplyManyRequest { dry_run: true, ..batch([tier("a")]) };
        send.send(first).await.unwrap();
        let requests = tokio_stream::wrappers::ReceiverStream::new(requests);
        let mut answers = admin.apply_many(requests).await.unwrap().into_inner();
        last = Some(tokio::time::timeout(SOON, answers.message()).await.expect("in time"));
        open.push((send, answers));
    }
    assert_eq!(last.and_then(Result::err).map(|status| status.code()), Some(Code::ResourceExhausted));
    drop(open);
}

#[tokio::test]
async fn audit_keeps_the_newest_of_many_changes() {
    let store = hanse_store::in_memory();
    let registry =
        Registry::open(store, SOON, Clock::default(), &hanse_runtime::shutdown::Shutdown::default()).await.unwrap();
    let actions: Vec<AuditAction> = (0..MAX_AUDIT_RECORDS + 500)
        .map(|number| AuditAction {
            who: "user/ada".into(),
            action: "apply",
            object: number.to_string(),
            proposed: None,
        })
        .collect();
    let mut done = 0;
    while done < actions.len() {
        let outcomes = registry.change_many(
            &actions[done..],
            |deed| deed,
            |deed, _| {
                if deed.object.ends_with("99") {
                    return Err(ChangeError::NotFound(String::new()));
                }
                let key = Key::new(&["test", &deed.object]).unwrap();
                Ok((Transaction::default().put(key, "x"), ()))
            },
        );
        done += outcomes.await.unwrap().len();
    }
    let kept = registry.audit(usize::MAX, "").await.unwrap();
    let refused = actions.len() as u64 / 100;
    let newest = actions.len() as u64 - refused;
    let numbers: Vec<u64> = kept.iter().map(|(number, ..)| *number).collect();
    assert_eq!(numbers, (newest - MAX_AUDIT_RECORDS + 1..=newest).rev().collect::<Vec<_>>());
    assert_eq!(kept[0].1.object, (actions.len() - 2).to_string(), "the last but one: the last was refused");
}
