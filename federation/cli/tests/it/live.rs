//! Answers of a federation that runs, of which a part is away.

use futures::channel::mpsc::unbounded;
use hanse_member::registration::MemberIdentity;
use hanse_proto::federation::v1 as pb;
use hanse_proto::federation::v1::questions_client::QuestionsClient;
use pb::answer::Answer as Reply;
use pb::explanation::Explanation as Explained;
use pb::pods_question::Which;
use pb::question::Question as Ask;
use serde_json::Value;

use crate::online::{Done, World, member, run};

const PODS: &str = "\
apiVersion: v1
kind: Pod
metadata: {name: a, namespace: web}
status: {phase: Running, podIP: 10.0.0.1}
---
apiVersion: v1
kind: Pod
metadata: {name: b, namespace: web}
status: {phase: Running, podIP: 10.0.0.2}
";

/// Lets a cluster join whose member answers for the pods of [`PODS`], as the offline commands judge them. `refuses`: packets
/// to the pod `b`.
fn attend(world: &World, cluster: &str, refuses: bool) {
    let folder = world.folder.path().join(format!("{cluster}-manifests"));
    std::fs::create_dir(&folder).expect("a folder");
    std::fs::write(folder.join("all.yaml"), PODS).expect("manifests");
    let source = format!("{cluster}={}", folder.display());
    let (identity, address) = (world.join(cluster), world.hub.address.to_string());
    let explain = move |query: &[u8]| {
        let query = String::from_utf8_lossy(query).into_owned();
        let arguments = ["policy", "explain", "--cluster", &source, "--queries", "-", "-o", "json"];
        let answer = run(None, &arguments, &query).out;
        let explained = match refuses && (query.contains("10.0.0.2") || query.contains("\"b\"")) {
            true => Explained::Error("it is not compiled yet".to_owned()),
            false => Explained::Answer(answer.trim().to_owned().into_bytes().into()),
        };
        pb::Explanation { explanation: Some(explained) }
    };
    let pod = |name: &str, last: u8| pb::PodInfo {
        namespace: "web".to_owned(),
        name: name.to_owned(),
        addresses: vec![vec![10, 0, 0, last].into()],
        ..pb::PodInfo::default()
    };
    let pods = [pod("a", 1), pod("b", 2)];
    let answer_pods = move |which: &Which| {
        let wanted = |pod: &&pb::PodInfo| match which {
            Which::Name(name) => name.name == pod.name,
            Which::Address(address) => pod.addresses[0] == *address,
            Which::All(_) => true,
        };
        pods.iter().filter(wanted).cloned().collect()
    };
    attend_as(world, identity, address, answer_pods, explain);
}

/// Answers questions of the hub as the member of a cluster.
fn attend_as(
    world: &World,
    identity: MemberIdentity,
    address: String,
    pods: impl Fn(&Which) -> Vec<pb::PodInfo> + Send + 'static,
    explain: impl Fn(&[u8]) -> pb::Explanation + Send + Sync + 'static,
) {
    let (answers, sent) = unbounded();
    answers.unbounded_send(pb::Answer::default()).expect("it is read");
    world.runtime.spawn(async move {
        let connection = identity.hub_client().expect("a client").connect(&address).await.expect("a hub");
        let mut questions =
            QuestionsClient::new(connection.channel).attend(sent).await.expect("it attends").into_inner();
        while let Ok(Some(question)) = questions.message().await {
            let reply = match question.question {
                Some(Ask::Explain(it)) => {
                    let explanations = it.queries.iter().map(|query| explain(query)).collect();
                    Reply::Explained(pb::Explained { explanations, ..pb::Explained::default() })
                }
                Some(Ask::Pods(it)) => {
                    let pods = it.which.as_ref().map(&pods).unwrap_or_default();
                    Reply::Pods(pb::Pods { pods, truncated: false })
                }
                None => Reply::Refused("not understood".to_owned()),
            };
            if answers.unbounded_send(pb::Answer { id: question.id, answer: Some(reply) }).is_err() {
                return;
            }
        }
    });
}

fn matrix(world: &World, arguments: &[&str]) -> Done {
    world.hanse(&[&["policy", "matrix", "--port", "8000"], arguments].concat())
}

