//! The state of a member in Secrets of a real API server: what two processes write to it, and what becomes of a Secret that is deleted.

use std::io::ErrorKind;
use std::path::Path;

use hanse_e2e::kubernetes::{ApiServer, until};
use hanse_kubernetes::Access;
use hanse_member::state::moving::take_from_data;
use hanse_member::state::{MAX_SECRET_BYTES, SecretName, State};
use hanse_runtime::health::{Health, Writes};
use serde_json::json;

use super::{PATIENCE, success};

const NAMESPACE: &str = "state";
const RECORD: &str = "nodes/0a.json";

/// Empty Secrets, as the chart creates them.
fn create(server: &ApiServer, names: &[String]) {
    let secrets: Vec<String> = names
        .iter()
        .map(|name| {
            let metadata = json!({"name": name, "namespace": NAMESPACE});
            json!({"apiVersion": "v1", "kind": "Secret", "metadata": metadata}).to_string()
        })
        .collect();
    success(server.kubectl().expect("kubectl").args(["create", "-f", "-"]), &secrets.join("\n---\n"));
}

fn delete(server: &ApiServer, name: &str) {
    success(server.kubectl().expect("kubectl").args(["--namespace", NAMESPACE, "delete", "secret", name]), "");
}

fn text(state: &State, file: &str) -> Option<String> {
    state.read(file).expect("read").map(|bytes| String::from_utf8(bytes).expect("text"))
}

pub async fn is_not_overwritten(server: &ApiServer) {
    success(server.kubectl().expect("kubectl").args(["create", "namespace", NAMESPACE]), "");
    let name = SecretName { namespace: NAMESPACE.to_owned(), name: "m".to_owned() };
    let administrator = server.user("state", &["system:masters"]).expect("a user");
    let kubeconfig = server.write_kubeconfig("state", &administrator).expect("written");
    let access = Access { kubeconfig: Some(kubeconfig), context: None };
    let writes = Writes::new(&Health::default());
    let folder = tempfile::tempdir().expect("a folder");
    let data = |name: &str| {
        let path = folder.path().join(name);
        std::fs::create_dir_all(&path).expect("a folder");
        path
    };
    let lead = |data: &Path| State::lead(data, &access, &name, &writes);

    // Without its Secrets, or one of them.
    let all = name.secrets();
    create(server, &all[1..]);
    let missing = format!("{:#}", lead(&data("one")).expect_err("one is missing"));
    assert!(missing.contains(&format!("{NAMESPACE}/{}", all[0])) && missing.contains("not found"), "{missing}");
    create(server, &all[..1]);
    let leader = lead(&data("one")).expect("the state is empty");

    two_processes(&leader, &data("commands"), &access, &name).await;
    deleted_secrets(server, leader, &lead, &data("one")).await;
    let leader = lead(&data("one")).expect("it is accepted");

    // The limit of the API server.
    let full = leader.write("nodes/0c.json", &vec![b'x'; MAX_SECRET_BYTES]).expect_err("too large");
    assert_eq!(full.kind(), ErrorKind::StorageFull, "{full}");

    // The caches of the process that led last are used, and those of an earlier one are not.
    let cached = |data: &Path| data.join("source").exists();
    for at in ["one", "two"] {
        std::fs::create_dir_all(data(at).join("source")).expect("a folder");
    }
    assert!(!leader.claim_caches().expect("claimed"), "they are of an unknown process");
    assert!(!cached(&data("one")) && leader.claim_caches().expect("claimed"));
    let next = lead(&data("two")).expect("the state is read");
    assert!(!next.claim_caches().expect("claimed") && !cached(&data("two")));
    std::fs::create_dir_all(data("one").join("source")).expect("a folder");
    let again = lead(&data("one")).expect("the state is read");
    assert!(!again.claim_caches().expect("claimed") && !cached(&data("one")), "another process led since");

    // A directory with the state of an earlier version is moved, once.
    let earlier = data("earlier");
    let files = State::from(earlier.as_path());
    for file in ["root.pem", "intermediate.pem", "member.pem", "term", "node-tokens/7f.json", "nodes/fa.json"] {
        files.write(file, file.as_bytes()).expect("written");
    }
    std::fs::create_dir_all(earlier.join("source")).expect("a folder");
    let moved = lead(&earlier).expect("the state is read");
    take_from_data(&moved).expect("moved");
    assert!(moved.claim_caches().expect("claimed") && cached(&earlier), "they are those of the process that led last");
    assert_eq!(text(&moved, "nodes/fa.json").as_deref(), Some("nodes/fa.json"));
    assert_eq!(text(&moved, "member.pem").as_deref(), Some("member.pem"));
    assert_eq!(moved.list("node-tokens").expect("listed"), ["7f.json"]);
    assert!(!earlier.join("member.pem").exists() && !earlier.join("intermediate.pem").exists());
    take_from_data(&moved).expect("there is nothing left");
    files.write("member.pem", b"another").expect("written");
    let both = format!("{:#}", take_from_data(&moved).expect_err("two states"));
    assert!(both.contains("remove the one that is not in use"), "{both}");
    success(server.kubectl().expect("kubectl").args(["delete", "namespace", NAMESPACE, "--wait=false"]), "");
}

