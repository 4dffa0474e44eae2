//! The program, without a kernel.

use std::process::Command;

#[test]
fn prints_an_error_in_one_line() {
    let directory = tempfile::tempdir().expect("a directory");
    let mut command = Command::new(env!("CARGO_BIN_EXE_hanse-agent"));
    command.args(["status", "--data"]).arg(directory.path()).env("RUST_BACKTRACE", "1");
    let output = command.output().expect("it starts");
    let printed = String::from_utf8_lossy(&output.stderr);
    assert_eq!((output.status.code(), printed.lines().count()), (Some(1), 1), "{printed}");
    assert!(printed.starts_with("hanse-agent: read ") && printed.contains("status.json"), "{printed}");
}
