//! The README's commands, read from the README and run word for word, as if they were pasted one by one.
//!
//! One thing differs: the programs are built already, so of a command that begins with `cargo build … &&` only what follows
//! is run, in a directory whose `target/debug` contains them. A section's commands run in one shell, in a sandbox, and each must
//! end with exit code 0 before the next begins.

use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Stdio};

use hanse_e2e::sandbox;

use crate::system::programs;

/// Commands that take longer than this hang.
const PATIENCE_SECONDS: u32 = 180;

/// The code of a section of the README: its indented lines.
fn section(title: &str) -> Vec<String> {
    let readme = Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md");
    let text = std::fs::read_to_string(&readme).expect("the README");
    let mut lines = text.lines().skip_while(|line| *line != format!("## {title}"));
    assert!(lines.next().is_some(), "the README has no section {title:?}");
    let lines = lines.take_while(|line| !line.starts_with("## "));
    lines.filter_map(|line| line.strip_prefix("    ")).map(str::to_owned).collect()
}

/// Whether the shell would wait for more: it knows the ends of its own commands best.
fn is_whole(command: &str) -> bool {
    let unfinished = command.ends_with('\\') || command.ends_with('|') || command.ends_with("&&");
    let checked = Command::new("bash").args(["-n", "-c", command]).stderr(Stdio::null()).status().expect("bash");
    !unfinished && checked.success()
}

fn commands(title: &str) -> Vec<String> {
    let (mut commands, mut open) = (Vec::new(), String::new());
    for line in section(title) {
        open.push_str(&line);
        if is_whole(&open) {
            commands.push(std::mem::take(&mut open));
        } else {
            open.push('\n');
        }
    }
    assert!(open.is_empty(), "{title}: this command has no end: {open}");
    assert!(!commands.is_empty(), "{title} has no commands");
    commands
}

/// What is run in a clone whose programs are built.
fn built(command: &str) -> &str {
    if !command.starts_with("cargo build ") {
        return command;
    }
    command.split_once("&& ").map_or("true", |(_, rest)| rest)
}

/// A folder like a clone in which the programs are built.
fn clone() -> tempfile::TempDir {
    let clone = tempfile::tempdir_in("/run").expect("a folder");
    let repository = Path::new(env!("CARGO_MANIFEST_DIR"));
    std::fs::create_dir_all(clone.path().join("target")).expect("a folder");
    symlink(programs(), clone.path().join("target/debug")).expect("a link");
    std::fs::create_dir_all(clone.path().join("e2e")).expect("a folder");
    let copied = Command::new("cp").arg("-r").arg(repository.join("demo")).arg(clone.path().join("e2e")).status();
    assert!(copied.expect("cp").success());
    clone
}

/// One command's exit code and what it printed.
struct Ran {
    command: String,
    code: String,
    output: String,
}

/// Runs a section's commands in one shell. Files of the test are in a folder of their own.
fn run(clone: &Path, title: &str) -> Vec<Ran> {
    let commands = commands(title);
    let files = tempfile::tempdir_in("/run").expect("a folder");
    let file = |at: usize, what: &str| files.path().join(format!("{at}.{what}"));
    // Each command prints into a file of its own, and leaves its exit code in another.
    let mut script = String::new();
    for (at, command) in commands.iter().enumerate() {
        let (out, code, command) = (file(at, "out"), file(at, "code"), built(command));
        script.push_str(&format!("exec >{} 2>&1\n{command}\necho $? >{}\n", out.display(), code.display()));
    }
    let path = files.path().join("script");
    std::fs::write(&path, script).expect("room");
    let mut shell = Command::new("timeout");
    shell.arg(PATIENCE_SECONDS.to_string()).arg("bash").arg(&path).current_dir(clone);
    shell.env_remove("HANSE_CONTEXT").stdin(Stdio::null()).status().expect("bash");
    let read = |at: usize, what: &str| std::fs::read_to_string(file(at, what)).unwrap_or_default();
    let ran = commands.into_iter().enumerate().map(|(at, command)| {
        let code = read(at, "code").trim().to_owned();
        Ran { command, code, output: read(at, "out") }
    });
    let ran: Vec<Ran> = ran.collect();
    for it in &ran {
        let logs = || {
            let logs = ["hub.log", "member.log", "node-1.log", "node-2.log"];
            let read = |name: &&str| std::fs::read_to_string(clone.join(name)).unwrap_or_default();
            logs.iter().map(read).collect::<Vec<_>>().join("\n--\n")
        };
        let code = if it.code.is_empty() { "it did not end in time, or the shell ended" } else { &it.code };
        assert_eq!(it.code, "0", "{title}: {}\n{code}: {}\n{}", it.command, it.output, logs());
    }
    ran
}

fn output<'a>(ran: &'a [Ran], command: &str) -> &'a str {
    let found = ran.iter().find(|it| it.command.starts_with(command));
    &found.unwrap_or_else(|| panic!("the README has no command {command:?}")).output
}

#[test]
fn readme_walk_through_ends_in_enforced() {
    sandbox::test("readme::readme_walk_through_ends_in_enforced", || {
        let clone = clone();
        let title = "Run a hub, a cluster and its nodes";
        let before = std::fs::read_dir(clone.path()).expect("the clone").count();
        let ran = run(clone.path(), title);
        let enforced = output(&ran, "hanse wait --for=enforced");
        assert!(enforced.contains("default-deny is enforced"), "{enforced}");
        let status = output(&ran, "hanse status");
        assert!(status.contains("2 of 2"), "both nodes enforce: {status}");
        let after = std::fs::read_dir(clone.path()).expect("the clone").count();
        assert_eq!(after, before, "its last commands remove what the others made");
        assert_eq!(hanse_e2e::namespace::list().expect("listed"), Vec::<String>::new());
    });
}

#[test]
fn readme_questions_are_answered() {
    sandbox::test("readme::readme_questions_are_answered", || {
        let clone = clone();
        let ran = run(clone.path(), "Evaluate policy");
        assert!(output(&ran, "echo ").contains("deny: end of tier platform"), "{}", output(&ran, "echo "));
        assert!(output(&ran, "hanse policy diff").contains("TCP 9443"), "{}", output(&ran, "hanse policy diff"));
    });
}
