//! The commands that call a hub, with a hub in this process.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use hanse_hub::server::{Hub, Options, default_store, init};
use hanse_identity::TrustDomain;
use hanse_member::registration::MemberIdentity;
use hanse_runtime::shutdown::Shutdown;
use serde_json::Value;

pub struct World {
    pub folder: tempfile::TempDir,
    pub context: PathBuf,
    // What serves, for as long as this is.
    pub hub: Hub,
    _shutdown: Shutdown,
    pub runtime: tokio::runtime::Runtime,
}

/// What a command did: exit code, output, complaints.
#[derive(Debug)]
pub struct Done {
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

impl Done {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

impl From<Output> for Done {
    fn from(output: Output) -> Self {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Self { code: output.status.code(), out: text(&output.stdout), err: text(&output.stderr) }
    }
}

pub fn run(context: Option<&Path>, arguments: &[&str], input: &str) -> Done {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hanse"));
    command.args(arguments).env_remove("HANSE_CONTEXT");
    if let Some(context) = context {
        command.env("HANSE_CONTEXT", context);
    }
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("hanse starts");
    // A command that does not read has closed its end.
    drop(child.stdin.take().expect("piped").write_all(input.as_bytes()));
    child.wait_with_output().expect("hanse ends").into()
}

impl World {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().expect("temporary directory");
        let data = folder.path().join("hub");
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("tokio");
        hanse_identity::tls::install_provider();
        let shutdown = Shutdown::default();
        let any = "127.0.0.1:0".parse().expect("an address");
        let domain = TrustDomain::new("hanse.test").expect("a domain");
        runtime.block_on(init(&data, &default_store(&data), &domain, any)).expect("a ClusterSet");
        // The store's last owner needs a moment to let go of the file.
        let deadline = Instant::now() + Duration::from_secs(20);
        let hub = loop {
            match runtime.block_on(Hub::start(Options::new(data.clone(), any, any), &shutdown)) {
                Ok(hub) => break hub,
                Err(error) if Instant::now() > deadline => panic!("{error:#}"),
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        };
        // Where it serves is known only now.
        let context = data.join("admin.context");
        let text =
            std::fs::read_to_string(&context).expect("the context").replace("127.0.0.1:0", &hub.address.to_string());
        std::fs::write(&context, text).expect("the context");
        Self { folder, context, hub, _shutdown: shutdown, runtime }
    }

    pub fn hanse(&self, arguments: &[&str]) -> Done {
        run(Some(&self.context), arguments, "")
    }

    /// Lets a cluster join with a token; its member then does not run.
    pub fn join(&self, cluster: &str) -> MemberIdentity {
        let token = self.hanse(&["token", "create", "--cluster", cluster]).out;
        let folder = self.folder.path().join(cluster);
        std::fs::create_dir_all(&folder).expect("a folder");
        let file = folder.join("token");
        hanse_runtime::files::write_secret(&file, token.trim().as_bytes()).expect("the token");
        let (join, stop) = ([self.hub.join_address.to_string()], Default::default());
        let joined = MemberIdentity::join(&folder, cluster, &file, &join, false, &stop);
        self.runtime.block_on(joined).expect("joined")
    }

