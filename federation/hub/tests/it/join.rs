//! Joining, renewing, revoking.

use std::time::{Duration, SystemTime};

use hanse_hub::authority::Lifetimes;
use hanse_hub::registry::ClusterState;
use hanse_identity::Identity;
use hanse_identity::keys::{Credentials, Fingerprint, Key};
use hanse_identity::tls::{PinnedRoot, TlsClient};
use hanse_identity::token::{Token, TokenKind};
use hanse_member::registration::{MemberIdentity, RegistrationError};
use hanse_proto::federation::v1 as wire;
use hanse_proto::federation::v1::registration_client::RegistrationClient;
use hanse_proto::federation::v1::renewal_client::RenewalClient;

use crate::support::{SOON, TestHub, apply, eventually, is_served, join, open, policy};

/// Agents know the cluster by the authority in these files, and another cluster would take its place.
#[tokio::test]
async fn a_folder_is_of_one_cluster_of_one_cluster_set() {
    let (test, other) = (TestHub::start().await, TestHub::start().await);
    test.member("train").await;
    let folder = test.member_folder("train");
    let files = || ["member.pem", "intermediate.pem", "root.pem"].map(|name| std::fs::read(folder.join(name)).unwrap());
    let before = files();
    let token = test.token("serve", true).await;
    let joined = test.join("train", "serve", &token).await;
    assert!(
        matches!(&joined, Err(RegistrationError::OtherFiles(_, found, _)) if found.contains("train")),
        "{joined:?}"
    );
    let token = other.token("train", true).await;
    let joined = join(&folder, "train", &token, &other.hub.join_address.to_string()).await;
    assert!(matches!(joined, Err(RegistrationError::OtherClusterSet(_))), "{joined:?}");
    assert_eq!(files(), before);
    // The hub has not heard of it: the token is as good as before.
    other.join("elsewhere", "train", &token).await.unwrap();
}

