//! `-o json`: the keys that `README.md` documents, and errors as objects.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::Value;

use crate::online::{Done, TIER, World, member, policy, run};
use crate::reported::train;

/// A documented key of one section, with whether it may be absent.
type Keys = BTreeMap<String, bool>;

fn sections() -> BTreeMap<String, Keys> {
    let page = include_str!("../../README.md");
    let mut sections: BTreeMap<String, Keys> = BTreeMap::new();
    let mut titles: Vec<&str> = Vec::new();
    for line in page.lines() {
        if let Some(title) = line.strip_prefix("### ") {
            titles = title.split(", ").collect();
        }
        let Some(row) = line.strip_prefix("| `") else { continue };
        let (key, rest) = row.split_once('`').expect("a key ends");
        for title in &titles {
            sections.entry((*title).to_owned()).or_default().insert(key.to_owned(), rest.starts_with('?'));
        }
    }
    sections
}

/// The paths of all values below `value`; an empty list or map is a path of its own.
fn paths(value: &Value, path: String, found: &mut BTreeSet<String>) {
    match value {
        Value::Object(map) if !map.is_empty() => {
            for (key, value) in map {
                let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                paths(value, path, found);
            }
        }
        Value::Array(list) if !list.is_empty() => {
            list.iter().for_each(|value| paths(value, format!("{path}[]"), found));
        }
        _ => drop(found.insert(path)),
    }
}

fn is_documented(path: &str, keys: &Keys) -> bool {
    keys.keys().any(|key| {
        let any_below = key.strip_suffix('*').is_some_and(|prefix| path.starts_with(prefix));
        // Of an empty list or map it is not known what it would contain.
        let empty = key.strip_prefix(path).is_some_and(|rest| rest.starts_with("[]") || rest.starts_with('.'));
        key == path || any_below || empty
    })
}

#[derive(Default)]
struct Page {
    sections: BTreeMap<String, Keys>,
    seen: BTreeMap<String, BTreeSet<String>>,
}

impl Page {
    fn new() -> Self {
        Self { sections: sections(), seen: BTreeMap::new() }
    }

    /// Every key of the output is documented.
    fn check(&mut self, section: &str, output: &str) {
        let keys = self.sections.get(section).unwrap_or_else(|| panic!("the page has no section {section:?}"));
        let mut found = BTreeSet::new();
        assert!(!output.is_empty(), "{section}: nothing was printed");
        for line in output.lines() {
            let value: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{section}: {error}: {line}"));
            paths(&value, String::new(), &mut found);
        }
        for path in &found {
            assert!(is_documented(path, keys), "{section}: the page does not document {path}: {output}");
        }
        self.seen.entry(section.to_owned()).or_default().extend(found);
    }

    /// Every documented key that is not optional was printed.
    fn finish(&self) {
        let checked: BTreeSet<&String> = self.seen.keys().collect();
        assert_eq!(checked, self.sections.keys().collect(), "each section is checked");
        for (section, keys) in &self.sections {
            for (key, _) in keys.iter().filter(|(_, is_optional)| !**is_optional) {
                let prefix = key.strip_suffix('*').unwrap_or(key);
                let is_seen = self.seen[section].iter().any(|path| path == key || path.starts_with(prefix));
                assert!(is_seen, "{section}: {key} was not printed; it is optional, or no longer exists");
            }
        }
    }
}

fn demo(folder: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../e2e/demo").join(folder).display().to_string()
}

