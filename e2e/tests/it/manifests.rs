//! The invariants of the layout, checked over the manifests (see ARCHITECTURE.md).

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Crates without I/O.
const PURE: &[&str] = &["hanse-policy", "hanse-compiler", "hanse-exchange", "hanse-ruleset"];
/// What would make a crate impure.
const IMPURE: &[&str] =
    &["tokio", "tonic", "kube", "netlink", "aya", "nix", "libc", "socket2", "hyper", "rand", "time"];
/// The crates of the agent that the federation may use.
const SHARED: &[&str] = &["hanse-ruleset", "hanse-protocol", "hanse-identity", "hanse-runtime"];

struct Crate {
    directory: PathBuf,
    /// Of `[dependencies]`; those of tests and builds are not part of the product.
    dependencies: BTreeSet<String>,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace's root")
}

/// Every crate below the two roofs, by name.
fn crates() -> BTreeMap<String, Crate> {
    let mut found = BTreeMap::new();
    for roof in ["federation", "agent"] {
        for entry in root().join(roof).read_dir().expect("the roof").flatten() {
            let manifest = entry.path().join("Cargo.toml");
            let Ok(text) = std::fs::read_to_string(&manifest) else { continue };
            let (mut section, mut name, mut dependencies) = ("", String::new(), BTreeSet::new());
            for line in text.lines().map(str::trim) {
                if line.starts_with('[') {
                    section = line;
                } else if let Some((key, value)) = line.split_once('=') {
                    let key = key.trim().split('.').next().unwrap_or_default();
                    match section {
                        "[package]" if key == "name" => name = value.trim().trim_matches('"').to_owned(),
                        "[dependencies]" => drop(dependencies.insert(key.to_owned())),
                        _ => {}
                    }
                }
            }
            let directory = entry.path().strip_prefix(root()).expect("below the root").to_owned();
            found.insert(name, Crate { directory, dependencies });
        }
    }
    found
}

#[test]
fn pure_crates_name_nothing_impure() {
    let crates = crates();
    for name in PURE {
        let pure = crates.get(*name).unwrap_or_else(|| panic!("{name} is a crate"));
        for dependency in &pure.dependencies {
            let impure = IMPURE.iter().any(|word| dependency == word || dependency.starts_with(&format!("{word}-")));
            assert!(!impure, "{name} is pure and names {dependency}");
            let ours = dependency.starts_with("hanse-");
            assert!(
                !ours
                    || PURE.contains(&dependency.as_str())
                    || (*name == "hanse-exchange" && dependency == "hanse-proto"),
                "{name} is pure and names {dependency}, which is not"
            );
        }
    }
}

#[test]
fn the_agent_does_not_depend_on_the_federation() {
    let crates = crates();
    let under = |name: &str, roof: &str| crates.get(name).is_some_and(|it| it.directory.starts_with(roof));
    for (name, it) in &crates {
        for dependency in &it.dependencies {
            if it.directory.starts_with("agent") {
                assert!(!under(dependency, "federation"), "{name} is of the agent and names {dependency}");
            } else if under(dependency, "agent") {
                assert!(SHARED.contains(&dependency.as_str()), "{name} is of the federation and names {dependency}");
            }
        }
    }
}

/// What may name the wire crate below the two roofs: the exchange's codec, and the gRPC services, clients and conversions at the
/// rim of each process. A directory means all files in it.
const WIRE_RIMS: &[&str] = &[
    "federation/exchange/src/codec",
    "federation/hub/src/administration",
    "federation/hub/src/exchange/progress",
    "federation/hub/src/exchange/report",
    "federation/hub/src/exchange/service",
    "federation/hub/src/questions",
    "federation/hub/src/registration",
    "federation/hub/src/server",
    "federation/member/src/exchange/client",
    "federation/member/src/fanout",
    "federation/member/src/flows",
    "federation/member/src/questions",
    "federation/member/src/registration",
    "federation/member/src/report",
    "federation/cli/src/completion",
    "federation/cli/src/online",
    "federation/cli/src/policy",
    "agent/node/src",
    "agent/protocol/src",
];

/// The Rust sources below a directory, relative to the root.
fn sources(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in directory.read_dir().into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|it| it == "rs") {
            found.push(path.strip_prefix(root()).expect("below the root").to_owned());
        }
    }
}

/// The backend is chosen in one file of the agent; everything else uses the trait.
#[test]
fn only_one_agent_file_names_the_backend() {
    fn sources(directory: &Path, found: &mut Vec<PathBuf>) {
        for entry in directory.read_dir().expect("a directory of sources").flatten() {
            match entry.path() {
                path if path.is_dir() => sources(&path, found),
                path => found.push(path),
            }
        }
    }
    let mut found = Vec::new();
    sources(&root().join("agent/node/src"), &mut found);
    let names_it = |path: &PathBuf| {
        let text = std::fs::read_to_string(path).expect("UTF-8").to_lowercase();
        text.contains("nftables") || text.contains("netlink")
    };
    let naming: Vec<_> = found.iter().filter(|path| names_it(path)).map(|path| path.file_name()).collect();
    assert_eq!(naming, [Some("backend.rs".as_ref())], "of {} files", found.len());
}

fn may_name_the_wire(file: &Path) -> bool {
    let is_test = file.file_name().is_some_and(|name| name == "tests.rs");
    is_test || WIRE_RIMS.iter().any(|rim| file.starts_with(rim) || file == Path::new(&format!("{rim}.rs")))
}

/// Whether a file that may not name the wire crate does.
fn names_the_wire(file: &Path, text: &str) -> bool {
    !may_name_the_wire(file) && text.replace("hanse_protocol", "").contains("hanse_proto")
}

/// A file that does not name the wire crate cannot have one of its types but through a rim, which gives out none.
#[test]
fn generated_types_stop_at_the_codec_and_the_rims() {
    let mut files = Vec::new();
    for it in crates().values() {
        sources(&root().join(&it.directory).join("src"), &mut files);
    }
    let read = |file: &PathBuf| std::fs::read_to_string(root().join(file)).expect("a source");
    let domain: Vec<&PathBuf> = files.iter().filter(|file| names_the_wire(file, &read(file))).collect();
    assert!(domain.is_empty(), "files of the domain name the wire crate: {domain:?}");
    // The check finds what is planted, and the sources contain the files that it is about.
    for (file, may) in [
        ("federation/exchange/src/codec/object.rs", true),
        ("federation/exchange/src/codec.rs", true),
        ("federation/exchange/src/hub/origin.rs", false),
        ("federation/exchange/src/member/receiver.rs", false),
        ("federation/member/src/world.rs", false),
    ] {
        let file = Path::new(file);
        assert!(files.iter().any(|it| it == file), "{} is missing", file.display());
        let planted = format!("use hanse_proto::federation::v1 as pb;\n{}", read(&file.to_owned()));
        assert_ne!(names_the_wire(file, &planted), may, "{}", file.display());
    }
}
