//! Folders that are meant for `kustomize`, and several objects with one key.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::{Value, json};

struct Folder {
    root: tempfile::TempDir,
}

impl Folder {
    fn new(files: &[(&str, &str)]) -> Self {
        let root = tempfile::tempdir().expect("temporary directory");
        for (name, content) in files {
            let path = root.path().join("c").join(name);
            std::fs::create_dir_all(path.parent().expect("a folder")).expect("directory");
            std::fs::write(path, content).expect("manifests");
        }
        Self { root }
    }

    fn directory(&self) -> String {
        self.root.path().join("c").display().to_string()
    }

    fn hanse(&self, command: &str, arguments: &[&str]) -> Output {
        let mut it = Command::new(env!("CARGO_BIN_EXE_hanse"));
        match command {
            "check" => it.args(["policy", command, &self.directory()]),
            _ => it.args(["policy", command, "--cluster", &format!("c={}", self.directory())]),
        };
        it.args(arguments).output().expect("hanse runs")
    }

    fn lines(&self, command: &str, arguments: &[&str]) -> Vec<Value> {
        let output = self.hanse(command, &[arguments, &["-o", "json"]].concat());
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{line}: {error}"))).collect()
    }

    /// The verdict from web to db on port 5432, whether it is incomplete, the exit code, and what was said beside it.
    fn verdict(&self) -> (Value, bool, Option<i32>, String) {
        let queries = self.root.path().join("queries.jsonl");
        let end = |name: &str| json!({"namespace": "shop", "pod": format!("deployment/{name}")});
        std::fs::write(&queries, json!({"from": end("web"), "to": end("db"), "port": 5432}).to_string())
            .expect("queries");
        let output = self.hanse("explain", &["--queries", path(&queries), "-o", "json"]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let answer: Value =
            serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"));
        (answer["verdict"].clone(), answer["incomplete"] == true, output.status.code(), said)
    }
}

fn path(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

const WORKLOADS: &str = "\
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: shop}
spec: {replicas: 1, selector: {matchLabels: {app: web}}, template: {metadata: {labels: {app: web}}, spec: {containers: [{name: c, image: web}]}}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: db, namespace: shop}
spec: {replicas: 1, selector: {matchLabels: {app: db}}, template: {metadata: {labels: {app: db}}, spec: {containers: [{name: c, image: db, ports: [{containerPort: 5432}]}]}}}
";
const POLICY: &str = "\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: db, namespace: shop}
spec:
  podSelector: {matchLabels: {app: db}}
  policyTypes: [Ingress]
  ingress:
  - from: [{podSelector: {matchLabels: {app: web}}}]
";
/// Partial objects, whose files come before those of the whole ones.
const REPLICAS: &str =
    "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: db, namespace: shop}\nspec: {replicas: 3}\n";
const RESOURCES: &str = "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: db, namespace: shop}\nspec: {template: {spec: {containers: [{name: c, resources: {limits: {cpu: '1'}}}]}}}\n";
const RULES: &str = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: db, namespace: shop}\nspec: {ingress: []}\n";

#[test]
fn a_patch_never_displaces_the_object() {
    let whole = [("workloads.yaml", WORKLOADS), ("policy.yaml", POLICY)];
    let (verdict, incomplete, code, _) = Folder::new(&whole).verdict();
    assert_eq!((verdict, incomplete, code), (json!("allow"), false, Some(0)));
    for patch in [REPLICAS, RESOURCES, RULES] {
        for name in ["a.yaml", "z.yaml"] {
            let folder = Folder::new(&[&whole[..], &[(name, patch)]].concat());
            let (verdict, incomplete, code, said) = folder.verdict();
            assert_eq!((verdict, incomplete, code), (json!("allow"), true, Some(1)), "{name} {patch}\n{said}");
            assert!(said.contains(&format!("{name}:1: refused: ")) && said.contains("conflicts with"), "{said}");
            assert!(said.contains("`kustomize build DIR | hanse policy"), "{said}");
            for command in [&["matrix"][..], &["order"], &["lint", "--fail-on", "never"], &["diff", "--staged"]] {
                assert_eq!(folder.hanse(command[0], &command[1..]).status.code(), Some(1), "{command:?}");
            }
            // Each object by itself would be accepted.
            let check = folder.hanse("check", &[]);
            let text = String::from_utf8_lossy(&check.stdout).into_owned();
            assert!(check.status.success() && text.contains("conflicts with"), "{text}");
            assert_eq!(folder.hanse("check", &["--strict"]).status.code(), Some(1));
        }
    }
}

#[test]
fn copies_are_one_object() {
    let other = format!("# a copy with what policy does not see\n{}", WORKLOADS.replace("image: db", "image: db:2"));
    let annotated = POLICY.replace("namespace: shop}", "namespace: shop, labels: {a: b}, annotations: {c: d}}");
    let files = [("a.yaml", WORKLOADS), ("b.yaml", &*other), ("p.yaml", POLICY), ("q.yaml", &*annotated)];
    let (verdict, incomplete, code, said) = Folder::new(&files).verdict();
    assert_eq!((verdict, incomplete, code), (json!("allow"), false, Some(0)), "{said}");
    assert_eq!(said.matches("duplicate of").count(), 3, "{said}");
}

/// An object of the federation cannot be applied twice, so it is a conflict there as well.
#[test]
fn different_objects_of_the_federation_make_answers_incomplete() {
    let folder = Folder::new(&[("workloads.yaml", WORKLOADS)]);
    let federation = folder.root.path().join("f");
    std::fs::create_dir(&federation).expect("directory");
    let tier = |order: u32| {
        format!("apiVersion: hanse.dev/v1alpha1\nkind: Tier\nmetadata: {{name: t}}\nspec: {{order: {order}}}\n")
    };
    for (second, code) in [(1, 0), (2, 1)] {
        std::fs::write(federation.join("a.yaml"), format!("{}---\n{}", tier(1), tier(second))).expect("manifests");
        let output = folder.hanse("matrix", &["--federation", path(&federation)]);
        assert_eq!(output.status.code(), Some(code), "{output:?}");
    }
}

#[test]
fn files_that_a_kustomization_names_as_patches_are_not_read() {
    let json_patch = "- {op: replace, path: /spec/replicas, value: 3}\n";
    for kustomization in [
        "resources: [workloads.yaml, policy.yaml]\npatches:\n- path: a/rules.yaml\n- {path: a/replicas.yml, target: {kind: Deployment}}\n- path: a/json.yaml\n- patch: |-\n    - {op: remove, path: /x}\n",
        "patchesStrategicMerge:\n- a/rules.yaml\n- ./a/../a/replicas.yml\n- |-\n  apiVersion: apps/v1\n  kind: Deployment\npatchesJson6902:\n- {path: a/json.yaml, target: {version: v1, kind: Deployment, name: db}}\n",
        "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\npatches: [{path: a/rules.yaml}, {path: a/replicas.yml}, {path: a/json.yaml}]\n",
    ] {
        for name in ["kustomization.yaml", "kustomization.yml", "Kustomization"] {
            let folder = Folder::new(&[
                ("workloads.yaml", WORKLOADS),
                ("policy.yaml", POLICY),
                (name, kustomization),
                ("a/rules.yaml", RULES),
                ("a/replicas.yml", REPLICAS),
                ("a/json.yaml", json_patch),
            ]);
            let (verdict, incomplete, code, said) = folder.verdict();
            assert_eq!((verdict, incomplete, code), (json!("allow"), false, Some(0)), "{kustomization}\n{said}");
            assert_eq!(said.matches("note: a patch of ").count(), 3, "{said}");
            let lines = folder.lines("check", &[]);
            let patches: Vec<&Value> = lines.iter().filter(|line| line["result"] == "patch").collect();
            assert_eq!(patches.len(), 3, "{lines:#?}");
            if name != "Kustomization" {
                let note = format!("{name}:1: note: ");
                let run = format!("Hanse does not apply: run `kustomize build {} | hanse policy", folder.directory());
                assert!(said.lines().any(|line| line.contains(&note) && line.contains(&run)), "{said}");
            }
            assert_eq!(folder.hanse("check", &["--strict"]).status.code(), Some(1));
        }
    }
    // A file that is named itself is read.
    let folder = Folder::new(&[("kustomization.yaml", "patches: [{path: rules.yaml}]\n"), ("rules.yaml", RULES)]);
    let file = Path::new(&folder.directory()).join("rules.yaml");
    let output = Command::new(env!("CARGO_BIN_EXE_hanse")).args(["policy", "check", path(&file)]).output();
    let output = output.expect("hanse runs");
    assert!(String::from_utf8_lossy(&output.stdout).contains("1 accepted"), "{output:?}");
}

/// Generated names are distinct, and the same in another checkout, after an edit above, and after an edit of the object.
#[test]
fn generated_names_are_distinct_and_stable() {
    let policy = |port: u16| {
        format!(
            "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{generateName: p-, namespace: shop}}\nspec: {{podSelector: {{}}, ingress: [{{ports: [{{port: {port}}}]}}]}}\n---\n"
        )
    };
    let job = "apiVersion: batch/v1\nkind: Job\nmetadata: {generateName: j-, namespace: shop}\nspec: {template: {metadata: {labels: {job: one}}, spec: {containers: [{name: c}]}}}\n---\n";
    let names = |folder: &Folder| -> Vec<String> {
        let tiers = folder.lines("order", &[]);
        let policies = tiers.iter().flat_map(|tier| tier["policies"].as_array().into_iter().flatten());
        policies.filter_map(|policy| policy["name"].as_str().map(str::to_owned)).collect()
    };
    let first = Folder::new(&[("a.yaml", &(job.repeat(3) + &policy(80) + &policy(81)))]);
    let second = Folder::new(&[("a.yaml", &("# more\n\n".to_owned() + &job.repeat(3) + &policy(80) + &policy(8081)))]);
    let of_first = names(&first);
    assert!(of_first.len() == 2 && of_first[0] != of_first[1], "{of_first:?}");
    assert_eq!(of_first, names(&second));
    let lines = first.lines("diff", &["--with", &format!("c={}", second.directory()), "--port", "81"]);
    let summary = &lines.last().expect("a last line")["summary"];
    assert_eq!((&summary["onlyBefore"], &summary["onlyAfter"]), (&json!([]), &json!([])), "{lines:#?}");
    assert!(summary["closed"].as_u64().is_some_and(|closed| closed > 0), "{lines:#?}");
    let matrix = first.lines("matrix", &["--port", "80"]);
    let mut jobs: Vec<&str> = matrix.iter().filter_map(|line| line["from"]["pod"].as_str()).collect();
    jobs.sort_unstable();
    jobs.dedup();
    assert!(jobs.len() == 3 && jobs.iter().all(|job| job.starts_with("job/j-")), "{jobs:?}");
}
