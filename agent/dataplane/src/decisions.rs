//! What a dataplane decides of connections, as it reports it.

use std::io;
use std::net::IpAddr;
use std::time::{Duration, SystemTime};

/// The decisions of a dataplane, read by a thread of its own: enforcing never waits for it.
pub trait Decisions: Send {
    /// Listens anew, after an error.
    ///
    /// # Errors
    /// `ResourceBusy` or `PermissionDenied` while another process may be listening.
    fn reopen(&mut self) -> io::Result<()>;

    /// Waits at most `limit` for decisions, and passes each to `receive`. Returns how many are known to be dropped.
    ///
    /// # Errors
    /// When nothing can be received any more, until [`Self::reopen`] succeeds.
    fn wait(&mut self, limit: Duration, receive: &mut dyn FnMut(Decided)) -> io::Result<u64>;

    /// How many decisions the dataplane did not report since the last call, because of its rate limits.
    ///
    /// # Errors
    /// When this cannot be read.
    fn suppressed(&mut self) -> io::Result<u64>;
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Decision {
    /// The connection was opened.
    Allowed,
    /// The connection was not opened.
    Denied,
    /// The connection was open and is forbidden now.
    Cut,
    /// The connection is forbidden, and passed: the node only observes.
    Observed,
}

/// The decision of one connection; of one packet where it was denied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decided {
    pub decision: Decision,
    /// The client, before address translation.
    pub source: IpAddr,
    /// The server, after address translation.
    pub destination: IpAddr,
    /// IP protocol number.
    pub protocol: u8,
    /// Both ports are 0 where the protocol has none.
    pub port: u16,
    pub source_port: u16,
    /// Type and code of the message that opened it.
    pub icmp: Option<(u8, u8)>,
    pub at: SystemTime,
}
