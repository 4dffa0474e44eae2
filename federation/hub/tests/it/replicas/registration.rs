//! What must happen once, or everywhere, whichever replica is used: single-use tokens, revocations, and the list of replicas.

use std::process::Stdio;
use std::time::Duration;

use hanse_member::registration::MemberIdentity;
use hanse_proto::federation::v1 as wire;
use hanse_proto::federation::v1::exchange_client::ExchangeClient;
use tokio_stream::wrappers::ReceiverStream;
use wire::publish_request::Message;

use crate::etcd_nodes::{self as nodes, SOON};
use crate::process::{Process, administrator, free_ports, hub};
use crate::replicas::{World, when};
use crate::support::join;

/// As the init containers of three pods, with the key file that Kubernetes mounts: readable for a group of the process.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_may_initialise_one_store_at_the_same_time() {
    use std::os::unix::fs::PermissionsExt as _;
    let etcd = nodes::shared().await;
    let folder = tempfile::tempdir().unwrap();
    let (url, key_file) = (etcd.url().to_string(), folder.path().join("unlock.key"));
    std::fs::write(&key_file, [7; 32]).unwrap();
    std::fs::set_permissions(&key_file, std::fs::Permissions::from_mode(0o440)).unwrap();
    let ports = free_ports();
    let [listen, join] = &ports;
    let data = |number: usize| folder.path().join(format!("hub-{number}"));
    let init = |number: usize| {
        let mut command = hub();
        command.args(["init", "--if-missing", "--listen", listen, "--join-listen", join, "--store", &url, "--data"]);
        command.arg(data(number)).arg("--key-file").arg(&key_file);
        command
    };
    // The second time, as after a restart of the pods.
    for round in 0..2 {
        let started: Vec<_> =
            (0..3).map(|number| init(number).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()).collect();
        let mut created = 0;
        for child in started {
            let output = child.unwrap().wait_with_output().unwrap();
            let printed =
                format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
            assert!(output.status.success(), "round {round}: {printed}");
            created += usize::from(printed.contains("Created ClusterSet"));
        }
        let administrators: Vec<usize> = (0..3).filter(|number| data(*number).join("admin.context").exists()).collect();
        assert_eq!((created, administrators.len()), (1, 1), "round {round}: one creates the administrator");
        let keys = (0..3).filter(|number| data(*number).join("admin.key").exists()).count();
        assert_eq!(keys, 1, "the others keep no key");
    }
    let owner = (0..3).map(data).find(|it| it.join("admin.context").exists()).unwrap();
    let mut run = hub();
    run.args(["run", "--listen", listen, "--join-listen", join, "--store", &url, "--key-file"]).arg(&key_file);
    let child = run.stderr(Stdio::null()).spawn().unwrap();
    let process = Process { child, listen: listen.clone(), join: join.clone() };
    let mut admin = administrator(&owner, &process).await;
    assert_eq!(admin.list_users(wire::ListUsersRequest {}).await.unwrap().into_inner().users.len(), 1);
    // Another key file is refused, and creates nothing.
    let other = folder.path().join("other.key");
    let mut command = hub();
    command.args(["init", "--if-missing", "--listen", listen, "--join-listen", join, "--store", &url, "--data"]);
    let refused = command.arg(folder.path().join("another")).arg("--key-file").arg(&other).output().unwrap();
    let printed = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && !other.exists(), "{printed}");
}

/// Two clusters with keys of their own use one token at the same time, at two replicas.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_is_used_once_also_at_two_replicas_at_the_same_time() {
    let etcd = nodes::shared().await;
    let url = etcd.url();
    let world = World::start(&[url.clone(), url]).await;
    world.admin(1).await;
    for round in 0..6 {
        let cluster = format!("c-{round}");
        let token = world.token(&cluster).await;
        let at = |number: usize| {
            let folder = world.folder.path().join(format!("{cluster}-{number}"));
            let (cluster, token, address) = (cluster.clone(), token.clone(), world.join_address(number).to_owned());
            async move { join(&folder, &cluster, &token, &address).await }
        };
        let (one, two) = tokio::join!(at(0), at(1));
        let refused = match (&one, &two) {
            (Ok(_), Err(refused)) | (Err(refused), Ok(_)) => refused.to_string(),
            other => panic!("round {round}: one of both joins: {other:?}\n{}", world.logs()),
        };
        assert!(refused.contains("used") || refused.contains("key"), "{refused}");
    }
}

/// A revocation at one replica ends the streams at all of them, and no replica takes the certificate again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_revocation_ends_streams_at_every_replica() {
    let etcd = nodes::shared().await;
    let url = etcd.url();
    let world = World::start(&[url.clone(), url]).await;
    world.admin(1).await;
    let token = world.token("train").await;
    let member = join(&world.folder.path().join("train"), "train", &token, world.join_address(0)).await.unwrap();
    let streams = [publish(&member, world.address(0)).await, publish(&member, world.address(1)).await];
    let revoke = wire::RevokeClusterRequest { name: "train".to_owned(), reason: "test".to_owned() };
    world.admin(0).await.revoke_cluster(revoke).await.unwrap();
    for (number, stream) in streams.into_iter().enumerate() {
        let ended = tokio::time::timeout(SOON, stream).await;
        assert!(ended.is_ok(), "the stream to replica {number} goes on\n{}", world.logs());
        assert!(!crate::support::is_served(&member, world.address(number)).await, "replica {number}");
    }
}

