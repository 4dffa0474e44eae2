//! What every process shares: logs, metrics, health, TLS identity, retry, drain.
//!
//! It promises that a caller's identity comes from its certificate and nothing else, that a connection never
//! outlives the certificates it was opened with, and that no secret is ever formatted into a log line.
//! It knows nothing of policy, of clusters' contents, or of any one protocol.

// What others wrote is printed by `text`, which escapes it.
#![warn(clippy::print_stdout, clippy::print_stderr)]

pub mod agent_wire;
pub mod ca;
pub mod files;
pub mod health;
pub mod identity;
pub mod instances;
pub mod keys;
pub mod logging;
pub mod metrics;
pub mod moment;
pub mod monitor;
pub mod retry;
pub mod shutdown;
pub mod supervisor;
pub mod text;
pub mod tls;
pub mod token;

pub use identity::{Identity, TrustDomain};
