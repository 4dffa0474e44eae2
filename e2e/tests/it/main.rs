//! Tests of the whole.

mod guards;
mod manifests;
mod network;
mod simulation;
mod system;
