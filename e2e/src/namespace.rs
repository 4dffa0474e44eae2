//! One network namespace: made, entered, removed.

use std::fs::File;
use std::io::{self, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};

use nix::sched::{CloneFlags, setns};

/// A file beside the names that says: these are ours.
pub(crate) const MARKER: &str = ".hanse";

#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("{command}: {message}")]
    Command { command: String, message: String },
}

/// A network namespace; dropped, it is removed with every interface in it.
#[derive(Debug)]
pub struct Namespace {
    name: String,
    file: File,
}

impl Namespace {
    /// Loopback is up, packets are forwarded, and the kernel's own source check is off: what drops a forged source must
    /// be what is under test.
    pub fn create(name: &str) -> Result<Self, NetworkError> {
        run(Command::new("ip").args(["netns", "add", name]))?;
        let file = File::open(Path::new("/run/netns").join(name))?;
        let namespace = Self { name: name.to_owned(), file };
        namespace.batch("link set lo up\n")?;
        namespace.enter(|| -> io::Result<()> {
            for (key, value) in [
                ("ipv4/ip_forward", "1"),
                ("ipv4/conf/all/rp_filter", "0"),
                ("ipv4/conf/default/rp_filter", "0"),
                ("ipv4/icmp_ratelimit", "0"),
                ("ipv6/conf/all/forwarding", "1"),
                ("ipv6/conf/default/forwarding", "1"),
                ("ipv6/conf/default/accept_dad", "0"),
            ] {
                std::fs::write(Path::new("/proc/sys/net").join(key), value)?;
            }
            Ok(())
        })?;
        Ok(namespace)
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs lines of `ip` in the namespace, as one batch.
    pub fn batch(&self, lines: &str) -> Result<(), NetworkError> {
        let mut command = Command::new("ip");
        command.args(["-n", &self.name, "-batch", "-"]).stdin(Stdio::piped()).stdout(Stdio::null());
        let mut child = command.stderr(Stdio::piped()).spawn()?;
        child.stdin.take().expect("piped").write_all(lines.as_bytes())?;
        let output = child.wait_with_output()?;
        if output.status.success() {
            return Ok(());
        }
        let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Err(NetworkError::Command { command: format!("ip -n {} of {lines:?}", self.name), message })
    }

    /// Runs `work` on a thread of its own inside the namespace. Sockets opened and processes started there stay there.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let inside = scope.spawn(|| {
                setns(&self.file, CloneFlags::CLONE_NEWNET).expect("our own namespace can be entered");
                work()
            });
            inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // A name that is gone already needs no removal.
        drop(run(Command::new("ip").args(["netns", "del", &self.name])));
    }
}

/// The namespaces that exist, by name.
pub fn list() -> Result<Vec<String>, NetworkError> {
    let mut names: Vec<String> = std::fs::read_dir("/run/netns")?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name != MARKER)
        .collect();
    names.sort();
    Ok(names)
}

pub(crate) fn run(command: &mut Command) -> Result<(), NetworkError> {
    let output = command.stdin(Stdio::null()).output()?;
    if output.status.success() {
        return Ok(());
    }
    let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(NetworkError::Command { command: format!("{command:?}").replace('"', ""), message })
}
