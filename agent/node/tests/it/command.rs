//! The program, where it needs no kernel.

use std::process::Command;

#[test]
fn what_failed_is_said_in_one_line() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut command = Command::new(env!("CARGO_BIN_EXE_hanse-agent"));
    command.args(["status", "--data"]).arg(folder.path()).env("RUST_BACKTRACE", "1");
    let output = command.output().expect("it starts");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!((output.status.code(), said.lines().count()), (Some(1), 1), "{said}");
    assert!(said.starts_with("hanse-agent: read ") && said.contains("status.json"), "{said}");
}
