//! Answers of a federation that runs, of which a part is away.

use futures::channel::mpsc::unbounded;
use hanse_proto::federation::v1 as pb;
use hanse_proto::federation::v1::questions_client::QuestionsClient;
use pb::answer::Answer as Reply;
use pb::explanation::Explanation as Explained;
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
                    let wanted = |pod: &&pb::PodInfo| match &it.which {
                        Some(pb::pods_question::Which::Name(name)) => name.name == pod.name,
                        Some(pb::pods_question::Which::Address(address)) => pod.addresses[0] == *address,
                        _ => true,
                    };
                    let pods = pods.iter().filter(wanted).cloned().collect();
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
