//! Tests of the whole.

mod manifests;
mod network;