/// Until the member attends.
fn complete(world: &World) -> Done {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    loop {
        let done = matrix(world, &["-o", "json"]);
        if !done.out.is_empty() || std::time::Instant::now() > deadline {
            return done;
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
}

fn lines(done: &Done) -> Vec<Value> {
    done.out.lines().map(|line| serde_json::from_str(line).expect("a line of JSON")).collect()
}

#[test]
fn live_matrix_that_lacks_a_cluster_is_incomplete() {
    let world = World::new();
    assert_eq!(world.apply(&member("train", "10.0.0.0/16"), &[]).code, Some(0));
    attend(&world, "train", false);
    let done = complete(&world);
    let answers = lines(&done);
    assert_eq!((done.code, answers.len()), (Some(0), 4), "{done:?}");
    assert!(answers.iter().all(|line| line["verdict"] == "allow" && line.get("incomplete").is_none()), "{answers:#?}");

    // One that is declared and has not joined is no part of the federation yet.
    assert_eq!(world.apply(&member("prod", "10.2.0.0/16"), &[]).code, Some(0));
    assert_eq!(matrix(&world, &["-o", "json"]).code, Some(0));
    // The member of another one does not run.
    assert_eq!(world.apply(&member("serve", "10.1.0.0/16"), &[]).code, Some(0));
    let _identity = world.join("serve");
    let done = matrix(&world, &["-o", "json"]);
    let answers = lines(&done);
    assert_eq!((done.code, answers.len()), (Some(1), 4), "{done:?}");
    assert!(answers.iter().all(|line| line["incomplete"] == true), "{answers:#?}");
    assert!(done.err.contains("serve: note: the member of cluster serve"), "{done:?}");
    let done = matrix(&world, &[]);
    assert_eq!(done.code, Some(1), "{done:?}");
    assert!(done.out.trim_end().lines().last().is_some_and(|line| line.starts_with("incomplete: ")), "{done:?}");
}

#[test]
fn live_matrix_that_lacks_a_pair_is_incomplete_in_every_line() {
    let world = World::new();
    assert_eq!(world.apply(&member("train", "10.0.0.0/16"), &[]).code, Some(0));
    attend(&world, "train", true);
    let done = complete(&world);
    let answers = lines(&done);
    assert_eq!((done.code, answers.len()), (Some(1), 1), "{done:?}");
    assert!(answers.iter().all(|line| line["incomplete"] == true), "{answers:#?}");
}

/// An answer that allows, with this verdict for ingress.
fn answer(ingress: &str) -> pb::Explanation {
    let none = serde_json::json!({"verdict": "allow", "trace": []});
    let line = serde_json::json!({
        "verdict": "allow",
        "egress": none,
        "ingress": {"verdict": ingress, "trace": []},
        "staged": {"verdict": "allow"},
        "form": "prepared",
    });
    pb::Explanation { explanation: Some(Explained::Answer(line.to_string().into_bytes().into())) }
}

/// An address that is granted to a cluster is that of its pod, whatever the member of the other end answers. An answer that does
/// not say `allow` or `deny` is an error.
#[test]
fn member_decides_neither_owners_of_other_addresses_nor_unknown_verdicts() {
    let world = World::new();
    let members = [member("train", "10.0.0.0/16"), member("serve", "10.1.0.0/16")].concat();
    assert_eq!(world.apply(&members, &[]).code, Some(0));
    attend(&world, "train", false);
    let pod = |addresses: &[[u8; 4]]| pb::PodInfo {
        namespace: "inference".to_owned(),
        name: "vllm".to_owned(),
        addresses: addresses.iter().map(|it| it.to_vec().into()).collect(),
        ..pb::PodInfo::default()
    };
    // Whatever the question is: a pod with an address of the other cluster, twice.
    let pods = move |_: &Which| vec![pod(&[[10, 0, 0, 1], [10, 1, 0, 1]]), pod(&[[10, 0, 0, 1]])];
    let explain = |query: &[u8]| match String::from_utf8_lossy(query) {
        query if query.contains("\"port\":81") => answer("no-such-verdict"),
        query if query.contains("\"port\":82") => answer("none"),
        _ => answer("allow"),
    };
    let identity = world.join("serve");
    attend_as(&world, identity, world.hub.address.to_string(), pods, explain);
    complete(&world);
    let query = |from: &str, port: u16| {
        let to = r#"{"cluster":"serve","namespace":"inference","pod":"vllm"}"#;
        let query = format!(r#"{{"from":{from},"to":{to},"port":{port}}}"#);
        run(Some(&world.context), &["policy", "explain", "--queries", "-", "-o", "json"], &query)
    };
    // Until both members attend.
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    let done = loop {
        let done = query(r#"{"ip":"10.0.0.1"}"#, 80);
        if done.code == Some(0) || std::time::Instant::now() > deadline {
            break done;
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    };
    let line = done.json();
    let asked: Vec<&Value> = line["asked"].as_array().expect("members").iter().map(|it| &it["cluster"]).collect();
    assert_eq!((done.code, &asked[..]), (Some(0), &[&Value::from("train"), &Value::from("serve")][..]), "{done:?}");
    for (port, error) in [(81, "cannot read"), (82, "does not match the query")] {
        let done = query(r#"{"ip":"10.0.0.1"}"#, port);
        assert_eq!(done.code, Some(1), "{done:?}");
        let line = done.json();
        assert!(line["error"].as_str().is_some_and(|text| text.contains(error)), "{line}");
    }
    // Only what the question named.
    let done = run(
        Some(&world.context),
        &["policy", "explain", "--queries", "-", "-o", "json"],
        r#"{"from":{"cluster":"serve","namespace":"inference","pod":"other"},"to":{"ip":"10.0.0.1"},"port":80}"#,
    );
    assert!(done.code == Some(1) && done.json()["error"].to_string().contains("no pod inference/other"), "{done:?}");
}
