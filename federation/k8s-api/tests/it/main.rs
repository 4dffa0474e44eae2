//! Manifests as people write them, through the whole reader.

mod network_policy;
mod reading;
