//! The Dockerfiles, as far as they can be checked without a container engine.

use std::collections::BTreeSet;
use std::process::Command;

use serde_json::Value;

use super::{complete, list, pods, rendered, root, success};

/// What the runtime image has: the C library and the compiler's runtime.
const LIBRARIES: [&str; 8] = [
    "linux-vdso.so.1",
    "libc.so.6",
    "libm.so.6",
    "libgcc_s.so.1",
    "libpthread.so.0",
    "libdl.so.2",
    "librt.so.1",
    "/lib64/ld-linux-x86-64.so.2",
];

/// The instructions of a Dockerfile with this name.
fn instructions(dockerfile: &str, name: &str) -> Vec<String> {
    let lines = dockerfile.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    lines.map(str::to_owned).collect()
}

/// The packages of the workspace, and their binaries.
fn binaries() -> BTreeSet<(String, String)> {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["metadata", "--no-deps", "--offline", "--format-version=1"]).current_dir(root());
    let metadata: Value = serde_json::from_str(&success(&mut cargo, "")).expect("JSON");
    let name = |value: &Value| value["name"].as_str().expect("a name").to_owned();
    let of = |package: &Value| -> Vec<_> {
        let is_binary = |target: &&Value| list(target, "kind").any(|kind| kind == "bin");
        list(package, "targets").filter(is_binary).map(|target| (name(package), name(target))).collect()
    };
    list(&metadata, "packages").flat_map(of).collect()
}

#[test]
fn images_match_the_chart_and_the_workspace() {
    let (binaries, objects) = (binaries(), rendered(&complete()));
    let pods = pods(&objects);
    assert_eq!(pods.len(), 3);
    for (component, pod) in pods {
        let path = root().join(format!("deploy/images/{component}.Dockerfile"));
        let dockerfile = std::fs::read_to_string(&path).expect("it is read");
        let program = format!("hanse-{component}");
        let installed = format!("/usr/local/bin/{program}");

        // The chart gives arguments only: the image has the program as its entry point.
        assert_eq!(instructions(&dockerfile, "ENTRYPOINT"), [format!("[\"{installed}\"]")], "{component}");
        assert!(instructions(&dockerfile, "CMD").is_empty(), "{component}");
        for container in list(pod, "containers").chain(list(pod, "initContainers")) {
            assert!(container["command"].is_null(), "{component}");
            let image = container["image"].as_str().expect("an image");
            assert_eq!(image.rsplit('/').next().and_then(|it| it.split('@').next()), Some(program.as_str()));
        }
        let security = &pod["securityContext"];
        let user = format!("{}:{}", security["runAsUser"], security["runAsGroup"]);
        assert_eq!(instructions(&dockerfile, "USER"), [user], "{component}");

        // What is copied is built, by packages that exist.
        let build = instructions(&dockerfile, "RUN").join(" ");
        let packages: Vec<&str> = build.split(" -p ").skip(1).map(str::trim).collect();
        let copies = instructions(&dockerfile, "COPY");
        let copied: Vec<&str> = copies.iter().filter_map(|it| it.strip_prefix("--from=build ")).collect();
        assert_eq!(copied.len(), packages.len(), "{component}: {build}");
        for (copy, package) in copied.iter().zip(packages) {
            let (from, to) = copy.split_once(' ').expect("a source and a target");
            let binary = from.strip_prefix("/src/target/release/").expect("a program of the build");
            assert_eq!(to, format!("/usr/local/bin/{binary}"), "{component}");
            assert!(binaries.contains(&(package.to_owned(), binary.to_owned())), "{component}: {package} {binary}");
            let mut ldd = Command::new("ldd");
            let needed = success(ldd.arg(crate::system::programs().join(binary)), "");
            for library in needed.lines().filter_map(|line| line.split_whitespace().next()) {
                assert!(
                    LIBRARIES.contains(&library),
                    "{binary} needs {library}, which the runtime image does not have"
                );
            }
        }
        // The folders that the chart mounts are not part of the image.
        let root_of = |path: &str| path.split('/').nth(1).map(str::to_owned);
        for mount in list(pod, "containers").flat_map(|it| list(it, "volumeMounts")) {
            let path = mount["mountPath"].as_str().expect("a path");
            assert!(!installed.starts_with(path) && root_of(path).as_deref() != Some("usr"), "{component}: {path}");
        }
    }
    let toolchain = std::fs::read_to_string(root().join("Cargo.toml")).expect("it is read");
    let toolchain: toml::Table = toolchain.parse().expect("TOML");
    let version = toolchain["workspace"]["package"]["rust-version"].as_str().expect("a version");
    for component in ["hub", "member", "agent"] {
        let path = root().join(format!("deploy/images/{component}.Dockerfile"));
        let dockerfile = std::fs::read_to_string(path).expect("it is read");
        let build = instructions(&dockerfile, "ARG").into_iter().find(|it| it.starts_with("BUILD="));
        assert!(build.is_some_and(|it| it.contains(&format!("rust:{version}-"))), "{component} builds with {version}");
    }
}
