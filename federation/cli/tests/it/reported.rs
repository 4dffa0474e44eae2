//! What members report, as the commands show it.

use std::time::{Duration, Instant};

use futures::channel::mpsc::{UnboundedSender, unbounded};
use hanse_proto::federation::v1 as pb;
use hanse_proto::federation::v1::exchange_client::ExchangeClient;
use hanse_proto::federation::v1::publish_request::Message;
use serde_json::Value;

use crate::online::{TIER, World, member, policy};

/// A cluster that has joined, and a stream on which it reports what a test wants.
struct Reporter {
    cluster: String,
    stream: UnboundedSender<pb::PublishRequest>,
}

impl Reporter {
    fn new(world: &World, cluster: &str) -> Self {
        let identity = world.join(cluster);
        let address = world.hub.address.to_string();
        let (stream, requests) = unbounded();
        let open = Message::Open(pb::PublishOpen { protocol: 1, epoch: 1 });
        stream.unbounded_send(pb::PublishRequest { message: Some(open) }).expect("it is read");
        world.runtime.spawn(async move {
            let connection = identity.hub_client().expect("a client").connect(&address).await.expect("a hub");
            let mut client = ExchangeClient::new(connection.channel);
            let mut answers = client.publish(requests).await.expect("it publishes").into_inner();
            while answers.message().await.is_ok_and(|answer| answer.is_some()) {}
        });
        Self { cluster: cluster.to_owned(), stream }
    }

    /// Reports, and waits until the hub shows it: the number of agents tells reports apart.
    fn report(&self, world: &World, report: pb::Realisation) {
        let agents = report.agents;
        let message = Some(Message::Realisation(report));
        self.stream.unbounded_send(pb::PublishRequest { message }).expect("it is read");
        let deadline = Instant::now() + Duration::from_secs(20);
        while status_of(world, &self.cluster)["agents"] != agents {
            assert!(Instant::now() < deadline, "not in time: {:?}", world.hanse(&["status"]));
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn status_of(world: &World, cluster: &str) -> Value {
    let status = world.hanse(&["status", "-o", "json"]).json();
    let of = |it: &&Value| it["name"] == cluster;
    status["clusters"].as_array().into_iter().flatten().find(of).cloned().unwrap_or_default()
}

/// Clears the screen, colours, rewrites the line above, sets the title, forges a row, turns words around.
const HOSTILE: &str =
    "\u{1b}[2J\u{1b}[31m\u{9b}1A\u{1b}]0;x\u{7}\r\nprod  accepted  yes\t0.1s\u{202e}evil\u{2066}\u{200b}\u{85}";

#[test]
fn text_of_a_member_does_not_act_on_the_administrators_terminal() {
    let world = World::new();
    let manifests = format!("{TIER}{}{}", member("evil", "10.1.0.0/16"), policy("p", "platform", 1));
    assert_eq!(world.apply(&manifests, &[]).code, Some(0));
    let evil = Reporter::new(&world, "evil");
    let node = pb::NodePosition {
        node: HOSTILE.to_owned(),
        connected: true,
        errors: vec![pb::ObjectError { object: HOSTILE.to_owned(), error: HOSTILE.to_owned() }],
        probe: HOSTILE.to_owned(),
        unenforced: vec![pb::UnenforcedPod {
            namespace: HOSTILE.to_owned(),
            name: HOSTILE.to_owned(),
            reason: HOSTILE.to_owned(),
        }],
        unenforced_total: 1,
        ..pb::NodePosition::default()
    };
    let refused = Some(pb::policy_state::State::Refused(HOSTILE.to_owned()));
    let report = pb::Realisation {
        nodes: vec![node],
        policies: vec![pb::PolicyState { policy: "p".to_owned(), state: refused }],
        agents: 1,
        problems: vec![HOSTILE.to_owned()],
        ..pb::Realisation::default()
    };
    evil.report(&world, report);
    let acts = |it: char| it.is_control() && it != '\n' || "\u{202e}\u{2066}\u{200b}".contains(it);
    for arguments in [
        &["status"][..],
        &["status", "-o", "json"],
        &["status", "-o", "yaml"],
        &["wait", "p"],
        &["wait", "p", "-o", "json"],
        &["wait", "p", "-o", "yaml"],
    ] {
        let done = world.hanse(arguments);
        let shown = format!("{}{}", done.out, done.err);
        assert!(shown.contains("\\u001b[2J"), "it is shown, escaped: {arguments:?} {done:?}");
        assert!(!shown.chars().any(acts), "{arguments:?} {done:?}");
        assert!(!shown.lines().any(|line| line.starts_with("prod")), "no forged row: {arguments:?} {done:?}");
    }
    // Programs read what was reported.
    let problems = status_of(&world, "evil")["problems"].to_string();
    assert!(
        problems.contains(&serde_json::to_string(HOSTILE).expect("JSON").trim_matches('"').to_owned()),
        "{problems}"
    );
}
