//! What every process shares: logs, metrics, health, retry, drain, and the printing of text that others wrote.
//!
//! It knows nothing of policy, of the contents of clusters, or of any one protocol.

// What others wrote is printed by `text`, which escapes it.
#![warn(clippy::print_stdout, clippy::print_stderr)]

pub mod files;
pub mod health;
pub mod logging;
pub mod metrics;
pub mod moment;
pub mod monitor;
pub mod places;
pub mod rate_limit;
pub mod retry;
pub mod settings;
pub mod shutdown;
pub mod supervisor;
pub mod text;
