//! Tests of the whole.

mod manifests;
