//! The dependency policy (`.deny.toml`), checked over `cargo metadata`: licences, sources and banned crates. Known
//! vulnerabilities need a database that CI cannot reach; `cargo xtask audit` checks them.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use serde::Deserialize;
use spdx::{Expression, LicenseReq, Licensee};

const CRATES_IO: &str = "registry+https://github.com/rust-lang/crates.io-index";

#[derive(Debug, Deserialize)]
struct Policy {
    licenses: Licenses,
    bans: Bans,
}

#[derive(Debug, Deserialize)]
struct Licenses {
    allow: Vec<String>,
}

#[derive(Debug, Deserialize)]
struct Bans {
    deny: Vec<Banned>,
}

#[derive(Debug, Deserialize)]
struct Banned {
    name: String,
}

#[derive(Debug, Deserialize)]
struct Metadata {
    packages: Vec<Package>,
    workspace_members: BTreeSet<String>,
    resolve: Resolve,
}

#[derive(Debug, Deserialize)]
struct Resolve {
    nodes: Vec<Node>,
}

/// A package that this platform builds.
#[derive(Debug, Deserialize)]
struct Node {
    id: String,
}

#[derive(Debug, Clone, Deserialize)]
struct Package {
    id: String,
    name: String,
    version: String,
    license: Option<String>,
    /// Absent for a package of this repository.
    source: Option<String>,
}

impl Policy {
    fn allows(&self, licence: &LicenseReq) -> bool {
        self.licenses
            .allow
            .iter()
            .any(|allowed| Licensee::parse(allowed).is_ok_and(|allowed| allowed.satisfies(licence)))
    }

    /// The violations of one package.
    fn violations(&self, package: &Package, is_member: bool) -> Vec<String> {
        let mut found = Vec::new();
        if self.bans.deny.iter().any(|banned| banned.name == package.name) {
            found.push("it is banned".to_owned());
        }
        match &package.source {
            None if is_member => return found,
            Some(source) if source == CRATES_IO => {}
            source => found.push(format!("its source is {source:?}, not crates.io")),
        }
        match &package.license {
            None => found.push("it has no licence".to_owned()),
            // Older manifests separate alternatives by a slash.
            Some(text) => match Expression::parse_mode(text, spdx::ParseMode::LAX) {
                Ok(licence) if licence.evaluate(|it| self.allows(it)) => {}
                Ok(_) => found.push(format!("its licence {text} is not allowed")),
                Err(error) => found.push(format!("its licence {text} cannot be read: {}", error.reason)),
            },
        }
        found
    }
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace's root")
}

fn policy() -> Policy {
    toml::from_str(&std::fs::read_to_string(root().join(".deny.toml")).unwrap()).unwrap()
}

fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).current_dir(root()).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn every_dependency_satisfies_the_policy() {
    let rustc = run("rustc", &["-vV"]);
    let host = rustc.lines().find_map(|line| line.strip_prefix("host: ")).expect("rustc prints its host");
    // The build has fetched everything that this platform needs.
    let arguments = ["metadata", "--format-version", "1", "--locked", "--offline", "--filter-platform", host];
    let metadata: Metadata = serde_json::from_str(&run(env!("CARGO"), &arguments)).unwrap();
    let built: BTreeSet<&str> = metadata.resolve.nodes.iter().map(|node| &*node.id).collect();
    let (policy, mut checked, mut violations) = (policy(), 0, Vec::new());
    for package in metadata.packages.iter().filter(|package| built.contains(&*package.id)) {
        checked += 1;
        for violation in policy.violations(package, metadata.workspace_members.contains(&package.id)) {
            violations.push(format!("{} {}: {violation}", package.name, package.version));
        }
    }
    assert!(checked > metadata.workspace_members.len(), "only {checked} packages were checked");
    assert!(violations.is_empty(), "{}", violations.join("\n"));
}

#[test]
fn finds_violations_of_the_dependency_policy() {
    let policy = policy();
    let good = Package {
        id: "x".to_owned(),
        name: "x".to_owned(),
        version: "1.0.0".to_owned(),
        license: Some("MIT/Apache-2.0".to_owned()),
        source: Some(CRATES_IO.to_owned()),
    };
    assert_eq!(policy.violations(&good, false), Vec::<String>::new());
    assert_eq!(policy.violations(&Package { source: None, license: None, ..good.clone() }, true), Vec::<String>::new());
    for (package, expected) in [
        (Package { license: Some("MIT AND GPL-3.0-only".to_owned()), ..good.clone() }, "is not allowed"),
        (Package { license: Some("LicenseRef-own".to_owned()), ..good.clone() }, "is not allowed"),
        (Package { license: Some("no licence at all".to_owned()), ..good.clone() }, "cannot be read"),
        (Package { license: None, ..good.clone() }, "has no licence"),
        (Package { source: Some("git+https://example.org/x".to_owned()), ..good.clone() }, "not crates.io"),
        (Package { source: None, ..good.clone() }, "not crates.io"),
        (Package { name: "openssl-sys".to_owned(), ..good.clone() }, "is banned"),
    ] {
        let violations = policy.violations(&package, false);
        assert!(matches!(&violations[..], [only] if only.contains(expected)), "{package:?}: {violations:?}");
    }
}