#[tokio::test]
async fn a_cluster_joins_with_a_token_and_is_served() {
    let test = TestHub::start().await;
    let member = test.member("train").await;
    let address = test.hub.address.to_string();
    let connection = member.hub_client().unwrap().connect(&address).await.unwrap();
    assert_eq!(connection.peer.key_exchange, "X25519MLKEM768");
    assert_eq!(connection.peer.identity(), Some(&Identity::Hub));
    assert!(is_served(&member, &address).await);

    // The intermediate is the cluster's own and starts without a hub.
    assert_eq!(member.authority().certificate().identity, Identity::cluster("train").unwrap());
    let read = MemberIdentity::read(&test.member_folder("train"), "train").unwrap().unwrap();
    assert_eq!(read.credentials().current().certificate.serial, member.credentials().current().certificate.serial);
    assert!(MemberIdentity::read(&test.member_folder("train"), "serve").is_err(), "files of another cluster");
    use std::os::unix::fs::PermissionsExt;
    for name in ["member.pem", "intermediate.pem"] {
        let mode = std::fs::metadata(test.member_folder("train").join(name)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
}

#[tokio::test]
async fn without_acceptance_nothing_is_issued() {
    let test = TestHub::start().await;
    let token = test.token("train", false).await;
    let joining = test.join("train", "train", &token);
    let accepting = async {
        let registry = test.hub.registry.clone();
        eventually("pending", || async {
            registry.snapshot().clusters.get("train").is_some_and(|c| c.state == ClusterState::Pending)
        })
        .await;
        assert!(!test.member_folder("train").join("member.pem").exists());
        let accept = wire::AcceptClusterRequest { name: "train".to_owned() };
        test.admin().await.accept_cluster(accept).await.unwrap();
    };
    let (member, ()) = tokio::join!(joining, accepting);
    assert!(is_served(&member.unwrap(), &test.hub.address.to_string()).await);
}

/// The raw answer to a join with this token and key.
async fn ask(test: &TestHub, token: &str, cluster: &str, key: &Key) -> Result<wire::JoinResponse, tonic::Status> {
    let root = test.hub.authority.root().fingerprint();
    let client = TlsClient::pinned(PinnedRoot::new(root, Identity::Hub)).unwrap();
    let connection = client.connect(&test.hub.join_address.to_string()).await.unwrap();
    let request = wire::JoinRequest {
        token: token.to_owned(),
        cluster: cluster.to_owned(),
        request: key.request().unwrap().into(),
        intermediate_request: Key::generate().unwrap().request().unwrap().into(),
        federated_allow_final: false,
    };
    RegistrationClient::new(connection.channel).join(request).await.map(tonic::Response::into_inner)
}

#[tokio::test]
async fn a_token_belongs_to_its_first_key_its_cluster_and_its_time() {
    let test = TestHub::start().await;
    let token = test.token("train", true).await;
    let [first, second] = [(); 2].map(|()| Key::generate().unwrap());
    let code = |answer: Result<wire::JoinResponse, tonic::Status>| answer.err().map(|status| status.code());

    assert_eq!(code(ask(&test, &token, "serve", &first).await), Some(tonic::Code::PermissionDenied), "other cluster");
    assert_eq!(code(ask(&test, &token, "train", &first).await), None);
    assert_eq!(code(ask(&test, &token, "train", &first).await), None, "the same key may ask again");
    assert_eq!(code(ask(&test, &token, "train", &second).await), Some(tonic::Code::PermissionDenied), "another key");

    let forged =
        Token::generate(TokenKind::Cluster, "train", test.hub.authority.trust_domain().clone(), Fingerprint::of(b""))
            .unwrap();
    assert_eq!(code(ask(&test, &forged.to_text(), "train", &second).await), Some(tonic::Code::NotFound), "unknown");
    let known = test.token("known", true).await;
    let (rest, secret) = known.rsplit_once('.').unwrap();
    let swapped: String = secret.chars().rev().collect();
    let wrong = code(ask(&test, &format!("{rest}.{swapped}"), "known", &second).await);
    assert!(matches!(wrong, Some(tonic::Code::NotFound | tonic::Code::InvalidArgument)), "another secret: {wrong:?}");
    assert_eq!(code(ask(&test, &known, "known", &second).await), None, "which has not used it up");
    let late = test.token("late", true).await;
    test.advance(Duration::from_secs(601));
    assert_eq!(code(ask(&test, &late, "late", &second).await), Some(tonic::Code::NotFound), "ended");
    assert_eq!(code(ask(&test, &token, "train", &first).await), Some(tonic::Code::NotFound), "ended for its key too");
}

#[tokio::test]
async fn a_token_that_was_used_brings_nothing_back() {
    let test = TestHub::start().await;
    let code = |answer: Result<wire::JoinResponse, tonic::Status>| answer.err().map(|status| status.code());
    let denied = Some(tonic::Code::PermissionDenied);
    let [first, second] = [(); 2].map(|()| Key::generate().unwrap());
    let [older, newer] = [test.token("train", true).await, test.token("train", true).await];
    assert_eq!(code(ask(&test, &older, "train", &first).await), None);
    assert_eq!(code(ask(&test, &newer, "train", &second).await), None);
    let registered = || test.hub.registry.snapshot().revision;
    let before = registered();
    assert_eq!(code(ask(&test, &older, "train", &first).await), denied, "a newer token has been used");
    assert_eq!(code(ask(&test, &newer, "train", &second).await), None, "which may ask again");
    assert!(registered() > before);

    // A member that has renewed its key is not taken back to the one that it joined with.
    let token = test.token("serve", true).await;
    let member = test.join("serve", "serve", &token).await.unwrap();
    let joined_with = member.credentials().current().key;
    let address = test.hub.address.to_string();
    member.renew(&address).await.unwrap();
    assert_eq!(code(ask(&test, &token, "serve", &joined_with).await), denied);
    assert!(is_served(&member, &address).await);
}

/// What a certificate and its key may renew.
async fn renew(test: &TestHub, credentials: &Credentials, key: &Key) -> Option<tonic::Code> {
    let root = test.folder.path().join("ca.pem");
    let channel = open(credentials.clone(), &root, &test.hub.address.to_string()).await.unwrap();
    let request = wire::RenewRequest { request: key.request().unwrap().into(), ..Default::default() };
    RenewalClient::new(channel).renew(request).await.err().map(|status| status.code())
}

#[tokio::test]
async fn the_former_key_renews_nothing_but_the_answer_that_was_lost() {
    let test = TestHub::start().await;
    let member = test.member("train").await;
    let former = member.credentials().current();
    let [next, other] = [(); 2].map(|()| Key::generate().unwrap());
    assert_eq!(renew(&test, &former, &next).await, None);
    assert_eq!(renew(&test, &former, &next).await, None, "once more");
    assert_eq!(renew(&test, &former, &other).await, Some(tonic::Code::PermissionDenied));
    assert_eq!(renew(&test, &former, &former.key).await, Some(tonic::Code::PermissionDenied));
    // Each is noted in the audit, which holds a bounded number.
    let mut codes = std::collections::BTreeSet::new();
    for _ in 0..16 {
        codes.insert(format!("{:?}", renew(&test, &former, &next).await));
    }
    assert_eq!(codes.into_iter().collect::<Vec<_>>(), ["None", "Some(ResourceExhausted)"]);
}

#[tokio::test]
async fn calls_of_one_connection_are_limited_too() {
    let test = TestHub::start().await;
    let root = test.hub.authority.root().fingerprint();
    let client = TlsClient::pinned(PinnedRoot::new(root, Identity::Hub)).unwrap();
    let connection = client.connect(&test.hub.join_address.to_string()).await.unwrap();
    assert!(connection.peer.ends_at < SystemTime::now() + Duration::from_secs(86_400));
    let mut client = RegistrationClient::new(connection.channel);
    let mut codes = Vec::new();
    for _ in 0..200 {
        let request = wire::RenewLateRequest { request: bytes::Bytes::new() };
        codes.push(client.renew_late(request).await.unwrap_err().code());
    }
    assert!(codes.contains(&tonic::Code::InvalidArgument) && codes.contains(&tonic::Code::ResourceExhausted));
}

#[tokio::test]
async fn a_revoked_token_is_worth_nothing() {
    let test = TestHub::start().await;
    let token = test.token("train", true).await;
    let id = Token::parse(TokenKind::Cluster, &token).unwrap().id;
    test.admin().await.revoke_token(wire::RevokeTokenRequest { id }).await.unwrap();
    assert!(matches!(test.join("train", "train", &token).await, Err(RegistrationError::Refused(_))));
}

#[tokio::test]
async fn a_newcomer_tells_a_false_hub_by_the_hash_in_its_token() {
    let test = TestHub::start().await;
    let other = TestHub::start().await;
    let root = other.hub.authority.root().fingerprint();
    let client = TlsClient::pinned(PinnedRoot::new(root, Identity::Hub)).unwrap();
    assert!(client.connect(&test.hub.join_address.to_string()).await.is_err());
    assert!(client.connect(&other.hub.join_address.to_string()).await.is_ok());
}

#[tokio::test]
async fn a_renewal_changes_the_key_and_the_old_one_ends_with_the_next() {
    let test = TestHub::start().await;
    let member = test.member("train").await;
    let address = test.hub.address.to_string();
    let first = MemberIdentity::read(&test.member_folder("train"), "train").unwrap().unwrap();
    let held = first.hub_client().unwrap().connect(&address).await.unwrap();
    member.renew(&address).await.unwrap();
    assert_ne!(member.credentials().current().key.public(), first.credentials().current().key.public());
    assert!(is_served(&member, &address).await);
    assert!(is_served(&first, &address).await, "the answer might have been lost");
    assert!(!held.peer.closed.is_cancelled(), "the old connection lives while the new one is opened");
    member.renew(&address).await.unwrap();
    assert!(is_served(&member, &address).await);
    eventually("the first key is forgotten", || async { !is_served(&first, &address).await }).await;
    tokio::time::timeout(SOON, held.peer.closed.cancelled()).await.expect("its connection is closed");
}

#[tokio::test]
async fn a_revocation_closes_streams_at_once_and_outlives_a_restart() {
    let test = TestHub::start().await;
    let (member, bystander) = (test.member("train").await, test.member("serve").await);
    let address = test.hub.address.to_string();
    let connection = member.hub_client().unwrap().connect(&address).await.unwrap();
    let other = bystander.hub_client().unwrap().connect(&address).await.unwrap();
    let revoke = wire::RevokeClusterRequest { name: "train".to_owned(), reason: "lost".to_owned() };
    let started = std::time::Instant::now();
    let answer = test.admin().await.revoke_cluster(revoke).await.unwrap().into_inner();
    assert_eq!(answer.closed, 1);
    tokio::time::timeout(SOON, connection.peer.closed.cancelled()).await.expect("the stream is closed");
    println!("revocation closed the stream after {:?}", started.elapsed());
    assert!(!other.peer.closed.is_cancelled());
    assert!(!is_served(&member, &address).await && is_served(&bystander, &address).await);
    let told = format!("{:#}", anyhow::Error::from(member.renew(&address).await.unwrap_err()));
    assert!(told.contains("our certificate is not admitted: it was revoked"), "what the hub said of it: {told}");
    assert!(matches!(member.renew_late(&test.hub.join_address.to_string()).await, Err(RegistrationError::Refused(_))));

    let test = test.restart().await;
    let address = test.hub.address.to_string();
    assert!(!is_served(&member, &address).await && is_served(&bystander, &address).await);
    let accept = wire::AcceptClusterRequest { name: "train".to_owned() };
    let refused = test.admin().await.accept_cluster(accept).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::FailedPrecondition, "only a new token lets it in again");
    let token = test.token("train", true).await;
    let again = test.join("train-again", "train", &token).await.unwrap();
    assert!(is_served(&again, &address).await && !is_served(&member, &address).await);
}

#[tokio::test]
async fn a_connection_ends_with_its_certificate_and_late_renewal_does_nothing_else() {
    let lifetimes = Lifetimes { leaf: Duration::from_secs(2), ..Lifetimes::default() };
    let test = TestHub::start_with(lifetimes).await;
    let member = test.member("train").await;
    let (address, join) = (test.hub.address.to_string(), test.hub.join_address.to_string());
    let connection = member.hub_client().unwrap().connect(&address).await.unwrap();
    let ends_at = connection.peer.ends_at;
    assert!(ends_at <= member.credentials().current().certificate.not_after);
    tokio::time::timeout(SOON, connection.peer.closed.cancelled()).await.expect("it ends");
    // Certificates count whole seconds, and the hub's own leaf may end a moment earlier.
    assert!(SystemTime::now() >= ends_at);
    eventually("the certificate ends", || async {
        SystemTime::now() > member.credentials().current().certificate.not_after + Duration::from_secs(1)
    })
    .await;
    assert!(!is_served(&member, &address).await, "an ended certificate is not served");
    assert!(member.renew(&address).await.is_err(), "nor renewed the ordinary way");

    let before = test.hub.registry.snapshot();
    member.renew_late(&join).await.unwrap();
    let after = test.hub.registry.snapshot();
    assert!(is_served(&member, &address).await);
    assert_eq!(before.clusters, after.clusters, "nothing of the cluster has changed");
    assert_eq!(before.objects, after.objects);

    let stranger = Key::generate().unwrap().request().unwrap();
    let root = test.hub.authority.root().fingerprint();
    let client = TlsClient::pinned(PinnedRoot::new(root, Identity::Hub)).unwrap();
    let channel = client.connect(&join).await.unwrap().channel;
    let request = wire::RenewLateRequest { request: stranger.into() };
    let refused = RegistrationClient::new(channel.clone()).renew_late(request).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::PermissionDenied);
    // With nothing but a token or a key, no other service is there.
    let status = wire::StatusRequest {};
    let admin = wire::administration_client::AdministrationClient::new(channel).status(status).await.unwrap_err();
    assert_eq!(admin.code(), tonic::Code::Unimplemented);

    test.advance(lifetimes.late_renewal + Duration::from_secs(60));
    assert!(matches!(member.renew_late(&join).await, Err(RegistrationError::Refused(_))), "after 30 days");
}

