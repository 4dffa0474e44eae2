//! Errors that can be detected before a token is presented do not use the token up; nor do later failures.

use std::net::TcpListener;
use std::path::PathBuf;

use hanse_member::process::{self, Options};
use hanse_member::source::Location;
use hanse_proto::federation::v1 as wire;
use hanse_ruleset::{Enforcement, UnknownPods};
use hanse_runtime::monitor::MetricsOptions;
use hanse_runtime::shutdown::Shutdown;

use crate::support::{SOON, TestHub, eventually};

struct World {
    hub: TestHub,
    options: Options,
}

impl World {
    async fn new() -> Self {
        let hub = TestHub::start().await;
        let folder = hub.folder.path();
        let (source, token_file) = (folder.join("source"), folder.join("train.token"));
        std::fs::create_dir(&source).unwrap();
        hanse_runtime::files::write_secret(&token_file, hub.token("train", true).await.as_bytes()).unwrap();
        let any = "127.0.0.1:0".parse().unwrap();
        let options = Options {
            data: folder.join("train"),
            cluster: "train".to_owned(),
            hubs: vec![hub.hub.address.to_string()],
            join: vec![hub.hub.join_address.to_string()],
            token_file: Some(token_file),
            source: Location::Directory(source),
            state: None,
            agent_service: None,
            agent_account: None,
            authority_config_map: None,
            agent_listen: any,
            enrol_listen: any,
            federated_allow_final: false,
            node_lifetime: SOON,
            unknown_pods: UnknownPods::Deny,
            enforcement: Enforcement::Enforce,
            node_taints: hanse_member::node_taints::NodeTaints::Leave,
            health_listen: None,
            metrics: MetricsOptions::default(),
        };
        Self { hub, options }
    }

    /// Why it does not run; the token is as good as before.
    async fn refused(&self, options: Options, expected: &[&str]) {
        let shutdown = Shutdown::default();
        let error = tokio::time::timeout(SOON, process::run(options, shutdown)).await.expect("in time").unwrap_err();
        let text = format!("{error:#}");
        assert!(expected.iter().all(|it| text.contains(it)), "{expected:?}: {text}");
        assert!(!self.is_bound().await, "the token was presented: {text}");
    }

    async fn is_bound(&self) -> bool {
        let tokens = self.hub.admin().await.list_tokens(wire::ListTokensRequest {}).await.unwrap().into_inner().tokens;
        let [token] = &tokens[..] else { panic!("{} tokens", tokens.len()) };
        !token.bound_key.is_empty()
    }

    /// The member runs, and the cluster is live.
    async fn joins(&self) {
        let shutdown = Shutdown::default();
        let running = tokio::spawn(process::run(self.options.clone(), shutdown.clone()));
        eventually("joined", || async {
            assert!(!running.is_finished(), "it has ended");
            self.options.data.join("member.pem").exists()
        })
        .await;
        assert!(shutdown.drain(SOON).await);
        running.await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn a_member_that_could_not_run_keeps_its_token() {
    let world = World::new().await;
    let options = || world.options.clone();
    let missing = world.hub.folder.path().join("missing");
    world
        .refused(Options { source: Location::Directory(missing), ..options() }, &["missing (--source)", "not used yet"])
        .await;
    let file: PathBuf = world.options.token_file.clone().unwrap();
    world.refused(Options { source: Location::Directory(file), ..options() }, &["--source"]).await;
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken_at = taken.local_addr().unwrap();
    world.refused(Options { agent_listen: taken_at, ..options() }, &["--agent-listen", "in use"]).await;
    world.refused(Options { enrol_listen: taken_at, ..options() }, &["--enrol-listen", "in use"]).await;
    drop(taken);
    let same = Options { agent_listen: taken_at, enrol_listen: taken_at, ..options() };
    world.refused(same, &["--agent-listen and --enrol-listen"]).await;
    // What is in the way of a file is found too.
    let data = world.options.data.clone();
    std::fs::create_dir_all(data.join("written/x")).unwrap();
    world.refused(options(), &["write files in", "--data"]).await;
    std::fs::remove_dir_all(data.join("written")).unwrap();
    world.joins().await;
}

#[tokio::test]
async fn a_token_that_was_spent_on_a_failure_is_good_for_the_same_key() {
    let world = World::new().await;
    let data = world.options.data.clone();
    // The hub has answered, and the answer cannot be written.
    std::fs::create_dir_all(data.join("root.pem/x")).unwrap();
    let shutdown = Shutdown::default();
    let ended = tokio::time::timeout(SOON, process::run(world.options.clone(), shutdown)).await.expect("in time");
    assert!(format!("{:#}", ended.unwrap_err()).contains("root.pem"));
    assert!(world.is_bound().await && !data.join("member.pem").exists());
    std::fs::remove_dir_all(data.join("root.pem")).unwrap();
    world.joins().await;
}
