//! Processes of the product, started in a namespace and watched.

use std::fs::File;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::Pid;

use crate::namespace::Namespace;
use crate::probe;

mod spawner;

/// A running program; dropped, it is killed. Both its outputs go to one log file.
#[derive(Debug)]
pub struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Appends to the log, so that a restart's lines follow those of the run before.
    pub fn start(namespace: &Namespace, mut command: Command, log: &Path) -> std::io::Result<Self> {
        let output = File::options().create(true).append(true).open(log)?;
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        let child = namespace.enter(|| {
            // A process inherits the signals that its parent's thread blocks; this one shall be stoppable.
            SigSet::empty().thread_set_mask()?;
            command.spawn()
        })?;
        Ok(Self { child, log: log.to_owned() })
    }

    /// As [`Self::start`], in the caller's network namespace, for programs that run outside the [`sandbox`](crate::sandbox) too:
    /// the kernel kills this one when the caller's process ends, however it ends.
    pub fn start_bound(command: Command, log: &Path) -> std::io::Result<Self> {
        let output = File::options().create(true).append(true).open(log)?;
        let child = spawner::spawn(&command, output)?;
        Ok(Self { child, log: log.to_owned() })
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Whether `text` appeared in the log in time, while the process ran.
    pub fn wait_for(&mut self, text: &str, deadline: Duration) -> bool {
        let mut ended = false;
        let found = probe::until(deadline, || {
            ended = self.has_ended();
            self.log().contains(text) || ended
        });
        found.is_some() && (!ended || self.log().contains(text))
    }

    pub fn has_ended(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(Some(_)))
    }

    /// Its exit code once it has ended; that of a shell where a signal ended it.
    pub fn exit_code(&mut self) -> Option<i32> {
        let status = self.child.try_wait().ok().flatten()?;
        Some(status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default()))
    }

    /// Requests the end, without waiting for it.
    pub fn terminate(&self) -> std::io::Result<()> {
        let id = i32::try_from(self.child.id()).map_err(std::io::Error::other)?;
        Ok(kill(Pid::from_raw(id), Signal::SIGTERM)?)
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// The memory that it uses now, in bytes: its resident set. Not in a [`sandbox`](crate::sandbox), where `/proc` has the numbers
    /// of processes outside.
    pub fn memory(&self) -> std::io::Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kilobytes = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
        kilobytes.map(|kilobytes| kilobytes * 1024).ok_or_else(|| std::io::ErrorKind::InvalidData.into())
    }

    /// `kill -9`: no goodbye, no flush.
    pub fn kill(mut self) -> std::io::Result<ExitStatus> {
        self.child.kill()?;
        self.child.wait()
    }

    /// Requests the end, and kills after `patience`.
    pub fn stop(mut self, patience: Duration) -> std::io::Result<ExitStatus> {
        self.terminate()?;
        if probe::until(patience, || self.has_ended()).is_none() {
            self.child.kill()?;
        }
        self.child.wait()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