#[test]
fn page_documents_the_keys_of_every_output() {
    let (world, reporter, at) = train();
    let behind = hanse_proto::federation::v1::NodePosition { hub_revision: 1, ..crate::reported::node("node-2", at) };
    reporter.report(&world, crate::reported::in_sync(at, vec![crate::reported::node("node-1", at), behind]));
    let mut page = Page::new();
    let out = |arguments: &[&str]| world.hanse(&[arguments, &["-o", "json"]].concat());
    let apply = out(&["apply", "-f", &demo("federation/policies.yaml")]);
    page.check("hanse apply", &apply.out);
    page.check("hanse apply", &world.apply(&policy("orphan", "none", 1), &["-o", "json"]).out);
    page.check("hanse apply", &world.apply(&policy("p", "platform", 9), &["-o", "json", "--dry-run"]).out);
    let invalid = policy("p", "platform", 9).replace("Deny", "Dney");
    page.check("hanse apply", &world.apply(&invalid, &["-o", "json"]).out);
    let ada = world.folder.path().join("ada").display().to_string();
    page.check("hanse user create", &out(&["user", "create", "ada", "--role", "viewer", "--out", &ada]).out);
    let token = out(&["token", "create", "--cluster", "serve"]);
    page.check("hanse token create", &token.out);
    for (section, arguments) in [
        ("hanse status", &["status"][..]),
        ("hanse node list", &["node", "list"]),
        ("hanse cluster list", &["cluster", "list"]),
        ("hanse cluster get NAME", &["cluster", "get", "train"]),
        ("hanse token list", &["token", "list"]),
        ("hanse user list", &["user", "list"]),
        ("hanse audit", &["audit"]),
        ("hanse version", &["version"]),
        ("hanse describe KIND NAME", &["describe", "fnp", "p"]),
        ("hanse describe KIND NAME", &["describe", "mc", "train"]),
        ("hanse describe cluster NAME", &["describe", "cluster", "train"]),
        ("hanse describe node CLUSTER/NODE", &["describe", "node", "train/node-2"]),
        ("hanse get", &["get"]),
        ("hanse get", &["get", "tier"]),
        ("hanse wait", &["wait", "--timeout", "1", "p", "tier/platform"]),
        ("hanse delete", &["delete", "fnp", "p"]),
        ("hanse user revoke", &["user", "revoke", "ada"]),
        ("hanse token revoke", &["token", "revoke", token.json()["id"].as_str().expect("an id")]),
        ("hanse cluster revoke", &["cluster", "revoke", "train", "--reason", "a test"]),
        ("hanse cluster list", &["cluster", "list"]),
    ] {
        page.check(section, &out(arguments).out);
    }
    let pending = world.hanse(&["token", "create", "--cluster", "prod", "--wait-for-accept"]).out;
    world.request(&pending, "prod");
    page.check("hanse cluster accept", &out(&["cluster", "accept", "prod"]).out);
    page.check("hanse get --watch", &first_line(&world, &["get", "--watch", "-o", "json"]));
    let failed = out(&["get", "fnp", "gone"]);
    page.check("Error", &failed.err);
    let dry = world.apply(&format!("{TIER}---\napiVersion: v1\nkind: Pod\nmetadata: {{name: x}}\n"), &["-o", "json"]);
    page.check("Note", &dry.err);
    let strict = TIER.replace("platform", "strict").replace("spec: {", "spec: {requireApproval: true, ");
    assert!(strict.contains("requireApproval"), "{strict}");
    assert_eq!(world.apply(&strict, &[]).code, Some(0));
    assert!(world.apply(&policy("waits", "strict", 1), &[]).out.contains("pending"));
    page.check("hanse policy pending", &out(&["policy", "pending"]).out);
    page.check("hanse policy reject", &out(&["policy", "reject", "fnp/waits"]).out);
    offline(&mut page);
    page.finish();
}

