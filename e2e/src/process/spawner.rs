//! Starts programs that end with this process.
//!
//! The kernel sends the signal of a parent's death (`PR_SET_PDEATHSIG`) when the *thread* that started the program ends. A test's
//! thread ends long before its process; so one thread, which never ends, starts all of them.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Sender, sync_channel};
use std::sync::{LazyLock, Mutex, PoisonError};

use nix::sched::{CloneFlags, setns};
use nix::sys::signal::SigSet;

struct Request {
    command: Command,
    /// The caller's network namespace.
    network: File,
    reply: mpsc::SyncSender<io::Result<Child>>,
}

/// The network namespace of the thread that opens it.
const NETWORK: &str = "/proc/thread-self/ns/net";

/// Both outputs of the program go to `output`.
pub fn spawn(command: &Command, output: File) -> io::Result<Child> {
    static SPAWNER: LazyLock<Mutex<Sender<Request>>> = LazyLock::new(|| {
        let (sender, receiver) = mpsc::channel::<Request>();
        std::thread::spawn(move || {
            for mut request in receiver {
                let started = enter(&request.network)
                    // A process inherits the signals that its parent's thread blocks; this one must be stoppable.
                    .and_then(|()| Ok(SigSet::empty().thread_set_mask()?))
                    .and_then(|()| request.command.spawn());
                // A caller that panicked needs no answer; the child would then run until the end.
                if let Err(mpsc::SendError(Ok(mut unwanted))) = request.reply.send(started) {
                    drop(unwanted.kill());
                }
            }
        });
        Mutex::new(sender)
    });
    let mut bound = Command::new("setpriv");
    bound.args(["--pdeathsig", "KILL"]).arg(command.get_program()).args(command.get_args());
    bound.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
    if let Some(directory) = command.get_current_dir() {
        bound.current_dir(directory);
    }
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => bound.env(name, value),
            None => bound.env_remove(name),
        };
    }
    let network = File::open(NETWORK)?;
    let (reply, result) = sync_channel(1);
    let sender = SPAWNER.lock().unwrap_or_else(PoisonError::into_inner).clone();
    sender.send(Request { command: bound, network, reply }).map_err(io::Error::other)?;
    result.recv().map_err(io::Error::other)?
}

fn enter(network: &File) -> io::Result<()> {
    // Without privileges, even the own namespace cannot be entered.
    if network.metadata()?.ino() == std::fs::metadata(NETWORK)?.ino() {
        return Ok(());
    }
    Ok(setns(network, CloneFlags::CLONE_NEWNET)?)
}