/// A replica that stops leaves the list at once; one that is killed, when its lease has ended.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_list_of_replicas_follows_those_that_run() {
    let etcd = nodes::shared().await;
    let url = etcd.url();
    let mut world = World::start(&[url.clone(), url.clone(), url]).await;
    let member = world.member("train", 1, 0).await;
    let knows = |count: usize| member.hubs.all().len() == count;
    when("three replicas", &world, SOON, || knows(3)).await;
    world.settle().await;
    // Questions are answered at each of them.
    for number in 0..3 {
        world.answered(number).await;
    }
    world.stop(1);
    let stopped = when("the stopped one is removed", &world, SOON, || knows(2)).await;
    world.kill(2);
    let killed = when("the killed one is removed", &world, SOON, || knows(1)).await;
    println!("removed after {stopped:?} when it stopped, and after {killed:?} when it was killed");
    // It does not wait for the end of a lease.
    assert!(stopped * 2 < killed, "{stopped:?} {killed:?}");
    assert_eq!(member.hubs.all(), [world.address(0)]);
    world.run(2);
    when("it is back", &world, SOON, || knows(2)).await;
    world.settle().await;
    world.answered(2).await;
}

/// A copy of a member's folder reaches a replica that has just started before the member does: the replica serves the member
/// nevertheless, as all others do.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_copies_of_a_member_all_replicas_serve_the_first() {
    let etcd = nodes::shared().await;
    let url = etcd.url();
    let mut world = World::start(&[url.clone(), url.clone()]).await;
    world.admin(1).await;
    let token = world.token("train").await;
    let member = join(&world.folder.path().join("train"), "train", &token, world.join_address(0)).await.unwrap();
    let at_first = publish_as(&member, world.address(0), 1).await;
    let store = hanse_store::open(&url).await.unwrap();
    let record = hanse_store::Key::new(&["instance", "train"]).unwrap();
    let deadline = tokio::time::Instant::now() + SOON;
    while store.read(&record).await.unwrap().is_none() {
        assert!(tokio::time::Instant::now() < deadline, "not recorded\n{}", world.logs());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    world.kill(1);
    world.run(1);
    world.admin(1).await;
    let copy = publish_as(&member, world.address(1), 2).await;
    let also = publish_as(&member, world.address(1), 1).await;
    let ended = tokio::time::timeout(SOON, copy).await.expect("the copy is replaced").unwrap();
    assert_eq!(ended.code(), tonic::Code::Aborted, "{ended:?}");
    let again = publish_as(&member, world.address(1), 2).await;
    let ended = tokio::time::timeout(SOON, again).await.expect("the copy is refused").unwrap();
    assert!(ended.code() == tonic::Code::Aborted && ended.message().contains("in use"), "{ended:?}");
    assert!(!also.is_finished() && !at_first.is_finished(), "the first is served by both");
    let status = world.until(1, "the conflict is reported", |it| !it.clusters[0].problems.is_empty()).await;
    assert!(format!("{:?}", status.clusters[0].problems[0].reason).contains("KeyInUse"), "{status:?}");
    also.abort();
    at_first.abort();
}

/// A member that publishes an empty cluster, and heartbeats until it is dropped.
pub async fn publish(member: &MemberIdentity, address: &str) -> tokio::task::JoinHandle<tonic::Status> {
    publish_as(member, address, 1).await
}

/// As [`publish`], by the process of this number.
async fn publish_as(member: &MemberIdentity, address: &str, instance: u8) -> tokio::task::JoinHandle<tonic::Status> {
    let connection = member.hub_client().unwrap().connect(address).await.unwrap();
    let (outbox, sending) = tokio::sync::mpsc::channel(8);
    let mut client = ExchangeClient::new(connection.channel);
    let answers = client.publish(ReceiverStream::new(sending));
    let open = wire::PublishOpen { protocol: 1, epoch: 1, instance: vec![instance; 16].into(), yields: false };
    let snapshot = Some(wire::begin::Kind::Snapshot(wire::Snapshot {}));
    let begin = wire::Begin { origin: String::new(), kind: snapshot, needs_interest: 0 };
    let position = Some(wire::Position { epoch: 1, revision: 1 });
    let end = wire::End { position, digest: Default::default(), view: 0 };
    for message in [Message::Open(open), Message::Begin(begin), Message::End(end)] {
        outbox.send(wire::PublishRequest { message: Some(message) }).await.unwrap();
    }
    let mut answers = answers.await.unwrap().into_inner();
    tokio::spawn(async move {
        loop {
            let beat = Message::Heartbeat(wire::Heartbeat::default());
            let sent = outbox.send(wire::PublishRequest { message: Some(beat) }).await;
            match tokio::time::timeout(Duration::from_millis(500), answers.message()).await {
                Ok(Err(status)) => return status,
                Ok(Ok(None)) => return tonic::Status::ok("it ended"),
                Ok(Ok(Some(_))) if sent.is_ok() => tokio::time::sleep(Duration::from_millis(500)).await,
                _ => {}
            }
        }
    })
}