    /// Lets a cluster request to join, which waits to be accepted.
    pub fn request(&self, token: &str, cluster: &'static str) {
        let folder = self.folder.path().join(cluster);
        std::fs::create_dir_all(&folder).expect("a folder");
        let file = folder.join("token");
        hanse_runtime::files::write_secret(&file, token.trim().as_bytes()).expect("the token");
        let join = [self.hub.join_address.to_string()];
        self.runtime.spawn(async move {
            MemberIdentity::join(&folder, cluster, &file, &join, false, &Default::default()).await
        });
        let deadline = Instant::now() + Duration::from_secs(20);
        // Before the request arrives, the cluster is unknown.
        let is_pending = |it: Done| it.code == Some(0) && it.json()["state"] == "Pending";
        while !is_pending(self.hanse(&["cluster", "get", cluster, "-o", "json"])) {
            assert!(Instant::now() < deadline, "it does not wait");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub fn apply(&self, manifests: &str, arguments: &[&str]) -> Done {
        run(Some(&self.context), &[&["apply", "-f", "-"], arguments].concat(), manifests)
    }
}

pub const TIER: &str = "apiVersion: hanse.dev/v1alpha1\nkind: Tier\nmetadata: {name: platform}\nspec: {phase: Guard, order: 1, defaultAction: Pass}\n";

pub fn policy(name: &str, tier: &str, order: u32) -> String {
    format!(
        "---\napiVersion: hanse.dev/v1alpha1\nkind: FederatedNetworkPolicy\nmetadata: {{name: {name}}}\nspec: {{tier: \
         {tier}, order: {order}, types: [Ingress], ingress: [{{action: Deny}}]}}\n"
    )
}

pub fn member(name: &str, cidr: &str) -> String {
    format!(
        "---\napiVersion: hanse.dev/v1alpha1\nkind: MemberCluster\nmetadata: {{name: {name}}}\nspec: {{grants: \
         {{namespaces: ['*'], cidrs: [{cidr}]}}}}\n"
    )
}

#[test]
fn missing_hub_is_reported_with_advice() {
    let missing = run(None, &["status"], "");
    assert_eq!(missing.code, Some(1), "{missing:?}");
    assert!(missing.err.contains("--context") && missing.err.contains("hanse-hub init"), "{missing:?}");
    assert_eq!(run(Some(Path::new("")), &["status"], "").err, missing.err, "empty is not set");
    let nowhere = run(Some(Path::new("/nonexistent/context")), &["status"], "");
    assert!(nowhere.err.contains("/nonexistent/context"), "{nowhere:?}");

    let world = World::new();
    // An address that was free a moment ago, and at which nobody listens.
    let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("its address");
    let text = std::fs::read_to_string(&world.context).expect("the context");
    let served = text.split('"').find(|part| part.starts_with("127.0.0.1")).expect("an address").to_owned();
    std::fs::write(&world.context, text.replace(&served, &free.to_string())).expect("the context");
    let gone = world.hanse(&["status"]);
    assert_eq!(gone.code, Some(1), "{gone:?}");
    assert!(gone.err.contains(&free.to_string()) && gone.err.contains("nothing listens there"), "{gone:?}");
    // The second hub of the list is asked where the first is gone.
    let both = text.replace(&format!("\"{served}\""), &format!("\"{free}\", \"{served}\""));
    std::fs::write(&world.context, both).expect("the context");
    assert_eq!(world.hanse(&["status"]).code, Some(0));
}

#[test]
fn error_contains_nothing_of_a_file_that_is_not_a_context() {
    let folder = tempfile::tempdir().expect("temporary directory");
    let (file, out) = (folder.path().join("ca.key"), folder.path().join("ann"));
    let create = ["user", "create", "ann", "--role", "viewer", "--out", out.to_str().expect("UTF-8")];
    for (content, expected) in [
        (
            "-----BEGIN PRIVATE KEY-----\nSECRETSECRET\n-----END PRIVATE KEY-----\n",
            "line 1: expected a mapping with hubs, ca",
        ),
        ("hubs: [a]\nca: SECRETSECRET: b\n", "line 2: expected a mapping with hubs, ca"),
        ("# A context\nhubs: SECRETSECRET\n", "line 2: expected a mapping with hubs, ca"),
        ("hubs: [a]\nca: SECRETSECRET\n", "missing field `"),
    ] {
        std::fs::write(&file, content).expect("written");
        for arguments in [&["status"][..], &create] {
            let done = run(Some(&file), arguments, "");
            assert_eq!((done.code, done.out.as_str()), (Some(1), ""), "{content}: {done:?}");
            assert!(done.err.contains("ca.key is not a context file: ") && done.err.contains(expected), "{done:?}");
            assert!(!done.err.contains("SECRETSECRET"), "{done:?}");
        }
    }
    assert!(!out.exists());
}

#[test]
fn staged_and_enforced_policies_of_one_name_are_two_objects() {
    let world = World::new();
    let staged = |action: &str| {
        let staged = policy("p", "platform", 1).replace("FederatedN", "StagedFederatedN");
        staged.replace("{tier", &format!("{{stagedAction: {action}, tier"))
    };
    let both = world.apply(&format!("{TIER}{}{}", policy("p", "platform", 1), staged("Delete")), &[]);
    assert_eq!((both.code, both.err.as_str()), (Some(0), ""), "{both:?}");
    assert!(both.out.contains("StagedFederatedNetworkPolicy/p created"), "{both:?}");
    let get = |kind: &str| world.hanse(&["get", kind, "p", "-o", "json"]).json();
    assert_eq!(get("sfnp")["spec"]["stagedAction"], "Delete");
    assert_eq!(get("fnp")["kind"], "FederatedNetworkPolicy");
    let listed = world.hanse(&["get", "stagedfederatednetworkpolicies"]);
    assert!(listed.out.contains("staged Delete, tier platform, order 1, 1 rule"), "{listed:?}");
    let described = world.hanse(&["describe", "sfnp/p"]);
    assert!(described.out.contains("platform (Guard, order 1"), "{described:?}");
    let wrong = world.apply(&staged("Learned"), &[]);
    assert!(wrong.code == Some(1) && wrong.err.contains("spec.stagedAction"), "{wrong:?}");
    // A staged policy keeps its tier.
    assert_eq!(world.hanse(&["delete", "fnp", "p"]).code, Some(0));
    let tier = world.hanse(&["delete", "tier", "platform"]);
    assert!(tier.err.contains("Tier/platform is used by StagedFederatedNetworkPolicy/p:"), "{tier:?}");
    let orphan = world.apply(&staged("Set").replace("platform", "gone"), &["--allow-missing-tier"]);
    assert!(orphan.code == Some(1) && orphan.err.contains("can only be moved to a tier that exists"), "{orphan:?}");
    assert_eq!(world.hanse(&["delete", "sfnp", "p"]).code, Some(0));
    assert_eq!(world.hanse(&["get", "sfnp", "p"]).code, Some(1));
    let orphan = world.apply(&staged("Set").replace("platform", "gone"), &["--allow-missing-tier"]);
    assert_eq!(orphan.code, Some(0), "{orphan:?}");
    let described = world.hanse(&["describe", "sfnp/p"]);
    assert!(described.out.contains("warning: spec.tier: Tier gone does not exist"), "{described:?}");
}

/// A repository for a management cluster may be applied to a hub without an operator, too.
#[test]
fn objects_for_the_operator_are_skipped_with_a_note() {
    let world = World::new();
    let set = "---\napiVersion: hanse.dev/v1alpha1\nkind: ClusterSet\nmetadata: {name: default}\n\
               spec: {trustDomain: hanse.example}\n";
    let token = "---\napiVersion: hanse.dev/v1alpha1\nkind: ClusterJoinToken\nmetadata: {name: t}\n\
                 spec: {cluster: train, secretName: t}\n";
    let accepted = member("train", "10.1.0.0/16").replace("{grants", "{acceptance: Accepted, grants");
    let applied = world.apply(&format!("{TIER}{set}{token}{accepted}"), &[]);
    assert_eq!(applied.code, Some(0), "{applied:?}");
    for said in [
        "ClusterSet default skipped: it is for the operator",
        "ClusterJoinToken t skipped: it is for the operator",
        "spec.acceptance: ignored without an operator",
    ] {
        assert!(applied.err.contains(said), "{applied:?}");
    }
    assert!(applied.out.contains("Tier/platform created") && applied.out.contains("MemberCluster/train created"));
    // An error in one of them is an error all the same.
    let wrong = world.apply(&set.replace("hanse.example", "Hanse"), &[]);
    assert!(wrong.code == Some(1) && wrong.err.contains("spec.trustDomain: \"Hanse\""), "{wrong:?}");
}

#[test]
fn applying_is_idempotent_and_fails_object_by_object() {
    let world = World::new();
    let first = world.apply(&format!("{TIER}{}", policy("p", "platform", 1)), &[]);
    assert_eq!((first.code, first.err.as_str()), (Some(0), ""), "{first:?}");
    assert!(first.out.contains("Tier/platform created") && first.out.contains("Policy/p created"), "{first:?}");
    let again = world.apply(&format!("{TIER}{}", policy("p", "platform", 1)), &[]);
    assert_eq!(again.out.matches("unchanged at").count(), 2, "{again:?}");

    // A dry run judges and changes nothing.
    let dry = world.apply(&policy("p", "platform", 2), &["--dry-run", "-o", "json"]);
    assert_eq!((dry.json()["result"].as_str(), dry.json()["dryRun"].as_bool()), (Some("configured"), Some(true)));
    assert_eq!(world.hanse(&["get", "fnp", "p", "-o", "json"]).json()["spec"]["order"], 1);

    // What the hub refuses keeps nothing else out, and is told by its place.
    let mixed =
        [member("train", "10.1.0.0/16"), member("serve", "10.1.2.0/24"), member("prod", "10.2.0.0/16")].concat();
    let mixed = world.apply(&mixed, &[]);
    assert_eq!(mixed.code, Some(1), "{mixed:?}");
    assert!(mixed.out.ends_with("2 applied: 2 created, 1 failed\n"), "{mixed:?}");
    assert_eq!(mixed.out.matches("created at").count(), 2, "{mixed:?}");
    assert!(mixed.err.contains("standard input:7: MemberCluster/serve failed: spec.grants.cidrs"), "{mixed:?}");
    assert!(mixed.err.contains("1 of 3 objects failed"), "{mixed:?}");

    // What is wrong by itself is told by file, line and field, and nothing of it is written.
    let file = world.folder.path().join("wrong.yaml");
    let wrong = format!("{}{}", policy("q", "platform", 1), policy("r", "platform", 1).replace("Deny", "Drop"));
    std::fs::write(&file, wrong).expect("manifests");
    let wrong = world.hanse(&["apply", "-f", file.to_str().expect("UTF-8")]);
    assert_eq!(wrong.code, Some(1), "{wrong:?}");
    assert!(
        wrong.err.contains("wrong.yaml:10: spec.ingress[0].action") && wrong.err.contains("nothing was applied"),
        "{wrong:?}"
    );
    assert_eq!(world.hanse(&["get", "fnp", "q"]).code, Some(1));

    // Two of one key: which counts would depend on who reads.
    let twice = world.apply(&format!("{}{}", policy("q", "platform", 1), policy("q", "platform", 2)), &[]);
    assert!(twice.code == Some(1) && twice.err.contains("standard input:7: metadata.name: duplicate of "), "{twice:?}");
    assert_eq!(world.hanse(&["get", "fnp", "q"]).code, Some(1));

    // Without its tier a policy would not be in force.
    let tier = world.hanse(&["delete", "tier", "platform"]);
    assert!(tier.code == Some(1) && tier.err.contains("Tier/platform is used by p:"), "{tier:?}");
    assert_eq!(world.hanse(&["delete", "fnp", "p"]).code, Some(0));
    assert_eq!(world.hanse(&["delete", "tier", "platform"]).code, Some(0));
    let orphan = world.apply(&policy("o", "platform", 1), &[]);
    assert!(orphan.code == Some(1) && orphan.err.contains("--allow-missing-tier"), "{orphan:?}");
    let orphan = world.apply(&policy("o", "platform", 1), &["--allow-missing-tier"]);
    assert!(orphan.code == Some(0) && orphan.err.contains("Tier platform does not exist"), "{orphan:?}");
    let absent = world.hanse(&["delete", "tier", "platform"]);
    assert!(absent.code == Some(1) && absent.err.contains("Tier/platform not found"), "{absent:?}");
    assert_eq!(world.hanse(&["delete", "tier", "platform", "--ignore-not-found"]).code, Some(0));
}

#[test]
fn manifest_from_get_is_not_applied_over_a_concurrent_change() {
    let world = World::new();
    let original = format!("{TIER}{}{}", policy("p", "platform", 1), policy("q", "platform", 1));
    assert_eq!(world.apply(&original, &[]).code, Some(0));
    // All of it, as a list, and the list as it was read.
    for format in ["yaml", "json"] {
        let all = world.hanse(&["get", "-o", format]);
        let same = world.apply(&all.out, &[]);
        assert_eq!((same.code, same.out.matches("unchanged at").count()), (Some(0), 3), "{same:?}");
    }
    // Items of a typed list leave out what it says.
    let items = r#"[{"metadata": {"name": "listed"}, "spec": {"tier": "platform", "ingress": [{"action": "Deny"}]}}]"#;
    let list = r#"{"apiVersion": "hanse.dev/v1alpha1", "kind": "FederatedNetworkPolicyList", "items": "#;
    let typed = world.apply(&format!("{list}{items}}}"), &[]);
    assert!(typed.code == Some(0) && typed.out.contains("Policy/listed created"), "{typed:?}");
    assert_eq!(world.hanse(&["get", "fnp", "listed"]).code, Some(0));
    let read = world.hanse(&["get", "fnp", "p", "-o", "yaml"]);
    assert_eq!(world.apply(&policy("p", "platform", 5), &[]).code, Some(0));
    let late = world.apply(&read.out.replace("order: 1", "order: 7"), &[]);
    assert_eq!(late.code, Some(1), "{late:?}");
    assert!(late.err.contains("is not at revision") && late.err.contains("hanse get"), "{late:?}");
    assert_eq!(world.hanse(&["get", "fnp", "p", "-o", "json"]).json()["spec"]["order"], 5);
    // By the files that name them.
    let file = world.folder.path().join("two.yaml");
    std::fs::write(&file, format!("{TIER}{}", policy("gone", "platform", 1))).expect("manifests");
    let named = world.hanse(&["get", "-f", file.to_str().expect("UTF-8")]);
    assert_eq!(named.code, Some(1), "{named:?}");
    assert!(named.out.contains("platform") && named.err.contains("FederatedNetworkPolicy/gone not found"), "{named:?}");
}

#[test]
fn an_author_writes_the_policies_of_their_tiers() {
    use std::os::unix::fs::PermissionsExt as _;
    let world = World::new();
    assert_eq!(world.apply(TIER, &[]).code, Some(0));
    let out = world.folder.path().join("ada");
    let out_text = out.to_str().expect("UTF-8");
    let create = ["user", "create", "ada", "--role", "author=platform", "--out", out_text];
    let created = world.hanse(&create);
    assert_eq!(created.code, Some(0), "{created:?}");
    let key = std::fs::metadata(out.join("ada.key")).expect("her key").permissions().mode();
    assert_eq!(key & 0o077, 0, "others cannot read her key");
    let again = world.hanse(&create);
    assert!(again.code == Some(1) && again.err.contains("--force"), "a key in use is not replaced: {again:?}");

    let ada = out.join("ada.context");
    let write = |manifest: &str| run(Some(&ada), &["apply", "-f", "-"], manifest);
    assert_eq!(write(&policy("p", "platform", 1)).code, Some(0));
    let denied = write(&policy("s", "security", 1));
    assert_eq!(denied.code, Some(1), "{denied:?}");
    assert!(
        denied.err.contains("needs the role author=security or administrator; user/ada has author=platform")
            && denied.err.contains("hanse user list"),
        "{denied:?}"
    );
    assert_eq!(run(Some(&ada), &["audit"], "").code, Some(1), "only administrators");
    let described = run(Some(&ada), &["describe", "fnp", "p"], "");
    assert!(described.out.contains("unknown: only administrators may read the audit log"), "{described:?}");
    let users = world.hanse(&["user", "list", "-o", "json"]).json();
    let hers = users["items"].as_array().into_iter().flatten().find(|user| user["name"] == "ada").expect("ada");
    assert_eq!(hers["roles"][0], "author=platform");
    let audit = world.hanse(&["audit", "-o", "json"]).json();
    let of_ada = audit["items"].as_array().into_iter().flatten().filter(|it| it["who"] == "user/ada");
    let mut outcomes: Vec<bool> = of_ada.map(|it| it["outcome"] == "done").collect();
    outcomes.sort_unstable();
    assert_eq!(outcomes, [false, true], "what was refused is on record: {audit:#}");
    assert_eq!(world.hanse(&["user", "revoke", "ada"]).code, Some(0));
    assert_eq!(run(Some(&ada), &["status"], "").code, Some(1));
    for wrong in ["author", "viewer=x", "king"] {
        let refused = world.hanse(&["user", "create", "bob", "--role", wrong, "--out", out_text]);
        assert_eq!(refused.code, Some(2), "{wrong}: {refused:?}");
    }
}

#[test]
fn wait_reports_clusters_that_lag() {
    let world = World::new();
    let unknown = world.hanse(&["wait", "--for=enforced", "nobody"]);
    assert!(unknown.code == Some(1) && unknown.err.contains("nobody"), "{unknown:?}");
    let manifests = format!("{TIER}{}{}", member("train", "10.1.0.0/16"), policy("p", "platform", 1));
    assert_eq!(world.apply(&manifests, &[]).code, Some(0));
    let nobody = world.hanse(&["wait", "--for=enforced", "--timeout", "1", "p"]);
    assert!(nobody.code == Some(1) && nobody.err.contains("has joined"), "nothing is enforced: {nobody:?}");
    world.join("train");
    let lagging = world.hanse(&["wait", "--for=enforced", "--timeout", "1", "p"]);
    assert_eq!(lagging.code, Some(1), "{lagging:?}");
    assert!(lagging.err.contains("p is not enforced") && lagging.err.contains("train"), "{lagging:?}");
    assert_eq!(world.hanse(&["status", "--exit-code"]).code, Some(1), "it has joined and was never heard");
    let told = world.hanse(&["wait", "--timeout", "1", "p", "-o", "json"]).json();
    assert_eq!((&told["state"], &told["clusters"][0]["cluster"]), (&"lagging".into(), &"train".into()));
}

/// As under `| head`: what was to be done is done, and the exit code says how it ended.
#[test]
fn a_closed_standard_output_neither_stops_the_work_nor_changes_the_exit_code() {
    let world = World::new();
    let closed = |arguments: &[&str], input: &str| {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        let mut command = Command::new(env!("CARGO_BIN_EXE_hanse"));
        command.args(arguments).env("HANSE_CONTEXT", &world.context);
        let mut child = command.stdin(Stdio::piped()).stdout(writer).stderr(Stdio::null()).spawn().expect("it starts");
        drop(child.stdin.take().expect("piped").write_all(input.as_bytes()));
        child.wait().expect("it ends").code()
    };
    // Several batches of 500.
    let count = 1_200;
    let many: String = (0..count).map(|it| policy(&format!("p{it}"), "platform", 1)).collect();
    let many = format!("{TIER}{many}");
    assert_eq!(closed(&["apply", "-f", "-"], &many), Some(0));
    let stored = || world.hanse(&["get", "fnp", "-o", "name"]).out.lines().count();
    assert_eq!(stored(), count);
    let bad = policy("bad", "platform", 1).replace("Deny", "Denied");
    assert_eq!(closed(&["apply", "-f", "-"], &format!("{many}{bad}")), Some(1), "one is refused");
    assert_eq!(closed(&["status", "--exit-code"], ""), Some(1), "no cluster has joined");
    assert_eq!(closed(&["status"], ""), Some(0));
    assert_eq!(closed(&["wait", "--timeout", "1", "p0", "-o", "json"], ""), Some(1));
    assert_eq!(closed(&["get", "fnp", "nothing"], ""), Some(1));
    assert_eq!(closed(&["delete", "-f", "-"], &many), Some(0));
    assert_eq!(stored(), 0);
}

#[test]
fn tokens_and_clusters() {
    let world = World::new();
    let none = world.hanse(&["token", "list"]);
    assert!(none.out.contains("hanse token create"), "{none:?}");
    let token = world.hanse(&["token", "create", "--cluster", "train"]);
    assert_eq!((token.code, token.out.lines().count(), token.err.as_str()), (Some(0), 1, ""), "alone on its line");
    let list = world.hanse(&["token", "list", "-o", "json"]);
    assert!(!list.out.contains(token.out.trim()), "a secret is shown once");
    let id = list.json()["items"][0]["id"].as_str().expect("an id").to_owned();
    assert_eq!(world.hanse(&["token", "revoke", &id]).code, Some(0));
    let twice = world.hanse(&["token", "revoke", &id]);
    assert!(twice.code == Some(1) && twice.err.contains(&id), "{twice:?}");
    let unknown = world.hanse(&["cluster", "get", "nowhere"]);
    assert!(unknown.code == Some(1) && unknown.err.contains("hanse cluster list"), "{unknown:?}");
    assert_eq!(world.apply(&member("train", "10.1.0.0/16"), &[]).code, Some(0));
    assert_eq!(world.hanse(&["cluster", "get", "train", "-o", "yaml"]).out.lines().next(), Some("---"));
    let accept = world.hanse(&["cluster", "accept", "train"]);
    assert!(accept.code == Some(1) && accept.err.contains("train"), "nobody has joined: {accept:?}");
    let expected = world.hanse(&["status", "--exit-code"]);
    assert_eq!(expected.code, Some(1), "of no cluster anything is in sync: {expected:?}");
    assert!(expected.err.contains("no cluster has joined"), "{expected:?}");
    assert_eq!(world.hanse(&["status"]).code, Some(0));
}

#[test]
fn revoked_cluster_joins_again_with_the_authority_of_its_agents() {
    let world = World::new();
    assert_eq!(world.apply(&member("train", "10.1.0.0/16"), &[]).code, Some(0));
    world.join("train");
    let folder = world.folder.path().join("train");
    let keys = || {
        ["member.pem", "intermediate.pem"]
            .map(|file| hanse_identity::keys::Credentials::read_file(&folder.join(file)).expect("a key").key.public())
    };
    let before = keys();
    let revoked = world.hanse(&["cluster", "revoke", "train", "-o", "json"]).json();
    let expected = serde_json::json!({
        "apiVersion": "cli.hanse.dev/v1", "kind": "Result", "cluster": "train", "result": "revoked", "closed": 0,
    });
    assert_eq!(revoked, expected);
    let accept = world.hanse(&["cluster", "accept", "train"]);
    assert!(accept.code == Some(1) && accept.err.contains("hanse-member join"), "{accept:?}");
    world.join("train");
    assert_eq!(world.hanse(&["cluster", "get", "train", "-o", "json"]).json()["state"], "Accepted");
    let after = keys();
    assert!(before[0] != after[0] && before[1] == after[1], "a new key, and the authority that agents know");
    let deleted = world.hanse(&["delete", "mc", "train"]);
    assert!(deleted.code == Some(0) && deleted.err.contains("train has joined"), "{deleted:?}");
    let status = world.hanse(&["status"]);
    assert!(status.out.contains("train") && !status.out.contains("labels: any"), "nothing is granted: {status:?}");
}

#[test]
fn unusable_context_is_reported_with_the_reason() {
    let world = World::new();
    let text = std::fs::read_to_string(&world.context).expect("the context");
    let check = |from: &str, to: &str, expected: &str| {
        assert!(text.contains(from), "{text}");
        let context = world.context.with_file_name("other.context");
        std::fs::write(&context, text.replace(from, to)).expect("written");
        let done = run(Some(&context), &["status"], "");
        assert!(done.code == Some(1) && done.err.contains(expected), "{done:?}");
    };
    check("hanse.test", "other.test", "the trust domain is other.test");
    let (served, join) = (world.hub.address.to_string(), world.hub.join_address.to_string());
    check(&served, &join, "where clusters join");
    let out = world.folder.path().join("ann");
    let out = out.to_str().expect("a path");
    let created = world.hanse(&["user", "create", "ann", "--role", "viewer", "--out", out, "-o", "json"]).json();
    let context = std::path::PathBuf::from(created["context"].as_str().expect("a path"));
    assert_eq!(run(Some(&context), &["cluster", "list"], "").code, Some(0));
    assert_eq!(world.hanse(&["user", "revoke", "ann"]).code, Some(0));
    let revoked = run(Some(&context), &["cluster", "list"], "");
    assert!(revoked.code == Some(1) && revoked.err.contains("revoked"), "{revoked:?}");
}

/// The candidates for the last word of a command line, as the script of bash requests them.
fn complete(context: Option<&Path>, words: &[&str]) -> Vec<String> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hanse"));
    command.arg("--").arg("hanse").args(words).env_remove("HANSE_CONTEXT").env("COMPLETE", "bash");
    command.env("_CLAP_IFS", "\n").env("_CLAP_COMPLETE_INDEX", words.len().to_string());
    if let Some(context) = context {
        command.env("HANSE_CONTEXT", context);
    }
    let done = Done::from(command.output().expect("hanse starts"));
    assert_eq!((done.code, done.err.as_str()), (Some(0), ""), "{done:?}");
    done.out.lines().map(str::to_owned).collect()
}

#[test]
fn completion_knows_every_command() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = run(None, &["completion", shell], "");
        assert!(script.code == Some(0) && script.out.contains("COMPLETE"), "{shell}: {script:?}");
    }
    for (words, expected) in [
        (&[""][..], &["apply", "audit", "policy"][..]),
        (&["policy", ""], &["scaffold", "lint"]),
        (&["user", ""], &["create", "revoke"]),
        (&["status", "-o", ""], &["json", "wide"]),
        (&["get", ""], &["fnp", "tier"]),
        (&["describe", ""], &["cluster", "node", "mc"]),
    ] {
        let candidates = complete(None, words);
        for it in expected {
            assert!(candidates.iter().any(|candidate| candidate == it), "{words:?} misses {it}: {candidates:?}");
        }
    }
}

#[test]
fn completion_offers_names_from_the_hub() {
    let world = World::new();
    let manifests =
        [TIER, &policy("web", "platform", 1), &policy("db", "platform", 1), &member("train", "10.1.0.0/16")];
    assert_eq!(world.apply(&manifests.concat(), &[]).code, Some(0));
    for (words, expected) in [
        (&["get", "fnp", ""][..], &["db", "web"][..]),
        (&["get", "fnp", "w"], &["web"]),
        (&["delete", "tier", ""], &["platform"]),
        (&["describe", "cluster", ""], &["train"]),
        (&["describe", "node", ""], &[]),
        (&["status", "t"], &["train"]),
        (&["cluster", "revoke", "t"], &["train"]),
        (&["token", "create", "--cluster", ""], &["train"]),
        (&["user", "revoke", ""], &["admin"]),
        (&["user", "create", "ada", "--role", "author=p"], &["author=platform"]),
        (&["wait", "d"], &["db"]),
        (&["wait", "Tier/"], &["Tier/platform"]),
        (&["wait", "tier/p"], &["tier/platform"]),
        (&["describe", "tier/"], &["tier/platform"]),
    ] {
        let mut candidates = complete(Some(&world.context), words);
        candidates.retain(|it| !it.starts_with('-'));
        assert_eq!(candidates, expected, "{words:?}");
    }
    // The option counts before the environment.
    let context = world.context.to_str().expect("UTF-8");
    assert_eq!(complete(None, &["--context", context, "get", "fnp", "w"]), ["web"]);
}

#[test]
fn completion_is_silent_and_quick_without_a_hub() {
    let world = World::new();
    let gone = std::net::TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("its address");
    // It accepts connections, and never answers.
    let mute = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let text = std::fs::read_to_string(&world.context).expect("the context");
    let other = world.context.with_file_name("other.context");
    for address in [gone, mute.local_addr().expect("its address")] {
        std::fs::write(&other, text.replace(&world.hub.address.to_string(), &address.to_string())).expect("written");
        let start = Instant::now();
        assert_eq!(complete(Some(&other), &["get", "fnp", "w"]), Vec::<String>::new());
        // Of the three seconds for which commands wait for a hub that starts, and the thirty of a call, nothing is used.
        assert!(start.elapsed() < Duration::from_millis(2_900), "{:?}", start.elapsed());
    }
    assert_eq!(complete(Some(Path::new("/nonexistent/context")), &["get", "fnp", "w"]), Vec::<String>::new());
    assert_eq!(complete(None, &["get", "fnp", "w"]), Vec::<String>::new());
}

#[test]
fn many_objects_are_applied_in_batches_with_a_summary() {
    let world = World::new();
    // More than a batch has, so that the last ones find the tier in an earlier one.
    let many: String = (0..1_200).map(|number| policy(&format!("p-{number}"), "platform", number)).collect();
    let many = format!("{TIER}{many}{}", policy("typo", "platfrom", 1));
    let dry = world.apply(&many, &["--dry-run"]);
    assert_eq!(dry.code, Some(1), "{}", dry.err);
    assert!(
        dry.out.ends_with("1201 applied (dry run): 1201 created, 1 failed\n"),
        "{}",
        &dry.out[dry.out.len() - 300..]
    );
    assert!(
        dry.err.contains("FederatedNetworkPolicy/typo failed: spec.tier: Tier platfrom does not exist"),
        "{}",
        dry.err
    );
    assert!(dry.err.contains("--allow-missing-tier") && dry.err.contains("1 of 1202 objects failed"), "{}", dry.err);
    assert!(world.hanse(&["get"]).out.contains("no objects found"), "a dry run writes nothing");

    let first = world.apply(&many, &[]);
    assert_eq!(first.code, Some(1), "{}", first.err);
    assert_eq!(first.out.lines().count(), 1_202, "a line each, and the summary");
    assert!(first.out.ends_with("1201 applied: 1201 created, 1 failed\n"));
    let changed = many.replace("order: 1199", "order: 7");
    let second = world.apply(&changed, &["--allow-missing-tier"]);
    assert_eq!(second.code, Some(0), "{}", second.err);
    assert!(second.out.ends_with("1202 applied: 1 created, 1 configured, 1200 unchanged\n"), "{}", second.err);
    assert!(second.err.contains("warning: spec.tier: Tier platfrom does not exist"), "{}", second.err);
    let json = world.apply(&changed, &["-o", "json"]);
    let results: Vec<Value> = json.out.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert!(results.len() == 1_202 && results.iter().all(|it| it["result"] == "unchanged"), "{}", json.err);

    let file = world.folder.path().join("many.yaml");
    std::fs::write(&file, format!("{changed}{}", policy("gone", "platform", 1))).expect("room");
    let file = file.to_str().expect("UTF-8");
    let got = world.hanse(&["get", "-f", file, "-o", "json"]);
    assert!(got.code == Some(1) && got.err.contains("FederatedNetworkPolicy/gone not found"), "{}", got.err);
    assert_eq!(got.json()["items"].as_array().map(Vec::len), Some(1_202));
    let deleted = world.hanse(&["delete", "-f", file]);
    assert_eq!(deleted.code, Some(1), "{}", deleted.err);
    assert!(deleted.out.ends_with("1202 deleted, 1 failed\n"), "{}", deleted.err);
    let again = world.hanse(&["delete", "-f", file, "--ignore-not-found"]);
    assert!(again.code == Some(0) && again.out.ends_with("1203 absent\n"), "{}", again.err);
    assert!(world.hanse(&["get"]).out.contains("no objects found"));
}

#[test]
fn grant_without_labels_gives_a_warning() {
    let world = World::new();
    let any = world.apply(&member("train", "10.1.0.0/16"), &[]);
    assert!(any.code == Some(0) && any.err.contains("warning: spec.grants.labels is absent (labels: any)"), "{any:?}");
    let named = member("serve", "10.2.0.0/16").replace("{namespaces", "{labels: {app: ['*']}, namespaces");
    let named = world.apply(&named, &[]);
    assert_eq!((named.code, named.err.as_str()), (Some(0), ""), "{named:?}");
    assert_eq!(world.apply(&member("prod", "10.3.0.0/16"), &[]).code, Some(0));
    let described = world.hanse(&["describe", "mc", "train"]);
    assert!(described.out.contains("warning: spec.grants.labels is absent (labels: any)"), "{described:?}");
    assert!(!world.hanse(&["describe", "mc", "serve"]).out.contains("warning"));
    let status = world.hanse(&["status"]);
    assert!(status.out.contains("warning: prod, train: spec.grants.labels is absent (labels: any)"), "{status:?}");
    let status = world.hanse(&["status", "-o", "json"]).json();
    let warned = |name: &str| {
        let cluster = status["items"].as_array().into_iter().flatten().find(|it| it["name"] == name);
        cluster.expect("a cluster")["warnings"].as_array().map(Vec::len)
    };
    assert_eq!((warned("train"), warned("serve")), (Some(1), Some(0)));
}

#[test]
fn version_shows_command_and_hub() {
    let version = env!("CARGO_PKG_VERSION");
    let alone = run(None, &["version"], "");
    assert_eq!((alone.code, alone.out), (Some(0), format!("client  {version}\n")));
    assert_eq!(run(None, &["--version"], "").out, format!("hanse {version}\n"));
    let world = World::new();
    let both = world.hanse(&["version"]).out;
    assert_eq!(both, format!("client  {version}\nhub     {version} (trust domain hanse.test)\n"));
    let json = world.hanse(&["version", "-o", "json"]).json();
    let expected = serde_json::json!({
        "apiVersion": "cli.hanse.dev/v1", "kind": "Version",
        "client": {"version": version}, "hub": {"version": version, "trustDomain": "hanse.test"},
    });
    assert_eq!(json, expected);
    assert_eq!(
        world.hanse(&["version", "--client", "-o", "json"]).json(),
        serde_json::json!({"apiVersion": "cli.hanse.dev/v1", "kind": "Version", "client": {"version": version}})
    );
    let gone = run(Some(Path::new("/nonexistent/context")), &["version"], "");
    assert!(gone.code == Some(1) && gone.out == format!("client  {version}\n"), "{gone:?}");
}

#[test]
fn command_waits_for_a_hub_that_starts() {
    let world = World::new();
    let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("its address");
    let text = std::fs::read_to_string(&world.context).expect("the context");
    let served = world.hub.address;
    std::fs::write(&world.context, text.replace(&served.to_string(), &free.to_string())).expect("the context");
    let forward = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(500));
        let listener = std::net::TcpListener::bind(free).expect("still free");
        let (client, _) = listener.accept().expect("a client");
        let hub = std::net::TcpStream::connect(served).expect("the hub");
        let (mut from, mut to) = (client.try_clone().expect("a socket"), hub.try_clone().expect("a socket"));
        let up = std::thread::spawn(move || std::io::copy(&mut from, &mut to));
        let (mut from, mut to) = (hub, client);
        let _ = std::io::copy(&mut from, &mut to);
        drop(up.join());
    });
    let status = world.hanse(&["status"]);
    assert_eq!((status.code, status.err.as_str()), (Some(0), ""), "{status:?}");
    forward.join().expect("forwarded");
}