/// The sections of the commands that read directories.
fn offline(page: &mut Page) {
    let clusters: Vec<String> =
        ["train", "serve", "prod"].iter().map(|name| format!("--cluster={name}={}", demo(name))).collect();
    let (federation, shop) = (demo("federation"), format!("--cluster=shop={}", demo("shop")));
    let branch = tempfile::tempdir().expect("a folder");
    let policies = std::fs::read_to_string(format!("{federation}/policies.yaml")).expect("policies");
    std::fs::write(branch.path().join("policies.yaml"), policies.replace("8443", "9443")).expect("written");
    let branch = branch.path().display().to_string();
    let all = |command: &str, arguments: &[&str], input: &str| {
        let mut line = vec!["policy", command, "--federation", &federation, "-o", "json"];
        line.extend(clusters.iter().map(String::as_str));
        line.extend(arguments);
        run(None, &line, input).out
    };
    let of_shop = |command: &str, arguments: &[&str], input: &str| {
        run(None, &[&["policy", command, &shop, "-o", "json"], arguments].concat(), input).out
    };
    let check = |directory: &str, input: &str| run(None, &["policy", "check", directory, "-o", "json"], input).out;
    page.check("hanse policy check", &check(&federation, ""));
    page.check("hanse policy check", &check("-", &policy("wrong", "t", 1).replace("Deny", "Drop")));
    page.check(
        "hanse policy check",
        &check("-", "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {name: c}\n"),
    );
    let query = r#"{"from":{"cluster":"prod","namespace":"sandbox","pod":"attacker-0"},"to":{"cluster":"serve","namespace":"inference","pod":"vllm-0"},"port":8000}"#;
    page.check("hanse policy explain", &all("explain", &["--queries", "-"], query));
    let query = r#"{"from":{"namespace":"shop","pod":"deployment/web"},"to":{"service":"shop/db"},"port":5432}"#;
    page.check("hanse policy explain", &of_shop("explain", &["--queries", "-"], query));
    let query = r#"{"from":{"ip":"192.0.2.1"},"to":{"ip":"192.0.2.2"},"port":5432}"#;
    page.check("hanse policy explain", &of_shop("explain", &["--queries", "-"], query));
    page.check("hanse policy matrix", &all("matrix", &["--port", "8000"], ""));
    page.check("hanse policy matrix", &of_shop("matrix", &[], ""));
    page.check("hanse policy order", &all("order", &[], ""));
    page.check("hanse policy lint", &all("lint", &[], ""));
    page.check("hanse policy lint", &of_shop("lint", &[], ""));
    page.check("hanse policy diff", &all("diff", &["--with-federation", &branch], ""));
    let selector = ["policy", "selector", "app == 'web'", "--labels", "-", "-o", "json"];
    page.check("hanse policy selector", &run(None, &selector, "{\"app\":\"web\"}\n").out);
}

/// The first line that a command prints which does not end by itself.
fn first_line(world: &World, arguments: &[&str]) -> String {
    use std::io::BufRead as _;
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_hanse"));
    command.args(arguments).env("HANSE_CONTEXT", &world.context).stdout(std::process::Stdio::piped());
    let mut child = command.spawn().expect("hanse starts");
    let mut line = String::new();
    let mut output = std::io::BufReader::new(child.stdout.take().expect("piped"));
    output.read_line(&mut line).expect("a line");
    child.kill().expect("it is ended");
    child.wait().expect("it has ended");
    line
}

fn error_of(done: &Done) -> Value {
    let last = done.err.lines().last().unwrap_or_default();
    let error: Value = serde_json::from_str(last).unwrap_or_else(|error| panic!("{error}: {done:?}"));
    assert_eq!((&error["apiVersion"], &error["kind"]), (&"cli.hanse.dev/v1".into(), &"Error".into()), "{done:?}");
    assert_eq!(error["exitCode"].as_i64(), done.code.map(i64::from), "{done:?}");
    error
}

