//! Namespaces of our own for mounts, network and processes, so that nothing is left behind.
//!
//! A program enters by starting itself again below `unshare`: as root directly, else inside a user namespace. Process 1
//! of the new process namespace is the program itself; when it ends, the kernel ends every process below it and with
//! them goes every network.

use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;

use crate::namespace;

/// Set inside; its value says how we came in.
const MARK: &str = "HANSE_SANDBOX";

/// Where programs keep files in memory.
const MEMORY: &str = "/dev/shm";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Privilege {
    /// The machine's root.
    Root,
    /// Root of a user namespace only.
    UserNamespace,
}

#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    #[error("start unshare (of util-linux): {0}")]
    Start(#[source] std::io::Error),
    /// What `unshare` said, and what helps.
    #[error("no namespaces can be made here: {0}; {1}")]
    Refused(String, &'static str),
    #[error("prepare the sandbox: {0}")]
    Prepare(#[from] namespace::NetworkError),
}

fn unshare() -> (Command, Privilege) {
    let root = nix::unistd::geteuid().is_root();
    let mut command = Command::new("unshare");
    if !root {
        command.args(["--user", "--map-root-user"]);
    }
    command.args(["--net", "--mount", "--pid", "--fork", "--kill-child"]);
    let privilege = if root { Privilege::Root } else { Privilege::UserNamespace };
    command.env(MARK, if root { "root" } else { "user" });
    (command, privilege)
}

fn remedy(privilege: Privilege) -> &'static str {
    match privilege {
        Privilege::Root => {
            "root needs CAP_SYS_ADMIN for it, and in a chroot the new root must be a mount point (mount --bind DIR DIR)"
        }
        Privilege::UserNamespace => {
            "run as root, or allow user namespaces (sysctl kernel.unprivileged_userns_clone=1, and on Ubuntu \
             kernel.apparmor_restrict_unprivileged_userns=0)"
        }
    }
}

/// Whether this process is inside already, and how it came in.
pub fn privilege() -> Option<Privilege> {
    match std::env::var(MARK).ok()?.as_str() {
        "root" => Some(Privilege::Root),
        _ => Some(Privilege::UserNamespace),
    }
}

/// A shell command that runs another one inside this sandbox, which it is in; for a user in another terminal.
///
/// # Errors
/// When `/proc` cannot be read.
pub fn command() -> std::io::Result<String> {
    // /proc belongs to the machine, so this is the process number as seen from outside.
    let process = std::fs::read_link("/proc/self")?;
    let user = match privilege() {
        Some(Privilege::UserNamespace) => "--user --preserve-credentials ",
        _ => "",
    };
    Ok(format!("nsenter --target {} {user}--net --mount", process.display()))
}

/// Inside, prepares the sandbox and returns how we came in; outside, replaces this process by itself inside.
pub fn enter() -> Result<Privilege, SandboxError> {
    if let Some(privilege) = privilege() {
        prepare()?;
        return Ok(privilege);
    }
    let (mut probe, privilege) = unshare();
    let output = probe.arg("true").output().map_err(SandboxError::Start)?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(SandboxError::Refused(said, remedy(privilege)));
    }
    let program = std::env::current_exe().map_err(SandboxError::Start)?;
    let (mut command, _) = unshare();
    Err(SandboxError::Start(command.arg(program).args(std::env::args_os().skip(1)).exec()))
}

/// Runs one test of a test binary inside: outside, starts the binary again for that test alone and panics when it
/// fails; inside, runs `body`. `name` is the test's full name. A machine that allows no namespaces fails the test.
pub fn test(name: &str, body: impl FnOnce()) {
    if privilege().is_some() {
        prepare().expect("the sandbox can be prepared");
        body();
        return;
    }
    let program = std::env::current_exe().expect("the test binary has a path");
    let (mut command, _) = unshare();
    let output = command.arg(program).args(["--exact", name, "--nocapture", "--test-threads=1"]).output();
    let output = output.expect("unshare starts");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{name} failed inside ({}):\n{text}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    // The counts of the test.
    print!("{text}");
}

fn prepare() -> Result<(), namespace::NetworkError> {
    // Names of network namespaces are files below /run/netns: ours, in our own mount namespace.
    if !Path::new("/run/netns").join(namespace::MARKER).exists() {
        namespace::run(Command::new("mount").args(["-t", "tmpfs", "hanse", "/run"]))?;
        // Files in memory, such as those of test clusters, are gone with the sandbox, however it ends.
        if Path::new(MEMORY).is_dir() {
            namespace::run(Command::new("mount").args(["-t", "tmpfs", "-o", "mode=1777", "hanse", MEMORY]))?;
        }
        std::fs::create_dir("/run/netns").map_err(namespace::NetworkError::Io)?;
        std::fs::write(Path::new("/run/netns").join(namespace::MARKER), b"").map_err(namespace::NetworkError::Io)?;
    }
    namespace::run(Command::new("ip").args(["link", "set", "lo", "up"]))
}