#[tokio::test]
async fn the_join_listener_limits_the_rate() {
    let test = TestHub::start().await;
    let client = TlsClient::pinned(PinnedRoot::new(test.hub.authority.root().fingerprint(), Identity::Hub)).unwrap();
    let mut refused = 0;
    for _ in 0..150 {
        if client.connect(&test.hub.join_address.to_string()).await.is_err() {
            refused += 1;
        }
    }
    assert!(refused > 0, "150 connections in a burst of 100");
}

/// Others would wait for its endpoints for ever, and with them every policy.
#[tokio::test]
async fn who_is_connected_and_publishes_nothing_is_silent() {
    use hanse_hub::registry::Lease;
    use hanse_proto::federation::v1::exchange_client::ExchangeClient;
    use wire::publish_request::Message;
    let test = TestHub::start().await.with_lease(Duration::from_secs(2)).await;
    let member = test.member("train").await;
    let connection = member.hub_client().unwrap().connect(&test.hub.address.to_string()).await.unwrap();
    let (sender, requests) = tokio::sync::mpsc::channel::<wire::PublishRequest>(1);
    let mut client = ExchangeClient::new(connection.channel);
    let mut answers = client.publish(tokio_stream::wrappers::ReceiverStream::new(requests)).await.unwrap().into_inner();
    let say = async |message| sender.send(wire::PublishRequest { message: Some(message) }).await.unwrap();
    say(Message::Open(wire::PublishOpen { protocol: 1, epoch: 1, ..Default::default() })).await;
    let registry = &test.hub.registry;
    let is = async |wanted: Lease| {
        say(Message::Heartbeat(wire::Heartbeat::default())).await;
        registry.snapshot().clusters["train"].lease == wanted
    };
    eventually("it is heard", || is(Lease::Live)).await;
    eventually("it counts as silent", || is(Lease::Stale)).await;
    let kind = Some(wire::begin::Kind::Snapshot(wire::Snapshot {}));
    say(Message::Begin(wire::Begin { origin: String::new(), kind, needs_interest: 0 })).await;
    let position = Some(wire::Position { epoch: 1, revision: 1 });
    say(Message::End(wire::End { position, digest: Vec::new().into(), view: 0 })).await;
    eventually("it publishes", || is(Lease::Live)).await;
    assert!(answers.message().await.unwrap().is_some(), "the stream was open all along");
}