#[test]
fn errors_are_objects_with_json_output() {
    let world = World::new();
    assert_eq!(world.apply(&format!("{TIER}{}", member("train", "10.1.0.0/16")), &[]).code, Some(0));
    for (arguments, code, expected) in [
        (&["get", "fnp", "gone", "-o", "json"][..], 1, "FederatedNetworkPolicy/gone not found"),
        (&["cluster", "get", "gone", "-o", "json"], 1, "cluster gone not found"),
        (&["status", "--no-such-option", "-o", "json"], 2, "--no-such-option"),
        (&["status", "-ojson", "--no-such-option"], 2, "--no-such-option"),
        (&["get", "-o=json", "--watch=3"], 2, "--watch"),
        (&["policy", "-o", "json"], 2, "-o"),
        (&["policy", "selector", "app = web", "-o", "json"], 2, "malformed selector: column 5"),
        (&["policy", "order", "-o", "json", "--cluster", "x=/nonexistent"], 1, "/nonexistent"),
        // Malformed command lines that the parser accepts.
        (&["get", "fnpx", "-o", "json"], 2, "unknown kind"),
        (&["get", "fnp/", "-o", "json"], 2, "KIND/NAME"),
        (&["delete", "tier", "-o", "json"], 2, "the name is missing"),
        (&["wait", "fnpx/web", "-o", "json"], 2, "unknown kind"),
        (&["describe", "train", "-o", "json"], 2, "unknown kind"),
        (&["describe", "fnpx", "web", "-o", "json"], 2, "cluster, node"),
        (&["describe", "fnp", "-o", "json"], 2, "the name is missing"),
        (&["describe", "node", "node-1", "-o", "json"], 2, "is not CLUSTER/NODE"),
        (&["policy", "lint", "-o", "json"], 2, "--cluster NAME=DIR is required"),
        (&["policy", "order", "-o", "json"], 2, "--cluster NAME=DIR is required"),
        (&["policy", "diff", "--cluster", "a=b", "-o", "json"], 2, "--staged"),
        (&["token", "create", "--cluster", "train", "--seconds", "0", "-o", "json"], 2, "--seconds"),
        (&["token", "create", "--cluster", "Bad_Name", "-o", "json"], 2, "--cluster"),
        (&["user", "create", "a/b", "--role", "viewer", "--out", "x", "-o", "json"], 2, "a/b"),
        // Accepted as of `describe` and `wait`.
        (&["get", "fnp/gone", "-o", "json"], 1, "FederatedNetworkPolicy/gone not found"),
    ] {
        let done = world.hanse(arguments);
        assert_eq!((done.code, done.out.as_str()), (Some(code), ""), "{done:?}");
        let error = error_of(&done);
        let causes = error["causes"].as_array().expect("a list").iter().chain([&error["error"]]);
        let text: String = causes.filter_map(Value::as_str).collect();
        assert!(text.contains(expected), "{expected}: {error}");
        assert!(!text.contains('\n') && !text.contains("For more information"), "{error}");
        assert!(done.err.lines().all(|line| serde_json::from_str::<Value>(line).is_ok()), "{done:?}");
    }
    // Some of several objects fail: their lines, and an error.
    let mixed = [member("serve", "10.1.2.0/24"), member("prod", "10.2.0.0/16")].concat();
    let mixed = world.apply(&mixed, &["-o", "json"]);
    assert_eq!((mixed.code, mixed.out.lines().count()), (Some(1), 2), "{mixed:?}");
    assert!(error_of(&mixed)["error"].as_str().is_some_and(|it| it.starts_with("1 of 2 objects failed")), "{mixed:?}");
    let file = world.folder.path().join("two.yaml");
    std::fs::write(&file, format!("{TIER}{}", policy("gone", "platform", 1))).expect("manifests");
    let partly = world.hanse(&["get", "-f", file.to_str().expect("UTF-8"), "-o", "json"]);
    assert_eq!(error_of(&partly)["error"], "1 of 2 objects not found");
    // Errors of manifests are by object, with file, line and fields.
    let wrong = policy("web", "platform", 1).replace("Deny", "Dney");
    let refused = world.apply(&wrong, &["-o", "json"]);
    assert_eq!((refused.code, refused.err.lines().count()), (Some(1), 1), "{refused:?}");
    assert_eq!(error_of(&refused)["error"], "1 error; nothing was applied");
    let line = refused.json();
    assert_eq!((&line["name"], &line["result"]), (&"web".into(), &"failed".into()), "{line}");
    assert_eq!((&line["file"], &line["line"]), (&"standard input".into(), &2.into()), "{line}");
    assert_eq!(line["errors"][0]["field"], "spec.ingress[0].action", "{line}");
    assert_eq!(world.hanse(&["delete", "tier/platform"]).code, Some(0));
    // The other formats have text, and help is not an error.
    for arguments in [&["get", "fnp", "gone"][..], &["get", "fnp", "gone", "-o", "yaml"]] {
        assert!(
            world.hanse(arguments).err.starts_with("hanse: FederatedNetworkPolicy/gone not found"),
            "{arguments:?}"
        );
    }
    let help = world.hanse(&["status", "-o", "json", "--help"]);
    assert!(help.code == Some(0) && help.out.contains("Usage: hanse status"), "{help:?}");
}

/// The text of notes and errors on standard error, in any format of output.
pub fn messages(output: &std::process::Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr);
    let message = |line: &str| match serde_json::from_str::<Value>(line) {
        Ok(object) => object["message"].as_str().or(object["error"].as_str()).unwrap_or_default().to_owned(),
        Err(_) => line.to_owned(),
    };
    text.lines().map(message).collect::<Vec<_>>().join("\n")
}
