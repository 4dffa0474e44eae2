//! Every recipe of the cookbook is accepted, and has the verdicts that its text states.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use super::{guide, pages, read};
use crate::corpus::question;
use crate::system::programs;

/// What the text states of a packet.
const STATEMENTS: [(&str, &str, Form); 4] = [
    ("- allowed: `", "allow", Form::Enforced),
    ("- denied: `", "deny", Form::Enforced),
    ("- allowed when enforced: `", "allow", Form::Staged),
    ("- denied when enforced: `", "deny", Form::Staged),
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Enforced,
    /// As if all staged policies were committed.
    Staged,
}

/// A section of the page.
#[derive(Debug, Default)]
struct Recipe {
    title: String,
    manifests: String,
    packets: Vec<(String, &'static str, Form)>,
}

/// The sections with manifests. Each list item in them is a statement.
fn recipes(text: &str) -> Vec<Recipe> {
    let mut recipes: Vec<Recipe> = Vec::new();
    let mut fenced = false;
    for line in text.lines() {
        if let Some(title) = line.strip_prefix("## ") {
            recipes.push(Recipe { title: title.to_owned(), ..Recipe::default() });
        }
        let Some(recipe) = recipes.last_mut() else { continue };
        if line.starts_with("```") {
            assert!(fenced || line == "```yaml", "{}: {line}: a block is YAML", recipe.title);
            fenced = !fenced;
        } else if fenced {
            recipe.manifests.push_str(line);
            recipe.manifests.push('\n');
        } else if line.starts_with("- ") {
            let stated = STATEMENTS.iter().find_map(|(start, verdict, form)| {
                let packet = line.strip_prefix(start)?.strip_suffix('`')?;
                Some((packet.to_owned(), *verdict, *form))
            });
            recipe.packets.push(stated.unwrap_or_else(|| panic!("{}: not a statement: {line}", recipe.title)));
        }
    }
    recipes
}

fn hanse(arguments: &[&str]) -> String {
    let output = Command::new(programs().join("hanse")).args(arguments).output().expect("it runs");
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "hanse {}: {text}", arguments.join(" "));
    text
}

/// What is not as stated, one line each.
fn differences(recipe: &Recipe, base: &str) -> Vec<String> {
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo");
    let folder = tempfile::tempdir().expect("a folder");
    let federation = folder.path().join("federation");
    std::fs::create_dir(&federation).expect("a folder");
    std::fs::copy(demo.join("federation/clusters.yaml"), federation.join("clusters.yaml")).expect("the clusters");
    for (name, text) in [("base.yaml", base), ("recipe.yaml", recipe.manifests.as_str())] {
        std::fs::write(federation.join(name), text).expect("room");
    }
    let federation = federation.to_str().expect("UTF-8");
    hanse(&["policy", "check", "--strict", federation]);
    let questions: Vec<String> = recipe.packets.iter().map(|(packet, ..)| question(packet).to_string()).collect();
    let queries = folder.path().join("queries.jsonl");
    std::fs::write(&queries, questions.join("\n")).expect("room");
    let clusters: Vec<String> =
        ["train", "serve", "prod"].map(|name| format!("{name}={}", demo.join(name).display())).into();
    let mut arguments = vec!["policy", "explain", "-o", "json", "--federation", federation];
    arguments.extend(clusters.iter().flat_map(|it| ["--cluster", it.as_str()]));
    arguments.extend(["--queries", queries.to_str().expect("UTF-8")]);
    let answers: Vec<Value> = hanse(&arguments).lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!(answers.len(), recipe.packets.len(), "{answers:?}");
    let compare = |((packet, stated, form), answer): (&(String, &str, Form), &Value)| {
        let answer = match form {
            Form::Enforced => answer,
            Form::Staged => &answer["staged"],
        };
        let verdict = &answer["verdict"];
        (verdict != stated).then(|| format!("{}: {packet}: {stated} in the text, {verdict} by policy", recipe.title))
    };
    recipe.packets.iter().zip(&answers).filter_map(compare).collect()
}

#[test]
fn recipes_of_the_cookbook_have_the_stated_verdicts() {
    let recipes = recipes(&read(&guide().join("cookbook.md")));
    assert!(recipes.len() >= 8, "{} recipes", recipes.len());
    let base = recipes[0].manifests.clone();
    let mut found = Vec::new();
    let mut names = BTreeMap::new();
    for (at, recipe) in recipes.iter().enumerate() {
        assert!(!recipe.manifests.is_empty(), "{} has no manifest", recipe.title);
        // A recipe that only denies, or only allows, would be true for the wrong reason.
        for verdict in ["allow", "deny"] {
            assert!(recipe.packets.iter().any(|it| it.1 == verdict), "{}: no packet is {verdict}", recipe.title);
        }
        for name in recipe.manifests.lines().filter_map(|line| line.strip_prefix("  name: ")) {
            assert_eq!(names.insert(name.to_owned(), at), None, "two recipes have the object {name}");
        }
        found.extend(differences(recipe, if at == 0 { "" } else { &base }));
    }
    assert!(found.is_empty(), "{}", found.join("\n"));
}

/// Manifests on the other pages are valid, too. The roles of users are not Hanse's: a test installs with them. `values` checks those with
/// values of the chart.
#[test]
fn manifests_of_the_guide_are_accepted() {
    let mut count = 0;
    for (page, text) in pages() {
        for block in text.split("```yaml\n").skip(1).filter_map(|rest| rest.split("```").next()) {
            let others = ["ClusterRole", "Application", "HelmRelease"].map(|kind| format!("\nkind: {kind}\n"));
            if others.iter().any(|kind| block.contains(kind)) || block.starts_with("hub:\n") {
                continue;
            }
            let folder = tempfile::tempdir().expect("a folder");
            let path = folder.path().join(format!("{page}.yaml"));
            std::fs::write(&path, block).expect("room");
            hanse(&["policy", "check", "--strict", path.to_str().expect("UTF-8")]);
            count += 1;
        }
    }
    assert!(count > 9, "{count} blocks");
}

#[test]
fn false_statements_are_found() {
    let text = read(&guide().join("cookbook.md"));
    let base = recipes(&text)[0].manifests.clone();
    let denied = "- denied: `prod:sandbox/attacker-0 -> train:registry/registry-0 TCP/5000`";
    assert!(text.contains(denied));
    let wrong = text.replace(denied, &denied.replace("denied", "allowed"));
    let found: Vec<String> = recipes(&wrong)
        .iter()
        .filter(|it| it.title.contains("registry for"))
        .flat_map(|it| differences(it, &base))
        .collect();
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].contains("attacker-0"), "{found:?}");
}