/// Members may have newer state than a backup. The new epoch invalidates its revisions.
#[tokio::test]
async fn a_hub_that_was_restored_tells_everything_anew() {
    use hanse_proto::federation::v1::exchange_client::ExchangeClient;
    let test = TestHub::start().await;
    let member = test.member("train").await;
    let backup = test.folder.path().join("backup");
    let test = test.backed_up(&backup).await;
    // The hub's first batch to somebody who holds `hub`, with its end.
    let first = async |test: &TestHub, hub: Option<wire::Position>| {
        let connection = member.hub_client().unwrap().connect(&test.hub.address.to_string()).await.unwrap();
        let open = wire::WatchOpen { protocol: 1, hub, ..wire::WatchOpen::default() };
        let open = wire::WatchRequest { message: Some(wire::watch_request::Message::Open(open)) };
        let (sender, requests) = tokio::sync::mpsc::channel(1);
        sender.send(open).await.unwrap();
        let requests = tokio_stream::wrappers::ReceiverStream::new(requests);
        let mut answers = ExchangeClient::new(connection.channel).watch(requests).await.unwrap().into_inner();
        let mut kind = None;
        let told = async {
            loop {
                match answers.message().await.unwrap().unwrap().message {
                    Some(wire::watch_response::Message::Begin(begin)) => kind = begin.kind,
                    Some(wire::watch_response::Message::End(end)) => return end.position.unwrap(),
                    _ => {}
                }
            }
        };
        let position = tokio::time::timeout(SOON, told).await.expect("a batch");
        (kind, position)
    };
    for name in ["a", "b", "c"] {
        test.admin().await.apply(apply(policy(name, "platform"))).await.unwrap();
    }
    let (_, newest) = first(&test, None).await;
    let test = test.restored(&backup).await;
    let (kind, anew) = first(&test, Some(newest)).await;
    assert!(matches!(kind, Some(wire::begin::Kind::Snapshot(_))), "{kind:?}");
    assert!(anew.epoch > newest.epoch && anew.revision < newest.revision, "{anew:?} after {newest:?}");
}

#[tokio::test]
async fn a_cluster_has_few_streams() {
    use hanse_proto::federation::v1::exchange_client::ExchangeClient;
    let test = TestHub::start().await;
    let member = test.member("train").await;
    let connection = member.hub_client().unwrap().connect(&test.hub.address.to_string()).await.unwrap();
    let mut client = ExchangeClient::new(connection.channel);
    let mut open = Vec::new();
    let mut codes = Vec::new();
    for _ in 0..9 {
        let (sender, requests) = tokio::sync::mpsc::channel::<wire::PublishRequest>(1);
        match client.publish(tokio_stream::wrappers::ReceiverStream::new(requests)).await {
            Ok(answers) => open.push((sender, answers)),
            Err(status) => codes.push(status.code()),
        }
    }
    assert_eq!((open.len(), codes), (8, vec![tonic::Code::ResourceExhausted]));
    drop(open.pop());
    eventually("there is room again", || {
        let mut client = client.clone();
        async move {
            let (sender, requests) = tokio::sync::mpsc::channel::<wire::PublishRequest>(1);
            let opened = client.publish(tokio_stream::wrappers::ReceiverStream::new(requests)).await;
            drop(sender);
            opened.is_ok()
        }
    })
    .await;
}