async fn two_processes(leader: &State, commands: &Path, access: &Access, name: &SecretName) {
    State::locate(commands, Some((access, name))).expect("written");
    let command = State::of_member(commands).expect("the state is read");
    leader.write(RECORD, b"1").expect("written");
    command.refresh().expect("read");
    assert_eq!(text(&command, RECORD).as_deref(), Some("1"));
    // The leader has read it, and another process writes it.
    let turn = leader.turn();
    command.write(RECORD, b"revoked").expect("written");
    let followed = until(PATIENCE, async || text(leader, RECORD).as_deref() == Some("revoked")).await;
    println!("a process follows the changes of others after {followed:?}");
    assert!(followed.is_some());
    let refused = leader.write_in(&turn, RECORD, b"enrolled").expect_err("it was changed");
    assert_eq!(refused.kind(), ErrorKind::ResourceBusy, "{refused}");
    assert_eq!(text(leader, RECORD).as_deref(), Some("revoked"));
    leader.write_in(&leader.turn(), RECORD, b"2").expect("it is known");
    // Another file of the Secret, by a process that has not seen that.
    command.write("nodes/0b.json", b"x").expect("written");
    leader.write(RECORD, b"3").expect("written");
    let refused = command.write(RECORD, b"4").expect_err("it was changed");
    assert_eq!(refused.kind(), ErrorKind::ResourceBusy, "{refused}");
    assert_eq!(text(&command, RECORD).as_deref(), Some("3"), "it is read again");
    assert!(command.remove(RECORD).expect("removed"));
    let followed = until(PATIENCE, async || text(leader, RECORD).is_none()).await;
    assert!(followed.is_some() && leader.list("nodes").expect("listed") == ["0b.json"]);
    leader.write(RECORD, b"5").expect("written");
}

async fn deleted_secrets(
    server: &ApiServer,
    leader: State,
    lead: &impl Fn(&Path) -> anyhow::Result<State>,
    data: &Path,
) {
    let deleted = "m-nodes-0".to_owned();
    delete(server, &deleted);
    assert!(leader.write(RECORD, b"6").is_err(), "it does not exist");
    assert_eq!(text(&leader, RECORD).as_deref(), Some("5"), "what is known stays");
    create(server, std::slice::from_ref(&deleted));
    let written = until(PATIENCE, async || leader.write(RECORD, b"7").is_ok()).await;
    assert!(written.is_some(), "its content is written again");
    let command = lead(data).expect("the state is whole");
    assert_eq!((text(&command, RECORD), text(&command, "nodes/0b.json")), (Some("7".into()), Some("x".into())));
    drop((command, leader));

    // Nothing knows what it contained.
    delete(server, &deleted);
    create(server, std::slice::from_ref(&deleted));
    let refused = format!("{:#}", lead(data).expect_err("it is not the same Secret"));
    assert!(refused.contains("m-nodes-0 does not belong to the state") && refused.contains("revoke"), "{refused}");
    let accept = r#"[{"op":"remove","path":"/data/id"}]"#;
    let mut patch = server.kubectl().expect("kubectl");
    success(patch.args(["--namespace", NAMESPACE, "patch", "secret", "m", "--type=json", "-p", accept]), "");
}
