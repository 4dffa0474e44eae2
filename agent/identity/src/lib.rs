//! Who a process is: keys, certificates, SPIFFE IDs, tokens, and mutual TLS with all of them.
//!
//! The identity of a caller comes from its certificate and from nothing else, and a connection never outlives the
//! certificates that it was opened with. No secret is formatted into a log line.

pub mod ca;
pub mod context;
pub mod instances;
pub mod keys;
pub mod spiffe;
pub mod tls;
pub mod token;

pub use spiffe::{Identity, TrustDomain};
