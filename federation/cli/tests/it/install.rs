//! What `hanse install`, `join` and `uninstall` refuse before they change anything. The tests of the README run them.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Output};

const DIGEST: &str = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

/// Runs the command with these programs only.
fn hanse(programs: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hanse"));
    command.env("PATH", programs).env("KUBECONFIG", programs.join("missing")).env_remove("HANSE_KUBECONFIG");
    command.args(arguments).output().expect("hanse runs")
}

fn messages(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn fake_helm(folder: &Path, version: &str) {
    let path = folder.join("helm");
    std::fs::write(&path, format!("#!/bin/sh\necho {version}\n")).expect("written");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("changed");
}

#[test]
fn malformed_options_are_errors_of_the_command_line() {
    let folder = tempfile::tempdir().expect("a folder");
    let install = ["install", "--registry=registry.example"];
    let join = ["join", "--cluster=east", "--registry=registry.example"];
    let (member, agent) = (format!("--member-digest={DIGEST}"), format!("--agent-digest={DIGEST}"));
    for (arguments, named) in [
        (vec!["install"], "--registry"),
        ([&install[..], &[]].concat(), "--hub-digest"),
        ([&install[..], &["--hub-digest=latest"]].concat(), "a tag is not a digest"),
        (vec!["install", "--registry=https://registry.example", "--hub-digest", DIGEST], "without a scheme"),
        (vec!["install", "--registry=Registry.example", "--hub-digest", DIGEST], "does not match pattern '^[a-z0-9]"),
        (vec!["uninstall", "--member-only", "--delete-clusterset"], "cannot be used with"),
        ([&join[..], &[&member]].concat(), "--agent-digest"),
        ([&join[..], &[&member, &agent, "--hub=hub.example:7443"]].concat(), "--join"),
        ([&join[..], &[&member, &agent, "--hub=hub.example", "--join=hub.example:7444"]].concat(), "--hub"),
        ([&join[..], &[&member, &agent, "--enforcement=observe"]].concat(), "Observe"),
        (vec!["uninstall", "--namespace=A"], "--namespace"),
    ] {
        let output = hanse(folder.path(), &arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {}", messages(&output));
        assert!(messages(&output).contains(named), "{arguments:?}: {}", messages(&output));
    }
}

#[test]
fn missing_or_old_helm_is_named() {
    let folder = tempfile::tempdir().expect("a folder");
    let digest = format!("--hub-digest={DIGEST}");
    let install = ["install", "--registry=registry.example", &digest];
    for arguments in [&install[..], &["uninstall"]] {
        let output = hanse(folder.path(), arguments);
        assert_eq!(output.status.code(), Some(1), "{}", messages(&output));
        assert!(messages(&output).contains("`helm` is not in PATH"), "{}", messages(&output));
    }
    fake_helm(folder.path(), "v3.13.9");
    let output = hanse(folder.path(), &install);
    assert_eq!(output.status.code(), Some(1));
    assert!(messages(&output).contains("Helm v3.13.9 is too old: 3.14"), "{}", messages(&output));
    // A missing kubeconfig is not an empty one.
    fake_helm(folder.path(), "v4.0.0");
    let output = hanse(folder.path(), &install);
    assert_eq!(output.status.code(), Some(1));
    assert!(messages(&output).contains("KUBECONFIG"), "{}", messages(&output));
    let output = hanse(folder.path(), &[&install[..], &["--kubeconfig=/missing/config"]].concat());
    assert!(messages(&output).contains("/missing/config"), "{}", messages(&output));
}
